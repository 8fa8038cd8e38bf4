from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from curation.training.diffusion import Diffusion, DiffusionSpec, decay_at, linear_betas, sigmoid_betas

SPEC = DiffusionSpec(
    image_size=8,
    channels=(8,),
    layers_per_level=1,
    attention=False,
    prediction="v_prediction",
    schedule="sigmoid",
    noise_steps=50,
    batch_size=8,
    learning_rate=1e-2,
    ema_decay=0.9,
    ema_every=2,
    clip=1.0,
    flip=True,
    sampling_steps=5,
)
IMAGES = torch.randint(0, 256, (12, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def trained(spec: DiffusionSpec, images: torch.Tensor, *, steps: int, seed: int = 0) -> Diffusion:
    model = Diffusion(spec, seed=seed)
    for _ in range(steps):
        model.train_step(images)
    return model


@pytest.mark.parametrize(("betas", "first"), [(sigmoid_betas, 3.0e-4), (linear_betas, 1e-4)])
def test_noise_grows_until_nearly_nothing_of_the_image_is_left(betas, first: float) -> None:
    beta = betas(1000)
    signal = (1 - beta).cumprod(dim=0)
    assert beta.min() > 0 and beta.max() <= 0.999 and (signal.diff() < 0).all()
    assert beta[0] == pytest.approx(first, rel=0.01) and signal[-1] < 1e-3


def test_the_signal_of_the_sigmoid_schedule_is_half_in_the_middle() -> None:
    signal = (1 - sigmoid_betas(1000)).cumprod(dim=0)
    assert signal[499].item() == pytest.approx(0.5, abs=1e-6)


def test_training_that_was_interrupted_goes_on_as_if_it_had_not_been() -> None:
    whole, first = trained(SPEC, IMAGES, steps=5), trained(SPEC, IMAGES, steps=3)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = Diffusion(SPEC, seed=99)
    second.load_state_dict(torch.load(saved, weights_only=True))
    losses = [second.train_step(IMAGES) for _ in range(2)]
    assert second.step == 5 and all(loss > 0 for loss in losses)
    assert torch.equal(second.sample(3, seed=1), whole.sample(3, seed=1))


def test_equal_seeds_give_equal_samples_in_batches_of_any_size_and_other_seeds_others() -> None:
    model = trained(SPEC, IMAGES, steps=2)
    samples = model.sample(5, seed=1)
    assert samples.shape == (5, 8, 8, 3) and samples.dtype == torch.uint8
    assert (samples.int() - model.sample(5, seed=1, batch_size=2).int()).abs().max() <= 1
    assert not torch.equal(samples, model.sample(5, seed=2))


def test_a_model_that_predicts_noise_learns_to_tell_it_from_one_colour() -> None:
    model = Diffusion(dataclasses.replace(SPEC, prediction="epsilon", schedule="linear"), seed=0)
    losses = [model.train_step(torch.full((4, 8, 8, 3), 90, dtype=torch.uint8)) for _ in range(60)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_the_error_of_a_predicted_velocity_counts_as_much_as_there_is_signal() -> None:
    """Of images without contrast the velocity is sqrt(signal) * noise, so nothing told costs signal, and signal^2."""

    class Silent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(()))

        def forward(self, noisy: torch.Tensor, time: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=self.nothing * noisy)

    spec = dataclasses.replace(SPEC, batch_size=2048)
    model = Diffusion(spec, seed=0)
    cast(Any, model)._network = Silent()
    signal = (1 - sigmoid_betas(spec.noise_steps)).cumprod(dim=0)
    assert signal.mean() > signal.square().mean() + 0.1
    grey = torch.full((4, 8, 8, 3), 128, dtype=torch.uint8)
    assert model.train_step(grey) == pytest.approx(signal.square().mean().item(), abs=0.04)


def test_a_model_of_one_colour_paints_in_that_colour() -> None:
    colour = torch.tensor([220, 30, 120], dtype=torch.uint8)
    spec = dataclasses.replace(SPEC, sampling_steps=20)
    images = colour.expand(4, 8, 8, 3)
    apart = [
        (model.sample(4, seed=0).float() - colour.float()).abs().mean().item()
        for model in (trained(spec, images, steps=0), trained(spec, images, steps=150))
    ]
    assert apart[1] < 40 < apart[0]


def test_the_average_is_the_weights_themselves_at_first_and_remembers_ever_longer() -> None:
    assert [decay_at(step, most=0.995) for step in (1, 10, 100)] == [0, 0, 0]
    assert decay_at(107, most=0.995) == pytest.approx(0.75) and decay_at(163, most=0.995) == pytest.approx(15 / 16)
    assert decay_at(10_000, most=0.995) == 0.995 and decay_at(163, most=0.5) == 0.5
    state = trained(SPEC, IMAGES, steps=2).state_dict()
    assert all(torch.equal(state["averaged"][name], weight) for name, weight in state["network"].items())


def test_samples_come_from_the_averaged_weights_which_follow_every_second_step() -> None:
    one, none = trained(SPEC, IMAGES, steps=1), trained(SPEC, IMAGES, steps=0)
    assert torch.equal(one.sample(2, seed=0), none.sample(2, seed=0))
    assert not torch.equal(trained(SPEC, IMAGES, steps=2).sample(2, seed=0), none.sample(2, seed=0))
