"""What every file in methods/ must hold. A new method is tested here by being there."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from curation import methods
from curation.columns import is_run_value
from curation.methods import load_selector, selector_class, selector_names
from curation.selector import PoolSelector, Rows, Selection, Selector, check_needs, take

N = 64
KEEP = 20


def unit_rows(n: int, rng: Generator, *, width: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, width, generator=rng), dim=1).half()


MAKERS: dict[str, Callable[[int, Generator], Tensor]] = {
    "uid": lambda n, rng: torch.randint(-(2**62), 2**62, (n, 2), generator=rng),
    # Small, so that images repeat.
    "sha256": lambda n, rng: torch.randint(4, (n, 2), generator=rng),
    # Rounded, so that there are ties.
    "clip_score": lambda n, rng: (torch.rand(n, generator=rng) * 2 - 1).mul(8).round().div(8),
    "learner_loss": lambda n, rng: (torch.rand(n, generator=rng) * 5).mul(4).round().div(4),
    "reference_loss": lambda n, rng: (torch.rand(n, generator=rng) * 5).mul(4).round().div(4),
    "mimic_score": lambda n, rng: torch.randn(n, generator=rng).mul(4).round().div(4),
    "head_residual": lambda n, rng: torch.randn(n, 3, generator=rng).softmax(dim=1) - torch.eye(3)[torch.arange(n) % 3],
    "head_input": lambda n, rng: torch.randn(n, 5, generator=rng),
    "comparison_gradient": lambda n, rng: torch.randn(3, 5, generator=rng),
    "rating_percentile": lambda n, rng: torch.rand(n, generator=rng).mul(32).round().div(32),
    "image_embedding": lambda n, rng: unit_rows(n, rng, width=8),
    "text_embedding": lambda n, rng: unit_rows(n, rng, width=8),
    "reference_image_embedding": lambda n, rng: unit_rows(n, rng, width=12),
    "reference_text_embedding": lambda n, rng: unit_rows(n, rng, width=12),
    "factors.representativeness": lambda n, rng: torch.rand(n, generator=rng),
    "factors.rarity": lambda n, rng: torch.rand(n, generator=rng),
    "usage_count": lambda n, rng: torch.randint(4, (n,), generator=rng).float(),
    # Some rows have no loss yet.
    "ledger_value": lambda n, rng: torch.where(torch.arange(n) % 9 == 0, torch.nan, torch.rand(n, generator=rng)),
    "ledger_variance": lambda n, rng: torch.where(torch.arange(n) % 9 == 0, torch.nan, torch.rand(n, generator=rng)),
    "last_step": lambda n, rng: torch.randint(30, (n,), generator=rng).float(),
    "label": lambda n, rng: torch.randint(3, (n,), generator=rng),
    "round": lambda n, rng: torch.tensor(2),
    "run_seed": lambda n, rng: torch.tensor(5),
    "planned_uses": lambda n, rng: torch.tensor(8.0),
    "mean_usage": lambda n, rng: torch.tensor(1.5),
    "last_round_step": lambda n, rng: torch.tensor(20),
    "logit_scale": lambda n, rng: torch.tensor(20.0),
    "logit_bias": lambda n, rng: torch.tensor(-6.0),
    "reference_logit_scale": lambda n, rng: torch.tensor(30.0),
    "reference_logit_bias": lambda n, rng: torch.tensor(-10.0),
}
"""Column or run value -> random values for n rows (a run value ignores n)."""


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("alchemist", {"rule": "gaussian"}),
    ("alchemist", {"rule": "top"}),
    ("alchemist", {"rule": "block"}),
    ("alchemist", {"rule": "random"}),
    ("jest", {"scoring": "easy_reference"}),
    ("jest", {"scoring": "hard_learner", "num_chunks": 100}),
    ("jest", {"form": "softmax"}),
    ("jest", {"form": "softmax", "with_self_term": False}),
    ("rho", {"sampling": True}),
    ("semantic_dedup", {"min_cosine": 0.5, "prefer": "clip_score"}),
    ("typicality", {"rule": "lightly"}),
    ("typicality", {"rule": "typiclust"}),
    ("typicality", {"rule": "top"}),
    ("rho", {"temperature": 0.3}),
    ("dynamic", {"schedule": "reversed", "usage": "frequency"}),
    ("dynamic", {"temperature": 0.05, "penalty": 0.1}),
    ("infobatch", {"kept_share": 0.2}),
    ("rs2", {"replacement": True}),
]
"""Forms of a method that are held to the contract beside its defaults."""


class Case(NamedTuple):
    selector: Selector
    rows: Rows
    keep: int | None


def rows_for(needs: frozenset[str], n: int) -> Rows:
    """Random rows that hold `needs` and a uid; the same for the same arguments."""
    if lacking := sorted(needs - MAKERS.keys()):
        pytest.fail(f"tests/test_methods_contract.py cannot make {lacking}: add a maker for each to MAKERS")
    rng = Generator().manual_seed(0)
    return {name: MAKERS[name](n, rng) for name in sorted(needs | {"uid"})}


def choose(case: Case, *, seed: int = 0, keep: int | None = None, rows: Rows | None = None) -> Selection:
    keep = case.keep if keep is None else keep
    return case.selector.select(rows or case.rows, keep, 0.5, Generator().manual_seed(seed))


def case_id(param: tuple[str, dict[str, Any]]) -> str:
    name, fields = param
    return " ".join([name, *(f"{field}={value}" for field, value in fields.items())])


ALL = [*((name, {}) for name in selector_names()), *VARIANTS]
OF_FIXED_SIZE = [(name, fields) for name, fields in ALL if load_selector(name, **fields).fixed_size]
OF_POOLS = [(name, fields) for name, fields in ALL if isinstance(load_selector(name, **fields), PoolSelector)]


@pytest.fixture(params=ALL, ids=case_id)
def case(request: pytest.FixtureRequest) -> Case:
    """A method; a test that is about some of them only names those, as in `case` with OF_POOLS."""
    name, fields = request.param
    selector = load_selector(name, **fields)
    return Case(selector, rows_for(selector.needs, N), KEEP if selector.fixed_size else None)


@pytest.mark.parametrize("name", selector_names())
def test_the_file_holds_one_frozen_dataclass_and_names_its_source(name):
    cls = selector_class(name)
    assert dataclasses.is_dataclass(cls)
    docstring = importlib.import_module(f"curation.methods.{name}").__doc__ or ""
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi:10\.", docstring), f"methods/{name}.py names no arXiv number or doi"
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_selector(name).needs = frozenset()  # pyright: ignore[reportAttributeAccessIssue]


def test_it_satisfies_the_protocol_and_says_what_it_is(case):
    assert isinstance(case.selector, Selector)
    assert isinstance(case.selector.needs, frozenset)
    assert case.selector.records in ("score", "loss")
    assert type(case.selector.fixed_size) is bool
    assert type(case.selector.unbiased) is bool
    if isinstance(case.selector, PoolSelector):
        assert "uid" in case.selector.needs, "ties are parted by the uid"


def test_it_needs_no_more_than_it_says(case):
    named = {name: column for name, column in case.rows.items() if name in case.selector.needs}
    choose(case, rows=named)


def test_scores_are_finite_float32_one_per_row(case):
    score = case.selector.score(case.rows, 0.5)
    assert score.shape == (N,)
    assert score.dtype == torch.float32
    assert torch.isfinite(score).all()


def test_a_selection_is_distinct_rows_with_one_weight_each(case):
    indices, weights = choose(case)
    assert indices.dtype == torch.int64
    assert len(indices.unique()) == len(indices)
    assert ((indices >= 0) & (indices < N)).all()
    if case.selector.fixed_size:
        assert len(indices) == KEEP
    assert weights.shape == indices.shape
    assert weights.dtype == torch.float32
    assert (torch.isfinite(weights) & (weights >= 0)).all()
    if not case.selector.unbiased and len(weights):
        assert weights.mean().item() == pytest.approx(1, abs=1e-5)


def test_an_equal_seed_gives_an_equal_selection(case):
    first, second = choose(case, seed=7), choose(case, seed=7)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.weights, second.weights)


def test_rows_are_left_as_they_were(case):
    before = {name: value.clone() for name, value in case.rows.items()}
    case.selector.score(case.rows, 0.5)
    choose(case)
    assert case.rows.keys() == before.keys()
    for name in before:
        torch.testing.assert_close(case.rows[name], before[name], rtol=0, atol=0, equal_nan=True)


def test_global_random_state_is_left_as_it_was(case):
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    case.selector.score(case.rows, 0.5)
    choose(case)
    assert torch.equal(torch.get_rng_state(), torch_before)
    numpy_after = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    assert numpy_after["pos"] == numpy_before["pos"]
    assert (numpy_after["key"] == numpy_before["key"]).all()


@pytest.mark.parametrize("case", OF_FIXED_SIZE, ids=case_id, indirect=True)
def test_none_and_all_of_the_rows_may_be_kept_and_no_more(case):
    assert len(choose(case, keep=0).indices) == 0
    assert sorted(choose(case, keep=N).indices.tolist()) == list(range(N))
    with pytest.raises(ValueError, match=rf"keep must be in \[0, {N}\], got {N + 1}"):
        choose(case, keep=N + 1)
    with pytest.raises(ValueError, match=r"keep must be in \[0, 64\], got -1"):
        choose(case, keep=-1)


def test_each_needed_column_is_missed_by_name(case):
    for needed in case.selector.needs:
        rows = {name: column for name, column in case.rows.items() if name != needed}
        if all(is_run_value(name) for name in rows):
            rows["some_other_column"] = torch.zeros(N)
        with pytest.raises(ValueError, match=rf"needs \['{needed}'\]"):
            check_needs(case.selector, rows)
        with pytest.raises(ValueError, match=rf"needs \['{needed}'\]"):
            choose(case, rows=rows)


@pytest.mark.parametrize("case", OF_POOLS, ids=case_id, indirect=True)
def test_permuted_rows_give_the_same_samples_of_a_pool(case):
    permutation = torch.randperm(N, generator=Generator().manual_seed(1))
    plain = choose(case)
    permuted = choose(case, rows=take(case.rows, permutation))
    assert torch.equal(permutation[permuted.indices], plain.indices)


@pytest.mark.parametrize("case", OF_POOLS, ids=case_id, indirect=True)
def test_a_sort_key_is_decided_by_its_row_alone(case):
    _, rows, _ = case
    keys = case.selector.sort_key(rows, 0.5, 3)
    assert keys.shape == (N,)
    assert keys.dtype == torch.float32
    some = torch.tensor([5, 0, 41])
    assert torch.equal(case.selector.sort_key(take(rows, some), 0.5, 3), keys[some])
    none = torch.tensor([], dtype=torch.int64)
    assert case.selector.sort_key(take(rows, none), 0.5, 3).shape == (0,)


def test_a_column_without_a_maker_fails_with_its_name():
    with pytest.raises(pytest.fail.Exception, match=r"cannot make \['a_new_column'\]: add a maker"):
        rows_for(frozenset({"uid", "a_new_column"}), N)


def test_every_file_in_methods_is_a_method_unless_it_begins_with_an_underscore():
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")}
    assert set(selector_names()) == {name for name in files if not name.startswith("_")}
    assert {"uniform", "clip_score", "jest", "rho"} <= set(selector_names())


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(ValueError, match="no method is named 'clipscore', did you mean 'clip_score'"):
        load_selector("clipscore")
    with pytest.raises(ValueError, match="no method is named '_pool_order', did you mean"):
        load_selector("_pool_order")


def test_an_unknown_field_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match=r"method 'uniform' has no field 'temperature', its fields are \[\]"):
        load_selector("uniform", temperature=1.0)


def test_a_field_of_another_type_is_refused_by_name():
    with pytest.raises(ValueError, match=r"method 'jest', num_chunks: Input should be a valid integer, got '16'"):
        load_selector("jest", num_chunks="16")
    with pytest.raises(ValueError, match=r"method 'jest', scoring: Input should be 'learnability', .*, got 'easy'"):
        load_selector("jest", scoring="easy")
    assert load_selector("grad_mimic", temperature=1) == load_selector("grad_mimic", temperature=1.0)


@pytest.fixture
def method_file(tmp_path, monkeypatch):
    """Writes methods/made_up.py into a folder that the loader also looks through."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "curation.methods.made_up", raising=False)
    return lambda source: (tmp_path / "made_up.py").write_text(source)


