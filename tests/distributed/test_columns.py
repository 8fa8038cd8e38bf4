"""Later columns of a curated run: right, resumable, never at the price of embedding again; and what trains on them."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from curation.data import manifest, offered, tables
from curation.data.manifest import OtherRun
from curation.distributed import columns
from curation.distributed.columns import ShardColumns, add_columns, checked
from curation.distributed.feed import FeedSpec, ReadShare
from curation.distributed.pipeline import curate
from curation.distributed.select import select
from curation.distributed.train import check, train
from curation.distributed.train_plan import checked as checked_training
from curation.models.frozen import frozen_digest, load_frozen
from curation.models.registry import weights_digest
from curation.numerics.picture import laplacian_variance, plainness
from curation.recipe import Compute, CurateRecipe, Embed, Pool, Threshold, TrainRecipe, Write
from curation.recipe.columns import EmbeddingsRecipe, FeaturesRecipe, Network, QualityRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, Evaluate, Reference, Train, Workers
from jobs import fit
from tests.distributed.conftest import WriteShard

CPU = Compute(device="cpu", actors=1)
NET = Network(model="nano", seed=3)


def features_recipe(run: Path, **fields: Any) -> FeaturesRecipe:
    return FeaturesRecipe(run=str(run), column="net", network=NET, batch_size=16, compute=CPU, **fields)


def embeddings_recipe(run: Path, **fields: Any) -> EmbeddingsRecipe:
    return EmbeddingsRecipe(
        run=str(run), **{"column": "same", "weights": Weights(model="nano", seed=7), "compute": CPU, **fields}
    )


@pytest.fixture(scope="module")
def run(ray_session: None, tmp_path_factory: pytest.TempPathFactory, write_shard: WriteShard) -> Path:
    """A curated run of two shards, 50 rows of which 47 were embedded, with the columns `net` and `same`."""
    root = tmp_path_factory.mktemp("columns")
    for number, broken in enumerate(([3, 4], [0])):
        fields = {"count": 25, "seed": number, "broken": broken, "fields": lambda row: {"label": "ab"[row % 2]}}
        write_shard(root / "pool" / f"{number:05d}.tar", **fields)
    recipe = CurateRecipe(
        pool=Pool(shards=str(root / "pool")),
        embed=Embed(model="nano", batch_size=32, seed=7),
        compute=CPU,
        write=Write(tars=False),
        output=str(root / "run"),
    )
    assert not curate(recipe).failures
    made = add_columns(features_recipe(root / "run"))
    assert (made.shards, made.made_now, made.rows, made.missing, made.failures) == (2, 2, 47, 0, [])
    assert add_columns(embeddings_recipe(root / "run", batch_size=32)).rows == 47
    return root / "run"


def test_features_are_the_frozen_networks_own_and_null_where_nothing_was_embedded(run: Path) -> None:
    read = tables.read(str(run), 0, ["net", "status", "image_embedding"])
    assert read["net"].is_valid().to_pylist() == [status == "ok" for status in read["status"].to_pylist()]
    frozen = load_frozen("open_clip", "nano", seed=3)
    with tarfile.open(run.parent / "pool" / "00000.tar") as tar:
        image = tar.extractfile("000000000.jpg")
        assert image is not None
        expected = frozen.embed(frozen.resize(Image.open(image))[None])
    np.testing.assert_allclose(np.array(read["net"][0].as_py()), expected[0], atol=2e-3)


def test_embeddings_of_the_same_model_are_those_that_curate_made(run: Path) -> None:
    for number in (0, 1):
        read = tables.read(str(run), number, ["image_embedding", "text_embedding", "clip_score"])
        same = tables.read(str(run), number, [f"same.{name}" for name in read.column_names])
        for name in read.column_names:
            assert same[f"same.{name}"].equals(read[name])
    record = manifest.committed(str(run), "columns.same")[0]
    embedded = manifest.committed(str(run), "embed")[0]
    assert record["run_values"] == {name: embedded[name] for name in ("logit_scale", "logit_bias")}


def test_what_is_made_is_not_made_again_and_nothing_is_embedded_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {
        path: os.stat(path).st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "lease.json"
    }

    def nothing(todo: list[Any], *_: Any) -> Iterator[dict[str, Any]]:
        assert not todo
        yield from ()

    monkeypatch.setattr(columns, "_pool", nothing)
    again = add_columns(features_recipe(run))
    assert (again.made_now, again.rows) == (0, 47)
    assert {path: os.stat(path).st_mtime_ns for path in before} == before


def test_another_network_under_the_same_name_is_refused(run: Path) -> None:
    recipe = features_recipe(run).model_copy(update={"network": Network(model="nano", seed=4)})
    with pytest.raises(OtherRun, match="the column 'net' of shard 0"):
        add_columns(recipe)


def test_a_selection_may_use_later_columns(run: Path) -> None:
    scores = np.concatenate([tables.read(str(run), n, ["same.clip_score"])[0].drop_null().to_numpy() for n in (0, 1)])
    steps = [Threshold(column="same.clip_score", at_least=float(np.sort(scores)[-10]))]
    selected = select(str(run), [0, 1], embedded=47, steps=steps, seed=0)
    assert selected.rows == 10
    with pytest.raises(ValueError, match="nothing.clip_score"):
        select(str(run), [0, 1], embedded=47, steps=[Threshold(column="nothing.clip_score", at_least=0)], seed=0)


def test_a_shard_that_cannot_be_read_is_pending_and_its_neighbours_are_made(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = columns.ColumnsSpec(
        recipe=features_recipe(run).model_copy(update={"column": "later"}),
        rules=Pool().read_rules(),
        precision="float32",
        device="cpu",
        num_features=None,
        made_by={},
    )
    actor = ShardColumns(spec)
    row = {"number": np.array([0]), "url": np.array([str(run / "nowhere.tar")]), "samples": np.array(["x"])}
    [told] = actor(row)["record"]
    assert '"pending": "FileNotFoundError' in told
    assert manifest.committed(str(run), "columns.later") == {}


def test_a_shard_that_left_the_pool_is_absent_and_no_failure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = QualityRecipe(run=str(run), column="left", compute=CPU)
    pool, away = run.parent / "pool", run.parent / "away"
    shards = [pool / f"{number:05d}.tar" for number in range(2)]
    pool.rename(away)
    try:
        with pytest.raises(ValueError, match="of the 2 shards of .* none is there any more, such as .*00000.tar"):
            add_columns(recipe)
        assert add_columns(embeddings_recipe(run, column="head", features="net")).absent == []  # reads no tar
    finally:
        away.rename(pool)
    shards[1].rename(run.parent / "left.tar")
    try:
        assert fit.main(["quality", "cpu", "--run", str(run), "--column", "left", "--compute.actors", "1"]) == 0
        assert f"1 shards have left the pool and got no value, such as {shards[1]}" in capsys.readouterr().out
        again = add_columns(recipe)
        assert (again.made_now, again.absent, again.failures, again.stopped) == (0, [str(shards[1])], [], None)
    finally:
        (run.parent / "left.tar").rename(shards[1])
    assert (add_columns(recipe).made_now, add_columns(recipe).absent) == (1, [])


def test_a_run_whose_pool_has_no_images_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    told = json.loads((run / "recipe.json").read_text())
    told["recipe"]["embed"]["cached"] = "clip-retrieval"
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="its pool has no images to make columns of"):
        checked(features_recipe(tmp_path / "run"))
    assert checked(embeddings_recipe(tmp_path / "run", features="net"))


def test_an_image_that_no_longer_decodes_has_no_value_and_is_counted(run: Path) -> None:
    recipe = features_recipe(run, max_pixels=1).model_copy(update={"column": "tiny"})
    made = add_columns(recipe)
    assert (made.rows, made.missing) == (0, 47)
    read = tables.read(str(run), 0, ["tiny"])["tiny"]
    assert read.null_count == 25 and pa.types.is_fixed_size_list(read.type)


def test_what_cannot_run_is_told_before_anything_starts(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run of jobs.curate"):
        checked(features_recipe(tmp_path))
    with pytest.raises(ValueError, match="a piece's name is letters"):
        checked(features_recipe(run).model_copy(update={"column": "caption"}))
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no committed shard yet"):
        checked(features_recipe(tmp_path))
    with pytest.raises(ValueError, match="has no column 'nothing'"):
        add_columns(embeddings_recipe(run, column="other", features="nothing"))


def training(run: Path, output: Path, **fields: Any) -> TrainRecipe:
    settings = {"num_steps": 4, "sub_batch": 8, "filter_ratio": 0.5, "score_batch": 64, **fields.pop("train", {})}
    return TrainRecipe(
        data=fields.pop("data", Data(run=str(run), features="net", segment_rows=8)),
        learner=fields.pop("learner", Weights(model="nano", seed=1)),
        train=Train(**settings),
        evaluate=fields.pop("evaluate", Evaluate(run=str(run))),
        compute=Workers(device="cpu", max_failures=0),
        output=str(output),
        **fields,
    )


def test_a_learner_on_features_trains_without_opening_a_tar(run: Path, tmp_path: Path) -> None:
    recipe = training(run, tmp_path / "out", reference=Reference(columns="same"))
    plan = checked_training(recipe)
    assert plan.num_features == 96 and ("same.image_embedding", "reference_image_embedding") in plan.columns
    # A run goes on only with the features and the reference that it began with, whatever their columns are called.
    made_by = {field: plan.identity[f"{field}.made_by"]["weights"] for field in ("data.features", "reference.columns")}
    assert made_by["data.features"] == frozen_digest(NET.library, NET.model, **NET.source())
    assert made_by["reference.columns"] == weights_digest("nano", seed=7)
    pool = run.parent / "pool"
    pool.rename(run.parent / "gone")
    try:
        summary = train(recipe)
    finally:
        (run.parent / "gone").rename(pool)
    assert summary.failures == [] and 0 <= summary.last["mean_r1"] <= 1 and summary.samples_trained == 32


def test_a_shard_that_is_gone_and_lacks_the_features_offers_nothing(run: Path, tmp_path: Path) -> None:
    part, shard = tmp_path / "part", run.parent / "pool" / "00001.tar"
    shutil.copytree(run, part)
    (part / "manifest" / tables.piece_stage("net") / "00000001.json").unlink()
    with pytest.raises(ValueError, match="1 of 2 shards of .* lack the column 'net'.* python -m jobs.fit features"):
        checked_training(training(part, tmp_path / "out"))
    away = shard.rename(tmp_path / "away.tar")
    try:
        plan = checked_training(training(part, tmp_path / "out"))
    finally:
        away.rename(shard)
    assert ([of.number for of in plan.shards], plan.absent) == ([0], [str(shard)])


@pytest.mark.parametrize("method", ["uniform", "grad_mimic"])
def test_a_classifier_learns_the_pools_labels(run: Path, tmp_path: Path, method: str) -> None:
    recipe = training(
        run,
        tmp_path / "out",
        reference=Reference(weights=Weights(model="linear", seed=5)),
        data=Data(run=str(run), features="net", label="json.label", segment_rows=8),
        learner=Weights(model="linear"),
        method={"name": method},
        train={"objective": "cross_entropy", "filter_ratio": 0.0},
    )
    assert checked_training(recipe).classes == ("a", "b")
    summary = train(recipe)
    assert summary.failures == [] and 0 <= summary.last["accuracy"] <= 1
    state = torch.load(summary.weights, weights_only=True)
    assert state["head.weight"].shape == (2, 96)


def test_labels_and_features_are_read_row_by_row(run: Path) -> None:
    shard = offered.offered_shards(str(run), manifest.committed(str(run), "embed"))[0]
    spec = FeedSpec(
        run=str(run),
        model="linear",
        pretrained=None,
        features="net",
        label="json.label",
        classes=("a", "b"),
        columns=(("clip_score", "clip_score"),),
        max_pixels=1,
        rules=Pool().read_rules(),
        decode_threads=1,
    )
    rows = shard.row_numbers(1, 6)
    assert rows.tolist() == [1, 2, 5, 6, 7, 8]
    planned = pa.table({"step": [0], "number": [[0]], "url": [["nowhere"]], "rows": [[rows]]})
    block = ReadShare(spec)(planned)
    table = tables.read(str(run), 0, ["net", "clip_score"]).take(pa.array(rows))
    assert block["label"].tolist() == [row % 2 for row in rows] and block["ok"].all()
    assert np.array_equal(block["features"], np.array(table["net"].to_pylist(), np.float16))
    assert np.array_equal(block["clip_score"], table["clip_score"].to_numpy())


def test_a_missing_column_is_told_with_the_command_that_makes_it(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="python -m jobs.fit features RECIPE --run .* --column nets"):
        check(training(run, tmp_path, data=Data(run=str(run), features="nets")))
    with pytest.raises(ValueError, match="python -m jobs.fit embeddings RECIPE --run .* --column nets"):
        check(training(run, tmp_path, reference=Reference(columns="nets")))
    with pytest.raises(ValueError, match="47 samples|samples of .* have no json.species"):
        check(
            training(
                run,
                tmp_path,
                data=Data(run=str(run), features="net", label="json.species"),
                learner=Weights(model="linear"),
                method={"name": "uniform"},
                train={"objective": "cross_entropy"},
            )
        )


def test_the_command_makes_columns_and_says_what_it_did(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert fit.main(["features", "debug", "--run", str(run), "--column", "net", "--dry-run"]) == 0
    settings = ["--network.seed", "3", "--batch-size", "16", "--compute.actors", "1"]
    assert fit.main(["features", "debug", "--run", str(run), "--column", "net", *settings]) == 0
    assert "47 rows in 2 shards, 0 of them made now" in capsys.readouterr().out
    assert fit.main(["embeddings", "debug", "--run", str(tmp_path), "--column", "net"]) == 2
    assert "is no run of jobs.curate" in capsys.readouterr().err
    assert fit.main(["nothing"]) == 2


def test_sharpness_and_plainness_are_measured_on_the_grey_image(run: Path) -> None:
    recipe = QualityRecipe(run=str(run), column="quality", max_side=12, compute=CPU)
    assert add_columns(recipe).rows == 47
    told = tables.read(str(run), 0, ["quality.sharpness", "quality.plainness"]).to_pylist()
    with tarfile.open(run.parent / "pool" / "00000.tar") as tar:
        image = tar.extractfile("000000000.jpg")
        assert image is not None
        grey = np.asarray(Image.open(image).convert("L").resize((12, 10), Image.Resampling.BOX))
    assert told[0]["quality.sharpness"] == pytest.approx(laplacian_variance(grey), rel=1e-6)
    assert told[0]["quality.plainness"] == pytest.approx(plainness(grey), rel=1e-6)
    assert told[3]["quality.sharpness"] is None  # a broken image
    assert select(str(run), [0, 1], embedded=47, steps=[Threshold(column="quality.plainness", at_most=0.99)], seed=0)
    with pytest.raises(OtherRun, match="the column 'quality' of shard 0"):
        add_columns(recipe.model_copy(update={"max_side": 16}))


def test_a_blank_image_is_plain_and_never_enlarged() -> None:
    sharpness, plain = columns.quality(Image.new("RGB", (300, 5), (9, 9, 9)), max_side=100)
    assert (sharpness, plain) == (0.0, 1.0)
    small = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert columns.quality(small, max_side=256)[1] == np.float32(plainness(np.asarray(small)))
