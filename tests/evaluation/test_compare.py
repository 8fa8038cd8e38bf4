from __future__ import annotations

import pytest
import torch

from curation.evaluation.compare import Reference
from curation.evaluation.fid import frechet_distance
from curation.evaluation.manifold import manifold_metrics


def drawn(seed: int, n: int, d: int = 6) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_an_arm_of_all_rows_is_measured_as_the_two_sets_are() -> None:
    real, arm = drawn(0, 80), drawn(1, 80) + 0.5
    found = Reference(real).compare({"arm": arm}, seed=0)["arm"]
    assert found.rows == 80 and found.distance == pytest.approx(frechet_distance(real, arm))
    assert found[2:] == pytest.approx(manifold_metrics(real, arm))


def test_a_sample_of_the_reference_beats_a_shifted_one_on_every_measure() -> None:
    real = drawn(2, 400)
    found = Reference(real).compare({"sample": real[:100], "shifted": real[:100] + 2}, seed=0)
    assert found["sample"].distance < 0.3 < found["shifted"].distance
    assert all(a > b for a, b in zip(found["sample"][2:], found["shifted"][2:], strict=True))


def test_wide_features_are_measured_in_the_references_principal_directions() -> None:
    scale = torch.tensor([10.0, 5.0, 1e-3, 1e-3, 1e-3, 1e-3])
    real, arm = drawn(3, 200) * scale, drawn(4, 200) * scale
    reference = Reference(real, max_width=2)
    assert reference.projected(arm).shape == (200, 2)
    assert reference.distance(arm) == pytest.approx(frechet_distance(real[:, :2], arm[:, :2]), rel=1e-3)


def test_arms_of_different_sizes_or_larger_than_the_reference_are_refused() -> None:
    reference = Reference(drawn(5, 20))
    with pytest.raises(
        ValueError, match=r"arms must be of one size, all measures depend on it, got \{'a': 8, 'b': 9\}"
    ):
        reference.compare({"a": drawn(0, 8), "b": drawn(0, 9)}, seed=0)
    with pytest.raises(ValueError, match="the reference has 20 rows, fewer than an arm's 21"):
        reference.compare({"a": drawn(0, 21)}, seed=0)
    with pytest.raises(ValueError, match="max_width must be at least 1, got 0"):
        Reference(drawn(5, 20), max_width=0)
