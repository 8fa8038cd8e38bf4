import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.numerics import folding
from curation.numerics.folding import SortedBatch

# Small keys meet often; large and negative ones do not share an int64 with their row.
small, wide = st.integers(0, 5), st.integers(-(2**63), 2**63 - 1)
batches = st.lists(st.tuples(small, st.floats(-1e6, 1e6, width=32)), max_size=40) | st.lists(
    st.tuples(small | wide, st.floats(-1e6, 1e6, width=32)), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(rows=batches, block_rows=st.sampled_from([1, 3, 10_240]), presorted=st.booleans())
def test_the_folds_of_a_batch_are_what_a_dict_gathers_by_key(rows, block_rows, presorted):
    rows = sorted(rows, key=lambda row: row[0]) if presorted else rows
    values = np.array([value for _, value in rows], dtype=np.float32)
    gathered = {}
    for key, value in rows:
        gathered.setdefault(key, []).append(value)
    batch = SortedBatch(np.array([key for key, _ in rows], dtype=np.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "BLOCK_ROWS", block_rows)
        folds = list(batch)
        again = list(batch)
    assert [key for folded in folds for key in folded.keys.tolist()] == sorted(gathered)
    assert [key for folded in again for key in folded.keys.tolist()] == sorted(gathered)
    for folded in folds:
        in_order = values[folded.order]
        came = [gathered[key] for key in folded.keys.tolist()]
        assert folded.counts().tolist() == [len(all_of) for all_of in came]
        assert in_order.tolist() == [value for all_of in came for value in all_of]
        assert folded.firsts(in_order).tolist() == [all_of[0] for all_of in came]
        assert folded.largest(in_order).tolist() == [max(all_of) for all_of in came]
        assert folded.means(in_order) == pytest.approx([sum(all_of) / len(all_of) for all_of in came])
        assert in_order.tolist() == values[folded.order].tolist()
        assert len(folded.order) - max(map(len, came)) < block_rows


def test_a_key_too_wide_to_share_an_int64_with_its_row_is_sorted_all_the_same():
    for top in (2**62, 2**63 - 1):
        (folded,) = SortedBatch(np.array([top, 5, top, 0] * 3))
        assert folded.keys.tolist() == [0, 5, top]
        assert folded.order.tolist() == [3, 7, 11, 1, 5, 9, 0, 2, 4, 6, 8, 10]
    (folded,) = SortedBatch(np.array([5, -(2**63), 5]))
    assert (folded.keys.tolist(), folded.order.tolist()) == ([-(2**63), 5], [1, 0, 2])


def test_a_batch_without_rows_has_no_block():
    assert list(SortedBatch(np.zeros(0, np.int64))) == []
