import hashlib
import io
import json
import tarfile
import uuid
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from curation.data import storage, writers
from curation.data.open_shard import open_shard
from curation.data.read_rules import ReadRules
from curation.data.shards import ShardReader
from curation.data.writers import KEPT_SCHEMA, ORIGIN_SCHEMA, SUBSET_DTYPE, write_index, write_subset

write_tar = partial(writers.write_tar, rules=ReadRules())

RULES = ReadRules()
RAW = {"jpg": b"\xff\xd8 raw \x00", "json": b'{\n    "uid": "x",  "license": "CC0"}', "txt": "Bild – ü".encode()}
UIDS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2**63, 2**64 - 1])), max_size=20)


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return str(tmp_path / "out") if request.param == "local" else f"memory:///{uuid.uuid4().hex}"


def write_pool(url, samples, *, format=tarfile.GNU_FORMAT, rules=RULES):
    """A shard of (key, {extension: bytes}) samples, and the rows that keep all of it."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as tar:
        for key, members in samples:
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size, header.mtime, header.mode = len(data), 1_700_000_000, 0o777
                tar.addfile(header, io.BytesIO(data))
    storage.write_bytes(url, sink.getvalue())
    return rows_of(url, rules=rules)


def rows_of(url, *, copies=1, rules=RULES):
    with storage.open_read(url) as raw:
        samples = list(ShardReader(raw, url=url, rules=rules))
    assert all(sample.reason is None for sample in samples)
    return kept(
        {
            "address": sample.row,
            "uid": sample.uid,
            "key": sample.key,
            "shard": url,
            "offset": sample.offset,
            "sha256": sample.sha256,
            "score": 0.5,
            "copies": copies,
        }
        for sample in samples
    )


def kept(rows):
    return pa.Table.from_pylist(list(rows), schema=KEPT_SCHEMA)


def changed(rows, **values):
    return kept({**row, **values} for row in rows.to_pylist())


def members_of(url):
    """(name, bytes) of a tar's members, as the standard library reads them."""
    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(url))) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # pyright: ignore[reportOptionalMemberAccess]


def keys_of(url):
    return list(dict.fromkeys(name.rsplit(".", 1)[0] for name, _ in members_of(url)))


class TestSubset:
    @given(uids=UIDS, splits=st.lists(st.integers(0, 20), max_size=3).map(sorted))
    def test_numpy_reads_it_as_datacomp_does_and_finds_every_uid_as_often_as_it_is_kept(self, uids, splits):
        words = np.array(sorted(uids), np.uint64).reshape(-1, 2)
        url = f"memory:///{uuid.uuid4().hex}.npy"
        write_subset(url, np.split(words, splits), num_rows=len(words))
        subset = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
        assert subset.dtype == np.dtype("u8,u8") == SUBSET_DTYPE
        assert subset.shape == (len(uids),)
        assert subset.tolist() == sorted(uids)
        for uid in {*uids, (1, 5)}:
            wanted = np.array([uid], np.dtype("u8,u8"))
            found = np.searchsorted(subset, wanted, "right") - np.searchsorted(subset, wanted, "left")
            assert found == uids.count(uid)

    def test_a_uid_is_its_first_and_last_16_hex_digits(self, folder):
        uid = "0123456789abcdeffedcba9876543210"
        url = storage.join(folder, "subset.npy")
        write_subset(url, [np.array([[int(uid[:16], 16), int(uid[16:], 16)]], np.uint64)], num_rows=1)
        assert storage.read_bytes(url)[-16:] == int(uid[:16], 16).to_bytes(8, "little") + int(uid[16:], 16).to_bytes(
            8, "little"
        )

    @pytest.mark.parametrize("announced", [0, 1, 3])
    def test_another_number_of_uids_than_announced_writes_nothing(self, folder, announced):
        with pytest.raises(ValueError, match=f"subset.npy: 2 uids came, {announced} were announced"):
            write_subset(storage.join(folder, "subset.npy"), [np.zeros((2, 2), np.uint64)], num_rows=announced)
        assert not storage.exists(storage.join(folder, "subset.npy"))

    @pytest.mark.parametrize(
        "blocks", [[[[1, 0], [0, 5]]], [[[1, 1], [1, 0]]], [[[1, 0]], [[0, 5]]], [[[1, 1]], [], [[1, 0]]]]
    )
    def test_uids_out_of_order_are_refused(self, folder, blocks):
        words = [np.array(block, np.uint64).reshape(-1, 2) for block in blocks]
        with pytest.raises(ValueError, match="subset.npy: the uids do not come in sorted order"):
            write_subset(storage.join(folder, "subset.npy"), words, num_rows=2)


