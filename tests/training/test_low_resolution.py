"""A step at two resolutions: what is scored, what is trained on, what it costs; and the distillation beside it."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from curation.methods import load_selector
from curation.models.clip import build_network
from curation.numerics.contrastive import Batch, softmax_distillation
from curation.training.contrastive import make_optimizer
from curation.training.contrastive_learner import ContrastiveLearner, LowView, Reference
from curation.training.flops import TRAINING_PASS, flexi_step, tower_flops
from curation.training.online_step import OnlineSettings, OnlineTrainer
from curation.training.picking import Stopwatch
from curation.training.step import PairBatch, contrastive_step

B, KEEP = 24, 8


def block(*, low_size: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    rows = {
        "pixels": torch.randint(0, 256, (B, 48, 48, 3), dtype=torch.uint8, generator=generator),
        "tokens": torch.randint(1, 400, (B, 28), generator=generator),
        "address": torch.randperm(B, generator=generator),
        "uid": torch.randint(-(2**62), 2**62, (B, 2), generator=generator),
        "ok": torch.ones(B, dtype=torch.bool),
        **{
            f"reference_{side}_embedding": F.normalize(torch.randn(B, 8, generator=generator), dim=1)
            for side in ("image", "text")
        },
    }
    if low_size is not None:
        small = F.interpolate(rows.pop("pixels").permute(0, 3, 1, 2).float(), (low_size, low_size))
        rows["low_pixels"] = small.permute(0, 2, 3, 1).to(torch.uint8)
    return rows


def trainer_of(low: LowView | None, *, method: str = "jest", **fields: Any) -> OnlineTrainer:
    network = build_network("nano", seed=0)
    learner = ContrastiveLearner(network=network, reference=Reference(20.0, -5.0, None), low=low, **fields)
    settings = OnlineSettings(keep=KEEP, num_steps=4, seed=1, low_share=low.share if low else 0.0)
    return OnlineTrainer(learner, make_optimizer(network, learning_rate=1e-3), load_selector(method), settings)


def test_the_super_batch_is_scored_in_large_patches_and_a_share_of_the_chosen_trained_in_them() -> None:
    trainer = trainer_of(LowView("pixels", 16, share=0.25))
    rows = block()
    picked = trainer.picker.pick(0, rows, progress=0.0, model=None, watch=Stopwatch())
    seen = trainer.learner.rows(rows, frozenset({"image_embedding"}))["image_embedding"]
    torch.testing.assert_close(seen, cast(Any, trainer.learner.network).embed_images(rows["pixels"], patch_size=16))
    full, tokens, low = (trainer.picker.sub_batch(rows, picked.chosen)).inputs
    assert (len(full), len(tokens), len(low)) == (6, 8, 2)
    # Each image stands with its own caption: those in full first, those at low resolution after them.
    own = {tuple(row): image for row, image in zip(rows["tokens"].tolist(), rows["pixels"], strict=True)}
    for row, image in zip(tokens.tolist(), [*full, *low], strict=True):
        assert torch.equal(own[tuple(row)], image)
    assert trainer.step(0, rows).report.loss > 0


def test_which_rows_are_trained_low_hangs_on_seed_and_step_alone() -> None:
    trainer = trainer_of(LowView("pixels", 16, share=0.5))

    def low_rows(number: int) -> list[int]:
        chosen = trainer.picker.pick(number, block(), progress=0.0, model=None, watch=Stopwatch()).chosen
        return block()["address"][chosen.is_low].sort().values.tolist()

    assert low_rows(0) == low_rows(0) and len(low_rows(0)) == 4
    assert low_rows(0) != low_rows(1)


def test_of_small_images_only_what_is_trained_in_full_is_asked_for_in_full() -> None:
    trainer, asked = trainer_of(LowView("low_pixels", 8, share=0.5)), []

    def in_full(places: Tensor) -> Tensor:
        asked.extend(places.tolist())
        return block()["pixels"][places]

    outcome = trainer.step(0, block(low_size=24), in_full)
    assert len(asked) == KEEP // 2 and outcome.report.loss > 0
    chosen = set(outcome.picked.trained.tolist())
    assert {int(block()["address"][place]) for place in asked} < chosen


def test_parts_of_a_batch_at_two_resolutions_give_the_whole_batchs_gradient() -> None:
    rows, gradients = block(), []
    for micro_batches in (1, 3):
        network = build_network("nano", seed=0)
        before = copy.deepcopy(network.state_dict())
        batch = PairBatch(rows["pixels"][:5], rows["tokens"][:9], rows["pixels"][5:9], 16)
        contrastive_step(
            network,
            batch,
            weights=torch.linspace(0.5, 1.5, 9),
            optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
            objective=load_sigmoid(),
            max_grad_norm=1e9,
            micro_batches=micro_batches,
        )
        gradients.append({name: before[name] - value for name, value in network.state_dict().items()})
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-3, atol=1e-5)


def load_sigmoid() -> Any:
    from curation.numerics.contrastive import load_objective

    return load_objective("sigmoid")


def test_a_step_costs_what_the_model_of_flops_says() -> None:
    """Counted on the real passes: scoring all, training the chosen at two resolutions."""
    low = LowView("pixels", 16, share=0.5)
    network, rows = build_network("nano", seed=0), block()
    cost = ContrastiveLearner(network=network, low=low).flops(rows, frozenset())
    full = sum(tower_flops(network, rows["pixels"], rows["tokens"]))
    low_cost = cost.scoring / full
    assert 0.3 < low_cost < 0.8
    modelled = B * cost.scoring + TRAINING_PASS * KEEP * cost.training
    assert modelled == pytest.approx(flexi_step(1 - KEEP / B, low_cost=low_cost) * full * KEEP, rel=1e-6)
    hollow = network.to("meta").eval()
    pixels, tokens = rows["pixels"].to("meta"), rows["tokens"].to("meta")
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            hollow.embed_images(pixels, patch_size=16)
            hollow.embed_texts(tokens)
        output = hollow(pixels[: KEEP // 2], tokens[:KEEP], pixels[KEEP // 2 : KEEP], low_patch_size=16)
        (output.image.sum() + output.text.sum()).backward()
    # Resampling the kernel is once for a pass, and the first layer has no gradient of its input.
    assert counter.get_total_flops() == pytest.approx(modelled, rel=0.05)


def test_distillation_is_the_cross_entropy_with_the_references_picks() -> None:
    rows, generator = block(), torch.Generator().manual_seed(8)
    image, text = (F.normalize(torch.randn(6, 5, generator=generator), dim=1) for _ in range(2))
    said = Batch(rows["reference_image_embedding"][:6], rows["reference_text_embedding"][:6], 0)
    scale = torch.tensor(7.0)
    losses = softmax_distillation(image, text, logit_scale=scale, reference=said, reference_scale=20.0)
    wanted = [
        (
            F.cross_entropy(scale * image[i] @ text.T, (20 * said.image_MD[i] @ said.text_MD.T).softmax(0))
            + F.cross_entropy(scale * text[i] @ image.T, (20 * said.text_MD[i] @ said.image_MD.T).softmax(0))
        ).item()
        / 2
        for i in range(6)
    ]
    assert losses.tolist() == pytest.approx(wanted, rel=1e-4)
    # A learner that says what the reference says cannot do better.
    same = softmax_distillation(*said[:2], logit_scale=torch.tensor(20.0), reference=said, reference_scale=20.0)
    assert (same <= losses + 1e-5).all()
    part = softmax_distillation(
        image[2:4], text[2:4], logit_scale=scale, reference=said._replace(first=2), reference_scale=20.0,
        within=Batch(image, text, 2),
    )  # fmt: skip
    torch.testing.assert_close(part, losses[2:4])


def test_distillation_enters_a_steps_gradient_and_not_the_losses_that_it_reports() -> None:
    trainers = [trainer_of(None, method="uniform", distill=share) for share in (0.0, 2.0)]
    plain, distilled = (trainer.step(0, block()).report for trainer in trainers)
    assert plain.loss == pytest.approx(distilled.loss) and torch.allclose(plain.losses, distilled.losses)
    assert distilled.grad_norm > 1.1 * plain.grad_norm
