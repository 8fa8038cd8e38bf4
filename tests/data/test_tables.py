import json
import math
import uuid
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.columns import FORMAT_VERSION, SAMPLE_COLUMNS
from curation.data import storage, tables
from curation.data.json_columns import TOO_DEEP, as_text, json_column, text_of
from curation.data.tables import Rechunk, conform, rechunked, unify

DIM = 3
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2), max_leaves=6
)


@pytest.fixture(params=["local", "memory"])
def output(request, tmp_path):
    return str(tmp_path / "out") if request.param == "local" else f"memory:///{uuid.uuid4().hex}"


def columns_of(n, *, dropped=()):
    """Our columns of n rows, of which those in `dropped` have no embedding."""
    ok = [row for row in range(n) if row not in dropped]
    rng = np.random.default_rng(n)
    return {
        "address": np.arange(n, dtype=np.int64) + 2**20,
        "uid": [f"{row:032x}" for row in range(n)],
        "key": [f"{row:09d}" for row in range(n)],
        "shard": ["/pool/00000.tar"] * n,
        "offset": [row * 512 for row in range(n)],
        "status": ["dropped" if row in dropped else "ok" for row in range(n)],
        "reason": ["image:empty" if row in dropped else None for row in range(n)],
        "caption": [None if row in dropped else f"Bild {row} – ü日本" for row in range(n)],
        "width": [None if row in dropped else row for row in range(n)],
        "height": [None if row in dropped else row for row in range(n)],
        "sha256": [None if row in dropped else "0" * 64 for row in range(n)],
        "image_embedding": rng.standard_normal((len(ok), DIM)).astype(np.float16),
        "text_embedding": rng.standard_normal((len(ok), DIM)).astype(np.float16),
        "clip_score": [None if row in dropped else -0.5 for row in range(n)],
    }


def table_of(fields, *, dropped=()):
    return tables.sample_table(columns_of(len(fields), dropped=dropped), fields)


def with_json(name, *values):
    return table_of([{name: value} for value in values])


class TestJsonColumn:
    @pytest.mark.parametrize(
        ("values", "dtype"),
        [
            ([], pa.null()),
            ([None, None], pa.null()),
            ([True, None, False], pa.bool_()),
            ([0, -1, None, 2**63 - 1, -(2**63)], pa.int64()),
            ([0.5, None, -0.0, 1e300], pa.float64()),
            ([1, 0.5, None, 2**53], pa.float64()),
            (["", "ü日本", None, "null"], pa.string()),
            ([[], None, [[]]], pa.list_(pa.list_(pa.null()))),
            ([[], []], pa.list_(pa.null())),
            ([[None], [1]], pa.list_(pa.int64())),
            ([["a", None], []], pa.list_(pa.string())),
            ([[True], [False, None]], pa.list_(pa.bool_())),
            ([[0, 0.5]], pa.list_(pa.float64())),
            ([[[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, 1.0]], [], None], pa.list_(pa.list_(pa.float64()))),  # face_bboxes
            ([[[[[1]]]]], pa.list_(pa.list_(pa.list_(pa.list_(pa.int64()))))),
        ],
    )
    def test_one_kind_of_value_is_kept_in_its_own_type(self, values, dtype):
        column = json_column(values)
        assert column.type == dtype
        assert column.to_pylist() == values

    @pytest.mark.parametrize(
        "values",
        [
            [2**63, None, 1],
            [2**53 + 1, 0.5],
            [True, 1],
            [True, 0.5],
            [1, "1"],
            [{}, {"a": [1, None, {"b": 0.5}]}],
            [{"a": 1}, None, [1]],
            [[1.5, True]],
            [[True, 1]],
            [[1], ["a"]],
            [[1, [2]]],
            [[2**63]],
            [[{"x": 1}]],
            [[2**60, 0.5]],
            [[[[[[1]]]]]],
        ],
    )
    def test_every_other_value_is_kept_as_its_json(self, values):
        column = json_column(values)
        assert column.type == pa.string()
        restored = [
            value if isinstance(given, str) or value is None else json.loads(value)
            for given, value in zip(values, column.to_pylist(), strict=True)
        ]
        assert repr(restored) == repr(values)

    def test_nan_and_infinity_are_floats_and_not_null(self):
        column = json_column([math.nan, math.inf, None, 1])
        assert column.type == pa.float64()
        assert column.null_count == 1
        assert str(column.to_pylist()) == "[nan, inf, None, 1.0]"

    def test_a_lone_surrogate_becomes_a_question_mark_wherever_it_stands(self):
        assert json_column(["a\ud800"]).to_pylist() == ["a?"]
        assert json_column([["a\ud800"]]).to_pylist() == ['["a?"]']
        assert json_column([{"\udfff": 1}]).to_pylist() == ['{"?": 1}']

    def test_a_value_that_is_nested_too_deeply_for_the_stack_costs_no_other(self):
        deep: list = []
        for _ in range(100_000):
            deep = [deep]
        assert json_column([deep, [1]]).to_pylist() == [TOO_DEEP, "[1]"]

    @given(st.lists(JSON, max_size=5))
    def test_any_values_make_a_column_that_a_file_gives_back(self, values):
        column = json_column(values)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"x": column}), sink)
        assert pq.read_table(pa.BufferReader(sink.getvalue()))["x"].combine_chunks().type == column.type
        assert [value is None for value in column.to_pylist()] == [value is None for value in values]
        assert column.type != pa.string() or column.to_pylist() == [v if v is None else text_of(v) for v in values]


