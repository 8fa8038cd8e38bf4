"""Parquet files as shards: LAION's and Hugging Face's columns, row ranges, damage that costs its rows only."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.addresses import MAX_ROWS_PER_SHARD
from curation.data import parquet_shards, storage
from curation.data.drop_reasons import DROP_REASONS, WARNINGS
from curation.data.open_shard import content_digest, fingerprint, open_shard
from curation.data.parquet_shards import RowRange, cut, is_parquet, read_rows, row_cuts, row_range
from curation.data.read_rules import ReadRules
from curation.data.samples import Sample, content_uid
from curation.data.shard_list import Shard, extend
from curation.data.shards import ShardReader
from curation.data.storage import ListedShard

RULES = ReadRules()
JPEG = b"\xff\xd8 an image"
UID = "0123456789abcdef0123456789abcdef"


def read(table: pa.Table | Path, folder: Path, *, rules: ReadRules = RULES, **settings: Any):
    """Samples and warnings of a table as a parquet shard; and the laws that hold for every shard."""
    path = folder / "part.parquet"
    if isinstance(table, pa.Table):
        pq.write_table(table, path, **settings)
    return samples_of(str(path), rules)


def samples_of(url: str, rules: ReadRules = RULES) -> tuple[list[Sample], Counter[str]]:
    with open_shard(url, rules) as reader:
        samples = list(reader)
    assert [sample.row for sample in samples] == list(range(len(samples)))
    assert {sample.reason for sample in samples} - {None} <= set(DROP_REASONS)
    assert set(reader.warnings) <= set(WARNINGS)
    assert reader.sha256 == content_digest(url, rules)
    for sample in samples:
        json.dumps([sample.key, sample.caption, sample.fields]).encode()
    return samples, reader.warnings


def one_row(folder: Path, *, rules: ReadRules = RULES, **columns: Any) -> tuple[Sample, Counter[str]]:
    table = pa.table({name: value if isinstance(value, pa.Array) else [value] for name, value in columns.items()})
    [sample], warnings = read(table, folder, rules=rules)
    return sample, warnings


class TestColumns:
    @pytest.mark.parametrize("image", ["image", "jpg", "png", "jpeg", "webp", "image_bytes", "IMAGE", "Jpg"])
    @pytest.mark.parametrize("caption", ["txt", "caption", "text", "TEXT"])
    def test_image_and_caption_are_found_by_the_usual_names_in_any_case(self, tmp_path, image, caption):
        sample, warnings = one_row(tmp_path, **{image: JPEG, caption: "a cat", "width": 3})
        assert (sample.image, sample.caption, sample.reason) == (JPEG, "a cat", None)
        assert sample.sha256 == hashlib.sha256(JPEG).hexdigest()
        assert sample.fields == {caption: "a cat", "width": 3}
        assert not warnings

    @pytest.mark.parametrize(
        "dtype",
        [
            pa.binary(),
            pa.large_binary(),
            pa.binary_view(),
            pa.binary(len(JPEG)),
            pa.dictionary(pa.int32(), pa.binary()),
        ],
        ids=str,
    )
    def test_bytes_of_any_type_are_an_image(self, tmp_path, dtype):
        assert one_row(tmp_path, image=pa.array([JPEG], dtype), text="t")[0].image == JPEG

    def test_a_struct_with_bytes_is_an_image_as_hugging_face_writes_it(self, tmp_path):
        column = pa.array([{"bytes": JPEG, "path": "a.jpg"}, None, {"bytes": None, "path": "b.jpg"}])
        samples, warnings = read(pa.table({"image": column, "text": ["a", "b", "c"]}), tmp_path)
        assert [sample.image for sample in samples] == [JPEG, None, None]
        assert [sample.reason for sample in samples] == [None, "image:missing", "image:missing"]
        assert not warnings

    def test_the_column_that_the_recipe_names_is_taken_before_a_usual_one(self, tmp_path):
        rules = ReadRules(image_column="photo", caption_column="TITLE")
        sample, warnings = one_row(tmp_path, rules=rules, jpg=b"other", photo=JPEG, text="other", title="a cat")
        assert (sample.image, sample.caption) == (JPEG, "a cat")
        assert warnings == {"parquet:column_left_out": 1}

    def test_a_caption_field_of_the_json_is_the_column_of_that_name(self, tmp_path):
        sample, _ = one_row(tmp_path, rules=ReadRules(caption_field="json.alt"), image=JPEG, text="no", alt="yes")
        assert sample.caption == "yes"

    def test_a_text_column_called_image_is_passed_over_for_one_that_holds_bytes(self, tmp_path):
        assert one_row(tmp_path, image="http://x/y.jpg", jpg=JPEG, text="t")[0].image == JPEG

    def test_of_two_columns_with_one_name_the_first_counts(self, tmp_path):
        table = pa.Table.from_arrays([pa.array([JPEG]), pa.array(["a"]), pa.array(["b"])], ["jpg", "text", "text"])
        [sample], _ = read(table, tmp_path)
        assert (sample.caption, sample.fields) == ("a", {"text": "a"})

    def test_a_name_with_a_dot_is_a_column_like_any_other(self, tmp_path):
        assert one_row(tmp_path, **{"jpg": JPEG, "a.b": "t"}, rules=ReadRules(caption_column="a.b"))[0].caption == "t"


class TestReasons:
    @pytest.mark.parametrize(
        ("columns", "rules", "reason"),
        [
            ({"image": None, "text": "t"}, {}, "image:missing"),
            ({"text": "t"}, {}, "image:missing"),
            ({"URL": "http://x", "TEXT": "t"}, {}, "image:not_downloaded"),
            ({"url": "http://x", "text": "t", "status": "success"}, {}, "image:missing"),
            ({"url": None, "text": "t"}, {}, "image:missing"),
            ({"jpg": pa.array([None], pa.binary()), "url": "u", "text": "t"}, {}, "image:not_downloaded"),
            ({"image": b"", "text": "t"}, {}, "image:empty"),
            ({"image": JPEG, "text": "t"}, {"max_image_bytes": 3}, "image:too_large"),
            ({"image": "a", "text": "t"}, {"image_column": "image"}, "image:not_bytes"),
            ({"image": [255, 216], "text": "t"}, {"image_column": "image"}, "image:not_bytes"),
            ({"image": JPEG}, {}, "caption:missing"),
            ({"image": JPEG, "text": pa.array([None], pa.string())}, {}, "caption:missing"),
            ({"image": JPEG, "text": pa.nulls(1)}, {}, "caption:missing"),
            ({"image": JPEG, "text": 7}, {}, "caption:not_text"),
            ({"image": JPEG, "text": ["a", "b"]}, {}, "caption:not_text"),
            ({"image": JPEG, "text": float("nan")}, {}, "caption:not_text"),
            ({"image": JPEG, "text": " \n"}, {}, "caption:empty"),
            ({"image": JPEG, "text": "long"}, {"max_caption_bytes": 3}, "caption:too_large"),
            ({"image": None, "text": None}, {}, "image:missing"),
        ],
    )
    def test_what_a_row_lacks_is_its_reason(self, tmp_path, columns, rules, reason):
        assert one_row(tmp_path, rules=ReadRules(**rules), **columns)[0].reason == reason

    def test_a_caption_that_is_not_utf8_costs_its_row_only(self, tmp_path):
        texts = pa.array([b"good", b"\xff bad"]).view(pa.string())
        samples, warnings = read(pa.table({"jpg": [JPEG] * 2, "text": texts}), tmp_path)
        assert [(s.caption, s.reason) for s in samples] == [("good", None), (None, "caption:not_utf8")]
        assert warnings == {"parquet:value_left_out": 1}  # as a field

    def test_keys_are_the_files_own_or_the_row(self, tmp_path):
        table = pa.table({"jpg": [JPEG] * 4, "text": ["t"] * 4, "key": ["a", None, "", "b"]})
        assert [s.key for s in read(table, tmp_path)[0]] == ["a", "000000001", "000000002", "b"]
        table = pa.table({"jpg": [JPEG], "text": ["t"], "key": [7]})
        assert [s.key for s in read(table, tmp_path)[0]] == ["7"]


class TestUids:
    @pytest.mark.parametrize(
        "value", [UID, UID.upper(), pa.array([bytes.fromhex(UID)]), pa.array([UID], pa.large_string())]
    )
    def test_32_hex_digits_or_16_bytes_are_a_uid(self, tmp_path, value):
        sample, warnings = one_row(tmp_path, jpg=JPEG, text="t", uid=value)
        assert sample.uid == UID
        assert not warnings

    @pytest.mark.parametrize("value", [7, 7.0, "7", "0x" + UID[2:], UID + "0", b"short", [UID]])
    def test_anything_else_is_counted_and_the_content_counts(self, tmp_path, value):
        sample, warnings = one_row(tmp_path, jpg=JPEG, text="t", uid=value)
        name = f"{tmp_path.name}/part.parquet".encode()
        assert sample.uid == content_uid(name, "000000000", image=JPEG, caption="t")
        assert warnings["uid:malformed"] == 1

    def test_no_uid_is_not_a_wrong_one(self, tmp_path):
        sample, warnings = one_row(tmp_path, jpg=JPEG, text="t", uid=pa.array([None], pa.string()))
        assert len(sample.uid) == 32
        assert not warnings


class TestFields:
    def test_laions_columns_are_read_whatever_their_width(self, tmp_path):
        nan = float("nan")
        table = pa.table(
            {
                "SAMPLE_ID": pa.array([1.0, nan]),
                "URL": ["http://a", "http://b"],
                "TEXT": ["a", None],
                "HEIGHT": pa.array([3, None], pa.int32()),
                "WIDTH": pa.array([4.0, nan]),
                "LICENSE": ["?", None],
                "NSFW": ["UNLIKELY", None],
                "similarity": pa.array([0.25, nan]),
                "hash": pa.array([-5, 2**62], pa.int64()),
                "punsafe": pa.array([0.5, None], pa.float32()),
            }
        )
        samples, warnings = read(table, tmp_path)
        assert not warnings
        assert [sample.reason for sample in samples] == ["image:not_downloaded"] * 2
        assert samples[0].fields == {**{name: table[name][0].as_py() for name in table.column_names}}
        assert samples[1].fields["HEIGHT"] is None
        assert np.isnan(samples[1].fields["WIDTH"])
        assert samples[1].fields["hash"] == 2**62

    @pytest.mark.parametrize(
        ("value", "plain"),
        [
            (pa.array([datetime.datetime(2020, 1, 2, 3)], pa.timestamp("us", tz="UTC")), "2020-01-02T03:00:00+00:00"),
            (pa.array([datetime.date(2020, 1, 2)]), "2020-01-02"),
            (pa.array([datetime.timedelta(seconds=1.5)]), 1.5),
            (pa.array([decimal.Decimal("1.50")]), 1.5),
            (pa.array([0.5], pa.float16()), 0.5),
            (pa.array([[[1.5], None]]), [[1.5], None]),
            (pa.array([{"a": {"b": "c"}}]), {"a": {"b": "c"}}),
            (pa.array(["x"]).dictionary_encode(), "x"),
            (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
        ],
    )
    def test_other_values_become_what_a_json_holds(self, tmp_path, value, plain):
        sample, warnings = one_row(tmp_path, jpg=JPEG, text="t", value=value)
        assert sample.fields["value"] == plain
        assert not warnings

    @pytest.mark.parametrize(
        "value", [pa.array([b"x"]), pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2)), pa.array([{"a": b"x"}])]
    )
    def test_bytes_and_tensors_are_left_out_and_counted(self, tmp_path, value):
        sample, warnings = one_row(tmp_path, jpg=JPEG, text="t", value=value)
        assert sample.fields == {"text": "t"}
        assert warnings == {"parquet:column_left_out": 1}

    def test_what_python_cannot_hold_is_null_and_counted(self, tmp_path):
        before_year_one = pa.array([-(2**62), 0], pa.timestamp("us"))
        table = pa.table({"jpg": [JPEG] * 2, "text": ["t"] * 2, "when": before_year_one})
        samples, warnings = read(table, tmp_path)
        assert [sample.fields["when"] for sample in samples] == [None, "1970-01-01T00:00:00"]
        assert warnings == {"parquet:value_left_out": 1}

    def test_a_text_above_the_limit_of_a_json_is_left_out(self, tmp_path):
        sample, warnings = one_row(tmp_path, rules=ReadRules(max_json_bytes=10), jpg=JPEG, text="t", note="x" * 11)
        assert sample.fields["note"] is None
        assert warnings == {"parquet:value_left_out": 1}

    def test_more_fields_than_allowed_are_cut_and_counted(self, tmp_path):
        sample, warnings = one_row(tmp_path, rules=ReadRules(max_json_fields=1), jpg=JPEG, a=1, text="t")
        assert sample.fields == {"a": 1}
        assert warnings == {"json:too_many_fields": 1}


def pool_table(n: int, *, first: int = 0) -> pa.Table:
    numbers = range(first, first + n)
    return pa.table(
        {"jpg": [b"\xff\xd8%d" % i for i in numbers], "text": [f"t {i}" for i in numbers], "i": list(numbers)}
    )


class TestRanges:
    @given(sizes=st.lists(st.integers(0, 30), max_size=12), max_rows=st.integers(1, 20))
    def test_cuts_cover_all_rows_once_and_fall_on_row_groups_where_they_can(self, sizes, max_rows):
        cuts = row_cuts(sizes, max_rows)
        ends = {0, *np.cumsum(sizes).tolist()}
        assert cuts[0] == 0
        assert cuts[-1] == sum(sizes)
        for first, stop in pairwise(cuts):
            assert 0 < stop - first <= max_rows
            within = {end for end in ends if first < end <= first + max_rows}
            assert stop in ends or not within  # only a row group that alone is too large is cut
            assert not within or stop == max(within)

    def test_a_url_says_which_rows(self):
        assert row_range("s3://b/a.parquet") == RowRange("s3://b/a.parquet", 0, None)
        assert row_range("/p/a.parquet#rows=0000000010:0000000020") == RowRange("/p/a.parquet", 10, 20)
        assert row_range("http://h/a.PARQUET?sig=x/y").file == "http://h/a.PARQUET?sig=x/y"
        assert not is_parquet("/p/a.parquet.tar")
        with pytest.raises(ValueError, match="names no parquet file"):
            row_range("/p/a.tar")

    def test_every_row_of_a_cut_file_is_read_once_with_the_uid_it_would_have_whole(self, tmp_path):
        path = tmp_path / "a.parquet"
        pq.write_table(pool_table(103), path, row_group_size=10)
        whole, _ = samples_of(str(path))
        listed = [ListedShard(str(path), "f")]
        shards = cut(listed, [], rules=RULES, max_rows=25)
        assert [shard.url.split("#")[1] for shard in shards] == [
            f"rows={first:010d}:{stop:010d}" for first, stop in pairwise([0, 20, 40, 60, 80, 103])
        ]
        parts = [sample for shard in shards for sample in samples_of(shard.url)[0]]
        assert [(s.uid, s.offset, s.key, s.fields["i"]) for s in parts] == [
            (s.uid, s.offset, s.key, s.fields["i"]) for s in whole
        ]
        assert [s.offset for s in whole] == list(range(103))

    def test_a_file_of_more_rows_than_an_address_holds_is_several_shards(self, tmp_path):
        path, rows = tmp_path / "big.parquet", MAX_ROWS_PER_SHARD + 5
        pq.write_table(pa.table({"url": pa.repeat("u", rows)}), path, row_group_size=rows)
        shards = cut([ListedShard(str(path), "f")], [], rules=RULES)
        ranges = [row_range(shard.url) for shard in shards]
        assert [r.first for r in ranges[1:]] == [r.stop for r in ranges[:-1]]
        assert (ranges[0].first, ranges[-1].stop, len(ranges)) == (0, rows, 9)
        with open_shard(shards[-1].url, RULES) as reader:
            assert [sample.offset for sample in reader] == list(range(MAX_ROWS_PER_SHARD, rows))

    def test_a_whole_file_of_too_many_rows_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(parquet_shards, "MAX_ROWS_PER_SHARD", 3)
        with pytest.raises(ValueError, match="more than 3 rows, and names no range"):
            read(pool_table(4), tmp_path)

    def test_a_known_file_keeps_its_cut_and_its_footer_is_not_read(self, tmp_path, monkeypatch):
        path = tmp_path / "a.parquet"
        pq.write_table(pool_table(30), path, row_group_size=10)
        listed = [ListedShard(str(path), fingerprint(str(path)))]
        shards = extend([], cut(listed, [], rules=RULES, max_rows=10))
        monkeypatch.setattr(storage, "open_read", lambda url: pytest.fail(f"{url} is opened"))
        assert cut(listed, shards, rules=RULES, max_rows=25) == [(shard.url, shard.fingerprint) for shard in shards]

    def test_an_edited_file_is_cut_anew_and_its_old_numbers_are_retired(self, tmp_path):
        path = tmp_path / "a.parquet"
        pq.write_table(pool_table(30), path, row_group_size=10)
        shards = extend([], cut([ListedShard(str(path), "old")], [], rules=RULES, max_rows=20))
        pq.write_table(pool_table(20), path, row_group_size=10)
        shards = extend(shards, cut([ListedShard(str(path), "new")], shards, rules=RULES, max_rows=10))
        live = [shard for shard in shards if not shard.retired and shard.fingerprint == "new"]
        assert [row_range(shard.url)[1:] for shard in live] == [(0, 10), (10, 20)]
        assert [shard.number for shard in shards] == [0, 1, 2, 3]

    def test_tars_and_absent_files_are_left_as_they_are(self):
        listed = [ListedShard("/a.tar", "f"), ListedShard("/gone.parquet", "")]
        assert cut(listed, [Shard(0, "/a.tar", "f")], rules=RULES) == listed


class TestPlan:
    @pytest.mark.parametrize(
        ("columns", "rules", "message"),
        [
            ({"jpg": [JPEG], "text": ["t"]}, {"caption_column": "txet"}, "pool.caption_column: .* did you mean 'text'"),
            ({"jpg": [JPEG], "text": ["t"]}, {"image_column": "jgp"}, "pool.image_column: .* did you mean 'jpg'"),
            ({"photo": ["x"], "text": ["t"]}, {"image_column": "photo"}, "'photo' of .* is string; wanted are encoded"),
            (
                {"photo": [JPEG], "text": ["t"]},
                {},
                "no column of image bytes that is named as usual: .*'photo', 'text'",
            ),
        ],
    )
    def test_columns_that_cannot_be_meant_are_told_before_anything_runs(self, tmp_path, columns, rules, message):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table(columns), path)
        with pytest.raises(ValueError, match=message):
            cut([ListedShard(str(path), "f")], [], rules=ReadRules(**rules))

    def test_a_list_of_urls_may_be_read(self, tmp_path):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"URL": ["u"]}), path)
        assert cut([ListedShard(str(path), "f")], [], rules=RULES) == [(str(path), "f")]

    def test_an_empty_column_name_is_refused(self):
        with pytest.raises(ValueError, match="must name a column, got an empty name"):
            ReadRules(image_column="")


class TestDamage:
    @pytest.mark.parametrize("data", [b"", b"<html>", b"PAR1" + b"\0" * 40 + b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1"])
    def test_what_is_no_parquet_file_is_one_row(self, tmp_path, data):
        (tmp_path / "a.parquet").write_bytes(data)
        url = str(tmp_path / "a.parquet")
        assert cut([ListedShard(url, "f")], [], rules=RULES) == [(url, "f")]
        samples, _ = samples_of(url)
        assert [(s.key, s.reason, s.offset) for s in samples] == [("@0", "parquet:unreadable", 0)]

    def test_a_file_that_is_cut_short_is_unreadable(self, tmp_path):
        read(pool_table(50), tmp_path)
        path = tmp_path / "part.parquet"
        path.write_bytes(path.read_bytes()[:-20])
        assert [s.reason for s in samples_of(str(path))[0]] == ["parquet:unreadable"]

    def test_a_damaged_row_group_costs_its_rows_and_no_others(self, tmp_path):
        path = tmp_path / "part.parquet"
        pq.write_table(pool_table(50), path, row_group_size=10, compression="zstd", write_page_checksum=True)
        column = pq.ParquetFile(path).metadata.row_group(2).column(0)
        data = bytearray(path.read_bytes())
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = b"\xee" * column.total_compressed_size
        path.write_bytes(data)
        samples, _ = samples_of(str(path))
        assert [s.offset for s in samples] == list(range(50))
        assert [s.offset for s in samples if s.reason == "parquet:damaged"] == list(range(20, 30))
        assert len({s.uid for s in samples}) == 50
        # and a range that begins in the damage
        damaged, _ = samples_of(f"{path}#rows=0000000025:0000000032")
        assert [s.reason for s in damaged] == ["parquet:damaged"] * 5 + [None] * 2

    @pytest.mark.parametrize("fails", ["error", "short"])
    @pytest.mark.parametrize("after", [0, 200, 100_000])
    def test_a_store_that_fails_is_an_error_and_no_damage(self, tmp_path, fails, after):
        path = tmp_path / "part.parquet"
        pq.write_table(pa.table({"jpg": [np.random.default_rng(i).bytes(9000) for i in range(50)]}), path)

        class Failing(io.BytesIO):
            def read(self, n: int | None = -1) -> bytes:
                at = self.tell()
                data = super().read(n)
                if at <= after < at + len(data) or (after == 0 and data):
                    if fails == "error":
                        raise ConnectionResetError("reset by peer")
                    return data[: len(data) // 2]
                return data

        reader = parquet_shards.ParquetReader(Failing(path.read_bytes()), url=str(path), rules=RULES)
        with pytest.raises(OSError, match="reset by peer" if fails == "error" else "a read of .* gave"):
            list(reader)
        with pytest.raises(RuntimeError, match="not read to its end"):
            _ = reader.sha256


class TestReadRows:
    def test_chosen_rows_come_as_they_were_read(self, tmp_path):
        table = pool_table(60)
        whole, _ = read(table, tmp_path, row_group_size=20)
        with open(tmp_path / "part.parquet", "rb") as raw:
            rows = list(read_rows(raw, [0, 7, 19, 45, 59], url=str(tmp_path / "part.parquet"), rules=RULES))
        wanted = [whole[row] for row in (0, 7, 19, 45, 59)]
        assert [(s.uid, s.key, s.image, s.caption, s.offset) for s in rows] == [
            (s.uid, s.key, s.image, s.caption, s.offset) for s in wanted
        ]

    def test_a_row_that_is_not_there_is_refused(self, tmp_path):
        read(pool_table(5), tmp_path)
        with (
            open(tmp_path / "part.parquet", "rb") as raw,
            pytest.raises(ValueError, match="not the parquet file that was read"),
        ):
            list(read_rows(raw, [5], url=str(tmp_path / "part.parquet"), rules=RULES))


def test_the_digest_changes_with_every_part_of_a_row(tmp_path):
    base = {"jpg": [JPEG], "text": ["t"], "i": [1], "key": ["k"], "uid": [UID]}
    digests = set()
    for change in ({}, {"jpg": [b"x"]}, {"text": ["u"]}, {"i": [2]}, {"key": ["l"]}, {"uid": [UID[::-1]]}):
        pq.write_table(pa.table({**base, **change}), tmp_path / "a.parquet")
        digests.add(content_digest(str(tmp_path / "a.parquet"), RULES))
    assert len(digests) == 6


def test_a_tar_is_opened_as_before(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    with open_shard(str(tmp_path / "a.tar"), RULES) as reader:
        assert isinstance(reader, ShardReader)
        assert list(reader) == []
    assert content_digest(str(tmp_path / "a.tar"), RULES) == hashlib.sha256(bytes(1024)).hexdigest()


@pytest.mark.parametrize("name", ["cifar10-lossless", "cifar10-test-jpeg"])
def test_real_parquet_pools_are_read_whole(real_data, name):
    path = real_data / "cifar" / f"{name}.parquet"
    table = pq.read_table(path, columns=["class", "label"])
    with open_shard(str(path), ReadRules(caption_column="class")) as reader:
        samples = list(reader)
    assert all(sample.reason is None and sample.image for sample in samples)
    assert [sample.caption for sample in samples] == table["class"].to_pylist()
    assert [sample.fields["label"] for sample in samples] == table["label"].to_pylist()


def test_a_real_url_list_is_metadata(real_data):
    with open_shard(str(real_data / "web-text" / "laion-alt-text.parquet"), RULES) as reader:
        reasons = Counter(sample.reason for sample in reader)
    assert reasons == {"image:not_downloaded": 7000}