class TestTar:
    SAMPLES = tuple((f"{n:09d}", {**RAW, "txt": f"Bild {n}".encode()}) for n in range(3))

    def test_the_raw_bytes_and_names_are_those_of_the_pool(self, folder):
        rows = write_pool(storage.join(folder, "pool.tar"), self.SAMPLES)
        assert write_tar(folder, 0, rows) == 3
        assert members_of(storage.join(folder, "00000.tar")) == members_of(storage.join(folder, "pool.tar"))

    def test_where_captions_are_chosen_the_txt_is_the_chosen_one_in_its_place_or_at_the_end(self, folder):
        rules = ReadRules(best_caption_of=("json.captions",))
        offered = {"jpg": RAW["jpg"], "txt": b"t", "json": b'{"captions": ["c"]}'}
        samples = [("a", offered), ("b", {name: offered[name] for name in ("jpg", "json")})]
        rows = write_pool(storage.join(folder, "pool.tar"), samples, rules=rules)
        writers.write_tar(folder, 0, changed(rows, caption="the best"), rules=rules)
        found = members_of(storage.join(folder, "00000.tar"))
        assert [name for name, _ in found] == ["a.jpg", "a.txt", "a.json", "b.jpg", "b.json", "b.txt"]
        assert [data for name, data in found if name.endswith("txt")] == [b"the best"] * 2
        assert [data for name, data in found if name.endswith("json")] == [offered["json"]] * 2

    @pytest.mark.parametrize("field", ["json.alt", "alt"])
    def test_a_caption_from_elsewhere_than_the_txt_is_the_txt(self, folder, field):
        rules = ReadRules(caption_field=field)
        members = {"jpg": RAW["jpg"], "txt": b"old", "json": b'{"alt": "used"}', "alt": b"used"}
        without = {name: data for name, data in members.items() if name != "txt"}
        rows = write_pool(storage.join(folder, "pool.tar"), [("a", members), ("b", without)], rules=rules)
        writers.write_tar(folder, 0, changed(rows, caption="used"), rules=rules)
        found = members_of(storage.join(folder, "00000.tar"))
        assert [data for name, data in found if name.endswith("txt")] == [b"used"] * 2
        kept_as_they_were = [(name, data) for name, data in found if not name.endswith("txt")]
        assert kept_as_they_were == [(f"{key}.{name}", data) for key in "ab" for name, data in without.items()]

    def test_equal_rows_give_equal_bytes_whatever_the_pools_times_and_owners(self, folder):
        rows = write_pool(storage.join(folder, "pool.tar"), self.SAMPLES)
        other = write_pool(storage.join(folder, "pax.tar"), self.SAMPLES, format=tarfile.PAX_FORMAT)
        other = changed(other, uid="0" * 32, shard=storage.join(folder, "pax.tar"))
        for index, table in enumerate((rows, rows, other)):
            write_tar(storage.join(folder, str(index)), 7, table)
        for name in ("00007.tar", "00007_stats.json"):
            assert len({storage.sha256_of(storage.join(folder, str(index), name)) for index in range(3)}) == 1
        parquets = [storage.read_bytes(storage.join(folder, str(index), "00007.parquet")) for index in range(2)]
        assert parquets[0] == parquets[1]
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(storage.join(folder, "0", "00007.tar")))) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o444)}

    def test_rows_of_several_shards_are_written_in_their_order(self, folder):
        tables = [write_pool(storage.join(folder, f"{n}.tar"), [(f"k{n}", RAW)]) for n in range(3)]
        write_tar(folder, 0, pa.concat_tables([tables[1], tables[0], tables[2]]))
        assert keys_of(storage.join(folder, "00000.tar")) == ["k1", "k0", "k2"]

    def test_only_the_kept_samples_are_written(self, folder):
        rows = write_pool(storage.join(folder, "pool.tar"), self.SAMPLES)
        assert write_tar(folder, 0, rows.take([2])) == 1
        assert keys_of(storage.join(folder, "00000.tar")) == ["000000002"]

    @pytest.mark.parametrize("rows", [kept([]), None], ids=["no rows", "no copies"])
    def test_nothing_kept_is_an_empty_tar(self, folder, rows):
        if rows is None:
            rows = changed(write_pool(storage.join(folder, "pool.tar"), self.SAMPLES), copies=0)
        assert write_tar(folder, 0, rows) == 0
        assert members_of(storage.join(folder, "00000.tar")) == []
        assert pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, "00000.parquet")))).num_rows == 0

    def test_copies_and_equal_keys_get_numbers_that_nobody_else_has(self, folder):
        first = changed(write_pool(storage.join(folder, "a.tar"), [("k", RAW), ("k-1", RAW)]), copies=3)
        second = write_pool(storage.join(folder, "b.tar"), [("k", RAW), ("k-1", RAW)])
        assert write_tar(folder, 0, pa.concat_tables([first, second])) == 8
        keys = keys_of(storage.join(folder, "00000.tar"))
        assert keys == ["k", "k-1", "k-2", "k-1-1", "k-1-2", "k-1-3", "k-3", "k-1-4"]
        origins = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, "00000.parquet")))).to_pylist()
        assert [origin["key"] for origin in origins] == keys
        assert [origin["source_key"] for origin in origins] == ["k"] * 3 + ["k-1"] * 3 + ["k", "k-1"]

    @pytest.mark.parametrize(
        "key", ["../x", "/abs", "a/../../x", "..", "a\\b", "c:\\x", "a\nb", "a\x1b[2Jb", "a\x7f", "//x", "a/.."]
    )
    def test_a_key_that_could_leave_the_folder_is_replaced_by_the_uid(self, folder, key):
        uid = "f" * 32
        rows = changed(write_pool(storage.join(folder, "pool.tar"), [("key", RAW)]), uid=uid)
        (row,) = rows.to_pylist()
        assert writers._free_key({**row, "key": key}, writers.Counter()) == uid

    @pytest.mark.parametrize("key", ["../x", "/abs", "a\\b", "a\nb"])
    def test_a_hostile_key_reaches_no_member_name(self, folder, key):
        rows = write_pool(storage.join(folder, "pool.tar"), [(key, RAW), ("good", RAW)])
        assert write_tar(folder, 0, rows) == 2
        assert keys_of(storage.join(folder, "00000.tar")) == [rows["uid"][0].as_py(), "good"]
        (origin, _) = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, "00000.parquet")))).to_pylist()
        assert origin["source_key"] == key

    @pytest.mark.parametrize(
        "key", ["ü日本", "a b", "a/b/c", "a..b/c", "x" * 300, "~", "-rf", "%2e%2e", "a'\"b", "a//b"]
    )
    def test_every_other_key_stays_as_it_was(self, folder, key):
        write_tar(folder, 0, write_pool(storage.join(folder, "pool.tar"), [(key, RAW)]))
        assert keys_of(storage.join(folder, "00000.tar")) == [key]

    def test_a_hostile_extension_is_left_out_and_its_sample_is_not(self, folder):
        sample = ("k", {**RAW, "x\\..\\..\\y": b"1", "a\nb": b"2", "seg.png": b"3"})
        write_tar(folder, 0, write_pool(storage.join(folder, "pool.tar"), [sample]))
        names = [name for name, _ in members_of(storage.join(folder, "00000.tar"))]
        assert names == ["k.jpg", "k.json", "k.txt", "k.seg.png"]

    @pytest.mark.parametrize(
        "wrong", [{"sha256": "0" * 64}, {"sha256": None}, {"key": "another"}, {"offset": 512}, {"offset": 10**9}]
    )
    def test_a_shard_that_no_longer_holds_the_sample_writes_nothing(self, folder, wrong):
        url = storage.join(folder, "pool.tar")
        rows = changed(write_pool(url, self.SAMPLES).slice(0, 1), **wrong)
        with pytest.raises(OSError, match=f"{url} no longer holds sample .* at offset .*: it was edited"):
            write_tar(folder, 0, rows)
        assert storage.names_in(folder) == ["pool.tar"]

    def test_a_shard_that_is_gone_is_an_error_of_the_store(self, folder):
        rows = write_pool(storage.join(folder, "pool.tar"), self.SAMPLES)
        storage.delete(storage.join(folder, "pool.tar"))
        with pytest.raises(FileNotFoundError, match="pool.tar"):
            write_tar(folder, 0, rows)
        assert storage.names_in(folder) == []

    def test_beside_a_tar_lie_its_count_and_the_origins_of_its_keys(self, folder):
        rows = changed(write_pool(storage.join(folder, "pool.tar"), self.SAMPLES), score=None)
        write_tar(folder, 12, rows)
        assert json.loads(storage.read_bytes(storage.join(folder, "00012_stats.json"))) == {"successes": 3}
        origins = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, "00012.parquet"))))
        assert origins.schema.equals(ORIGIN_SCHEMA)
        assert origins["status"].to_pylist() == ["success"] * 3
        assert origins["source_key"].equals(rows["key"])
        shared = ["uid", "address", "score", "shard"]
        assert origins.select(shared).equals(rows.select(shared))

    def test_a_removed_tar_leaves_its_neighbour(self, folder):
        rows = write_pool(storage.join(folder, "pool.tar"), self.SAMPLES)
        for index in (0, 1):
            write_tar(folder, index, rows)
        writers.remove_tar(folder, 0)
        writers.remove_tar(folder, 0)
        assert storage.names_in(folder) == ["00001.parquet", "00001.tar", "00001_stats.json", "pool.tar"]

    def test_ten_thousand_equal_keys_cost_no_search_each(self):
        used: writers.Counter[str] = writers.Counter()
        keys = [writers._free_key({"key": "k", "uid": ""}, used) for _ in range(10_000)]
        assert len(set(keys)) == 10_000
        assert used.total() < 3 * 10_000