class TestSampleTable:
    FIELDS = ({"url": "u", "n": 1}, {"n": 2, "boxes": [[0.5]]}, {}, {"n": None, "": 0, "a.b": "x", "a": "y"})

    def test_ours_come_first_and_the_pools_in_order_of_appearance(self):
        names = table_of(self.FIELDS).column_names
        ours = [*SAMPLE_COLUMNS][:-1]
        assert names == [
            *ours,
            "image_embedding",
            "text_embedding",
            "clip_score",
            *(f"json.{name}" for name in ("url", "n", "boxes", "", "a.b", "a")),
        ]

    @pytest.mark.parametrize("dropped", [(), (0,), (1, 3), (0, 1, 2, 3)])
    def test_a_written_table_comes_back_whole(self, output, dropped):
        table = table_of(self.FIELDS, dropped=dropped)
        tables.write(output, 7, table)
        back = tables.read(output, 7)
        assert back.equals(table)
        assert back.schema.metadata == {b"format_version": str(FORMAT_VERSION).encode()}

    def test_a_shard_without_samples_is_a_table_without_rows(self, output):
        table = table_of([])
        tables.write(output, 0, table)
        assert tables.read(output, 0).equals(table)
        assert table.schema.field("image_embedding").type == pa.list_(pa.float16(), DIM)

    def test_embeddings_stand_at_the_rows_that_are_ok_and_are_null_elsewhere(self):
        columns = columns_of(4, dropped=(0, 2))
        table = tables.sample_table(columns, [{}] * 4)
        assert [value is None for value in table["text_embedding"].to_pylist()] == [True, False, True, False]
        kept = table.take([1, 3])
        assert np.array_equal(tables.as_array(kept["text_embedding"], name="text_embedding"), columns["text_embedding"])

    @pytest.mark.parametrize("rows", [0, 1, 4])
    def test_another_number_of_embeddings_than_of_ok_rows_is_refused(self, rows):
        columns = columns_of(3) | {"image_embedding": np.zeros((rows, DIM), np.float16)}
        with pytest.raises(ValueError, match=f"{rows} values came for 3 rows that have one"):
            tables.sample_table(columns, [{}] * 3)

    def test_another_number_of_json_rows_is_refused(self):
        with pytest.raises(ValueError, match="[Cc]olumn"):
            tables.sample_table(columns_of(3), [{"a": 1}] * 2)

    def test_equal_input_gives_byte_equal_files(self, output):
        for number in (0, 1):
            tables.write(output, number, table_of(self.FIELDS, dropped=(1,)))
        assert storage.sha256_of(tables.url_of(output, 0)) == storage.sha256_of(tables.url_of(output, 1))

    def test_all_but_the_embeddings_is_compressed_lists_too(self, output):
        tables.write(output, 0, table_of(self.FIELDS))
        with storage.open_read(tables.url_of(output, 0)) as file:
            group = pq.ParquetFile(file).metadata.row_group(0)
        chunks = [group.column(index) for index in range(group.num_columns)]
        plain = {chunk.path_in_schema for chunk in chunks if chunk.compression == "UNCOMPRESSED"}
        assert plain == {"image_embedding.list.element", "text_embedding.list.element"}
        assert "json.boxes.list.element.list.element" in {chunk.path_in_schema for chunk in chunks}


