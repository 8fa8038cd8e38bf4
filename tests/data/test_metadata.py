"""Numbers joined by uid: every row of the metadata is found, no other; the pool's own fields win."""

from __future__ import annotations

import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.data import metadata, storage
from curation.data.open_shard import content_digest, open_shard
from curation.data.read_rules import ReadRules
from curation.data.storage import ListedShard


def hexes(*numbers: int) -> list[str]:
    return [f"{number:032x}" for number in numbers]


@pytest.fixture
def built(tmp_path):
    """built(*tables): the index of metadata files with these tables, and its account."""

    def build(*tables: pa.Table, url: str = ""):
        url = url or str(tmp_path / uuid.uuid4().hex)
        for place, table in enumerate(tables):
            pq.write_table(table, tmp_path / f"{place}.parquet", row_group_size=3)
        files = [ListedShard(str(tmp_path / f"{place}.parquet"), "f") for place in range(len(tables))]
        account = metadata.build(url, files)
        return metadata.opened(url), account, url

    return build


def test_datacomps_columns_are_found_by_uid(built):
    rng = np.random.default_rng(0)
    uids = [rng.bytes(16).hex() for _ in range(500)]
    table = pa.table(
        {
            "uid": uids,
            "url": ["u"] * 500,
            "text": ["t"] * 500,
            "original_width": pa.array(range(500), pa.int64()),
            "clip_b32_similarity_score": pa.array(np.arange(500) / 512, pa.float32()),
            "face_bboxes": pa.array([[[0.1, 0.2]]] * 500, pa.list_(pa.list_(pa.float64()))),
            "sha256": ["s"] * 500,
        }
    )
    index, account, _ = built(table.slice(0, 200), table.slice(200))
    assert account["columns"] == ["clip_b32_similarity_score", "original_width"]
    assert (account["rows"], account["malformed_uid"], account["repeated_uid"]) == (500, 0, 0)
    for row, uid in enumerate(uids):
        assert index.find(uid) == {"clip_b32_similarity_score": row / 512, "original_width": row}
    assert index.find("f" * 32) is None
    assert index.find("0" * 32) is None


def test_equal_high_words_are_told_apart_by_the_low_ones(built):
    uids = hexes(5, 7, 1 << 64, (1 << 64) + 5, (1 << 128) - 1)
    index, _, _ = built(pa.table({"uid": uids, "x": list(range(5))}))
    assert [index.find(uid) for uid in uids] == [{"x": row} for row in range(5)]
    assert index.find(hexes(6)[0]) is None
    assert index.find(hexes((1 << 64) + 6)[0]) is None


def test_of_repeated_uids_the_first_row_of_the_first_file_counts(built):
    index, account, _ = built(
        pa.table({"uid": hexes(1, 2, 1), "x": [1.0, 2.0, 3.0]}), pa.table({"uid": hexes(2), "x": [4.0]})
    )
    assert [index.find(uid) for uid in hexes(1, 2)] == [{"x": 1.0}, {"x": 2.0}]
    assert account["repeated_uid"] == 2


def test_rows_without_a_uid_are_counted(built):
    index, account, _ = built(pa.table({"uid": [*hexes(1), None, "seven", ""], "x": [1, 2, 3, 4]}))
    assert account["malformed_uid"] == 3
    assert len(index.high) == 1


def test_nulls_and_missing_columns_are_no_values_and_truth_is_a_number(built):
    index, _, _ = built(
        pa.table({"uid": hexes(1, 2), "x": pa.array([None, 2.5]), "good": [True, None]}),
        pa.table({"UID": pa.array([bytes.fromhex(h) for h in hexes(3)]), "y": [7]}),
    )
    assert [index.find(uid) for uid in hexes(1, 2, 3)] == [{"good": 1.0}, {"x": 2.5}, {"y": 7.0}]


def test_metadata_without_rows_find_nothing(built):
    index, account, _ = built(pa.table({"uid": pa.array([], pa.string()), "x": pa.array([], pa.float64())}))
    assert index.find(hexes(1)[0]) is None
    assert account["rows"] == 0


def test_an_index_in_a_bucket_is_read_too(built):
    index, _, _ = built(pa.table({"uid": hexes(1), "x": [1]}), url=f"memory:///{uuid.uuid4().hex}")
    assert index.find(hexes(1)[0]) == {"x": 1.0}


def test_an_index_that_is_there_is_not_made_again(built, monkeypatch):
    _, account, url = built(pa.table({"uid": hexes(1), "x": [1]}))
    monkeypatch.setattr(metadata, "_write_sorted", lambda *_: pytest.fail("sorted again"))
    assert metadata.build(url, []) == account


def test_a_row_is_located_in_the_file_that_it_is_in(built):
    index, account, _ = built(
        pa.table({"uid": [*hexes(5), None, *hexes(7)]}), pa.table({"uid": hexes(1, 7, 9), "x": [1, 2, 3]})
    )
    assert [index.locate(uid) for uid in hexes(5, 7, 1, 9, 2)] == [(0, 0), (0, 2), (1, 0), (1, 2), None]
    assert [file.rows for file in index.files] == [3, 3] == [rows for _, rows in account["files"]]


def test_files_that_cannot_be_joined_are_refused_by_name(tmp_path, built):
    with pytest.raises(ValueError, match=r"0.parquet has no column 'uid' to join by, it has \['id'\]"):
        built(pa.table({"id": [1]}))
    (tmp_path / "bad.parquet").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="bad.parquet is no parquet file"):
        metadata.build(str(tmp_path / "i"), [ListedShard(str(tmp_path / "bad.parquet"), "f")])
    with pytest.raises(ValueError, match="gone.parquet is named but not there"):
        metadata.digest_of([ListedShard("gone.parquet", "")])
    with pytest.raises(ValueError, match="pool.metadata: no shard matches"):
        metadata.listed(str(tmp_path / "none" / "*.parquet"))


def test_the_digest_tells_other_files_and_other_bytes_apart():
    digests = {
        metadata.digest_of(listed)
        for listed in ([ListedShard("a", "1")], [ListedShard("a", "2")], [ListedShard("b", "1")])
    }
    assert len(digests) == 3


def test_samples_get_the_numbers_of_their_uid_where_they_have_none(tmp_path, built):
    _, _, url = built(pa.table({"uid": hexes(1, 2), "x": [1.5, 2.5], "own": [8, 9]}))
    pool = pa.table(
        {"uid": hexes(2, 1, 3), "jpg": [b"a", b"b", b"c"], "text": ["t"] * 3, "own": pa.array([4, None, 5])}
    )
    pq.write_table(pool, tmp_path / "pool.parquet")
    shard = str(tmp_path / "pool.parquet")
    with open_shard(shard, ReadRules(metadata=url)) as reader:
        samples = list(reader)
        warnings, digest = dict(reader.warnings), reader.sha256
        assert reader.num_bytes == 6
    assert [(s.fields.get("x"), s.fields["own"]) for s in samples] == [(2.5, 4), (1.5, 8.0), (None, 5)]
    assert warnings == {"metadata:no_row": 1}
    assert digest == content_digest(shard, ReadRules())


def test_a_store_that_fails_is_its_own_error(tmp_path, monkeypatch):
    pq.write_table(pa.table({"uid": hexes(1), "x": [1]}), tmp_path / "a.parquet")

    def fails(url):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(storage, "open_read", fails)
    with pytest.raises(ConnectionResetError):
        metadata.build(str(tmp_path / "i"), [ListedShard(str(tmp_path / "a.parquet"), "f")])
