import subprocess
from itertools import product
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.benchmarks import pairs
from jobs.benchmarks.pairs import interleaved, paired_ratio, provenance


def test_the_order_alternates_and_each_figure_keeps_its_side():
    calls = []

    def side(name):
        def run():
            calls.append(name)
            return f"{name}{len(calls)}"

        return run

    figures = interleaved(side("o"), side("r"), pairs=3)  # pyright: ignore[reportArgumentType]
    assert calls == ["o", "r", "r", "o", "o", "r"]
    assert figures == [("o1", "r2"), ("o4", "r3"), ("o5", "r6")]


def test_no_pairs_are_no_figures():
    assert interleaved(lambda: 1.0, lambda: 1.0, pairs=0) == []


def test_the_median_of_seven_lies_in_their_range_with_98_percent():
    ratio = paired_ratio([(n, 2.0) for n in (7, 1, 3, 2, 6, 4, 5)])
    assert ratio == (2.0, 0.5, 3.5, 1 - 2 / 2**7, 7)
    assert str(ratio) == "2.000 [0.500, 3.500] (98%, 7 pairs)"


@pytest.mark.parametrize(
    ("n", "place"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3), (17, 4), (20, 5), (25, 7)]
)
def test_the_interval_is_that_of_the_tables_for_the_sign_test(n, place):
    ratio = paired_ratio([(rank, 1.0) for rank in range(n)])
    assert (ratio.low, ratio.high) == (place, n - 1 - place)
    assert ratio.confidence >= 0.95 or n < 6


@pytest.mark.parametrize(("n", "at_least"), [(3, 0.1), (4, 0.5), (5, 0.9), (7, 0.5), (8, 0.0)])
def test_the_confidence_is_the_exact_share_of_draws_whose_interval_holds_the_median(n, at_least):
    # Each draw lies below or above the true median with equal chance; the interval holds it if its ends part.
    held = 0
    for signs in product((-1.0, 1.0), repeat=n):
        ratio = paired_ratio([(sign, 1.0) for sign in signs], at_least=at_least)
        held += ratio.low < 0 < ratio.high
    assert held / 2**n == pytest.approx(ratio.confidence)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.floats(0.1, 10))
def test_equal_sides_have_ratio_one_and_the_median_lies_in_the_interval(figures, scale):
    assert paired_ratio([(figure, figure) for figure in figures])[:3] == (1.0, 1.0, 1.0)
    ratio = paired_ratio([(figure, scale) for figure in figures])
    assert ratio.low <= ratio.median <= ratio.high


@pytest.mark.parametrize("figures", [[], [(1.0, 0.0)], [(1.0, 1.0), (1.0, -2.0)], [(inf, -inf)]])
def test_no_pair_or_a_rival_without_a_figure_is_refused(figures):
    with pytest.raises(ValueError, match=r"figures must be pairs whose second is positive, got \["):
        paired_ratio(figures)


def test_provenance_names_date_hardware_and_the_commit_of_this_code_wherever_one_stands(tmp_path, monkeypatch):
    here = provenance()
    monkeypatch.chdir(tmp_path)
    assert provenance() == here
    assert set(here) == {"date", "cpus", "cpu", "python", "commit"}
    assert here["cpus"] >= 1
    assert all(here.values())


def test_without_git_the_commit_is_unknown(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert pairs.provenance()["commit"] == "unknown"


def test_changed_files_show_in_the_commit(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "pairs.py").write_text("old")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(pairs, "__file__", str(tmp_path / "pairs.py"))
    clean = provenance()["commit"]
    (tmp_path / "pairs.py").write_text("new")
    assert provenance()["commit"] == f"{clean}-dirty"
    assert len(clean) >= 7
