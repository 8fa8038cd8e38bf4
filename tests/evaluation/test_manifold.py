from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curation.evaluation.manifold import manifold_metrics
from curation.numerics import distances


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def drawn(seed: int, n: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def test_the_worked_example_of_the_module() -> None:
    real, generated = column(0, 1, 2, 10), column(0.5, 1.6, 30, 31)
    assert manifold_metrics(real, generated, k_recall=1, k_coverage=1) == (0.5, 0.75, 1.0, 0.75)


def test_identical_sets_are_precise_and_recalled_and_far_ones_neither() -> None:
    x = drawn(0, 200)
    same = manifold_metrics(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    # A row lies in the balls of itself and of the rows whose fifth-nearest it may be: 6/5 of them on average or so.
    assert 1 <= same.density <= 2
    assert manifold_metrics(x, x + 1000) == (0, 0, 0, 0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.floats(0.3, 2))
def test_the_measures_are_their_definitions_over_all_pairs(seed: int, k_pr: int, k_dc: int, scale: float) -> None:
    real, generated = drawn(seed, 12).double(), drawn(seed + 1, 12, scale).double()
    to_real = torch.cdist(generated, real)

    def radii(x: Tensor, k: int) -> Tensor:
        return torch.cdist(x, x).sort(dim=1).values[:, k]  # place 0 is the row itself

    want = (
        (to_real <= radii(real, k_pr)).any(dim=1).double().mean().item(),
        (to_real.T <= radii(generated, k_pr)).any(dim=1).double().mean().item(),
        (to_real <= radii(real, k_dc)).sum().item() / (k_dc * 12),
        (to_real <= radii(real, k_dc)).any(dim=0).double().mean().item(),
    )
    found = manifold_metrics(real.float(), generated.float(), k_recall=k_pr, k_coverage=k_dc)
    assert found == pytest.approx(want)


def test_one_far_generated_row_inflates_recall_but_not_coverage() -> None:
    real, generated = column(*range(10)), column(0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 500)
    found = manifold_metrics(real, generated, k_recall=3, k_coverage=1)
    assert found.recall == 1 and found.coverage < 0.5


def test_blocks_do_not_change_the_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = drawn(2, 100), drawn(3, 100)
    whole = manifold_metrics(real, generated)
    monkeypatch.setattr(distances, "BLOCK_ROWS", 7)
    monkeypatch.setattr(distances, "BLOCK_KEYS", 9)
    assert manifold_metrics(real, generated) == pytest.approx(whole)


def test_sets_of_different_sizes_and_impossible_ks_are_refused() -> None:
    with pytest.raises(ValueError, match="sets must be of one size, the measures depend on it, got 4 and 5"):
        manifold_metrics(drawn(0, 4), drawn(0, 5))
    for ks in ({"k_recall": 0}, {"k_coverage": 6}):
        with pytest.raises(ValueError, match=r"k must be in \[1, 5\], the other rows"):
            manifold_metrics(drawn(0, 6), drawn(0, 6), **ks)
