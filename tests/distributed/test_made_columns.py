"""Columns that a selection makes for itself: languages, heads and clusters equal the plain loop's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from curation.data import tables
from curation.data.manifest import OtherRun
from curation.distributed import stored_columns
from curation.distributed.made_columns import HeadScores, sampled_rows
from curation.distributed.pipeline import curate
from curation.numerics.sampling import tie_hash, uid_words
from curation.recipe import Compute, CurateRecipe, Embed, OneOf, Pool, Select, Threshold, Write
from curation.recipe.made_columns import Clusters, EmbeddingHead, Language
from jobs.recipes import basic
from tests.distributed.conftest import kept_uids, select_again

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def base(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> CurateRecipe:
    """A run over Vietnamese captions of photos and English titles of products; the tests re-run its selection."""
    recipe = CurateRecipe(
        pool=Pool(shards=f"{real_data}/vietnamese::{real_data}/fashion/00000.tar"),
        embed=Embed(model="nano", batch_size=64, seed=7),
        compute=Compute(device="cpu", actors=2),
        selection=(),
        write=Write(tars=False),
        output=str(tmp_path_factory.mktemp("made") / "out"),
    )
    assert not curate(recipe).failures
    return recipe


def rows_of(recipe: CurateRecipe, columns: list[str]) -> list[dict[str, Any]]:
    return tables.read_unified(recipe.output, [0, 1], ["uid", "shard", *columns]).to_pylist()


def test_a_language_filter_parts_the_pools_and_the_columns_are_made_once(
    base: CurateRecipe, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fasttext")
    language = Language(make="language", model=str(real_data / "weights" / "lid.176.ftz"))
    summary = select_again(base, columns=(language,), selection=(OneOf(column="language.label", one_of=("vi",)),))
    rows = rows_of(base, ["language.label", "language.probability"])
    labels = Counter((Path(row["shard"]).parent.name, row["language.label"]) for row in rows)
    assert labels["vietnamese", "vi"] > 590 and labels["fashion", "vi"] < 10
    assert summary.selected == sum(row["language.label"] == "vi" for row in rows)
    assert kept_uids(base) == {row["uid"] for row in rows if row["language.label"] == "vi"}
    monkeypatch.setattr(stored_columns, "_make", lambda *_: pytest.fail("made again"))
    sure = (OneOf(column="language.label", one_of=("en",)), Threshold(column="language.probability", at_least=0.5))
    select_again(base, columns=(language,), selection=sure)
    assert kept_uids(base) == {
        row["uid"] for row in rows if row["language.label"] == "en" and row["language.probability"] >= 0.5
    }
    with pytest.raises(ValueError, match="'gone.ftz' is not a file"):
        select_again(base, columns=(language.model_copy(update={"model": "gone.ftz"}),))


def test_a_heads_score_is_a_selectors(base: CurateRecipe, tmp_path: Path) -> None:
    width = tables.vector_width(base.output, 0, "image_embedding")
    torch.save(nn.Linear(width, 1).state_dict(), tmp_path / "head.pth")
    head = EmbeddingHead(
        make="embedding_head", name="aesthetic", checkpoint=str(tmp_path / "head.pth"), layout="linear"
    )
    best = Select(method={"name": "clip_score", "column": "aesthetic.score"}, keep=40)
    select_again(base, columns=(head,), selection=(best,))
    rows = rows_of(base, ["aesthetic.score", "image_embedding"])
    state = torch.load(tmp_path / "head.pth", weights_only=True)
    unit = np.array([row["image_embedding"] for row in rows], np.float64)
    unit /= np.linalg.norm(unit, axis=1)[:, None]
    expected = unit @ state["weight"][0].double().numpy() + float(state["bias"])
    np.testing.assert_allclose([row["aesthetic.score"] for row in rows], expected, atol=1e-5)
    order = np.argsort([-row["aesthetic.score"] for row in rows])
    assert kept_uids(base) == {rows[place]["uid"] for place in order[:40]}
    torch.save(nn.Linear(width, 1).state_dict(), tmp_path / "head.pth")
    former = HeadScores("other", head.checkpoint, "linear", "image_embedding", digest="of the former file")
    with pytest.raises(ValueError, match=r"head.pth on .* is another file than where the job runs"):
        former.make(tables.read(base.output, 0, ["image_embedding"]))
    with pytest.raises(OtherRun, match="the column 'aesthetic' of shard 0"):
        select_again(base, columns=(head,))


def test_image_based_filtering_keeps_the_clusters_that_the_target_is_in(
    base: CurateRecipe, real_data: Path, tmp_path: Path
) -> None:
    target = base.model_copy(
        update={"pool": Pool(shards=f"{real_data}/vietnamese"), "output": str(tmp_path / "target")}
    )
    curate(target)
    clusters = Clusters(make="clusters", name="like", num_clusters=12, target=target.output, rows_per_cluster=20)
    score = Select(method={"name": "clip_score"}, keep_fraction=0.5)
    near = Threshold(column="like.target_rows", at_least=1)
    select_again(base, columns=(clusters,), selection=(near,))
    kept = kept_uids(base)
    [folder] = (Path(base.output) / "fit").iterdir()
    centroids = np.load(folder / "centroids.npy").astype(np.float64)

    def nearest(recipe: CurateRecipe, numbers: list[int]) -> tuple[list[str], np.ndarray]:
        rows = tables.read_unified(recipe.output, numbers, ["uid", "image_embedding"]).to_pylist()
        embeddings = np.array([row["image_embedding"] for row in rows], np.float64)
        return [row["uid"] for row in rows], (embeddings @ centroids.T).argmax(1)  # as DataComp's own script does

    uids, of_pool = nearest(base, [0, 1])
    _, of_target = nearest(target, [0])
    expected = {uid for uid, cluster in zip(uids, of_pool, strict=True) if cluster in set(of_target)}
    assert len(kept ^ expected) <= 2  # a row between two centroids may fall either way
    told = rows_of(base, ["like.cluster", "like.target_rows"])
    counts = np.bincount(of_target, minlength=12)
    assert sum(row["like.target_rows"] != counts[row["like.cluster"]] for row in told) <= 24
    # The intersection with a score is two steps, the score's first: both are of the whole pool.
    select_again(base, columns=(clusters,), selection=(score,))
    by_score = kept_uids(base)
    select_again(base, columns=(clusters,), selection=(score, near))
    assert kept_uids(base) == kept & by_score


def test_the_sample_that_centroids_are_fitted_on_is_the_same_for_any_grouping(
    base: CurateRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(base, ["image_embedding"])
    ties = tie_hash(uid_words([row["uid"] for row in rows]))
    expected = np.array([rows[place]["image_embedding"] for place in np.argsort(ties)[:100]], np.float16)
    np.testing.assert_array_equal(sampled_rows(base.output, [0, 1], "image_embedding", limit=100), expected)
    monkeypatch.setattr("curation.distributed.tasks.SHARDS_PER_TASK", 1)
    np.testing.assert_array_equal(sampled_rows(base.output, [0, 1], "image_embedding", limit=100), expected)


def test_more_clusters_than_rows_and_two_columns_of_one_name_are_errors(base: CurateRecipe) -> None:
    many = Clusters(make="clusters", name="many", num_clusters=10_000)
    with pytest.raises(ValueError, match="columns 'many': 10000 clusters of"):
        select_again(base, columns=(many,))
    with pytest.raises(ValueError, match="columns: two of them are called 'many'"):
        CurateRecipe(columns=(many, many))
    with pytest.raises(ValueError, match="a piece's name is"):
        CurateRecipe(columns=(many.model_copy(update={"name": "a.b"}),))


def test_the_basic_recipe_writes_datacomps_subset_of_metadata_without_an_image(real_data: Path, tmp_path: Path) -> None:
    fasttext = pytest.importorskip("fasttext")
    texts = pq.read_table(real_data / "web-text" / "laion-alt-text.parquet")["caption"].to_pylist()[:400]
    rng = np.random.default_rng(1)
    width, height = rng.integers(100, 700, (2, len(texts)))
    words = rng.integers(0, 2**63, (len(texts), 2), np.uint64)
    uids = [f"{high:016x}{low:016x}" for high, low in words]
    for number in range(2):
        part = slice(number * 200, (number + 1) * 200)
        columns = {
            "uid": uids[part],
            "text": texts[part],
            "original_width": width[part],
            "original_height": height[part],
        }
        path = tmp_path / "metadata" / f"{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({**columns, "url": ["http://a.org/x"] * 200, "sha256": ["0" * 64] * 200}), path)
        vectors = rng.normal(size=(200, 8)).astype(np.float16)
        np.savez(path.with_suffix(".npz"), l14_img=vectors, l14_txt=vectors)
    model = str(real_data / "weights" / "lid.176.ftz")
    recipe = basic().model_copy(
        update={
            "pool": Pool(shards=str(tmp_path / "metadata" / "*.parquet")),
            "columns": (Language(make="language", model=model),),
            "output": str(tmp_path / "run"),
        }
    )
    summary = curate(recipe)
    assert not summary.failures and summary.decoded_now == 0
    predict = fasttext.load_model(model).predict
    expected = {
        uid
        for uid, text, w, h in zip(uids, texts, width, height, strict=True)
        if predict(text.replace("\n", " "))[0][0] == "__label__en"
        and len(text.split()) > 2
        and len(text) > 5
        and min(w, h) >= 200
        and max(w, h) / min(w, h) <= 3
    }
    assert kept_uids(recipe) == expected and 50 < len(expected) < 350
