import os
import threading
import uuid
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from curation.data import storage
from curation.data.remote import ChangedWhileRead


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    """A fresh folder that does not exist yet, on each kind of store."""
    if request.param == "local":
        return str(tmp_path / "new" / "folder")
    if request.param == "s3":
        return request.getfixturevalue("s3_bucket") + "/folder"
    return f"memory:///{uuid.uuid4().hex}/folder"


@pytest.fixture(params=["memory", "s3"])
def bucket(request):
    return request.getfixturevalue("s3_bucket") if request.param == "s3" else f"memory:///{uuid.uuid4().hex}"


def urls(patterns):
    return [shard.url for shard in storage.list_shards(patterns)]


def local_pool(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return [str(root / name) for name in sorted(names)]


class TestNames:
    @pytest.mark.parametrize(
        ("folder", "joined"),
        [
            ("/a", "/a/b/c"),
            ("/a/", "/a/b/c"),
            ("/", "/b/c"),
            ("x:", "x:/b/c"),
            ("memory://a/", "memory://a/b/c"),
            ("memory://", "memory://b/c"),
            ("memory:///", "memory://b/c"),
            ("s3://bucket", "s3://bucket/b/c"),
        ],
    )
    def test_join_puts_a_file_below_a_folder(self, folder, joined):
        assert storage.join(folder, "b", "c") == joined

    def test_every_spelling_of_a_place_has_one_absolute_url(self, tmp_path, monkeypatch):
        (tmp_path / "pool").mkdir()
        monkeypatch.chdir(tmp_path / "pool")
        place = f"{tmp_path}/pool/x.tar"
        spellings = [
            "x.tar",
            "./x.tar",
            "../pool/x.tar",
            place,
            f"file://{place}",
            f"/{place}",
            f"{tmp_path}//pool/./x.tar",
        ]
        assert {storage.absolute(spelling) for spelling in spellings} == {place}
        assert storage.absolute("memory://a/b") == storage.absolute("memory:///a/b") == "memory:///a/b"

    @pytest.mark.parametrize(
        "name", ["a b.tar", "ü日本.tar", "a#b.tar", "a%20b.tar", "%.tar", "a::b.tar", "a?b=c.tar", "[1]*.tar"]
    )
    def test_odd_characters_of_a_local_name_are_literal(self, tmp_path, name):
        url = f"{tmp_path}/{name}"
        storage.write_bytes(url, b"odd")
        assert os.listdir(tmp_path) == [name]
        assert storage.absolute(url) == url
        assert storage.read_bytes(url) == b"odd"
        assert storage.list_shards(str(tmp_path)) == [(url, storage.fingerprint(url))]

    @pytest.mark.parametrize("name", ["a b.tar", "ü日本.tar", "a#b.tar", "a%20b.tar"])
    def test_odd_characters_of_a_bucket_are_literal(self, bucket, name):
        url = f"{bucket}/{name}"
        storage.write_bytes(url, b"odd")
        assert storage.names_in(bucket) == [name]
        assert storage.read_bytes(url) == b"odd"
        assert urls(url) == urls(bucket) == [url]

    def test_a_chain_of_urls_is_refused(self):
        with pytest.raises(ValueError, match="'simplecache::memory://a' holds '::'"):
            storage.absolute("simplecache::memory://a")

    def test_an_unknown_protocol_is_named(self):
        with pytest.raises(ValueError, match="cannot open 's4://a': Protocol not known: s4"):
            storage.absolute("s4://a")

    def test_a_protocol_whose_package_is_missing_says_what_to_install(self, monkeypatch):
        def missing(*_, **__):
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(storage, "url_to_fs", missing)
        with pytest.raises(ValueError, match="cannot open 's3://a': Install s3fs"):
            storage.read_bytes("s3://a")

    def test_only_plain_paths_and_file_urls_are_local(self):
        assert [storage.is_local(url) for url in ("/a", "a", "file:///a", "memory://a")] == [True, True, True, False]


class TestReadAndWrite:
    @pytest.mark.parametrize("data", [b"", b"\0", b"x" * (storage.BLOCK_BYTES + 1)])
    def test_what_was_written_is_read(self, folder, data):
        url = storage.join(folder, "a.bin")
        storage.write_bytes(url, data)
        storage.copy(url, storage.join(folder, "copy", "b.bin"))
        assert storage.read_bytes(url) == data
        assert storage.read_bytes(storage.join(folder, "copy", "b.bin")) == data

    def test_writing_again_replaces_the_whole_file(self, folder):
        url = storage.join(folder, "a.bin")
        storage.write_bytes(url, b"a long one")
        storage.write_bytes(url, b"short")
        assert storage.read_bytes(url) == b"short"

    def test_who_reads_the_old_file_never_gets_a_byte_of_the_new_one(self, folder):
        url = storage.join(folder, "a.bin")
        storage.write_bytes(url, b"the old file")
        with storage.open_read(url) as old:
            assert old.read(4) == b"the "
            storage.write_bytes(url, b"something new")
            if folder.startswith("s3://"):  # which keeps no file for those who still read it
                with pytest.raises(ChangedWhileRead, match="folder/a.bin changed while it was read"):
                    old.read()
            else:
                assert old.read() == b"old file"

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_exception_leaves_the_old_file_whole_and_nothing_else(self, folder, error):
        url = storage.join(folder, "a.bin")
        storage.write_bytes(url, b"old")
        with pytest.raises(error, match="midway"), storage.write_atomic(url) as file:
            file.write(b"half of the new")
            raise error("midway")
        assert storage.read_bytes(url) == b"old"
        assert storage.names_in(folder) == ["a.bin"]

    def test_an_exception_leaves_no_new_file(self, folder):
        url = storage.join(folder, "a.bin")
        with pytest.raises(RuntimeError, match="midway"), storage.write_atomic(url) as file:
            file.write(b"half")
            raise RuntimeError("midway")
        assert not storage.exists(url)
        assert storage.names_in(folder) == []

    def test_nothing_is_visible_before_the_block_ends(self, folder):
        url = storage.join(folder, "a.bin")
        with storage.write_atomic(url) as file:
            file.write(b"whole")
            file.flush()
            assert not storage.exists(url)
        assert storage.read_bytes(url) == b"whole"

    def test_two_writers_never_mix_and_the_last_to_end_wins(self, folder):
        url = storage.join(folder, "a.bin")
        with storage.write_atomic(url) as outer:
            outer.write(b"outer ")
            with storage.write_atomic(url) as inner:
                inner.write(b"inner")
            assert storage.read_bytes(url) == b"inner"
            outer.write(b"whole")
        assert storage.read_bytes(url) == b"outer whole"
        assert storage.names_in(folder) == ["a.bin"]

    def test_writers_at_once_leave_one_of_their_files_whole(self, folder):
        url = storage.join(folder, "a.bin")
        parts = [bytes([n]) * 100_000 for n in range(8)]

        def write(data):
            for _ in range(10):
                storage.write_bytes(url, data)

        threads = [threading.Thread(target=write, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert storage.read_bytes(url) in parts
        assert storage.names_in(folder) == ["a.bin"]

    def test_an_upload_that_fails_midway_makes_nothing_visible(self, monkeypatch):
        bucket = f"memory:///{uuid.uuid4().hex}"

        def broken(self, source, target, **_):
            raise OSError("connection lost")

        monkeypatch.setattr(MemoryFileSystem, "put_file", broken)
        with pytest.raises(OSError, match="connection lost"):
            storage.write_bytes(f"{bucket}/a.bin", b"new")
        assert not storage.exists(f"{bucket}/a.bin")

    def test_a_missing_file_is_an_error_to_read_and_nothing_to_delete(self, folder):
        url = storage.join(folder, "none")
        for read in (storage.read_bytes, storage.fingerprint, storage.sha256_of):
            with pytest.raises(FileNotFoundError, match="none"):
                read(url)
        storage.delete(url)
        assert not storage.exists(url)
        assert storage.names_in(folder) == []

    def test_a_deleted_file_is_gone(self, folder):
        for name in ("a", "b"):
            storage.write_bytes(storage.join(folder, name), b"x")
        storage.delete(storage.join(folder, "a"))
        assert storage.names_in(folder) == ["b"]

    def test_below_a_file_there_is_nothing(self, tmp_path):
        local_pool(tmp_path, "a.tar")
        assert not storage.exists(f"{tmp_path}/a.tar/b")
        assert storage.names_in(f"{tmp_path}/a.tar/b") == storage.names_in(f"{tmp_path}/a.tar") == []

    def test_names_are_those_of_files_sorted(self, folder):
        for path in (["b"], ["a"], ["sub", "c"]):
            storage.write_bytes(storage.join(folder, *path), b"")
        assert storage.names_in(folder) == ["a", "b"]

    def test_a_store_that_does_not_answer_is_not_a_missing_file(self, monkeypatch):
        # fsspec's own `exists` says False here, and a shard list that "is not there" is begun anew.
        def down(self, path, **_):
            raise PermissionError("403 Forbidden")

        monkeypatch.setattr(MemoryFileSystem, "info", down)
        for ask in (storage.exists, storage.list_shards):
            with pytest.raises(PermissionError, match="403"):
                ask("memory:///down/a.tar")

    def test_what_another_process_wrote_is_seen_at_once(self):
        assert isinstance(storage._resolve("memory://a")[0], AbstractFileSystem)
        assert storage._resolve("memory://a")[0].dircache.use_listings_cache is False

    def test_sha256_is_that_of_the_bytes(self, folder):
        url = storage.join(folder, "a")
        storage.write_bytes(url, b"abc")
        assert storage.sha256_of(url) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


class TestFingerprint:
    def test_it_changes_with_the_size_and_with_the_time_alone(self, folder):
        url = storage.join(folder, "a.tar")
        marks = []
        for data in (b"one", b"three", b"seven"):
            storage.write_bytes(url, data)
            if storage.is_local(url):
                os.utime(url, ns=(0, 10**18 + len(marks)))
            marks.append(storage.fingerprint(url))
        assert len(set(marks)) == 3
        assert all(marks)

    def test_it_stays_while_the_file_does(self, folder):
        url = storage.join(folder, "a.tar")
        storage.write_bytes(url, b"x")
        assert storage.fingerprint(url) == storage.fingerprint(url)

    @pytest.mark.parametrize("pattern", ["", "*.tar", "a.tar", "{a,b}.tar"])
    def test_a_listing_and_the_file_itself_show_the_same_one(self, folder, pattern):
        url = storage.join(folder, "a.tar")
        storage.write_bytes(url, b"x")
        assert storage.list_shards(storage.join(folder, pattern))[0] == (url, storage.fingerprint(url))

    def test_an_etag_is_preferred_and_loses_its_quotes(self):
        info = {"size": 5, "ETag": '"abc"', "LastModified": "x"}
        assert storage._fingerprint_of(info) == "5:abc"

    def test_over_http_a_listing_and_the_file_show_the_same_one(self, tmp_path):
        local_pool(tmp_path, "00000.tar", "00001.tar")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            root = f"http://127.0.0.1:{server.server_port}"
            shards = storage.list_shards(f"{root}/*.tar")
            assert [shard.url for shard in shards] == [f"{root}/00000.tar", f"{root}/00001.tar"]
            assert [shard.fingerprint for shard in shards] == [storage.fingerprint(shard.url) for shard in shards]
            assert shards[0].fingerprint.startswith("9:")
            assert len(shards[0].fingerprint) > len("9:")
        finally:
            server.shutdown()
            server.server_close()


class TestListShards:
    def test_globs_brace_lists_and_joined_patterns_name_shards_sorted_and_once(self, folder):
        for name in ("00000", "00001", "00002", "b/00000", "notes"):
            storage.write_bytes(storage.join(folder, f"{name}.tar"), b"x")
        listed = urls(
            "::".join(storage.join(folder, p) for p in ("b/*.tar", "{00001..00002}.tar", "0000[01].tar", "b"))
        )
        assert listed == [storage.join(folder, f"{name}.tar") for name in ("00000", "00001", "00002", "b/00000")]

    def test_a_folder_means_its_own_tars(self, folder):
        for name in ("a.tar", "b.txt", "sub/c.tar", "d.tar.gz"):
            storage.write_bytes(storage.join(folder, name), b"x")
        assert urls(folder) == urls(folder + "/") == [storage.join(folder, "a.tar")]

    def test_several_folders_may_hold_a_00000_tar(self, folder):
        for name in ("a/00000.tar", "b/00000.tar", "b/c/00000.tar"):
            storage.write_bytes(storage.join(folder, name), name.encode())
        assert urls(storage.join(folder, "**/*.tar")) == [
            storage.join(folder, name) for name in ("a/00000.tar", "b/00000.tar", "b/c/00000.tar")
        ]
        assert len(urls("::".join(storage.join(folder, name) for name in ("a", "b", "b/c")))) == 3

    def test_a_named_shard_that_is_absent_has_no_fingerprint(self, folder):
        storage.write_bytes(storage.join(folder, "1.tar"), b"x")
        shards = storage.list_shards(storage.join(folder, "{0..2}.tar"))
        assert [shard.url for shard in shards] == [storage.join(folder, f"{n}.tar") for n in range(3)]
        assert [bool(shard.fingerprint) for shard in shards] == [False, True, False]

    @pytest.mark.parametrize("pattern", ["", "*.tar", "a.tar", "{0..9}.tar", "*/00000.tar"])
    def test_a_pattern_that_matches_nothing_is_an_error(self, folder, pattern):
        storage.write_bytes(storage.join(folder, "other.txt"), b"x")
        with pytest.raises(ValueError, match=r"pool\.shards: no shard matches"):
            storage.list_shards(storage.join(folder, pattern))

    def test_one_glob_that_matches_nothing_is_an_error_beside_others_that_do(self, folder):
        storage.write_bytes(storage.join(folder, "a.tar"), b"x")
        with pytest.raises(ValueError, match="no shard matches '.*/b\\*.tar'"):
            storage.list_shards(f"{folder}/a.tar::{folder}/b*.tar")

    @pytest.mark.parametrize("patterns", ["", "::"])
    def test_no_pattern_at_all_is_an_error(self, patterns):
        with pytest.raises(ValueError, match="no shard matches"):
            storage.list_shards(patterns)

    def test_a_broken_brace_list_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"pool\.shards: '.*a\{b.tar' is no brace list: Unbalanced"):
            storage.list_shards(f"{tmp_path}/a{{b.tar")

    def test_hidden_names_are_matched_only_by_a_pattern_with_the_dot(self, folder):
        for name in ("a.tar", "._a.tar", ".b.tar"):  # a Mac leaves `._a.tar` beside each `a.tar`
            storage.write_bytes(storage.join(folder, name), b"x")
        assert urls(folder) == urls(f"{folder}/*.tar") == [storage.join(folder, "a.tar")]
        assert urls(f"{folder}/.*.tar") == [storage.join(folder, name) for name in ("._a.tar", ".b.tar")]
        assert urls(f"{folder}/._a.tar") == [storage.join(folder, "._a.tar")]

    def test_a_file_or_folder_that_is_there_is_meant_whatever_characters_it_has(self, tmp_path):
        local_pool(tmp_path, "v[2]/a[1].tar", "v[2]/a1.tar", "v2/b.tar")
        assert urls(f"{tmp_path}/v[2]") == [f"{tmp_path}/v[2]/a1.tar", f"{tmp_path}/v[2]/a[1].tar"]
        assert urls(f"{tmp_path}/v[2]/a[1].tar") == [f"{tmp_path}/v[2]/a[1].tar"]
        assert urls(f"{tmp_path}/v[12]/*.tar") == [f"{tmp_path}/v2/b.tar"]

    def test_symbolic_links_are_shards_like_others_and_a_broken_one_is_absent(self, tmp_path):
        local_pool(tmp_path, "real/a.tar")
        (tmp_path / "pool").mkdir()
        (tmp_path / "pool" / "linked.tar").symlink_to(tmp_path / "real" / "a.tar")
        (tmp_path / "pool" / "broken.tar").symlink_to(tmp_path / "real" / "nothing.tar")
        (tmp_path / "pool" / "sub").symlink_to(tmp_path / "real")
        shards = storage.list_shards(f"{tmp_path}/pool/*.tar::{tmp_path}/pool/*/*.tar")
        assert [(shard.url.removeprefix(f"{tmp_path}/pool/"), shard.fingerprint) for shard in shards] == [
            ("broken.tar", ""),
            ("linked.tar", storage.fingerprint(str(tmp_path / "real/a.tar"))),
            ("sub/a.tar", storage.fingerprint(str(tmp_path / "real/a.tar"))),
        ]

    def test_a_name_that_is_not_utf_8_is_told(self, tmp_path):
        local_pool(tmp_path, "a.tar")
        (tmp_path / os.fsdecode(b"b\xff.tar")).write_bytes(b"x")
        with pytest.raises(
            ValueError, match=r"pool.shards: the name of '.*b\\udcff.tar' is not UTF-8: rename the file"
        ):
            storage.list_shards(str(tmp_path))

    def test_a_folder_named_like_a_shard_is_none(self, folder):
        storage.write_bytes(storage.join(folder, "x.tar", "inside.txt"), b"x")
        storage.write_bytes(storage.join(folder, "a.tar"), b"x")
        assert urls(f"{folder}/*.tar") == [storage.join(folder, "a.tar")]

    def test_the_root_of_a_store_is_a_folder(self):
        name = f"{uuid.uuid4().hex}.tar"
        storage.write_bytes(f"memory://{name}", b"x")
        assert f"memory:///{name}" in urls("memory://")
        fsspec.filesystem("memory").rm_file(f"/{name}")


def test_patterns_mean_the_same_in_any_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    patterns = storage.absolute_patterns("a/{00..01}.tar::s3://b/*.tar::../c")
    assert patterns == f"{tmp_path}/a/{{00..01}}.tar::s3://b/*.tar::{tmp_path.parent}/c"
    assert storage.absolute_patterns("") == ""
