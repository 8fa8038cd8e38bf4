"""clip-retrieval's folder and DataComp's files: what is written is read back, and what does not fit is never paired."""

from __future__ import annotations

import io
import uuid
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.data import cached_embeddings, storage, tables
from curation.data.cached_embeddings import Source, fingerprint, sources
from curation.data.drop_reasons import DROP_REASONS
from curation.data.embeddings_folder import part_names, remove_part, write_part
from curation.data.read_rules import ReadRules

RULES = ReadRules()
UIDS = [f"{number:032x}" for number in range(4)]
COLUMNS = {"uid": UIDS, "url": ["u"] * 4, "text": list("abcd"), "clip_l14_similarity_score": [0.1, 0.2, 0.3, 0.4]}


def vectors(seed: int, n: int = 4, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def write_datacomp(folder, table=None, **arrays) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(COLUMNS) if table is None else table, folder / "ab.parquet")
    defaults = {"b32_img": vectors(1), "b32_txt": vectors(2), "l14_img": vectors(3), "l14_txt": vectors(4)}
    np.savez(folder / "ab.npz", **{**defaults, "dedup": np.zeros(4), **arrays})
    return str(folder / "ab.parquet")


class TestDatacomp:
    @pytest.mark.parametrize(("layout", "seeds"), [("datacomp-b32", (1, 2)), ("datacomp-l14", (3, 4))])
    def test_the_arrays_of_the_model_are_read_and_normalised(self, tmp_path, layout, seeds):
        cached = cached_embeddings.read(write_datacomp(tmp_path), layout, RULES)
        assert [sample.uid for sample in cached.samples] == UIDS
        assert [sample.caption for sample in cached.samples] == list("abcd")
        assert [sample.fields["clip_l14_similarity_score"] for sample in cached.samples] == [0.1, 0.2, 0.3, 0.4]
        assert cached.reasons == [None] * 4
        np.testing.assert_allclose(cached.image_ND, unit(vectors(seeds[0])), rtol=1e-6)
        np.testing.assert_allclose(cached.text_ND, unit(vectors(seeds[1])), rtol=1e-6)

    def test_rows_of_a_file_get_the_rows_of_its_arrays(self, tmp_path):
        url = write_datacomp(tmp_path)
        cached = cached_embeddings.read(f"{url}#rows=0000000001:0000000003", "datacomp-b32", RULES)
        assert [sample.uid for sample in cached.samples] == UIDS[1:3]
        np.testing.assert_allclose(cached.image_ND, unit(vectors(1))[1:3], rtol=1e-6)

    def test_float16_and_compressed_arrays_are_read(self, tmp_path):
        url = write_datacomp(tmp_path)
        np.savez_compressed(tmp_path / "ab.npz", b32_img=vectors(1).astype(np.float16), b32_txt=vectors(2))
        cached = cached_embeddings.read(url, "datacomp-b32", RULES)
        np.testing.assert_allclose(np.linalg.norm(cached.image_ND, axis=1), 1, rtol=1e-6)

    def test_a_row_without_a_direction_is_dropped_and_the_others_keep_theirs(self, tmp_path):
        image, text = vectors(1), vectors(2)
        image[1], text[2, 3] = 0, np.inf
        cached = cached_embeddings.read(write_datacomp(tmp_path, b32_img=image, b32_txt=text), "datacomp-b32", RULES)
        assert cached.reasons == [None, "embedding:not_finite", "embedding:not_finite", None]
        np.testing.assert_allclose(cached.image_ND, unit(image[[0, 3]]), rtol=1e-6)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda p: p.unlink(), "embedding:missing"),
            (lambda p: p.write_bytes(b"<html>"), "embedding:unreadable"),
            (lambda p: p.write_bytes(p.read_bytes()[:300]), "embedding:unreadable"),
            (lambda p: np.savez(p, b32_img=vectors(1)), "embedding:unreadable"),
            (lambda p: np.savez(p, b32_img=vectors(1, n=3), b32_txt=vectors(2)), "embedding:not_aligned"),
            (lambda p: np.savez(p, b32_img=vectors(1, n=5), b32_txt=vectors(2, n=5)), "embedding:not_aligned"),
            (lambda p: np.savez(p, b32_img=vectors(1, dim=6), b32_txt=vectors(2)), "embedding:unreadable"),
            (lambda p: np.savez(p, b32_img=vectors(1)[:, 0], b32_txt=vectors(2)), "embedding:unreadable"),
            (lambda p: np.savez(p, b32_img=vectors(1).astype(int), b32_txt=vectors(2)), "embedding:unreadable"),
            (lambda p: np.savez(p, b32_img=np.asfortranarray(vectors(1)), b32_txt=vectors(2)), "embedding:unreadable"),
            (lambda p: np.savez(p, b32_img=np.array([[{}]] * 4), b32_txt=vectors(2)), "embedding:unreadable"),
        ],
    )
    def test_arrays_that_do_not_belong_to_the_rows_drop_them_all(self, tmp_path, change, reason):
        url = write_datacomp(tmp_path)
        change(tmp_path / "ab.npz")
        cached = cached_embeddings.read(url, "datacomp-b32", RULES)
        assert cached.reasons == [reason] * 4
        assert len(cached.image_ND) == len(cached.text_ND) == 0
        assert reason in DROP_REASONS

    def test_an_array_whose_bytes_end_early_is_unreadable(self, tmp_path):
        url = write_datacomp(tmp_path)
        whole = io.BytesIO()
        np.save(whole, vectors(1))
        with zipfile.ZipFile(tmp_path / "ab.npz", "w") as archive:
            archive.writestr("b32_img.npy", whole.getvalue()[:-4])
            archive.writestr("b32_txt.npy", whole.getvalue())
        assert cached_embeddings.read(url, "datacomp-b32", RULES).reasons == ["embedding:unreadable"] * 4

    def test_metadata_that_cannot_be_read_are_their_own_reason(self, tmp_path):
        url = write_datacomp(tmp_path)
        (tmp_path / "ab.parquet").write_bytes(b"no")
        assert cached_embeddings.read(url, "datacomp-b32", RULES).reasons == ["parquet:unreadable"]

    def test_the_fingerprint_changes_with_the_arrays(self, tmp_path):
        url = write_datacomp(tmp_path)
        before = fingerprint(url, "datacomp-b32")
        np.savez(tmp_path / "ab.npz", b32_img=vectors(9, n=5))
        after = fingerprint(url, "datacomp-b32")
        (tmp_path / "ab.npz").unlink()
        assert len({before, after, fingerprint(url, "datacomp-b32")}) == 3

    def test_a_store_that_fails_is_an_error_and_drops_nothing(self, tmp_path, monkeypatch):
        url, opened = write_datacomp(tmp_path), storage.open_read

        def fails(name):
            if name.endswith(".npz"):
                raise ConnectionResetError("reset by peer")
            return opened(name)

        monkeypatch.setattr(storage, "open_read", fails)
        with pytest.raises(ConnectionResetError):
            cached_embeddings.read(url, "datacomp-b32", RULES)