class TestRead:
    def test_columns_come_in_the_order_they_were_named(self, output):
        table = table_of(TestSampleTable.FIELDS)
        tables.write(output, 0, table)
        wanted = ["json.a", "uid", "json.a.b", "image_embedding"]
        assert tables.read(output, 0, iter(wanted)).equals(table.select(wanted))

    @pytest.mark.parametrize("wanted", [["json.nowhere"], ["json.nowhere", "uid"], []])
    def test_a_json_column_that_the_shard_lacks_is_null_in_every_row(self, output, wanted):
        tables.write(output, 0, table_of(TestSampleTable.FIELDS))
        table = tables.read(output, 0, wanted)
        assert (table.num_rows, table.column_names) == (4, wanted)
        assert all(table[name].null_count == 4 for name in wanted if name == "json.nowhere")

    def test_a_column_of_ours_that_is_unknown_is_named_with_those_that_are_there(self, output):
        tables.write(output, 0, table_of([{}]))
        with pytest.raises(
            ValueError, match=r"00000000.parquet has no column 'licence', it has \['address', 'caption'"
        ):
            tables.read(output, 0, ["uid", "licence"])

    def test_a_newer_format_is_refused(self, output):
        newer = table_of([{}]).replace_schema_metadata({"format_version": str(FORMAT_VERSION + 1)})
        tables.write(output, 0, newer)
        with pytest.raises(
            ValueError, match=f"00000000.parquet has format_version {FORMAT_VERSION + 1}, this code reads"
        ):
            tables.read(output, 0, ["uid"])

    def test_a_missing_table_is_an_error(self, output):
        with pytest.raises(FileNotFoundError, match="00000003.parquet"):
            tables.read(output, 3)


class TestManyNames:
    def test_a_table_has_so_many_json_columns_and_the_rows_that_lose_others_are_counted(self, monkeypatch):
        fields = [{"a": 1, "b": 2}, {}, {"c": 3, "a": 4, "d": 5}, {"e": None, "c": 6}]
        assert tables.too_many_columns(fields) == {}
        whole = table_of(fields)
        monkeypatch.setattr(tables, "MAX_JSON_COLUMNS", 3)
        assert tables.too_many_columns(fields) == {"json:too_many_columns": 2}
        assert table_of(fields).equals(whole.select(whole.column_names[:-2]))
        assert whole.column_names[-5:] == ["json.a", "json.b", "json.c", "json.d", "json.e"]
        assert whole["json.c"].to_pylist() == [None, None, 3, 6] and pa.types.is_null(whole["json.e"].type)

    def test_names_of_each_rows_own_do_not_make_a_column_each(self):
        table = table_of([{f"{row}-{name}": row for name in range(64)} for row in range(100)])
        assert sum(name.startswith("json.") for name in table.column_names) == tables.MAX_JSON_COLUMNS


