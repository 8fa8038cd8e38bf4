"""Alchemist's rater: frozen features in, one rating per row out; and the weights that a batch gets while it is taught.

Alchemist, 2025 (arXiv:2512.16905), Eq. 7 and its group head; the authors' code (KlingTeam/Alchemist) where it differs.
Three ways to make weights of an instance logit z_i and of the batch's mean and variance:

    clean   softmax((z_i + group term) / temperature): ours. The group term shifts the logit, so that it can change the
            order inside a batch, and nothing multiplies all of a batch's weights
    paper   softmax(z_i) * sigmoid(batch head), as printed. With positive losses the gradient on the batch weight always
            points down: it collapses to 0 (alchemist.md, Sec. 3)
    code    softmax(softmax(sigmoid(z_i)) * sigmoid(batch head)), as released. The second softmax undoes the collapse,
            and most of the weighting: of 32 rows the largest weight is at most 1.071 times the smallest

A weight compares a row with its batch; the rating is the logit, before any softmax. In clean mode with a group term it
is the mean over fixed batches, drawn once when training ends, in each of which the row takes one place: no rating
depends on the rows that are rated beside it, or on their order.

B rows of a batch, n rows, F features, W width of the trunk, M batches that ratings are averaged over.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

RaterMode = Literal["clean", "paper", "code"]


class Weights(NamedTuple):
    """Weights (B,) of a batch's rows, their logits (B,), and the batch's own weight, where the mode has one."""

    weights: Tensor
    logits: Tensor
    batch_weight: Tensor | None


class Rater(nn.Module):
    """Linear-GELU trunk, an instance head, and a group or batch head if `group`."""

    def __init__(
        self,
        sample_NF: Tensor,
        *,
        mode: RaterMode = "clean",
        group: bool = True,
        temperature: float = 1.0,
        width: int = 128,
        hidden: int = 64,
    ):
        """`sample_NF`: features whose mean and deviation standardise all others."""
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.mode, self.group, self.temperature = mode, group, temperature
        self.mean_F: Tensor
        self.deviation_F: Tensor
        self.register_buffer("mean_F", sample_NF.float().mean(dim=0))
        self.register_buffer("deviation_F", sample_NF.float().std(dim=0, unbiased=False).clamp_min(1e-6))
        self.trunk = nn.Sequential(nn.Linear(sample_NF.shape[1], width), nn.GELU())
        self.instance = _head(width, hidden)
        of_group = 3 * width if mode == "clean" else 2 * width
        self.of_group = _head(of_group, hidden) if group else None
        self.others_sum_MW: Tensor | None
        self.others_square_MW: Tensor | None
        self.register_buffer("others_sum_MW", None)
        self.register_buffer("others_square_MW", None)
        self.others = 0

    def features(self, rows_BF: Tensor) -> Tensor:
        """f (B, W)."""
        return self.trunk((rows_BF.float() - self.mean_F) / self.deviation_F)

    def forward(self, rows_BF: Tensor) -> Weights:
        """The weights of one batch."""
        f_BW = self.features(rows_BF)
        logits = self.instance(f_BW)[:, 0]
        if self.mode == "clean":
            if self.of_group is not None:
                mean, variance = f_BW.mean(dim=0), f_BW.var(dim=0, unbiased=False)
                logits = logits + self._group_term(f_BW, mean.expand_as(f_BW), variance.expand_as(f_BW))
            return Weights((logits / self.temperature).softmax(dim=0), logits, None)
        inside = logits.sigmoid() if self.mode == "code" else logits
        weights, batch_weight = inside.softmax(dim=0), None
        if self.of_group is not None:
            of_batch = torch.cat([f_BW.mean(dim=0), f_BW.var(dim=0, unbiased=False)])
            batch_weight = self.of_group(of_batch).sigmoid()[0]
            weights = weights * batch_weight
        return Weights(weights.softmax(dim=0) if self.mode == "code" else weights, logits, batch_weight)

    @torch.no_grad()
    def remember_batches(self, batches_MBF: Tensor) -> None:
        """Fix the batches that ratings are averaged over: the first row of each gives its place to the one rated."""
        f_MBW = self.features(batches_MBF[:, 1:].flatten(0, 1)).unflatten(0, (len(batches_MBF), -1))
        self.others_sum_MW, self.others_square_MW = f_MBW.sum(dim=1), f_MBW.square().sum(dim=1)
        self.others = f_MBW.shape[1]

    @torch.no_grad()
    def rate(self, rows_nF: Tensor) -> Tensor:
        """Ratings (n,), each of its own row alone. ValueError if batches are needed and none were remembered."""
        f_nW = self.features(rows_nF)
        logits = self.instance(f_nW)[:, 0]
        if self.mode != "clean" or self.of_group is None:
            return logits
        if self.others_sum_MW is None or self.others_square_MW is None:
            raise ValueError("a rater with a group term rates in remembered batches; it has none yet")
        terms = torch.zeros_like(logits)
        for sum_W, square_W in zip(self.others_sum_MW, self.others_square_MW, strict=True):
            mean_nW = (sum_W + f_nW) / (self.others + 1)
            # Cancellation may leave a variance just below 0.
            variance_nW = ((square_W + f_nW.square()) / (self.others + 1) - mean_nW.square()).clamp_min(0)
            terms += self._group_term(f_nW, mean_nW, variance_nW)
        return logits + terms / len(self.others_sum_MW)

    @torch.no_grad()
    def rate_as_released(self, rows_BF: Tensor) -> Tensor:
        """What the authors' scoring script gives a batch, (B,): softmax(sigmoid(z)) times the batch's weight, no second
        softmax. It depends on the batch. ValueError unless the mode is code."""
        if self.mode != "code":
            raise ValueError(f"only a rater of mode code rates as released, this one's is {self.mode!r}")
        f_BW = self.features(rows_BF)
        weights = self.instance(f_BW)[:, 0].sigmoid().softmax(dim=0)
        if self.of_group is None:
            return weights
        return weights * self.of_group(torch.cat([f_BW.mean(dim=0), f_BW.var(dim=0, unbiased=False)])).sigmoid()

    def _group_term(self, f_nW: Tensor, mean_nW: Tensor, variance_nW: Tensor) -> Tensor:
        assert self.of_group is not None
        return self.of_group(torch.cat([f_nW, mean_nW, variance_nW], dim=1))[:, 0]


def _head(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, 1))
