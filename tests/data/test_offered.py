from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.data import offered
from curation.data.offered import OfferedShard, Rounds

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum)


def rows_of(rounds: Rounds, start: int, stop: int) -> list[tuple[int, int]]:
    return [(p.place, row) for p in rounds.pieces(start, stop) for row in range(p.first, p.first + p.count)]


@given(SHARDS, st.integers(1, 50), st.integers(0, 3))
def test_each_round_offers_every_row_exactly_once(sizes: list[int], segment_rows: int, number: int) -> None:
    rounds = Rounds(np.array(sizes), segment_rows=segment_rows, seed=5)
    seen = rows_of(rounds, number * rounds.rows, (number + 1) * rounds.rows)
    assert sorted(seen) == [(place, row) for place, size in enumerate(sizes) for row in range(size)]


@given(SHARDS, st.integers(1, 50), st.integers(1, 60), st.integers(0, 100))
def test_a_position_is_one_number(sizes: list[int], segment_rows: int, batch: int, start: int) -> None:
    whole = Rounds(np.array(sizes), segment_rows=segment_rows, seed=1)
    resumed = Rounds(np.array(sizes), segment_rows=segment_rows, seed=1)
    stream = rows_of(whole, 0, start + batch)
    assert rows_of(resumed, start, start + batch) == stream[start:]


def test_rounds_and_seeds_differ_in_order() -> None:
    rounds = Rounds(np.array([64, 64]), segment_rows=4, seed=0)
    first, second = rows_of(rounds, 0, 128), rows_of(rounds, 128, 256)
    other = rows_of(Rounds(np.array([64, 64]), segment_rows=4, seed=1), 0, 128)
    assert first != second
    assert first != other


def test_a_range_may_span_rounds() -> None:
    rounds = Rounds(np.array([3, 2]), segment_rows=2, seed=0)
    assert len(rows_of(rounds, 3, 12)) == 9
    assert rows_of(rounds, 3, 12) == rows_of(rounds, 3, 5) + rows_of(rounds, 5, 10) + rows_of(rounds, 10, 12)


def test_what_cannot_be_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="shards offer rows"):
        Rounds(np.array([0, 0]), segment_rows=4, seed=0)
    with pytest.raises(ValueError, match="segment_rows must be at least 1"):
        Rounds(np.array([3]), segment_rows=0, seed=0)
    with pytest.raises(ValueError, match="a range from 0 on"):
        Rounds(np.array([3]), segment_rows=1, seed=0).pieces(2, 1)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_offered_rows_are_those_not_dropped(dropped: list[bool]) -> None:
    mask = np.array(dropped)
    shard = OfferedShard(0, "a.tar", "f", len(mask), np.flatnonzero(mask).astype(np.int32))
    kept = np.flatnonzero(~mask)
    assert shard.offered == len(kept)
    for first in range(len(kept)):
        np.testing.assert_array_equal(shard.row_numbers(first, len(kept) - first), kept[first:])


def test_what_is_offered_round_trips(tmp_path: Path) -> None:
    shards = [
        OfferedShard(0, "a.tar", "1:2", 5, np.array([1, 4], np.int32)),
        OfferedShard(7, "b.tar", "3:4", 1, np.zeros(0, np.int32)),
    ]
    offered.save(str(tmp_path / "pool.parquet"), shards)
    for saved, shard in zip(offered.load(str(tmp_path / "pool.parquet")), shards, strict=True):
        assert saved[:4] == shard[:4]
        np.testing.assert_array_equal(saved.dropped, shard.dropped)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = offered.SCHEMA.with_metadata({"format_version": "99"})
    monkeypatch.setattr(offered, "SCHEMA", newer)
    offered.save(str(tmp_path / "pool.parquet"), [])
    with pytest.raises(ValueError, match="format_version 99"):
        offered.load(str(tmp_path / "pool.parquet"))