class TestAsNumbersAndText:
    @pytest.mark.parametrize(
        ("values", "numbers"),
        [
            ([1, None, -2], [1.0, math.nan, -2.0]),
            ([0.5, None, math.nan], [0.5, math.nan, math.nan]),
            ([True, False, None], [1.0, 0.0, math.nan]),
            (["0.5", "-1e3", None], [0.5, -1000.0, math.nan]),
            ([None, None], [math.nan, math.nan]),
            ([2**53 + 1, 2**63 - 1], [2.0**53, 2.0**63]),  # LAION's SAMPLE_ID
            ([], []),
        ],
    )
    def test_numbers_are_float64_and_null_is_nan(self, values, numbers):
        column = pa.chunked_array([json_column(values)])
        found = tables.as_numbers(column, name="x")
        assert found.dtype == np.float64
        assert np.array_equal(found, np.array(numbers, np.float64), equal_nan=True)

    def test_a_value_that_is_no_number_costs_no_other(self):
        texts = [
            "640",
            "N/A",
            None,
            "",
            " 5",
            "1_0",
            "0x1",
            "1e3",
            "-.5",
            "+5.",
            "iNf",
            "9" * 400,
            "true",
            "[640]",
            "1.",
        ]
        column = pa.chunked_array([pa.array(texts)])
        nan, inf = math.nan, math.inf
        expected = [640, nan, nan, nan, nan, nan, nan, 1000, -0.5, 5, inf, inf, nan, nan, 1]
        for found in (tables.as_numbers(column, name="x"), tables.numbers_in(column)):
            assert np.array_equal(found, np.array(expected, np.float64), equal_nan=True)
        assert np.isnan(tables.numbers_in(pa.chunked_array([json_column([[640], None])]))).all()

    @given(st.text("0123456789+-.eEinfINFatyTY \n", max_size=6))
    def test_what_is_a_number_is_what_arrow_casts(self, text):
        column = pa.chunked_array([pa.array([text])])
        try:
            expected = column.cast(pa.float64()).to_numpy()
        except pa.ArrowInvalid:
            expected = np.array([math.nan])
        assert np.array_equal(tables.numbers_in(column), expected, equal_nan=True)

    @pytest.mark.parametrize("values", [["n/a"], ["a", None], [[1]], [""]])
    def test_a_column_that_holds_no_numbers_is_named(self, values):
        with pytest.raises(ValueError, match="column 'json.x' of type .* holds no numbers"):
            tables.as_array(pa.chunked_array([json_column(values)]), name="json.x")

    def test_an_embedding_that_is_null_is_refused(self):
        table = table_of([{}, {}, {}], dropped=(1,))
        with pytest.raises(ValueError, match="column 'image_embedding' is null in 1 rows"):
            tables.as_array(table["image_embedding"], name="image_embedding")

    def test_embeddings_of_chunks_and_slices_are_those_of_the_rows(self):
        table = pa.concat_tables([table_of([{}] * 3), table_of([{}] * 2)]).slice(1, 3)
        expected = np.array(table["image_embedding"].to_pylist(), np.float16)
        assert np.array_equal(tables.as_array(table["image_embedding"], name="x"), expected)
        assert tables.as_array(table.slice(0, 0)["image_embedding"], name="x").shape == (0, DIM)

    @pytest.mark.parametrize(
        ("values", "texts"),
        [
            (["a", None], ["a", None]),
            ([1, None], ["1", None]),
            ([True], ["true"]),
            ([[0.5, None]], ["[0.5, null]"]),
            ([None], [None]),
        ],
    )
    def test_any_column_as_text(self, values, texts):
        column = as_text(pa.chunked_array([json_column(values)]))
        assert column.type == pa.string()
        assert column.to_pylist() == texts


