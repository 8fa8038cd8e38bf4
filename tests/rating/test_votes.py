from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.rating import votes
from curation.rating.database import NAME
from curation.rating.store import Answer, Store


@pytest.fixture
def voted(make_store: Callable[..., Store], folder: Path) -> Path:
    """Ann likes green best, then blue; is unsure once, and takes one vote back. Returns the file."""
    store = make_store(clock=lambda: 1_700_000_000.0)
    rater = store.rater(store.enter("Ann"))
    order = {"green": 2, "blue": 1, "red": 0}
    for place in range(9):
        assert store.assign(rater)
        [pair] = store.open_assignments(rater)
        left, right = (order[store.items[image].model] for image in (pair.left, pair.right))
        answer: Answer = "unsure" if place == 4 else "left" if left > right else "right"
        store.vote(rater, pair.token, answer, key=f"key {place}", seconds=2.0)
    store.undo(rater, "key 8")
    return folder / NAME


def test_results_are_of_standing_votes_and_know_which_side_each_model_stood_on(voted: Path) -> None:
    found = votes.results(voted)
    assert (found.num_votes, found.num_raters) == (8, 1)
    assert [model.name for model in found.models] == ["green", "blue", "red"]
    won = {(pair.first, pair.second): (pair.wins, pair.losses) for pair in found.pairs}
    assert won["blue", "green"][0] == 0 and won["blue", "red"][1] == 0 and won["green", "red"][1] == 0
    assert sum(pair.ties for pair in found.pairs) == 1


def test_the_export_has_every_vote_with_what_was_seen_and_no_name(voted: Path, tmp_path: Path) -> None:
    assert votes.export(voted, str(tmp_path / "v.parquet"), with_names=False) == 9
    table = pq.read_table(tmp_path / "v.parquet")
    rows = table.to_pylist()
    assert table.schema.equals(votes.EXPORTED) and [row["undone"] for row in rows] == [False] * 8 + [True]
    for row in rows:
        chosen = {"left": row["left_model"], "right": row["right_model"], "unsure": None}[row["answer"]]
        assert row["winner"] == chosen and row["rater_name"] is None and row["seconds"] == 2.0
        assert row["left_image"].endswith(".png") and row["left_model"] != row["right_model"]
    assert rows[0]["voted_at"] == datetime.datetime.fromtimestamp(1_700_000_000, datetime.UTC)
    votes.export(voted, str(tmp_path / "v.parquet"), with_names=True)
    assert set(pq.read_table(tmp_path / "v.parquet")["rater_name"].to_pylist()) == {"Ann"}


def test_a_study_without_a_vote_has_an_empty_export_and_results(
    make_store: Callable[..., Store], tmp_path: Path, folder: Path
) -> None:
    make_store()
    assert votes.export(folder / NAME, str(tmp_path / "v.parquet"), with_names=True) == 0
    assert pq.read_table(tmp_path / "v.parquet").schema.equals(votes.EXPORTED)
    assert votes.plain(votes.results(folder / NAME))["num_votes"] == 0