class TestParquetRows:
    """Tars from the rows of a parquet file."""

    PNG = b"\x89PNG\r\n\x1a\n rest"
    WEBP = b"RIFF\0\0\0\0WEBP rest"

    @pytest.fixture
    def pool(self, tmp_path):
        table = pa.table(
            {
                "image": [b"\xff\xd8 a", self.PNG, self.WEBP, b"GIF89a"],
                "text": ["a", "b – ü", "c", "d"],
                "key": ["../x", "k", "k", None],
                "score": [1.5, float("nan"), float("inf"), None],
                "tags": [["x"], [], None, ["y", "z"]],
            }
        )
        pq.write_table(table, tmp_path / "pool.parquet", row_group_size=2)
        return self.rows(str(tmp_path / "pool.parquet"))

    @staticmethod
    def rows(url, *, rules=RULES, **values):
        with open_shard(url, rules) as reader:
            samples = list(reader)
        names = ("uid", "key", "offset", "sha256", "caption")
        given = {"address": 0, "shard": url, "score": 0.5, "copies": 1, "width": 4, "height": 3, **values}
        return kept({**given, **{name: getattr(sample, name) for name in names}} for sample in samples)

    def test_a_row_is_an_image_a_json_of_its_columns_and_a_caption(self, pool, tmp_path):
        assert write_tar(str(tmp_path / "out"), 0, pool) == 4
        members = members_of(str(tmp_path / "out" / "00000.tar"))
        first = pool["uid"][0].as_py()  # its key could leave a folder
        assert [name for name, _ in members] == [
            f"{key}.{extension}"
            for key, image in ((first, "jpg"), ("k", "png"), ("k-1", "webp"), ("000000003", "jpg"))
            for extension in (image, "json", "txt")
        ]
        assert [data for name, data in members if name.endswith(("jpg", "png", "webp"))] == [
            b"\xff\xd8 a",
            self.PNG,
            self.WEBP,
            b"GIF89a",
        ]
        assert [data.decode() for name, data in members if name.endswith("txt")] == ["a", "b – ü", "c", "d"]
        fields = [json.loads(data, parse_constant=pytest.fail) for name, data in members if name.endswith("json")]
        assert [f["uid"] for f in fields] == pool["uid"].to_pylist()
        assert [f["score"] for f in fields] == [1.5, None, None, None]
        assert [f["tags"] for f in fields] == [["x"], [], None, ["y", "z"]]
        assert {(f["width"], f["height"]) for f in fields} == {(4, 3)}

    def test_the_txt_is_the_column_that_the_rules_name(self, tmp_path):
        pq.write_table(pa.table({"image": [self.PNG], "text": ["old"], "alt": ["used"]}), tmp_path / "p.parquet")
        rules = ReadRules(caption_field="json.alt")
        writers.write_tar(str(tmp_path / "out"), 0, self.rows(str(tmp_path / "p.parquet"), rules=rules), rules=rules)
        assert members_of(str(tmp_path / "out" / "00000.tar"))[-1] == ("000000000.txt", b"used")

    def test_what_is_written_has_the_uids_of_the_rows(self, pool, tmp_path):
        write_tar(str(tmp_path / "out"), 0, pool)
        again = rows_of(str(tmp_path / "out" / "00000.tar"))
        assert again["uid"].to_pylist() == pool["uid"].to_pylist()

    def test_chosen_rows_of_ranges_and_a_tar_are_written_in_one_go(self, pool, tmp_path):
        of_tar = write_pool(str(tmp_path / "pool.tar"), [("t", RAW)])
        url = str(tmp_path / "pool.parquet")
        second, third = changed(pool.slice(1, 1), shard=f"{url}#rows=0000000000:0000000002"), pool.slice(2, 1)
        third = changed(third, shard=f"{url}#rows=0000000002:0000000004", copies=2)
        rows = pa.concat_tables([second, third, of_tar])
        assert write_tar(str(tmp_path / "out"), 0, rows) == 4
        assert keys_of(str(tmp_path / "out" / "00000.tar")) == ["k", "k-1", "k-2", "t"]

    @pytest.mark.parametrize(
        "wrong", [{"offset": 0}, {"offset": 4}, {"key": "other"}, {"sha256": "0" * 64}, {"sha256": None}]
    )
    def test_a_file_that_no_longer_holds_the_row_writes_nothing(self, pool, tmp_path, wrong):
        with pytest.raises(OSError, match="no longer holds sample .* it was edited"):
            write_tar(str(tmp_path / "out"), 0, changed(pool.slice(1, 1), **wrong))
        assert storage.names_in(str(tmp_path / "out")) == []