class TestUnify:
    @pytest.mark.parametrize(
        ("first", "second", "dtype", "values"),
        [
            (1, 2, pa.int64(), [1, 2]),
            (1, 0.5, pa.float64(), [1.0, 0.5]),
            (None, True, pa.bool_(), [None, True]),
            (None, None, pa.null(), [None, None]),
            (1, "a", pa.string(), ["1", "a"]),
            (True, 1, pa.string(), ["true", "1"]),
            ({"a": 1}, 5, pa.string(), ['{"a": 1}', "5"]),
            ([], [[0.5]], pa.list_(pa.list_(pa.float64())), [[], [[0.5]]]),
            ([], ["a"], pa.list_(pa.string()), [[], ["a"]]),
            ([[1]], [[0.5]], pa.list_(pa.list_(pa.float64())), [[[1.0]], [[0.5]]]),
            ([1], ["a"], pa.string(), ["[1]", '["a"]']),
            ([[1]], [["a"]], pa.string(), ["[[1]]", '[["a"]]']),
            ([[1]], ["a"], pa.string(), ["[[1]]", '["a"]']),
            ([1], 1, pa.string(), ["[1]", "1"]),
            (2**53 + 1, 0.5, pa.float64(), [2.0**53, 0.5]),
        ],
    )
    def test_shards_whose_types_differ_are_settled_in_either_order(self, output, first, second, dtype, values):
        tables.write(output, 0, with_json("x", first))
        tables.write(output, 1, with_json("x", second))
        for order, expected in (([0, 1], values), ([1, 0], values[::-1])):
            table = tables.read_unified(output, order)
            assert table["json.x"].type == dtype
            assert table["json.x"].to_pylist() == expected
            assert table.num_rows == 2

    def test_a_column_that_one_shard_lacks_is_null_there(self, output):
        tables.write(output, 0, with_json("x", 1))
        tables.write(output, 1, with_json("y", "a"))
        table = tables.read_unified(output, [0, 1], ["uid", "json.y", "json.x", "json.z"])
        assert table.column_names == ["uid", "json.y", "json.x", "json.z"]
        assert [table[f"json.{name}"].to_pylist() for name in "xyz"] == [[1, None], [None, "a"], [None, None]]

    def test_no_shards_are_a_table_without_rows(self, output):
        assert tables.read_unified(output, []).num_rows == 0

    def test_a_column_of_ours_with_two_types_is_an_error(self):
        other = columns_of(1) | {
            name: np.zeros((1, DIM + 1), np.float16) for name in ("image_embedding", "text_embedding")
        }
        with pytest.raises(
            ValueError, match="column 'image_embedding' is fixed_size_list.* in one table and fixed_size"
        ):
            unify([table_of([{}]).schema, tables.sample_table(other, [{}]).schema])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.lists(JSON, min_size=1, max_size=3), min_size=1, max_size=4))
    def test_any_shards_can_be_read_as_one_and_no_row_or_null_moves(self, shards):
        parts = [pa.table({"json.x": json_column(values)}) for values in shards]
        schema = unify(part.schema for part in parts)
        whole = pa.concat_tables([conform(part, schema) for part in parts])
        assert schema == unify(part.schema for part in reversed(parts))
        assert [v is None for v in whole["json.x"].to_pylist()] == [v is None for values in shards for v in values]


class TestRechunk:
    @given(sizes=st.lists(st.integers(0, 7), max_size=8), num_rows=st.integers(1, 9))
    def test_no_row_is_lost_or_moved_and_all_but_the_last_are_full(self, sizes, num_rows):
        rows = pa.table({"x": np.arange(sum(sizes))})
        ends = np.cumsum([0, *sizes])
        parts = [rows.slice(begin, end - begin) for begin, end in pairwise(ends)]
        chunks = list(rechunked(parts, num_rows))
        assert [x for chunk in chunks for x in chunk["x"].to_pylist()] == list(range(len(rows)))
        assert all(chunk.num_rows == num_rows for chunk in chunks[:-1])
        assert all(0 < chunk.num_rows <= num_rows for chunk in chunks)

    def test_a_table_is_taken_in_although_nobody_asks_for_what_it_completes(self):
        chunks = Rechunk(10)
        chunks.add(pa.table({"x": [1, 2, 3]}))
        assert [chunk["x"].to_pylist() for chunk in chunks.rest()] == [[1, 2, 3]]
        assert list(chunks.rest()) == []

    @pytest.mark.parametrize("num_rows", [0, -1])
    def test_chunks_without_rows_are_refused(self, num_rows):
        with pytest.raises(ValueError, match=f"num_rows must be at least 1, got {num_rows}"):
            Rechunk(num_rows)
