"""Pools of every format through the whole run: parquet rows, DataComp's metadata, cached embeddings in and out."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from curation.data import parquet_shards, shard_list, tables
from curation.data.read_rules import ReadRules
from curation.data.rows import StaleTable, read_rows
from curation.distributed.pipeline import curate, make_plan
from curation.distributed.train_plan import checked
from curation.recipe import Compute, CurateRecipe, Embed, Pool, Select, Threshold, TrainRecipe, Write
from tests.distributed.conftest import WriteShard, jpeg

pytestmark = pytest.mark.usefixtures("ray_session")

CLIP_SCORE = {"name": "clip_score"}


def uid(number: int) -> str:
    return np.random.default_rng(number).bytes(16).hex()


def write_parquet_pool(path: Path, n: int = 50) -> None:
    """`n` rows in groups of 10, as Hugging Face's data sets have them: row 3 is no image, row 4 a URL only."""
    images = [{"bytes": jpeg(row), "path": None} for row in range(n)]
    images[3]["bytes"], images[4]["bytes"] = b"no image", None
    table = pa.table(
        {
            "IMAGE": images,
            "TEXT": [f"picture {row}" for row in range(n)],
            "URL": ["http://x"] * n,
            "uid": [uid(row) if row % 2 else None for row in range(n)],
            "similarity": pa.array(np.linspace(0, 1, n), pa.float32()),
            "NSFW": pa.array([float("nan")] * n),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=10)


@pytest.fixture(scope="module")
def parquet_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurateRecipe, Path]:
    """A parquet pool, cut into ranges of 20 rows, and the run that curated it."""
    root = tmp_path_factory.mktemp("parquet")
    write_parquet_pool(root / "pool" / "part.parquet")
    recipe = CurateRecipe(
        pool=Pool(shards=str(root / "pool")),
        embed=Embed(model="nano", batch_size=8),
        compute=Compute(device="cpu", actors=1),
        selection=(Threshold(column="json.similarity", at_least=0.5), Select(method=CLIP_SCORE, keep=15)),
        write=Write(samples_per_shard=10, embeddings=True),
        output=str(root / "run"),
        max_drop_fraction=0.5,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_shards, "cut", partial(parquet_shards.cut, max_rows=20))
        summary = curate(recipe)
    assert not summary.failures
    assert (summary.read, summary.embedded, summary.selected) == (50, 48, 15)
    assert summary.dropped == {"image:not_downloaded": 1, "image:unrecognized": 1}
    return recipe, root


