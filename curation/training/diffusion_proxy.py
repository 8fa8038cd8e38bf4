"""A diffusion model as a proxy: a loss for each image that is not mostly the draw of its noise.

`--proxy.kind function --proxy.function curation.training.diffusion_proxy:diffusion_proxy`, on rows that are pixels of
`jobs.fit features` (library pixels). A U-Net predicts the noise (Ho et al. 2020, arXiv:2006.11239, Eq. 14); a row's
loss is its mean over a fixed grid of times with one fixed noise image for each, the same for every row, every step and
every model that is compared (alchemist.md, Sec. 8, trap 6). Losses grow by orders of magnitude from late to early
times, so each is told in units of what the best linear guess would have for pixels of the rows' variance. A condition,
such as a caption's embedding or a one-hot class, is added to the time's embedding.

For GPUs: a row costs as many forward passes as there are times. B rows, S pixels a side, T times, C condition.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

PATCH = 4
"""`models.frozen`'s pixels come patch by patch."""
TIMES = (0.05, 0.175, 0.3, 0.425, 0.55, 0.675, 0.8, 0.925)
"""Of the way to pure noise."""
CHANNELS = (32, 64)


def diffusion_proxy(rows_NG: Tensor, condition_width: int, seed: int) -> DiffusionProxy:
    """The proxy for rows of pixels (n, 3 S S) in [0, 1]. ValueError if they are none."""
    return DiffusionProxy(rows_NG, condition_width=condition_width, seed=seed)


class DiffusionProxy(nn.Module):
    """A small U-Net of diffusers and the noise that its losses are measured with."""

    def __init__(
        self,
        rows_NG: Tensor,
        *,
        condition_width: int,
        seed: int,
        channels: tuple[int, ...] = CHANNELS,
        norm_groups: int = 8,
    ):
        """ImportError if diffusers is not there. ValueError if rows are no square images of three channels."""
        super().__init__()
        from diffusers.models.unets.unet_2d import UNet2DModel  # an extra: few runs need it

        side = math.isqrt(rows_NG.shape[1] // 3)
        if side * side * 3 != rows_NG.shape[1] or side % PATCH:
            raise ValueError(f"rows of {rows_NG.shape[1]} numbers are no square images of {PATCH} x {PATCH} patches")
        self._side = side
        settings: dict[str, Any] = {"class_embed_type": "identity"} if condition_width else {}
        self.network = UNet2DModel(
            sample_size=side,
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            norm_num_groups=norm_groups,
            add_attention=False,
            **settings,
        )
        self.condition = nn.Linear(condition_width, 4 * channels[0]) if condition_width else None
        time_T = torch.tensor(TIMES, dtype=torch.float64)
        signal_T = (time_T * math.pi / 2).cos().square()  # the share of the image's variance that is left
        variance = (2 * rows_NG.double() - 1).var().item()
        linear_T = signal_T * variance / (signal_T * variance + 1 - signal_T)
        generator = torch.Generator().manual_seed(seed)
        self.steps_T: Tensor
        self.signal_T: Tensor
        self.linear_T: Tensor
        self.noise_T3SS: Tensor
        self.register_buffer("steps_T", (time_T * 1000).round().float())
        self.register_buffer("signal_T", signal_T.float())
        self.register_buffer("linear_T", linear_T.float())
        self.register_buffer("noise_T3SS", torch.randn(len(TIMES), 3, side, side, generator=generator))

    def prepare(self, rows_NG: Tensor) -> Tensor:
        """Images (n, 3, S, S) in [-1, 1]."""
        count, across = len(rows_NG), self._side // PATCH
        cut = rows_NG.float().reshape(count, across, across, PATCH, PATCH, 3)
        return 2 * cut.permute(0, 5, 1, 3, 2, 4).reshape(count, 3, self._side, self._side) - 1

    def forward(self, images_B3SS: Tensor, condition_BC: Tensor | None = None) -> Tensor:
        """Losses (B,), about 1 for a model that knows no more than the pixels' variance."""
        told: Tensor | None = None if self.condition is None else self.condition(condition_BC)
        total = torch.zeros(len(images_B3SS), device=images_B3SS.device)
        for step, signal, linear, noise_3SS in zip(
            self.steps_T, self.signal_T, self.linear_T, self.noise_T3SS, strict=True
        ):
            noisy = signal.sqrt() * images_B3SS + (1 - signal).sqrt() * noise_3SS
            guessed = self.network(noisy, step.expand(len(noisy)), class_labels=told).sample
            total = total + (guessed - noise_3SS).square().mean(dim=(1, 2, 3)) / linear
        return total / len(TIMES)
