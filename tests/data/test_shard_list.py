import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.columns import FORMAT_VERSION
from curation.data import shard_list, storage
from curation.data.shard_list import SCHEMA, Shard, extend, present
from curation.data.storage import ListedShard

URLS = [f"/pool/{name}.tar" for name in "abcde"]
LISTING = st.dictionaries(st.sampled_from(URLS), st.sampled_from(["", "1", "2", "3"])).map(
    lambda listing: [ListedShard(url, mark) for url, mark in listing.items()]
)


@pytest.fixture(params=["local", "memory", "s3"])
def output(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_bucket") + "/out"
    return str(tmp_path / "out") if request.param == "local" else f"memory:///{uuid.uuid4().hex}"


def listed(**marks):
    return [ListedShard(f"/pool/{name}.tar", mark) for name, mark in marks.items()]


def numbers(shards):
    return {shard.url[6:-4]: shard.number for shard in shards if not shard.retired}


@given(st.lists(LISTING, max_size=8), st.randoms())
def test_a_number_is_given_once_and_means_the_same_bytes_for_ever(listings, random):
    shards: list[Shard] = []
    meaning: dict[int, tuple[str, str]] = {}
    retired: set[int] = set()
    for listing in listings:
        before = shards
        random.shuffle(listing)
        shards = extend(shards, listing)
        assert [shard.number for shard in shards] == list(range(len(shards)))
        assert len(shards) >= len(before)
        for shard in shards:
            assert meaning.setdefault(shard.number, (shard.url, shard.fingerprint)) == (shard.url, shard.fingerprint)
        assert retired <= {shard.number for shard in shards if shard.retired}
        retired = {shard.number for shard in shards if shard.retired}
        # The run's pool is what is there, each shard once, under the number that means what it holds now.
        there = {url: mark for url, mark in listing if mark}
        pool = present(shards, listing)
        assert {shard.url: shard.fingerprint for shard in pool} == there
        assert len(pool) == len(there)
        assert [shard.number for shard in pool] == sorted(shard.number for shard in pool)
        assert extend(shards, listing) == shards


@given(st.lists(LISTING, max_size=8))
def test_by_content_too_a_number_means_the_same_bytes_for_ever(listings):
    shards: list[Shard] = []
    meaning: dict[int, tuple[str, str | None]] = {}
    for listing in listings:
        # Two of the three fingerprints are of the same bytes: a copy with another time.
        content = {url: {"1": "x", "2": "x", "3": "y"}.get(mark, "") for url, mark in listing}
        shards = extend(shards, listing, content_of=content.__getitem__)
        assert [shard.number for shard in shards] == list(range(len(shards)))
        shards = [
            shard._replace(sha256=shard.sha256 or content[shard.url]) if shard in present(shards, listing) else shard
            for shard in shards
        ]
        for shard in present(shards, listing):
            assert shard.sha256 == content[shard.url]
            assert meaning.setdefault(shard.number, (shard.url, shard.sha256)) == (shard.url, shard.sha256)


def test_new_shards_are_numbered_in_the_order_of_their_urls():
    assert numbers(extend([], listed(c="1", a="1", b="1"))) == {"a": 0, "b": 1, "c": 2}


def test_a_shard_that_sorts_first_gets_the_next_number():
    shards = extend([], listed(b="1", c="1"))
    assert numbers(extend(shards, listed(a="1", b="1", c="1"))) == {"b": 0, "c": 1, "a": 2}


def test_shards_of_several_folders_with_one_name_have_numbers_of_their_own():
    pool = [ListedShard(f"/pool/{folder}/00000.tar", "1") for folder in ("x", "y", "z")]
    assert [shard.url for shard in extend([], pool)] == [url for url, _ in pool]


def test_an_edited_shard_retires_its_number_and_gets_a_new_one():
    shards = extend([], listed(a="1", b="1"))
    edited = extend(shards, listed(a="2", b="1"))
    assert edited == [shards[0]._replace(retired=True), shards[1], Shard(2, "/pool/a.tar", "2")]
    assert numbers(extend(edited, listed(a="1", b="1"))) == {"b": 1, "a": 3}


def test_a_shard_that_vanished_and_came_back_keeps_its_number():
    shards = extend([], listed(a="1", b="1"))
    assert extend(shards, listed(b="1")) == extend(shards, listed(a="", b="1")) == shards
    assert extend(shards, []) == shards
    assert [shard.url for shard in present(shards, listed(a="", b="1"))] == ["/pool/b.tar"]
    assert extend(shards, listed(a="1", b="1")) == shards


def test_an_absent_shard_gets_no_number():
    assert extend([], listed(a="", b="1")) == [Shard(0, "/pool/b.tar", "1")]


def test_with_the_same_content_a_new_fingerprint_changes_no_number():
    shards = [Shard(0, "/pool/a.tar", "1", sha256="x", rows=5)]
    assert extend(shards, listed(a="2"), content_of=lambda url: "x") == [shards[0]._replace(fingerprint="2")]


def test_by_content_an_edit_is_seen_although_the_fingerprint_is_the_same():
    shards = [Shard(0, "/pool/a.tar", "1", sha256="x", rows=5)]
    edited = extend(shards, listed(a="1"), content_of=lambda url: "y")
    assert edited == [shards[0]._replace(retired=True), Shard(1, "/pool/a.tar", "1")]


def test_only_shards_that_were_read_and_are_there_are_hashed():
    asked = []
    shards = [Shard(0, "/pool/a.tar", "1", sha256="x"), Shard(1, "/pool/b.tar", "1"), Shard(2, "/pool/c.tar", "1", "x")]
    extend(shards, listed(a="1", b="1", c="", d="1"), content_of=lambda url: asked.append(url) or "x")
    assert asked == ["/pool/a.tar"]


@pytest.mark.parametrize(
    "shards",
    [
        [],
        [
            Shard(0, "/pool/ü b.tar", "10:5"),
            Shard(1, "s3://b/a.tar", "", "ab" * 32, 0, True),
            Shard(2, "", "x", "", 2**40),
        ],
    ],
)
def test_a_saved_list_comes_back(output, shards):
    shard_list.save(output, shards)
    assert shard_list.load(output) == shards


def test_a_run_without_a_list_has_no_shards(output):
    assert shard_list.load(output) == []


def test_a_store_that_does_not_answer_is_no_empty_list(output, monkeypatch):
    def down(url):
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(storage, "_info", down)
    with pytest.raises(PermissionError, match="403"):
        shard_list.load(output)


def written(output, table):
    with storage.write_atomic(storage.join(output, "shards.parquet")) as file:
        pq.write_table(table, file)


def test_a_newer_format_is_refused(output):
    schema = SCHEMA.with_metadata({"format_version": str(FORMAT_VERSION + 1)})
    written(output, pa.Table.from_pylist([], schema=schema))
    with pytest.raises(
        ValueError, match=f"shards.parquet has format_version {FORMAT_VERSION + 1}, this code reads up to"
    ):
        shard_list.load(output)


@pytest.mark.parametrize("wrong", [[0, 2], [1], [1, 0], [0, 0]])
def test_a_numbering_with_gaps_repeats_or_disorder_is_damaged(output, wrong):
    shard_list.save(output, [Shard(number, f"/{number}.tar", "1") for number in wrong])
    with pytest.raises(ValueError, match=r"shards.parquet is damaged: its shard numbers are not 0 to"):
        shard_list.load(output)


def test_a_list_without_a_column_is_damaged(output):
    written(output, pa.Table.from_pylist([], schema=SCHEMA).drop_columns(["sha256"]))
    with pytest.raises(ValueError, match="shards.parquet is damaged: its columns are"):
        shard_list.load(output)


@pytest.mark.parametrize("data", [b"", b"no parquet"])
def test_a_file_that_is_no_parquet_is_damaged(output, data):
    storage.write_bytes(storage.join(output, "shards.parquet"), data)
    with pytest.raises(ValueError, match="shards.parquet is damaged: "):
        shard_list.load(output)
