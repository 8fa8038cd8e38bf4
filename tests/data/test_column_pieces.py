"""Later columns lie beside the sample tables, row by row, and are read with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.data import tables

OK = np.array([True, False, True, True])


def write_samples(output: str, number: int = 0) -> None:
    columns = {
        "address": np.arange(4),
        "uid": [f"{row:032x}" for row in range(4)],
        "key": list("abcd"),
        "shard": ["x.tar"] * 4,
        "offset": [0, 512, 1024, 1536],
        "status": ["ok" if ok else "dropped" for ok in OK],
        "reason": [None if ok else "image:missing" for ok in OK],
        "caption": list("abcd"),
        "width": [1] * 4,
        "height": [1] * 4,
        "sha256": ["0" * 64] * 4,
        "image_embedding": np.zeros((3, 2), np.float16),
        "text_embedding": np.zeros((3, 2), np.float16),
        "clip_score": [0.1, None, 0.2, 0.3],
    }
    tables.write(output, number, tables.sample_table(columns, [{"x": row} for row in range(4)]))


def test_a_piece_is_read_beside_its_table_under_its_own_names(tmp_path: Path) -> None:
    output = str(tmp_path)
    write_samples(output)
    vectors = np.arange(9, dtype=np.float16).reshape(3, 3)
    tables.write_piece(output, "net", 0, {"net": tables.spread(vectors, OK)})
    scores = tables.spread(np.array([1.0, 2.0, 3.0], np.float32), OK)
    tables.write_piece(output, "other", 0, {"other.clip_score": scores})
    read = tables.read(output, 0, ["net", "key", "other.clip_score", "json.x", "json.y"])
    assert read.column_names == ["net", "key", "other.clip_score", "json.x", "json.y"]
    assert read["net"].to_pylist() == [[0, 1, 2], None, [3, 4, 5], [6, 7, 8]]
    assert read["other.clip_score"].to_pylist() == [1.0, None, 2.0, 3.0]
    assert read["json.y"].null_count == 4
    assert tables.read(output, 0, ["net"], rows=range(2, 9))["net"].to_pylist() == [[3, 4, 5], [6, 7, 8]]
    assert {"net", "other.clip_score", "key"} <= set(tables.column_names(output, 0))
    assert "net" not in tables.own_column_names(output, 0)
    assert tables.vector_width(output, 0, "net") == 3


def test_the_sample_table_alone_is_read_when_no_column_is_named(tmp_path: Path) -> None:
    write_samples(str(tmp_path))
    tables.write_piece(str(tmp_path), "net", 0, {"net": pa.nulls(4, pa.float32())})
    assert "net" not in tables.read(str(tmp_path), 0).column_names


def test_what_is_not_there_or_does_not_fit_is_named(tmp_path: Path) -> None:
    output = str(tmp_path)
    write_samples(output)
    with pytest.raises(ValueError, match="has no column 'net'"):
        tables.read(output, 0, ["net"])
    tables.write_piece(output, "net", 0, {"net": pa.nulls(3, pa.float32())})
    with pytest.raises(ValueError, match="has 3 rows, its sample table 4"):
        tables.read(output, 0, ["net"])
    with pytest.raises(ValueError, match="has no column 'net.part'"):
        tables.read(output, 0, ["net.part"])
    with pytest.raises(ValueError, match="columns of the piece 'net' are called net or net.PART, got 'nets'"):
        tables.write_piece(output, "net", 0, {"nets": pa.nulls(4)})
    with pytest.raises(ValueError, match="'key' is string, no column of vectors"):
        tables.vector_width(output, 0, "key")


@pytest.mark.parametrize("name", ["", "a.b", "../up", "json", "uid", "1st"])
def test_a_piece_has_a_plain_name_that_hides_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="a piece's name is letters"):
        tables.check_piece_name(name, known=["uid"])
    assert tables.check_piece_name("mobile-net_2", known=["uid"]) == "mobile-net_2"


def test_values_are_spread_over_the_rows_that_have_one() -> None:
    with pytest.raises(ValueError, match="2 values came for 3 rows that have one"):
        tables.spread(np.zeros(2), OK)
    assert tables.spread(np.zeros((0, 5), np.float16), np.zeros(2, bool)).type == pa.list_(pa.float16(), 5)
