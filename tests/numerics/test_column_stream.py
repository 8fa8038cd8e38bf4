import io
from pathlib import Path

import numpy as np
import pytest

from curation.numerics.column_stream import read_column, slices, write_column


def test_slices_cover_a_length_once():
    assert [list(range(7))[rows] for rows in slices(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(slices(0, 3)) == []


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize("length", [0, 1, 700_001])
def test_a_column_is_read_as_it_was_written_by_us_and_by_numpy(dtype, length):
    column = np.random.default_rng(0).integers(0, 65536, length).astype(dtype)
    file = io.BytesIO()
    written = write_column(file, column)
    assert np.array_equal(np.load(io.BytesIO(file.getvalue()), allow_pickle=False), column)
    read = np.zeros(length, dtype)
    read_column(io.BytesIO(file.getvalue()), read, written, name="x")
    assert np.array_equal(read, column)


def test_a_strided_view_is_a_column_too():
    table = np.zeros(5, dtype=[("value", np.float32), ("step", np.uint32)])
    table["value"] = [-1.0, 0.0, -0.0, 2.0, 3.0]
    file = io.BytesIO()
    written = write_column(file, table["value"])
    file.seek(0)
    read = np.zeros_like(table)
    read_column(file, read["value"], written, name="x")
    assert read["value"].tobytes() == table["value"].tobytes()
    assert not read["step"].any()


def test_a_file_that_gives_less_than_it_was_asked_for_is_read_to_its_end():
    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    column = np.arange(1000, dtype=np.uint32)
    file = io.BytesIO()
    written = write_column(file, column)
    read = np.zeros(1000, np.uint32)
    read_column(Slow(file.getvalue()), read, written, name="x")
    assert np.array_equal(read, column)


def test_zeros_that_are_read_take_no_memory():
    file = io.BytesIO()
    written = write_column(file, np.zeros(100_000_000, np.uint16))
    file.seek(0)
    before = _resident_bytes()
    read_column(file, read := np.zeros(100_000_000, np.uint16), written, name="x")
    assert _resident_bytes() - before < 50_000_000
    assert len(read) == 100_000_000


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_what_is_no_column_of_this_kind_and_length_is_refused():
    file = io.BytesIO()
    written = write_column(file, np.arange(9, dtype=np.uint16))
    data = file.getvalue()
    for wrong, column, complaint in (
        (b"no npy", np.zeros(9, np.uint16), "score.count is damaged: "),
        (data, np.zeros(9, np.uint32), r"score.count must be uint32 \(9,\), got uint16 \(9,\)"),
        (data, np.zeros(8, np.uint16), r"score.count must be uint16 \(8,\), got uint16 \(9,\)"),
        (data[:-3], np.zeros(9, np.uint16), "score.count is cut off: it ends at row 7 of 9"),
        (data + b"\0", np.zeros(9, np.uint16), "score.count goes on after its 9 rows"),
        (data[:-1] + b"\1", np.zeros(9, np.uint16), "score.count is damaged: its checksum is"),
    ):
        with pytest.raises(ValueError, match=complaint):
            read_column(io.BytesIO(wrong), column, written, name="score.count")
