from __future__ import annotations

import numpy as np
import pytest

from curation.numerics.krippendorff import krippendorff_alpha

# Krippendorff 2011, example C: four observers, twelve units, some not rated (0).
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3),
    (0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0),
)
UNITS, VALUES = np.array([(unit, value) for row in OBSERVERS for unit, value in enumerate(row) if value]).T


def test_alpha_is_that_of_the_papers_example() -> None:
    assert krippendorff_alpha(UNITS, VALUES) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(UNITS, VALUES, metric="interval") == pytest.approx(0.849, abs=5e-4)


def test_a_table_by_hand() -> None:
    # Units (a, a), (a, b): coincidences aa 2, ab 1, ba 1; observed 2, expected (4 - 1) of 2 x 3 x 1 = 6: 1 - 3 x 2 / 6.
    assert krippendorff_alpha(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])) == pytest.approx(0.0)
    assert krippendorff_alpha(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])) == 1.0
    assert krippendorff_alpha(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0])) == pytest.approx(-0.5)


def test_units_that_one_rater_saw_do_not_count() -> None:
    assert krippendorff_alpha(np.append(UNITS, 99), np.append(VALUES, 5)) == krippendorff_alpha(UNITS, VALUES)


def test_nothing_is_known_without_two_ratings_of_a_unit_or_two_values() -> None:
    assert krippendorff_alpha(np.array([], int), np.array([], int)) is None
    assert krippendorff_alpha(np.array([0, 1, 2]), np.array([1, 0, 1])) is None
    assert krippendorff_alpha(np.array([0, 0]), np.array([1, 1])) is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(N,\) both, got \(2,\) and \(3,\)"):
        krippendorff_alpha(np.zeros(2), np.zeros(3))