MADE_UP = inspect.cleandoc("""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class MadeUp:
        temperature: float
        needs = frozenset()
        records = "score"
        fixed_size = True
        unbiased = False
        def score(self, rows, progress): ...
        def select(self, rows, keep, progress, rng): ...
""")


def test_a_file_is_all_that_a_new_method_takes(method_file):
    method_file(MADE_UP)
    assert "made_up" in selector_names()
    selector = load_selector("made_up", temperature=2.0)
    assert selector == selector_class("made_up")(temperature=2.0)


def test_a_field_without_a_default_is_asked_for(method_file):
    method_file(MADE_UP)
    with pytest.raises(ValueError, match=r"method 'made_up' lacks a value for \['temperature'\]"):
        load_selector("made_up")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("", r"\[\]"),
        (MADE_UP.replace("(frozen=True)", ""), r"\[\]"),
        (MADE_UP + "\n" + MADE_UP.replace("MadeUp", "Second"), r"\['MadeUp', 'Second'\]"),
    ],
    ids=["no class", "not frozen", "two classes"],
)
def test_a_file_without_exactly_one_frozen_selector_is_refused(method_file, source, found):
    method_file(source)
    with pytest.raises(TypeError, match=rf"methods/made_up.py must hold exactly one frozen dataclass .* {found}"):
        load_selector("made_up", temperature=2.0)


def test_a_class_that_breaks_the_protocol_is_refused(method_file):
    method_file(MADE_UP.replace("unbiased = False", ""))
    with pytest.raises(TypeError, match="MadeUp in methods/made_up.py does not satisfy the Selector protocol"):
        load_selector("made_up", temperature=2.0)
