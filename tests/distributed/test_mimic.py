"""Grad-Mimic from end to end: a run on pairs, its score log, the columns made of it, a selection that uses them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from curation.addresses import pack
from curation.data import manifest, offered, tables
from curation.data.drawn_rows import draw_rows
from curation.data.manifest import OtherRun
from curation.data.score_log import read_steps
from curation.distributed.mimic_columns import VoteRounds, add_mimic_columns, checked_mimic
from curation.distributed.select import select
from curation.distributed.train import train
from curation.distributed.train_plan import checked, resolved
from curation.models.classifier import build_classifier
from curation.recipe import Select, Threshold, TrainRecipe
from curation.recipe.columns import MimicRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Comparison, Data, Reference, Remember, Train, Workers
from jobs import fit
from tests.distributed.test_train import ledger_of

LAYER = "visual.transformer.resblocks.3"


def mimic_recipe(run: Path, output: Path, **fields: Any) -> TrainRecipe:
    settings = {"num_steps": 10, "sub_batch": 48, "filter_ratio": 0.0, "score_batch": 64, "mimic_layer": LAYER}
    return TrainRecipe(
        data=Data(run=str(run), segment_rows=16),
        learner=Weights(model="nano", seed=1),
        reference=fields.pop("reference", Reference(weights=Weights(model="nano", seed=7))),
        method=fields.pop("method", {"name": "grad_mimic", "temperature": 0.1}),
        train=Train(**{**settings, **fields.pop("train", {})}),
        compute=Workers(device="cpu", workers=2, max_failures=0),
        output=str(output),
        checkpoint_every=4,
        **fields,
    )


@pytest.fixture(scope="module")
def run(curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the curated run, for it gets columns."""
    return Path(shutil.copytree(curated, tmp_path_factory.mktemp("mimic") / "run"))


@pytest.fixture(scope="module")
def trained(run: Path) -> tuple[Path, Any]:
    """Two rounds of 236 rows on two workers, and what the run told of itself."""
    output = run.parent / "trained"
    return output, train(mimic_recipe(run, output, train={"weight_scope": "mimic"}))


@pytest.mark.slow
def test_every_rows_score_and_weight_is_logged_and_weights_have_mean_one(trained: tuple[Path, Any]) -> None:
    output, summary = trained
    assert summary.failures == [] and summary.steps == 10
    steps = list(read_steps(str(output)))
    assert [step.step for step in steps] == list(range(1, 11))
    for step in steps:
        assert len(step.addresses) == 48 and step.weights.mean() == pytest.approx(1.0, abs=1e-5)
        assert step.weights[step.scores.argmax()] == step.weights.max() and np.isfinite(step.scores).all()


@pytest.mark.slow
def test_the_ledger_remembers_each_rows_last_score_and_weight(trained: tuple[Path, Any], run: Path) -> None:
    output, _ = trained
    last = {}
    for step in read_steps(str(output)):
        told = zip(step.addresses.tolist(), step.scores.tolist(), step.weights.tolist(), strict=True)
        last |= {address: (score, weight) for address, score, weight in told}
    ledger = ledger_of(mimic_recipe(run, output))
    addresses = np.array(sorted(last))
    for place, name in enumerate(("score", "weight")):
        kept = ledger.read(name, addresses)["ledger_value"]
        assert kept.tolist() == [last[address][place] for address in addresses.tolist()]


