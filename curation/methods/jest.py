"""JEST: choose a sub-batch as a set, chunk by chunk, because a contrastive loss couples its rows.

Source: Evans et al. 2024 (arXiv:2406.17711), Algorithm 1, Eq. 1 and 2. A set scores its loss under the learner minus
its loss under a fixed, well-trained reference (learnability); each chunk is drawn with p ~ exp(what a row would add to
the set chosen so far). Instead of the B x B matrix of Algorithm 1 only chunk x B products are formed, tile by tile:
the same draws in O(B) memory. The noise comes from `rng` in the order of the rows, so workers that hold the same rows
in the same order and pass the same seed choose the same.

Deviations. The first chunk is drawn by exp of the diagonal (the paper's pseudocode leaves open how it is weighted).
The bias is added to the logit: it is minus the paper's beta. Chunks differ by at most one row, so that any `keep` can
be met. The paper's softmax algorithm was not read: the public port of DRRho-CLIP leaves a candidate's own pair out of
its denominator, ours has it in, so that the score is the candidate's own loss in the set (Eq. 1); `with_self_term`
False is the port. In both its first chunk is drawn by the raw cosine logits.

B rows, D embedding, C rows of a chunk, A the rows chosen so far.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from curation.numerics.contrastive import blocked_pair_losses
from curation.numerics.logit_sums import log_sums, softplus_sums
from curation.numerics.sampling import gumbel_top_k
from curation.selector import Rows, Selection, check_keep, check_needs, num_rows, uniform_weights

SIGNS: dict[str, dict[str, float]] = {
    "learnability": {"": 1.0, "reference_": -1.0},
    "easy_reference": {"reference_": -1.0},
    "hard_learner": {"": 1.0},
}
"""Scoring -> prefix of a model's columns -> sign with which its loss enters the score."""

FORMS = ("sigmoid", "softmax")


class View(NamedTuple):
    """The rows as one model sees them, and the sign with which its loss enters the score."""

    sign: float
    image_BD: Tensor
    text_BD: Tensor
    logit_scale: Tensor
    logit_bias: Tensor

    def own_logits(self) -> Tensor:
        """Logits of the rows' own pairs without the bias, (B,) float64."""
        return (self.logit_scale * torch.einsum("bd,bd->b", self.image_BD.float(), self.text_BD.float())).double()


