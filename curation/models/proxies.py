"""Small generative models that tell how hard a sample is: a loss for each row, over frozen features or pixels.

They stand in for the proxy of Alchemist (arXiv:2512.16905), a 0.3B autoregressive image model, where only per-sample
losses are wanted and a CPU has to do. Both may be conditioned on a vector of the caption or class.

    autoregressive  a row is cut into tokens of one codebook; each is predicted from a few that precede it and from its
                    place. Cross-entropy, averaged over tokens, as the paper's over 680. Plain rows cost little, noise
                    and mosaics much: the codebook has no word for what is rare
    masked          one half of a row is predicted from the other, both ways, in principal components. Squared error as
                    a share of the half's variance; blind to what few components hold, such as fine noise

What does not change while a model trains (tokens, components) is made once, by `prepare`. Both have a forward
derivative, so that `numerics.gradients.projection` serves them.

B rows of a batch, N rows, G numbers of a row, T tokens, P numbers of a token (G = T P), K codes, E width of an
embedding, W width of the network, C numbers of a condition, H components of a half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EMBEDDING_WIDTH = 32
ASSIGN_ROWS = 65_536
"""Tokens whose distances to all codes are in memory at once: 64 MB with 256 codes."""


class Proxy(Protocol):
    """A module of per-sample losses. Anything that has these two methods and is an nn.Module will do."""

    def prepare(self, rows_NG: Tensor) -> Tensor:
        """Rows (N, G) as `forward` takes them, (N, ...): what need not be done at every step."""
        ...

    def __call__(self, prepared_B: Tensor, condition_BC: Tensor | None = None) -> Tensor:
        """Losses (B,), with gradients to the parameters."""
        ...


class Standard(nn.Module):
    """Rows with their mean taken away, in units of one deviation: per number, or one for all."""

    def __init__(self, rows_NG: Tensor, *, per_number: bool):
        super().__init__()
        rows = rows_NG.float()
        deviation = rows.std(dim=0, unbiased=False) if per_number else rows.std(unbiased=False).expand(rows.shape[1])
        self.mean_G: Tensor
        self.deviation_G: Tensor
        self.register_buffer("mean_G", rows.mean(dim=0))
        self.register_buffer("deviation_G", deviation.clamp_min(1e-6).clone())

    def forward(self, rows_NG: Tensor) -> Tensor:
        """(N, G) float32."""
        return (rows_NG.float() - self.mean_G) / self.deviation_G


class Autoregressive(nn.Module):
    """Tokens predicted one from another. A square number of tokens is a grid, row by row, and neighbours above
    count."""

    def __init__(self, standard: Standard, codes_KP: Tensor, *, num_tokens: int, width: int, condition_width: int = 0):
        """ValueError if the rows' length is not tokens times code length."""
        super().__init__()
        num_numbers = len(standard.mean_G)
        if num_tokens * codes_KP.shape[1] != num_numbers:
            raise ValueError(f"{num_numbers} numbers are not {num_tokens} tokens of {codes_KP.shape[1]}")
        self.standard, self.num_tokens = standard, num_tokens
        self.codes_KP: Tensor
        self.register_buffer("codes_KP", codes_KP.float())
        self._offsets = offsets_before(num_tokens)
        self.embedding = nn.Embedding(len(codes_KP) + 1, EMBEDDING_WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self.inward = nn.Linear(len(self._offsets) * EMBEDDING_WIDTH, width)
        self.condition = nn.Linear(condition_width, width) if condition_width else None
        self.between = nn.Linear(width, width)
        self.outward = nn.Linear(width, len(codes_KP))

    @torch.no_grad()
    def prepare(self, rows_NG: Tensor) -> Tensor:
        """Tokens (N, T) int64: the nearest code of each."""
        pieces = self.standard(rows_NG).reshape(-1, self.codes_KP.shape[1])
        square_K = self.codes_KP.square().sum(dim=1)
        nearest = [(square_K - 2 * some @ self.codes_KP.T).argmin(dim=1) for some in pieces.split(ASSIGN_ROWS)]
        return torch.cat(nearest).reshape(len(rows_NG), self.num_tokens)

    def forward(self, tokens_BT: Tensor, condition_BC: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each row's tokens, (B,)."""
        before = len(self.codes_KP)
        padded = F.pad(tokens_BT, (max(self._offsets), 0), value=before)
        first = max(self._offsets)
        context = torch.stack([padded[:, first - o : first - o + self.num_tokens] for o in self._offsets], dim=2)
        hidden_BTW = self.inward(self.embedding(context).flatten(2)) + self.position
        if self.condition is not None:
            assert condition_BC is not None, "a conditional proxy needs its condition"
            hidden_BTW = hidden_BTW + self.condition(condition_BC)[:, None]
        hidden_BTW = F.gelu(self.between(F.gelu(hidden_BTW)))
        log_BTK = self.outward(hidden_BTW).log_softmax(dim=2)
        return -log_BTK.gather(2, tokens_BT[:, :, None])[:, :, 0].mean(dim=1)


def offsets_before(num_tokens: int) -> tuple[int, ...]:
    """How far back the tokens lie that a token is predicted from, ascending."""
    side = round(num_tokens**0.5)
    wanted = (1, 2, side - 1, side, side + 1, 2 * side) if side * side == num_tokens and side > 2 else (1, 2, 3, 4)
    return tuple(offset for offset in dict.fromkeys(wanted) if offset < num_tokens) or (1,)


class Masked(nn.Module):
    """Each half of a row's numbers predicted from the other."""

    def __init__(self, rows_NG: Tensor, *, components: int, width: int, condition_width: int = 0):
        """Components are those of `rows_NG`. ValueError if a half has, or the rows are, fewer than are wanted."""
        super().__init__()
        half = rows_NG.shape[1] // 2
        if components > min(half, len(rows_NG)):
            raise ValueError(f"{components} components of halves of {half} numbers and {len(rows_NG)} rows")
        self.standard = Standard(rows_NG, per_number=False)
        self._half = half
        centred = self.standard(rows_NG)
        bases = [_principal(part, components) for part in (centred[:, :half], centred[:, half:])]
        self.first_GH: Tensor
        self.second_GH: Tensor
        self.register_buffer("first_GH", bases[0])
        self.register_buffer("second_GH", bases[1])
        variances = [(part @ basis).square().mean() for part, basis in zip(_halves(centred, half), bases, strict=True)]
        self.variance_2: Tensor
        self.register_buffer("variance_2", torch.stack(variances).clamp_min(1e-12))
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(components + condition_width, width), nn.GELU(), nn.Linear(width, components))
            for _ in range(2)
        )

    @torch.no_grad()
    def prepare(self, rows_NG: Tensor) -> Tensor:
        """Components of both halves, (N, 2, H), each half of mean square 1 over the rows it was made of."""
        first, second = _halves(self.standard(rows_NG), self._half)
        both = torch.stack([first @ self.first_GH, second @ self.second_GH], dim=1)
        return both / self.variance_2.sqrt()[:, None]

    def forward(self, halves_B2H: Tensor, condition_BC: Tensor | None = None) -> Tensor:
        """Mean squared error of each row, (B,), the mean of both ways: about 1 for a model that knows nothing."""
        losses = []
        for shown in (0, 1):
            given = halves_B2H[:, shown]
            if condition_BC is not None:
                given = torch.cat([given, condition_BC], dim=1)
            losses.append((self.networks[shown](given) - halves_B2H[:, 1 - shown]).square().mean(dim=1))
        return (losses[0] + losses[1]) / 2


def _halves(rows_NG: Tensor, half: int) -> Sequence[Tensor]:
    return rows_NG[:, :half], rows_NG[:, half:]


def _principal(rows_NG: Tensor, components: int) -> Tensor:
    """Directions (G, H) of the largest variance."""
    covariance = rows_NG.T @ rows_NG / len(rows_NG)
    return torch.linalg.eigh(covariance)[1][:, -components:].flip(1)


def checked_losses(losses: Any, batch: int, *, of: str) -> Tensor:
    """The losses themselves. ValueError if they are not one float for each row: for functions that users give."""
    if not isinstance(losses, Tensor) or losses.shape != (batch,) or not losses.is_floating_point():
        came = f"{losses.dtype} {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"{of} must give one loss per row, floats ({batch},), got {came}")
    return losses