class TestIndex:
    def test_sizes_and_meta_are_what_open_clip_and_datacomp_read(self, folder):
        write_index(folder, {"00001.tar": 2, "00000.tar": 3}, arguments={"seed": 0, "pool": {"a": None}}, num_read=9)
        assert json.loads(storage.read_bytes(storage.join(folder, "sizes.json"))) == {"00000.tar": 3, "00001.tar": 2}
        assert json.loads(storage.read_bytes(storage.join(folder, "meta.json"))) == {
            "seed": "0",
            "pool": "{'a': None}",
            "output_shard_format": "{:05d}.tar",
            "processed_count": 9,
            "output_count": 5,
            "output_shard_count": 2,
            "cwd": ".",
        }

    def test_a_removed_index_leaves_what_it_did_not_make(self, folder):
        write_index(folder, {"00000.tar": 1}, arguments={}, num_read=1)
        for name in ("sample_ids.npy", "README.md", "notes.txt"):
            storage.write_bytes(storage.join(folder, name), b"x")
        writers.remove_index(folder)
        writers.remove_index(folder)
        assert storage.names_in(folder) == ["notes.txt"]

    def test_an_empty_set_has_an_index_too(self, folder):
        write_index(folder, {}, arguments={}, num_read=0)
        assert json.loads(storage.read_bytes(storage.join(folder, "sizes.json"))) == {}
        assert json.loads(storage.read_bytes(storage.join(folder, "meta.json")))["output_count"] == 0