def chunk_sizes(keep: int, num_chunks: int) -> list[int]:
    """How many rows each chunk draws: sizes that differ by at most one, the larger first, none of them 0."""
    num_chunks = min(num_chunks, keep)
    return [keep // num_chunks + (chunk < keep % num_chunks) for chunk in range(num_chunks)]


class SigmoidLogits:
    """What each row would add to the set A, (B,) float64: S_kk + sum over i in A of (S_ik + S_ki). Algorithm 1.

    S_ij is the signed sum over the models of softplus(-logit_ij) where i = j, of softplus(logit_ij) elsewhere. For the
    total T(A), the sum of S over A x A, this is T(A + k) - T(A). Rows of A themselves hold no meaningful number.
    """

    def __init__(self, views: list[View]) -> None:
        self._views = views
        self.diagonal = _signed_sum(views, lambda view: F.softplus(-view.own_logits() - view.logit_bias))
        self._coupling = torch.zeros_like(self.diagonal)

    def add(self, chosen_C: Tensor) -> Tensor:
        """The logits after `chosen_C` has joined A. Costs 4 C B D multiply-adds per model."""
        for sign, image_BD, text_BD, logit_scale, logit_bias in self._views:
            scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
            self._coupling += sign * softplus_sums(text_BD, image_BD[chosen_C], **scalars)
            self._coupling += sign * softplus_sums(image_BD, text_BD[chosen_C], **scalars)
        return self.diagonal + self._coupling


class SoftmaxLogits:
    """What each row's own loss would be beside the set A, (B,) float64, Eq. 1: signed sum over the models of

    1/2 [LSE over j of scale * image_k.text_j + LSE over j of scale * text_k.image_j] - scale * image_k.text_k,

    j in A + k with the self term, in A without. `diagonal` is the last term alone. Rows of A hold no meaningful number.
    """

    def __init__(self, views: list[View], *, with_self_term: bool) -> None:
        self._views = views
        self._own = [view.own_logits() for view in views]
        self.diagonal = _signed_sum(views, lambda view: -view.own_logits())
        nothing = torch.full_like(self.diagonal, -torch.inf)
        self._over = [(own, own) if with_self_term else (nothing, nothing) for own in self._own]

    def add(self, chosen_C: Tensor) -> Tensor:
        """The logits after `chosen_C` has joined A."""
        logits = torch.zeros_like(self.diagonal)
        for i, (sign, image_BD, text_BD, logit_scale, _) in enumerate(self._views):
            over_texts, over_images = self._over[i]
            over_texts = torch.logaddexp(over_texts, log_sums(image_BD, text_BD[chosen_C], logit_scale=logit_scale))
            over_images = torch.logaddexp(over_images, log_sums(text_BD, image_BD[chosen_C], logit_scale=logit_scale))
            self._over[i] = over_texts, over_images
            logits += sign * ((over_texts + over_images) / 2 - self._own[i])
        return logits


def draw_jointly(logits: SigmoidLogits | SoftmaxLogits, *, sizes: list[int], gain: float, rng: Generator) -> Tensor:
    """Rows (sum of sizes,) int64, in the order of the draws: chunk after chunk, each row once, p ~ exp(gain * logit).

    Algorithm 1. Rows of one chunk are drawn independently of each other, without replacement.
    """
    taken = torch.zeros_like(logits.diagonal, dtype=torch.bool)
    chunks: list[Tensor] = []
    for size in sizes:
        now = logits.add(chunks[-1]) if chunks else logits.diagonal
        chunks.append(gumbel_top_k((gain * now).masked_fill(taken, -torch.inf), size, rng))
        taken[chunks[-1]] = True
    return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.int64, device=taken.device)


