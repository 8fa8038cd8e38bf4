"""What Grad-Mimic asks of any learner: which parameters are the mimic layer, and whether the reference's fit it.

The score compares weights, not functions: it means something only where the reference's layer, put into the learner,
still does its work there. With another initialisation, or a permuted basis, it does not, and the score is noise
(grad_mimic.md, section 8, trap 2). So that is what is measured: the accuracy of the learner with the reference's layer
in place of its own, as a share of what the reference itself reaches, both above chance.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from curation.numerics.gradients import towards

MIN_SURVIVING = 0.3
"""On a toy a reference grown from the learner's own weights brings half of what it knows, a permuted one nothing."""
MIN_COSINE = 0.2
"""For the whole network, where there is nothing around the layer: weights that grew from other random ones are
orthogonal, those of one origin are not (0.45 on the same toy)."""


def layer_of(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameter, or the parameters of the module, called `name`; all of the network's if it is empty.

    ValueError if there is none.
    """
    inside = f"{name}." if name else ""
    layer = {
        found: parameter for found, parameter in network.named_parameters() if found == name or found.startswith(inside)
    }
    if not layer:
        known = sorted({found.rpartition(".")[0] for found, _ in network.named_parameters()})
        raise ValueError(f"no parameter is in mimic_layer {name!r}; modules are {known[-12:]}")
    return layer


def check_fits(layer: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    """ValueError that names the parameter whose shape differs in the reference."""
    towards(layer, reference)


@contextlib.contextmanager
def replaced(layer: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Iterator[None]:
    """The layer holds the reference's weights for as long as the block runs."""
    own = {name: value.detach().clone() for name, value in layer.items()}
    with torch.no_grad():
        try:
            for name, value in layer.items():
                value.copy_(reference[name])
            yield
        finally:
            for name, value in layer.items():
                value.copy_(own[name])


class Alignment(NamedTuple):
    """How well a reference's layer fits a learner, measured on some rows."""

    learner: float
    """Accuracy of the learner as it is."""
    reference: float
    swapped: float
    """Accuracy of the learner with the reference's layer in place of its own."""
    chance: float
    cosine: float
    """Of the two layers' weights, all in a row."""
    num_rows: int
    is_whole: bool
    """The layer is the whole network: nothing is swapped then, and the cosine decides."""

    @property
    def surviving(self) -> float:
        """Share of the reference's accuracy above chance that its layer brings into the learner; NaN if it has none."""
        above = self.reference - self.chance
        return (self.swapped - self.chance) / above if self._knows_something else math.nan

    @property
    def _knows_something(self) -> bool:
        error = math.sqrt(self.chance * (1 - self.chance) / self.num_rows)
        return self.reference - self.chance > 2 * error

    @property
    def complaint(self) -> str | None:
        """What is wrong, with the figures; None if nothing is."""
        told = (
            f"accuracy on {self.num_rows} rows: learner {self.learner:.3f}, reference {self.reference:.3f}, learner "
            f"with the reference's layer {self.swapped:.3f}, chance {self.chance:.3f}; cosine of the weights "
            f"{self.cosine:.3f}"
        )
        if not self._knows_something:
            return f"the reference knows nothing of these rows, so its mimic scores are noise ({told})"
        if self.is_whole and self.cosine < MIN_COSINE:
            return (
                "the reference's weights are not aligned with the learner's: they have another origin, and mimic "
                f"scores on the way there are noise ({told})"
            )
        if self.surviving < MIN_SURVIVING:
            return (
                f"the reference's mimic layer is not aligned with the learner: {max(0.0, self.surviving):.0%} of what "
                f"it knows survives there, so mimic scores are noise ({told})"
            )
        return None


def cosine_of(layer: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Cosine of two sets of weights, all in a row; 0 if one of them is nought."""
    pairs = [
        (value.detach().double().flatten(), reference[name].detach().double().flatten())
        for name, value in layer.items()
    ]
    product, own, other = (
        sum(float(a @ b) for a, b in some) for some in (pairs, _squares(pairs, 0), _squares(pairs, 1))
    )
    return product / math.sqrt(own * other) if own and other else 0.0


def _squares(pairs: list[tuple[Tensor, Tensor]], side: int) -> list[tuple[Tensor, Tensor]]:
    return [(pair[side], pair[side]) for pair in pairs]
