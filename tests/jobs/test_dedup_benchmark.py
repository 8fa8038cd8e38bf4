from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.benchmarks.dedup import _demo_groups, _known_groups, outcome
from jobs.benchmarks.subsample import clustered


def test_a_row_is_rightly_removed_if_a_copy_of_it_stays():
    group = np.array([7, 7, 7, 1, 2, 3, 3])
    # 0 and 2 fall, 1 stays: right. 4 falls and has no copy: wrong. 5 and 6 both fall: wrong, none of them is left.
    found = outcome(group, np.array([1, 3]))
    assert (found.removed, found.rightly, found.should) == (5, 2, 3)
    assert (found.precision, found.recall) == (0.4, pytest.approx(2 / 3))
    nothing = outcome(np.array([1, 2]), np.array([0, 1]))
    assert (nothing.precision, nothing.recall) == (None, None)


def test_the_truth_names_groups_by_key(tmp_path):
    (tmp_path / "known_duplicates.csv").write_text("group,key,source_name\n0,a,x.jpg\n0,b,y.jpg\n")
    assert _known_groups(tmp_path) == {"a": "group 0", "b": "group 0"}
    pq.write_table(pa.table({"key": ["a", "b"], "duplicate_of": [None, "a"]}), tmp_path / "truth.parquet")
    assert _demo_groups(tmp_path / "truth.parquet") == {"b": "a"}


def test_synthetic_rows_are_unit_rows_that_a_seed_repeats():
    rows = clustered(100, 16, seed=3)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(100))
    assert torch.equal(rows, clustered(100, 16, seed=3))
    assert not torch.equal(rows, clustered(100, 16, seed=4))