@dataclass(frozen=True)
class Jest:
    """Joint selection of the rows that are hard for the learner and easy for the reference, as a set.

    Columns (n, D) of unit norm, any float dtype: `image_embedding`, `text_embedding`, and the reference's with its own
    D. Run values, 0-dim: `logit_scale` (exponentiated), `logit_bias`, and the reference's own.
    """

    num_chunks: int = 16
    scoring: Literal["learnability", "easy_reference", "hard_learner"] = "learnability"
    form: Literal["sigmoid", "softmax"] = "sigmoid"
    with_self_term: bool = True
    """softmax: a candidate's own pair is in its denominator."""
    gain: float = 1.0
    """What the logits are multiplied by before a draw."""

    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        _check_choice("scoring", self.scoring, tuple(SIGNS))
        _check_choice("form", self.form, FORMS)
        if self.num_chunks < 1:
            raise ValueError(f"num_chunks must be at least 1, got {self.num_chunks}")
        if not (math.isfinite(self.gain) and self.gain > 0):
            raise ValueError(f"gain must be finite and above 0, got {self.gain}")

    @property
    def needs(self) -> frozenset[str]:
        """The embeddings, scale and (sigmoid) bias of the models which `scoring` looks at."""
        values = ("image_embedding", "text_embedding", "logit_scale", "logit_bias")
        return frozenset(
            prefix + value
            for prefix in SIGNS[self.scoring]
            for value in values
            if not (self.form == "softmax" and value == "logit_bias")
        )

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the score."""
        return "score"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The diagonal S_kk (n,) float32: a row's score alone, by which the first chunk is drawn."""
        return self._logits(rows).diagonal.float()

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` distinct rows in the order of the draws, weight 1 each; the noise is drawn where `rng` lives.

        ValueError if a needed name is missing or malformed, or `keep` is not in [0, n].
        """
        logits = self._logits(rows)
        keep = check_keep(keep, num_rows(rows))
        indices = draw_jointly(logits, sizes=chunk_sizes(keep, self.num_chunks), gain=self.gain, rng=rng)
        return Selection(indices=indices, weights=uniform_weights(keep).to(indices.device))

    def set_score(self, rows: Rows, chosen_C: Tensor) -> float:
        """s(A) = mean over A of the signed losses of the set `chosen_C` (C,) as a batch: what JEST maximises.

        ValueError if the set is empty.
        """
        if not len(chosen_C):
            raise ValueError("set_score needs at least one row, got an empty set")
        total = 0.0
        for sign, image_BD, text_BD, logit_scale, logit_bias in self._views(rows):
            losses = blocked_pair_losses(
                image_BD[chosen_C],
                text_BD[chosen_C],
                logit_scale=logit_scale,
                logit_bias=logit_bias,
                objective=self.form,
            )
            total += sign * losses.double().mean().item()
        return total

    def off_diagonal_share(self, rows: Rows, chosen_C: Tensor) -> float:
        """Share in [0, 1] of the logits' variance, over the rows outside `chosen_C` (C,), that the set brings in.

        var(logit - diagonal) / (var(diagonal) + var(logit - diagonal)). Near 0 (small scale, very negative bias, small
        set) joint selection is independent selection, and no gain of JEST can be expected. ValueError if fewer than
        two rows are left or nothing varies.
        """
        logits = self._logits(rows)
        left = torch.ones_like(logits.diagonal, dtype=torch.bool)
        left[chosen_C] = False
        diagonal, joint = logits.diagonal[left], (logits.add(chosen_C) - logits.diagonal)[left]
        if len(diagonal) < 2:
            raise ValueError(f"off_diagonal_share needs two rows outside the set, got {len(diagonal)}")
        alone, together = diagonal.var().item(), joint.var().item()
        if alone + together == 0:
            raise ValueError("off_diagonal_share is undefined: all logits are equal")
        return together / (alone + together)

    def _logits(self, rows: Rows) -> SigmoidLogits | SoftmaxLogits:
        views = self._views(rows)
        return (
            SigmoidLogits(views) if self.form == "sigmoid" else SoftmaxLogits(views, with_self_term=self.with_self_term)
        )

    def _views(self, rows: Rows) -> list[View]:
        """The rows as each model sees them. ValueError that names what is missing or malformed."""
        check_needs(self, rows)
        num_rows(rows)
        return [
            View(
                sign,
                *_unit_pairs(rows, f"{prefix}image_embedding", f"{prefix}text_embedding"),
                _run_value(rows, f"{prefix}logit_scale", above=0.0),
                torch.zeros(()) if self.form == "softmax" else _run_value(rows, f"{prefix}logit_bias"),
            )
            for prefix, sign in SIGNS[self.scoring].items()
        ]


def _signed_sum(views: list[View], number_of: Callable[[View], Tensor]) -> Tensor:
    return torch.stack([view.sign * number_of(view) for view in views]).sum(dim=0)


def _unit_pairs(rows: Rows, image_name: str, text_name: str) -> tuple[Tensor, Tensor]:
    image_BD, text_BD = rows[image_name].detach(), rows[text_name].detach()
    if image_BD.ndim != 2 or image_BD.shape != text_BD.shape:
        raise ValueError(
            f"{image_name} and {text_name} must be (n, D) alike, got {tuple(image_BD.shape)} and {tuple(text_BD.shape)}"
        )
    for name, embedding_BD in ((image_name, image_BD), (text_name, text_BD)):
        norms = torch.linalg.vector_norm(embedding_BD, dim=1, dtype=torch.float32)
        # 16-bit rounding moves a norm by less than 0.005. NaN fails the comparison too.
        wrong = (~((norms - 1).abs() < 0.01)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(f"{name} must be of unit norm, got norm {norms[wrong[0]].item():g} in row {wrong[0]}")
    return image_BD, text_BD


def _run_value(rows: Rows, name: str, *, above: float = -math.inf) -> Tensor:
    value = rows[name].detach()
    if value.ndim or not above < value.item() < math.inf:
        bound = "finite" if above == -math.inf else f"finite and above {above:g}"
        raise ValueError(f"{name} must be 0-dim, {bound}, got {value.tolist()}")
    return value


def _check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{field} must be one of {list(known)}, got {value!r}; did you mean {nearest!r}?")