@pytest.mark.slow
def test_a_rows_gradient_is_compared_with_that_of_a_batch_drawn_for_the_step(run: Path, tmp_path: Path) -> None:
    recipe = TrainRecipe(
        data=Data(run=str(run), segment_rows=16, features="image_embedding", label="shard"),
        learner=Weights(model="linear", seed=3),
        comparison=Comparison(run=str(run), rows=100, batch=60),
        method={"name": "agra"},
        train=Train(num_steps=3, sub_batch=24, filter_ratio=0.5, objective="cross_entropy"),
        compute=Workers(device="cpu", workers=2, max_failures=0),
        ledger=Remember(score_log="on"),
        output=str(tmp_path / "out"),
    )
    summary = train(recipe)
    assert summary.failures == [] and summary.steps == 3
    # The first step's scores by torch's own gradients, at the weights that the learner begins with.
    first = next(read_steps(str(tmp_path / "out")))
    shards = offered.offered_shards(str(run), manifest.committed(str(run), "embed"))
    classes = {url: number for number, url in enumerate(sorted(shard.url for shard in shards))}
    of_run = {"features": "image_embedding", "label": "shard", "classes": classes}
    drawn = draw_rows(str(run), shards, num_rows=100, seed=recipe.seed, **of_run)
    batch = np.random.default_rng([recipe.seed, 0]).choice(100, 60, replace=False)
    network = build_classifier("linear", num_classes=6, num_features=drawn.features_NF.shape[1], seed=3)

    def gradient(features: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(features).float()), torch.from_numpy(labels))
        return torch.autograd.grad(loss, network.head.weight)[0]

    other = gradient(drawn.features_NF[batch], drawn.labels_N[batch])
    whole = draw_rows(str(run), shards, num_rows=236, seed=0, **of_run)
    at = {address: row for row, address in enumerate(offered_addresses(shards))}
    assert len(first.addresses) == 48 and set(first.addresses.tolist()) <= set(at)
    for address, score in list(zip(first.addresses.tolist(), first.scores.tolist(), strict=True))[::5]:
        row = at[address]
        own = gradient(whole.features_NF[row : row + 1], whole.labels_N[row : row + 1])
        by_hand = (own * other).sum() / other.norm() / own.norm()
        assert score == pytest.approx(by_hand.item(), abs=1e-5)


def offered_addresses(shards: list[offered.OfferedShard]) -> list[int]:
    return [int(address) for s in shards for address in pack(s.number, s.row_numbers(0, s.offered))]


def test_a_comparison_that_cannot_be_made_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    def recipe(**fields: Any) -> TrainRecipe:
        data = Data(run=str(run), features="image_embedding", label="shard")
        settings = {"method": {"name": "agra"}, "data": data, "learner": Weights(model="linear")}
        train = Train(objective="cross_entropy", sub_batch=24, filter_ratio=0.0)
        comparison = Comparison(run=str(run))
        return TrainRecipe(
            **{**settings, "train": train, "comparison": comparison, "output": str(tmp_path / "o"), **fields}
        )

    assert checked(resolved(recipe())).num_features
    with pytest.raises(ValueError, match=r"'agra' compares with the gradient of a second batch: name its run"):
        recipe(comparison=Comparison())
    with pytest.raises(ValueError, match="method 'uniform' compares with no batch"):
        recipe(method={"name": "uniform"})
    with pytest.raises(ValueError, match="compares gradients of a head: it needs cross_entropy and data.features"):
        recipe(data=Data(run=str(run)), train=Train(sub_batch=24, filter_ratio=0.0), learner=Weights(model="nano"))
    with pytest.raises(ValueError, match="is no run of jobs.curate"):
        checked(resolved(recipe(comparison=Comparison(run=str(tmp_path)))))


@pytest.mark.slow
def test_a_reference_of_other_random_weights_is_told_loudly(trained: tuple[Path, Any]) -> None:
    output, summary = trained
    [warning] = summary.warnings
    measured = json.loads((output / "train" / "alignment.json").read_text())
    assert warning == measured["complaint"] and f"chance {1 / 24:.3f}" in warning


