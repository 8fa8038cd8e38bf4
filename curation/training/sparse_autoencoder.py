"""A TopK sparse autoencoder: each row is written as a few of many directions.

Source: Gao et al. 2024, scaling and evaluating sparse autoencoders (arXiv:2406.04093), Sec. 2.3: the K largest
responses of a row are kept, cut at 0, and its features are their directions' weighted sum. The encoder begins as the
decoder's transpose and directions have length 1. Deviation: the bias before the encoder begins at the rows' mean,
which callers take off. The sum is a dense product: on a CPU it is as fast, forth and back, as gathering K directions.

n rows, D features, M units, K active units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curation.numerics.factors import Active, top_units


class Written(NamedTuple):
    """Rows as the autoencoder writes them."""

    rows_nD: Tensor
    active: Active
    responses_nM: Tensor
    """Before the K largest were kept."""


class SparseAutoencoder(nn.Module):
    """`width` features, `num_units` directions, `num_active` of them per row."""

    def __init__(self, width: int, *, num_units: int, num_active: int, seed: int) -> None:
        """ValueError if there are fewer units than a row activates."""
        super().__init__()
        if not 1 <= num_active <= num_units:
            raise ValueError(f"num_active must be in [1, {num_units}], the units, got {num_active}")
        generator = torch.Generator().manual_seed(seed)
        directions_MD = F.normalize(torch.randn(num_units, width, generator=generator), dim=1)
        self.decoder_MD = nn.Parameter(directions_MD)
        self.encoder_MD = nn.Parameter(directions_MD.clone())
        self.encoder_bias_M = nn.Parameter(torch.zeros(num_units))
        self.before_D = nn.Parameter(torch.zeros(width))
        self.num_active = num_active

    def forward(self, rows_nD: Tensor) -> Written:
        """Rows (n, D) of mean 0."""
        responses_nM = F.linear(rows_nD - self.before_D, self.encoder_MD, self.encoder_bias_M)
        active = top_units(responses_nM, self.num_active)
        return Written(self.decoded(active) + self.before_D, active, responses_nM)

    def decoded(self, active: Active) -> Tensor:
        """The weighted sum (n, D) of the active units' directions."""
        dense_nM = active.values_NK.new_zeros(len(active.values_NK), len(self.decoder_MD))
        return dense_nM.scatter(1, active.units_NK, active.values_NK) @ self.decoder_MD

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every direction length 1 again."""
        self.decoder_MD.copy_(F.normalize(self.decoder_MD, dim=1))
