"""The index of committed pieces: what it says is what the manifests say, whatever became of it or of them."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage
from curation.data.pieces import SCHEMA, Pieces

MADE_BY = {"model": "nano", "batch": 64}


@pytest.fixture(autouse=True)
def index_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MIN_INDEXED", 2)


@pytest.fixture(params=["local", "memory", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("s3_bucket") + "/out"
    return str(tmp_path / "out") if request.param == "local" else f"memory:///{uuid.uuid4().hex}"


def commit(output: str, *numbers: int, read: int = 1, made_by: dict[str, Any] = MADE_BY) -> None:
    for number in numbers:
        manifest.commit(output, "embed", number, {"read": read, "url": f"/{number}.tar"}, made_by=made_by)


def indexed(output: str) -> Pieces:
    """The pieces, once all of them have been noted in the index."""
    pieces = manifest.committed(output, "embed")
    manifest.index(output, "embed", pieces)
    return pieces


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Manifests that were opened."""
    urls: list[str] = []
    read = manifest.read
    monkeypatch.setattr(manifest, "read", lambda url: urls.append(url.rpartition("/")[2]) or read(url))
    return urls


def test_indexed_manifests_are_not_opened_and_say_the_same(output: str, opened: list[str]) -> None:
    commit(output, 0, 1, 2)
    before = indexed(output)
    assert sorted(opened) == ["00000000.json", "00000001.json", "00000002.json"]
    opened.clear()
    commit(output, 7)
    after = manifest.committed(output, "embed")
    assert opened == ["00000007.json"] and list(after.loose) == [7]
    assert after == {**before, 7: {**before[0], "read": 1, "url": "/7.tar"}}


def test_a_manifest_is_the_commit_whatever_the_index_says(output: str, opened: list[str]) -> None:
    commit(output, 0, 1, 2)
    indexed(output)
    storage.delete(manifest.url_of(output, "embed", 1))
    commit(output, 2, read=99)
    pieces = manifest.committed(output, "embed")
    assert sorted(pieces) == [0, 2] and pieces[2]["read"] == 99


def test_a_piece_that_was_made_again_is_indexed_anew(output: str, opened: list[str]) -> None:
    commit(output, 0, 1)
    indexed(output)
    commit(output, 0, 1, read=5)
    indexed(output)
    opened.clear()
    assert [piece["read"] for piece in manifest.committed(output, "embed").values()] == [5, 5]
    assert not opened


def test_a_deleted_index_is_made_again(output: str) -> None:
    commit(output, 0, 1, 2)
    before = indexed(output)
    folder = storage.join(output, "manifest", "embed.index")
    assert storage.names_in(folder) == ["000000.parquet"]
    storage.delete(storage.join(folder, "000000.parquet"))
    assert indexed(output) == before and storage.names_in(folder) == ["000000.parquet"]


def test_few_manifests_are_no_reason_for_an_index(output: str) -> None:
    commit(output, 0)
    indexed(output)
    assert storage.names_in(storage.join(output, "manifest", "embed.index")) == []


def test_records_that_were_added_are_indexed_with_the_fingerprints_of_their_manifests(
    output: str, opened: list[str]
) -> None:
    pieces = Pieces()
    for number in range(3):
        commit(output, number)
        pieces.add(number, manifest.read(manifest.url_of(output, "embed", number)))
    manifest.index(output, "embed", pieces)
    assert not pieces.loose
    opened.clear()
    assert manifest.committed(output, "embed") == pieces and not opened


def test_each_run_that_made_pieces_is_told(output: str) -> None:
    commit(output, 0, 1)
    commit(output, 2, made_by={"model": "other"})
    runs = indexed(output).one_of_each_run()
    assert [record["made_by"] for record in runs.values()] == [MADE_BY, {"model": "other"}]
    assert manifest.committed(output, "embed").one_of_each_run() == runs


def test_a_damaged_or_newer_segment_is_named(output: str) -> None:
    commit(output, 0, 1)
    url = storage.join(output, "manifest", "embed.index", "000000.parquet")
    storage.write_bytes(url, b"no parquet")
    with pytest.raises(ValueError, match=r"000000.parquet is damaged; delete it, it is made again"):
        manifest.committed(output, "embed")
    newer = SCHEMA.empty_table().replace_schema_metadata({"format_version": str(FORMAT_VERSION + 1)})
    with storage.write_atomic(url) as file:
        pq.write_table(newer, file)
    with pytest.raises(ValueError, match=f"format_version {FORMAT_VERSION + 1}, this code reads up to"):
        manifest.committed(output, "embed")
    with storage.write_atomic(url) as file:
        pq.write_table(pa.table({"number": [1]}), file)
    with pytest.raises(ValueError, match=r"000000.parquet is damaged"):
        manifest.committed(output, "embed")


VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.dictionaries(st.text(), st.integers(), max_size=2)


@given(st.dictionaries(st.integers(0, 2**43), st.dictionaries(st.sampled_from("abc"), VALUES), min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_any_record_comes_back_from_the_index_as_from_its_manifest(records: dict[int, dict[str, Any]]) -> None:
    output = f"memory:///{uuid.uuid4().hex}"
    for number, record in records.items():
        manifest.commit(output, "embed", number, record, made_by=MADE_BY)
    before = indexed(output)
    assert not before.loose
    assert manifest.committed(output, "embed") == before
    assert {number: json.loads(json.dumps(record)) for number, record in records.items()} == {
        number: {name: value for name, value in record.items() if name in "abc"} for number, record in before.items()
    }
