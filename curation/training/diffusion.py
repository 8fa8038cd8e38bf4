"""A generative model in its plainest form: a U-Net that is trained to undo noise, sampled without adding any.

Ho et al. 2020 (arXiv:2006.11239), Algorithm 1; Song et al. 2021 (arXiv:2010.02502), Eq. 12 with sigma = 0. Network and
schedulers are those of diffusers; the defaults follow lucidrains' denoising-diffusion-pytorch of October 2023: it
predicts v (Salimans and Ho 2022, arXiv:2202.00512), noise follows the sigmoid schedule, the loss of v is weighted by
the share of signal, and weights are averaged, as ema_pytorch does it: copied for 100 steps, then remembered the longer
the more there is to remember, up to `ema_decay`. All that is drawn comes from one generator on the CPU, whose state is
saved with the weights, so a training that was interrupted goes on as if it had not been.

N images, n samples, B rows of a batch, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BETAS_OF_ADAM = (0.9, 0.99)
LARGEST_BETA = 0.999
AVERAGED_AFTER, AVERAGING_POWER = 100, 2 / 3
"""Steps for which weights are copied, and how fast the decay then grows: ema_pytorch's own."""


@dataclass(frozen=True)
class DiffusionSpec:
    """A model and how it is trained; `recipe.evaluate.Generator` says what each field means."""

    image_size: int
    channels: tuple[int, ...]
    layers_per_level: int
    attention: bool
    prediction: Literal["epsilon", "v_prediction"]
    schedule: Literal["sigmoid", "linear"]
    noise_steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float
    ema_every: int
    clip: float
    flip: bool
    sampling_steps: int


def sigmoid_betas(num_steps: int, *, start: float = -3.0, end: float = 3.0) -> Tensor:
    """Variances (T,) float64 of the noise added at each step: Jabri et al. 2022 (arXiv:2212.11972), Algorithm 1."""
    time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    low, high = (torch.tensor(end, dtype=torch.float64).sigmoid(), torch.tensor(start, dtype=torch.float64).sigmoid())
    signal = (low - (time * (end - start) + start).sigmoid()) / (low - high)
    return (1 - signal[1:] / signal[:-1]).clamp(0, LARGEST_BETA)


def linear_betas(num_steps: int) -> Tensor:
    """Variances (T,) float64, for 1,000 steps from 1e-4 to 0.02, for others as much noise in all: Ho et al. Sec. 4."""
    scale = 1000 / num_steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_steps, dtype=torch.float64).clamp(0, LARGEST_BETA)


def decay_at(step: int, *, most: float) -> float:
    """What share of the averaged weights stays at an update after so many steps, at most `most`.

    With a fixed share the weights of the first steps would be most of the average for hundreds of updates.
    """
    return min(most, 1 - (1 + max(0, step - AVERAGED_AFTER)) ** -AVERAGING_POWER)