def test_a_large_file_is_addressed_by_ranges_of_rows(parquet_run: tuple[CurateRecipe, Path]) -> None:
    recipe, root = parquet_run
    shards = shard_list.load(recipe.output)
    assert [parquet_shards.row_range(shard.url)[1:] for shard in shards] == [(0, 20), (20, 40), (40, 50)]
    assert [shard.rows for shard in shards] == [20, 20, 10]
    table = pa.concat_tables(pq.read_table(path) for path in sorted((root / "run" / "samples").iterdir()))
    assert table["offset"].to_pylist() == list(range(50))
    assert table["address"].to_pylist() == [(row // 20 << 20) + row % 20 for row in range(50)]
    assert [u for row, u in enumerate(table["uid"].to_pylist()) if row % 2] == [uid(row) for row in range(1, 50, 2)]


def test_kept_rows_become_tars_that_webdataset_and_open_clip_read(
    parquet_run: tuple[CurateRecipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, root = parquet_run
    pool, shards = pq.read_table(root / "pool" / "part.parquet"), root / "run" / "shards"
    origins = pa.concat_tables(pq.read_table(shards / f"{index:05d}.parquet") for index in range(2))
    pattern = str(shards / "{00000..00001}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False))  # pyright: ignore
    assert len(samples) == origins.num_rows == 15
    for sample, origin in zip(samples, origins.to_pylist(), strict=True):
        row = int(sample["__key__"])
        assert row >= 25
        assert sample["jpg"] == pool["IMAGE"][row].as_py()["bytes"]
        assert sample["txt"].decode() == pool["TEXT"][row].as_py() == origin["caption"]
        fields = json.loads(sample["json"])
        assert fields["uid"] == origin["uid"] == (uid(row) if row % 2 else origin["uid"])
        assert (fields["URL"], fields["NSFW"], fields["width"]) == ("http://x", None, 24)
        assert (origin["status"], origin["url"], origin["source_key"]) == ("success", "http://x", f"{row:09d}")
    with tarfile.open(shards / "00000.tar") as tar:
        assert [name.split(".")[1] for name in tar.getnames()[:3]] == ["jpg", "json", "txt"]
    data = pytest.importorskip("open_clip_train.data", exc_type=ImportError)
    # open_clip 3.3 is written for webdataset 0.2, which does not mark the end of each tar.
    monkeypatch.setattr(data, "tar_file_expander", partial(data.tar_file_expander, eof_value=None))
    assert data.get_dataset_size(pattern) == (15, 2)
    read = list(
        data.tarfile_to_samples_nothrow(iter([{"url": str(shards / f"{index:05d}.tar")} for index in range(2)]))
    )
    assert [sample["jpg"] for sample in read] == [sample["jpg"] for sample in samples]
    assert all(data.filter_no_caption_or_no_image(sample) for sample in read)


def test_the_subset_finds_every_kept_uid(parquet_run: tuple[CurateRecipe, Path]) -> None:
    _, root = parquet_run
    subset = np.load(root / "run" / "selection" / "subset.npy")
    kept = pq.read_table(root / "run" / "selection" / "selected.parquet")["uid"].to_pylist()
    assert subset.dtype == np.dtype("u8,u8")
    assert subset.tolist() == sorted((int(u[:16], 16), int(u[16:], 16)) for u in kept)


def test_doing_it_again_decodes_and_writes_nothing(parquet_run: tuple[CurateRecipe, Path]) -> None:
    recipe, root = parquet_run
    written = [root / "run" / "shards" / "00000.tar", root / "run" / "embeddings" / "img_emb" / "img_emb_0.npy"]
    before = [path.stat().st_mtime_ns for path in written]
    plan = make_plan(recipe)
    assert (len(plan.pool), plan.todo) == (3, [])  # as it was cut, although the limit is another now
    summary = curate(recipe)
    assert (summary.read, summary.decoded_now, summary.selected) == (50, 0, 15)
    assert [path.stat().st_mtime_ns for path in written] == before


def test_training_reads_chosen_rows_of_a_parquet_shard(parquet_run: tuple[CurateRecipe, Path]) -> None:
    recipe, root = parquet_run
    shard, rows = shard_list.load(recipe.output)[1], np.array([2, 3, 11])
    pool = pq.read_table(root / "pool" / "part.parquet")
    read = read_rows(recipe.output, shard.number, shard.url, rows, ["caption"], rules=ReadRules())
    assert [(image.place, image.image) for image in read.images] == [
        (place, pool["IMAGE"][20 + row].as_py()["bytes"]) for place, row in enumerate(rows.tolist())
    ]
    assert read.columns["caption"].to_pylist() == ["picture 22", "picture 23", "picture 31"]


def test_a_parquet_file_that_was_edited_is_never_paired_with_its_table(
    parquet_run: tuple[CurateRecipe, Path], tmp_path: Path
) -> None:
    recipe, root = parquet_run
    table = pq.read_table(root / "pool" / "part.parquet")
    edited = tmp_path / "pool" / "part.parquet"
    edited.parent.mkdir()
    pq.write_table(table.slice(1), edited)
    with pytest.raises(StaleTable, match="does not hold the sample '000000005' at offset 5"):
        list(read_rows(recipe.output, 0, str(edited), np.array([5, 6]), ["caption"], rules=ReadRules()).images)


def test_cached_embeddings_select_what_the_model_selected(parquet_run: tuple[CurateRecipe, Path]) -> None:
    _, root = parquet_run
    kept = pq.read_table(root / "run" / "selection" / "selected.parquet")
    cached = CurateRecipe(
        pool=Pool(shards=str(root / "run" / "embeddings" / "metadata")),
        embed=Embed(cached="clip-retrieval"),
        compute=Compute(actors=1),
        selection=(Select(method=CLIP_SCORE, keep=5),),
        write=Write(tars=False),
        output=str(root / "cached"),
    )
    summary = curate(cached)
    assert (summary.read, summary.embedded, summary.decoded_now, summary.selected) == (15, 15, 0, 5)
    best = sorted(zip(kept["score"].to_pylist(), kept["uid"].to_pylist(), strict=True))[-5:]
    again = pq.read_table(root / "cached" / "selection" / "selected.parquet")
    assert set(again["uid"].to_pylist()) == {u for _, u in best}
    np.testing.assert_allclose(sorted(again["score"].to_pylist()), [score for score, _ in best], atol=2e-3)
    with pytest.raises(ValueError, match="made from cached embeddings .* holds no images to train on"):
        checked(TrainRecipe.model_validate({"data": {"run": cached.output}, "output": str(root / "t")}))


def test_datacomps_metadata_alone_give_the_subset_that_datacomps_baseline_gives(tmp_path: Path) -> None:
    rng, n = np.random.default_rng(0), 40
    scores = np.round(rng.normal(size=n), 1).astype(np.float32)  # with ties
    uids = [uid(row) for row in range(n)]
    (tmp_path / "metadata").mkdir()
    for part, rows in enumerate([slice(0, 25), slice(25, n)]):
        table = pa.table({"uid": uids[rows], "clip_l14_similarity_score": scores[rows]})
        pq.write_table(table, tmp_path / "metadata" / f"{part:032x}.parquet")
        image, text = (rng.normal(size=(table.num_rows, 16)).astype(np.float16) for _ in range(2))
        np.savez(tmp_path / "metadata" / f"{part:032x}.npz", l14_img=image, l14_txt=text)
    lowest = np.sort(scores)[::-1][int(n * 0.3)]  # what `get_threshold` of its apply_filter.py finds
    theirs = {"name": "clip_score", "column": "json.clip_l14_similarity_score"}
    summary = curate(
        CurateRecipe(
            pool=Pool(shards=str(tmp_path / "metadata")),
            embed=Embed(cached="datacomp-l14"),
            compute=Compute(actors=1),
            selection=(Select(method=theirs, keep_fraction=0.3, ties="datacomp"),),
            write=Write(tars=False),
            output=str(tmp_path / "run"),
        )
    )
    assert not summary.failures
    wanted = [u for u, score in zip(uids, scores, strict=True) if score >= lowest]
    subset = np.load(tmp_path / "run" / "selection" / "subset.npy")
    assert subset.tolist() == sorted((int(u[:16], 16), int(u[16:], 16)) for u in wanted)


def test_datacomps_vectors_join_the_samples_of_tars_by_uid_and_nothing_is_decoded(
    tmp_path: Path, write_shard: WriteShard, recipe_for: Callable[..., CurateRecipe]
) -> None:
    """Two tars and two metadata files that hold their samples in another order; rows 4 and 9 are not in them."""
    for shard in range(2):
        write_shard(
            tmp_path / "pool" / f"{shard}.tar", count=6, fields=lambda row, shard=shard: {"uid": uid(6 * shard + row)}
        )
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, 12, 16)).astype(np.float16)
    (tmp_path / "metadata").mkdir()
    for part, rows in enumerate(np.split(rng.permutation([row for row in range(12) if row not in (4, 9)]), [3])):
        table = pa.table({"uid": [uid(row) for row in rows], "n": rows})
        pq.write_table(table, tmp_path / "metadata" / f"{part}.parquet")
        np.savez(tmp_path / "metadata" / f"{part}.npz", l14_img=vectors[0, rows], l14_txt=vectors[1, rows])
    pool = Pool(shards=str(tmp_path / "pool"), metadata=str(tmp_path / "metadata"))
    recipe = recipe_for(
        "", pool=pool, selection=(Select(method={"name": "clip_score"}, keep=3),), max_drop_fraction=0.2
    )
    recipe = recipe.model_copy(update={"embed": Embed(cached="datacomp-l14")})
    summary = curate(recipe)
    assert not summary.failures
    assert (summary.read, summary.embedded, summary.dropped) == (12, 10, {"embedding:missing": 2})
    assert summary.decoded_now == 0 and summary.warnings == {"metadata:no_row": 2}
    unit = vectors.astype(np.float32) / np.linalg.norm(vectors.astype(np.float32), axis=2, keepdims=True)
    for shard in range(2):
        table = tables.read(recipe.output, shard, ["uid", "status", "image_embedding", "text_embedding", "json.n"])
        for row, found in enumerate(table.to_pylist(), start=6 * shard):
            assert found["uid"] == uid(row) and (found["status"] == "ok") == (row not in (4, 9))
            if found["status"] == "ok":
                assert found["json.n"] == row
                np.testing.assert_array_equal(found["image_embedding"], unit[0, row].astype(np.float16))
                np.testing.assert_array_equal(found["text_embedding"], unit[1, row].astype(np.float16))
    scores = np.einsum("nd,nd->n", *unit)
    best = sorted((row for row in range(12) if row not in (4, 9)), key=lambda row: -scores[row])[:3]
    with tarfile.open(Path(recipe.output) / "shards" / "00000.tar") as tar:
        files = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".json")]
        kept = {json.load(file)["uid"] for file in files if file}
    assert kept == {uid(row) for row in best}
    assert not curate(recipe).failures
    np.savez(tmp_path / "metadata" / "0.npz", l14_img=vectors[0, :3], l14_txt=vectors[0, :3])
    with pytest.raises(ValueError, match="pool.metadata was .*, now .*"):  # other vectors are another run
        curate(recipe)


def test_metadata_join_the_samples_of_tars_by_uid(
    tmp_path: Path, write_shard: WriteShard, recipe_for: Callable[..., CurateRecipe]
) -> None:
    write_shard(tmp_path / "pool" / "0.tar", count=12, fields=lambda row: {"uid": uid(row), "n": row})
    (tmp_path / "metadata").mkdir()
    order = np.random.default_rng(0).permutation(11)  # row 11 is not in it
    for part in range(2):
        rows = order[part::2]
        table = pa.table({"uid": [uid(row) for row in rows], "clip_l14_similarity_score": rows / 10})
        pq.write_table(table, tmp_path / "metadata" / f"{part}.parquet")
    pool = Pool(shards=str(tmp_path / "pool"), metadata=str(tmp_path / "metadata"))
    steps = (Threshold(column="json.clip_l14_similarity_score", at_least=0.65),)
    recipe = recipe_for("", pool=pool, selection=steps)
    summary = curate(recipe)
    assert not summary.failures
    assert summary.warnings == {"metadata:no_row": 1}
    kept = pq.read_table(Path(recipe.output) / "selection" / "selected.parquet")
    assert set(kept["uid"].to_pylist()) == {uid(row) for row in (7, 8, 9, 10)}
    pq.write_table(pa.table({"uid": [uid(0)], "x": [1]}), tmp_path / "metadata" / "2.parquet")
    with pytest.raises(ValueError, match="pool.metadata was .*, now .*"):
        curate(recipe)