class TestSources:
    def test_where_arrays_lie(self):
        assert sources("s3://b/m/ab.parquet#rows=0000000000:0000000001", "datacomp-l14") == (
            Source("s3://b/m/ab.npz", "l14_img"),
            Source("s3://b/m/ab.npz", "l14_txt"),
        )
        assert sources("/x/emb/metadata/metadata_07.parquet", "clip-retrieval") == (
            Source("/x/emb/img_emb/img_emb_07.npy"),
            Source("/x/emb/text_emb/text_emb_07.npy"),
        )

    @pytest.mark.parametrize("url", ["/x/metadata_0.parquet", "/x/metadata/part_0.parquet"])
    def test_another_name_is_no_part_of_clip_retrievals_folder(self, url):
        with pytest.raises(ValueError, match="name the folder `metadata` of it"):
            sources(url, "clip-retrieval")


class TestClipRetrieval:
    @pytest.fixture(params=["local", "memory"])
    def run(self, request, tmp_path):
        """A run of two shards whose json fields differ, with a dropped row in the first."""
        url = str(tmp_path / "run") if request.param == "local" else f"memory:///{uuid.uuid4().hex}"
        for number, fields in enumerate(
            [[{"url": "u", "n": 1, "caption": "json's"}] * 3, [{"n": 0.5, "uid": "x"}] * 2]
        ):
            n = len(fields)
            status = ["ok", "dropped", "ok"][:n] if n == 3 else ["ok"] * n
            ok = status.count("ok")
            columns = {
                "address": (number << 20) + np.arange(n),
                "uid": [f"{number}{row}" for row in range(n)],
                "key": [f"k{number}{row}" for row in range(n)],
                "shard": ["s"] * n,
                "offset": [0] * n,
                "status": status,
                "reason": [None if s == "ok" else "r" for s in status],
                "caption": [f"c{number}{row}" for row in range(n)],
                "width": [1] * n,
                "height": [1] * n,
                "sha256": [None] * n,
                "image_embedding": unit(vectors(number, ok)).astype(np.float16),
                "text_embedding": unit(vectors(number + 5, ok)).astype(np.float16),
                "clip_score": [0.5 if s == "ok" else None for s in status],
            }
            tables.write(url, number, tables.sample_table(columns, fields))
        return url

    KEPT = np.array([0, 2, (1 << 20) + 1])

    def test_row_k_of_the_three_files_is_the_same_sample(self, run):
        folder, names = storage.join(run, "embeddings"), part_names(0, 1)
        assert names == ("img_emb/img_emb_0.npy", "text_emb/text_emb_0.npy", "metadata/metadata_0.parquet")
        write_part(folder, names, output=run, kept=self.KEPT)
        image, text = (np.load(io.BytesIO(storage.read_bytes(storage.join(folder, name)))) for name in names[:2])
        metadata = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, names[2]))))
        assert image.dtype == text.dtype == np.float16
        np.testing.assert_array_equal(image[:2], unit(vectors(0, 2)).astype(np.float16))
        np.testing.assert_array_equal(text[2], unit(vectors(6, 2)).astype(np.float16)[1])
        assert metadata.column_names == ["image_path", "caption", "uid", "clip_score", "url", "n"]
        assert metadata["image_path"].to_pylist() == ["k00", "k02", "k11"]
        assert metadata["caption"].to_pylist() == ["c00", "c02", "c11"]  # ours, not the json's
        assert metadata["n"].to_pylist() == [1.0, 1.0, 0.5]
        assert metadata["url"].to_pylist() == ["u", "u", None]

    def test_what_is_written_is_read_back_as_cached_embeddings(self, run):
        folder, names = storage.join(run, "embeddings"), part_names(3, 12)
        assert names[2] == "metadata/metadata_03.parquet"
        write_part(folder, names, output=run, kept=self.KEPT)
        cached = cached_embeddings.read(storage.join(folder, names[2]), "clip-retrieval", RULES)
        assert cached.reasons == [None] * 3
        assert [(s.key, s.caption) for s in cached.samples] == [("k00", "c00"), ("k02", "c02"), ("k11", "c11")]
        np.testing.assert_allclose(cached.image_ND[:2], unit(vectors(0, 2)), atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(cached.text_ND, axis=1), 1, atol=1e-6)

    def test_a_removed_part_leaves_its_neighbour(self, run):
        folder = storage.join(run, "embeddings")
        for index in range(2):
            write_part(folder, part_names(index, 2), output=run, kept=self.KEPT)
        remove_part(folder, part_names(0, 2))
        for sub, left in (
            ("img_emb", "img_emb_1.npy"),
            ("text_emb", "text_emb_1.npy"),
            ("metadata", "metadata_1.parquet"),
        ):
            assert storage.names_in(storage.join(folder, sub)) == [left]

    @pytest.mark.parametrize(("parts", "first"), [(1, "0"), (9, "0"), (10, "00"), (100, "000"), (99, "00")])
    def test_numbers_have_the_digits_that_clip_retrieval_gives_them(self, parts, first):
        assert part_names(0, parts)[0] == f"img_emb/img_emb_{first}.npy"
        assert len(first) == int(np.log10(parts)) + 1
