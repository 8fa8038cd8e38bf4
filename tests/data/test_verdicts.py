from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation import addresses
from curation.data import verdicts
from curation.data.verdicts import KeptRows, Verdict


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Shards 0 to 3 of which 0 has rows 1 and 5 kept, 1 none, 2 row 0, 3 none; written in two blocks."""
    where = np.concatenate([addresses.pack(0, np.array([1, 5])), addresses.pack(2, np.array([0]))])
    score = np.array([0.5, -1.0, np.nan], np.float32)
    blocks = iter([KeptRows(where[:1], score[:1]), KeptRows(where[1:], score[1:])])
    assert not verdicts.exists(str(tmp_path))
    verdicts.write(str(tmp_path), blocks, num_rows=3, num_shards=4)
    assert verdicts.exists(str(tmp_path))
    return str(tmp_path)


def table(shard: int, rows: list[int]) -> pa.Table:
    return pa.table({"address": addresses.pack(shard, np.array(rows, np.int64))})


def test_rows_pass_that_were_kept_and_have_their_scores(folder):
    verdict = Verdict("typicality", folder)
    assert verdict.passes(table(0, [0, 1, 5, 7])).tolist() == [False, True, True, False]
    scores = np.array([np.nan, 0.5, -1.0, np.nan], np.float32)
    np.testing.assert_array_equal(verdict.scores(table(0, [0, 1, 5, 7])), scores)
    assert verdict.passes(table(1, [0, 1])).tolist() == [False, False]
    assert np.isnan(verdict.scores(table(1, [0, 1]))).all()
    assert verdict.passes(table(2, [0])).tolist() == [True]
    assert verdict.passes(table(3, [])).tolist() == []


def test_the_files_are_plain_numpy_arrays(folder):
    assert np.load(Path(folder) / "address.npy").tolist() == [1, 5, 2 << 20]
    assert np.load(Path(folder) / "begins.npy").tolist() == [0, 2, 2, 3, 3]


def test_more_or_fewer_rows_than_announced_leave_no_verdict(tmp_path):
    with pytest.raises(AssertionError, match="1 rows came, 2 were announced"):
        verdicts.write(
            str(tmp_path), iter([KeptRows(np.array([3]), np.zeros(1, np.float32))]), num_rows=2, num_shards=1
        )
    assert not verdicts.exists(str(tmp_path))