class Diffusion:
    """A model in training: weights, averaged weights, optimiser, steps done, and the generator of all that is drawn."""

    def __init__(self, spec: DiffusionSpec, *, seed: int, device: str = "cpu"):
        """ImportError, saying what to install, if diffusers is not there."""
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # an extra: few runs need it
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        self.spec, self.step = spec, 0
        self._device = device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self._network = _network(spec).to(device)
        self._averaged = _network(spec).to(device).requires_grad_(False).eval()
        self._averaged.load_state_dict(self._network.state_dict())
        self._optimiser = torch.optim.Adam(self._network.parameters(), lr=spec.learning_rate, betas=BETAS_OF_ADAM)
        self._rng = torch.Generator().manual_seed(seed)
        betas = {"sigmoid": sigmoid_betas, "linear": linear_betas}[spec.schedule](spec.noise_steps)
        settings: dict[str, Any] = {
            "num_train_timesteps": spec.noise_steps,
            "trained_betas": betas.float().numpy(),
            "prediction_type": spec.prediction,
        }
        self._noising = DDPMScheduler(**settings)
        # Trailing: the first step starts at pure noise, as training ends there.
        self._denoising = DDIMScheduler(**settings, timestep_spacing="trailing", set_alpha_to_one=True)
        self._signal = self._noising.alphas_cumprod.to(device)

    def train_step(self, images_NSS3: Tensor) -> float:
        """One gradient step on a batch drawn with replacement from images (N, S, S, 3) uint8; returns the loss."""
        spec, rng = self.spec, self._rng
        rows = torch.randint(len(images_NSS3), (spec.batch_size,), generator=rng)
        clean = _as_signal(images_NSS3[rows])
        if spec.flip:
            mirrored = torch.rand(spec.batch_size, generator=rng) < 0.5
            clean = torch.where(mirrored[:, None, None, None], clean.flip(3), clean)
        noise = torch.randn(clean.shape, generator=rng)
        time = torch.randint(spec.noise_steps, (spec.batch_size,), generator=rng)
        clean, noise, time = clean.to(self._device), noise.to(self._device), time.to(self._device)
        noisy = self._noising.add_noise(clean, noise, time)  # pyright: ignore[reportArgumentType]
        told = self._network(noisy, time).sample
        if spec.prediction == "epsilon":
            loss = F.mse_loss(told, noise)
        else:
            wanted = self._noising.get_velocity(clean, noise, time)  # pyright: ignore[reportArgumentType]
            loss = ((told - wanted).square().mean(dim=(1, 2, 3)) * self._signal[time]).mean()
        self._optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), spec.clip)
        self._optimiser.step()
        self.step += 1
        if self.step % spec.ema_every == 0:
            self._average()
        return loss.item()

    @torch.no_grad()
    def sample(self, num_samples: int, *, seed: int, batch_size: int = 256) -> Tensor:
        """Images (n, S, S, 3) uint8 of the averaged weights. Sample i starts from the same noise for every model."""
        size, parts = self.spec.image_size, []
        noise = torch.randn(num_samples, 3, size, size, generator=torch.Generator().manual_seed(seed))
        for image in noise.split(batch_size):
            image = image.to(self._device)
            self._denoising.set_timesteps(self.spec.sampling_steps, device=self._device)
            for time in self._denoising.timesteps:
                told = self._averaged(image, time).sample
                image = self._denoising.step(told, int(time), image).prev_sample  # pyright: ignore[reportAttributeAccessIssue]
            parts.append(_as_pixels(image.cpu()))
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on; `torch.load(weights_only=True)` reads it."""
        return {
            "step": self.step,
            "network": self._network.state_dict(),
            "averaged": self._averaged.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.step = state["step"]
        self._network.load_state_dict(state["network"])
        self._averaged.load_state_dict(state["averaged"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._rng.set_state(state["rng"])

    @torch.no_grad()
    def _average(self) -> None:
        decay = decay_at(self.step, most=self.spec.ema_decay)
        for average, weight in zip(self._averaged.parameters(), self._network.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)


def _network(spec: DiffusionSpec) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel

    plain = ["DownBlock2D"] * len(spec.channels), ["UpBlock2D"] * len(spec.channels)
    if spec.attention:
        plain[0][-1], plain[1][0] = "AttnDownBlock2D", "AttnUpBlock2D"
    return UNet2DModel(
        sample_size=spec.image_size,
        block_out_channels=spec.channels,
        layers_per_block=spec.layers_per_level,
        down_block_types=tuple(plain[0]),
        up_block_types=tuple(plain[1]),
        norm_num_groups=8,
        add_attention=spec.attention,
    )


def _as_signal(pixels_BSS3: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) in [-1, 1]."""
    return pixels_BSS3.permute(0, 3, 1, 2).float() / 127.5 - 1


def _as_pixels(signal_B3SS: Tensor) -> Tensor:
    """float32 (B, 3, S, S) -> uint8 (B, S, S, 3), what lies outside [-1, 1] cut."""
    return ((signal_B3SS.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous()