@pytest.mark.slow
def test_columns_of_the_log_filter_a_selection(
    trained: tuple[Path, Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = trained
    flags = ["--run", str(run), "--log", str(output), "--column", "mimic"]
    assert fit.main(["mimic", "majority", *flags]) == 0
    assert "quality" in capsys.readouterr().err
    scores: dict[int, list[float]] = {}
    for step in read_steps(str(output)):
        for address, score in zip(step.addresses.tolist(), step.scores.tolist(), strict=True):
            scores.setdefault(address, []).append(score)
    table = tables.read_unified(
        str(run), range(6), ["address", "status", "clip_score", "mimic.score", "mimic.keep", "mimic.rank"]
    )
    rows = [row for row in table.to_pylist() if row["mimic.score"] is not None]
    assert {row["address"] for row in rows} == set(scores) and all(row["status"] == "ok" for row in rows)
    for row in rows:
        assert row["mimic.score"] == pytest.approx(np.mean(scores[row["address"]]), abs=1e-5)
    order = sorted(rows, key=lambda row: row["mimic.score"])
    assert order[0]["mimic.rank"] == 0 and order[-1]["mimic.rank"] == pytest.approx(1 - 1 / len(rows))
    # A second time nothing changes; with other settings the column is another one.
    assert fit.main(["mimic", "majority", *flags]) == 0
    with pytest.raises(OtherRun, match="aggregator was"):
        add_mimic_columns(MimicRecipe(run=str(run), log=str(output), column="mimic", aggregator="one_coin"))
    # The filter: the clip score's top half, and of those none of the pool's lowest 15%.
    steps = [Select(method={"name": "clip_score"}, keep_fraction=0.5), Threshold(column="mimic.rank", at_least=0.15)]
    by_both = select(str(run), range(6), embedded=len(rows), steps=steps, seed=0)
    is_low = {row["address"] for row in rows if row["mimic.rank"] < np.float32(0.15)}
    best = sorted(rows, key=lambda row: -row["clip_score"])[: by_both.counts[1].rows_out]
    assert by_both.rows == sum(row["address"] not in is_low for row in best) < len(best)


@pytest.mark.parametrize("over", ["round", "step"])
def test_a_rows_kth_coming_is_its_vote_in_round_k(tmp_path: Path, over: str) -> None:
    rng = np.random.default_rng(0)
    rounds = VoteRounds(tmp_path, num_rows=10, by="threshold", over=over)
    stream = np.concatenate([rng.permutation(10) for _ in range(6)])
    weights = rng.random(60).astype(np.float32) * 2
    for at in range(0, 60, 7):  # batches that span rounds
        here = slice(at, at + 7)
        rounds.add(stream[here], weights[here], weights[here])
        assert len(rounds._open) <= 4
    rounds.close()
    expected: dict[int, list[bool]] = {}
    for place, weight in zip(stream.tolist(), weights.tolist(), strict=True):
        expected.setdefault(place, []).append(weight > 1)
    found: dict[int, list[bool]] = {}
    for places, votes in rounds():
        assert len(set(places.tolist())) == len(places) == 10
        for place, vote in zip(places.tolist(), votes.tolist(), strict=True):
            found.setdefault(place, []).append(vote)
    assert found == expected and rounds.num_rounds == 6


def test_what_cannot_be_read_is_refused_by_name(curated: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run of jobs.train"):
        checked_mimic(MimicRecipe(run=str(curated), log=str(tmp_path)))
    with pytest.raises(ValueError, match="is no run of jobs.train; name one"):
        checked_mimic(MimicRecipe(run=str(curated), log=str(curated)))
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": {"data": {"run": "elsewhere"}}}))
    with pytest.raises(ValueError, match="was trained on elsewhere"):
        checked_mimic(MimicRecipe(run=str(curated), log=str(tmp_path)))
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": {"data": {"run": str(curated)}}}))
    with pytest.raises(ValueError, match="has no score log"):
        checked_mimic(MimicRecipe(run=str(curated), log=str(tmp_path)))


def test_a_recipe_says_what_grad_mimic_needs() -> None:
    with pytest.raises(ValueError, match="goes towards a reference's weights: name them"):
        mimic_recipe(Path("run"), Path("out"), reference=Reference())
    with pytest.raises(ValueError, match="train.weight_scope mimic is grad_mimic's, not 'uniform''s"):
        mimic_recipe(Path("run"), Path("out"), method={"name": "uniform"}, train={"weight_scope": "mimic"})
    with pytest.raises(ValueError, match="needs train.micro_batches 1"):
        mimic_recipe(Path("run"), Path("out"), train={"weight_scope": "mimic", "micro_batches": 2})