class TestOtherReaders:
    @pytest.fixture
    def curated(self, tmp_path):
        samples = [("a/k", RAW), ("../x", RAW), ("ü", RAW), ("a\\b", {**RAW, "seg.png": b"s"})]
        rows = changed(write_pool(str(tmp_path / "pool.tar"), samples), copies=2)
        sizes = {f"{index:05d}.tar": write_tar(str(tmp_path / "out"), index, rows) for index in range(2)}
        write_index(str(tmp_path / "out"), sizes, arguments={}, num_read=4)
        uids = rows["uid"].to_pylist()
        keys = ["a/k", "a/k-1", uids[1], f"{uids[1]}-1", "ü", "ü-1", uids[3], f"{uids[3]}-1"]
        return tmp_path / "out", keys

    def test_webdataset_reads_every_sample(self, curated):
        folder, keys = curated
        dataset = webdataset.WebDataset(str(folder / "{00000..00001}.tar"), shardshuffle=False)  # pyright: ignore
        samples = list(dataset)
        assert [sample["__key__"] for sample in samples] == keys * 2
        assert all(sample[name] == data for sample in samples for name, data in RAW.items())
        assert [sample.get("seg.png") for sample in samples[:8]] == [None] * 6 + [b"s"] * 2

    def test_open_clips_own_loader_counts_and_reads_every_sample(self, curated, monkeypatch):
        data = pytest.importorskip("open_clip_train.data", exc_type=ImportError)
        # open_clip 3.3 is written for webdataset 0.2, which does not mark the end of each tar.
        monkeypatch.setattr(data, "tar_file_expander", partial(data.tar_file_expander, eof_value=None))
        folder, keys = curated
        assert data.get_dataset_size(str(folder / "{00000..00001}.tar")) == (16, 2)
        sources = [{"url": str(folder / f"{index:05d}.tar")} for index in range(2)]
        samples = list(data.tarfile_to_samples_nothrow(iter(sources)))
        assert [sample["__key__"] for sample in samples] == keys * 2
        assert all(hashlib.sha256(sample["jpg"]).digest() == hashlib.sha256(RAW["jpg"]).digest() for sample in samples)

    def test_our_own_reader_reads_them_as_another_pool(self, curated):
        folder, keys = curated
        assert rows_of(str(folder / "00000.tar"))["key"].to_pylist() == keys
