"""Training on what a method chooses once a round: even usage, the same rounds after a kill, the rivals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.data import tables
from curation.distributed.factor_columns import add_factor_columns
from curation.distributed.pipeline import curate
from curation.distributed.train import train
from curation.methods.dynamic import usage_gap
from curation.recipe import Compute, CurateRecipe, Embed, Pool, TrainRecipe
from curation.recipe.columns import FactorsRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, Train, Workers
from tests.distributed.conftest import WriteShard
from tests.distributed.test_train import checkpoints, go_on, ledger_of, log, start, wait_for

STEPS, BATCH = 24, 24  # 236 rows: a round at 0.5 has 5 steps


@pytest.fixture(scope="module")
def run(curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the curated run with factors."""
    copy = Path(shutil.copytree(curated, tmp_path_factory.mktemp("rounds") / "run"))
    add_factor_columns(FactorsRecipe(run=str(copy), encoder="random", units_per_feature=2, num_active=8, max_dead=1.0))
    return copy


@pytest.fixture(scope="module")
def recipe_for(run: Path) -> Callable[..., TrainRecipe]:
    def make(output: Path, *, method: dict[str, Any], workers: int = 1, **fields: Any) -> TrainRecipe:
        settings = {"num_steps": STEPS, "sub_batch": BATCH, "filter_ratio": 0.0}
        settings |= {"choose": "round", "keep_fraction": 0.5}
        return TrainRecipe(
            data=fields.pop("data", Data(run=str(run), segment_rows=8, features="image_embedding")),
            learner=fields.pop("learner", Weights(model="nano", seed=1)),
            method=method,
            train=Train(**{**settings, "score_batch": 64, **fields.pop("train", {})}),
            compute=Workers(device="cpu", workers=workers, max_failures=0),
            output=str(output),
            checkpoint_every=fields.pop("checkpoint_every", 3),
            **fields,
        )

    return make


def rounds_of(output: Path) -> list[dict[str, Any]]:
    heads = sorted(output.glob("train/rounds/*/round.json"))
    return [{**json.loads(path.read_text()), "seconds": 0} for path in heads]


DYNAMIC = {"name": "dynamic", "penalty": 0.5}


@pytest.fixture(scope="module")
def unstopped(recipe_for: Callable[..., TrainRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unstopped")
    summary = train(recipe_for(output, method=DYNAMIC, workers=2))
    assert summary.failures == [] and summary.samples_trained == STEPS * BATCH == summary.ledger["uses"]
    return output


@pytest.mark.slow
def test_usage_keeps_within_the_methods_promise_after_every_round(unstopped: Path) -> None:
    rounds = rounds_of(unstopped)
    assert [head["first_step"] for head in rounds] == [0, 5, 10, 15, 20]
    assert all(head["rows"] == 120 and head["steps"] == 5 and head["left_over"] == 0 for head in rounds)
    for head in rounds:
        assert head["usage_gap"] == usage_gap(0.5) == 3
        assert head["usage_max"] - head["usage_min"] <= 3
    # Rounds that every kept checkpoint lies behind have given up their rows, their accounts stay.
    assert [bool(list(path.glob("*.npy"))) for path in sorted(unstopped.glob("train/rounds/*"))] == [
        False,
        False,
        True,
        True,
        True,
    ]


@pytest.mark.slow
def test_the_rounds_are_those_of_a_plain_loop_over_the_whole_pool(unstopped: Path, run: Path) -> None:
    import torch

    from curation.methods import load_selector
    from curation.numerics.sampling import uid_words

    names = ["address", "uid", "status", "factors.representativeness", "factors.rarity"]
    rows = [row for row in tables.read_unified(str(run), range(6), names).to_pylist() if row["status"] == "ok"]
    columns = {
        name: torch.tensor([row[name] for row in rows]) for name in ("factors.representativeness", "factors.rarity")
    }
    columns["uid"] = torch.from_numpy(uid_words([row["uid"] for row in rows]).view(np.int64))
    usage, addresses = np.zeros(236), np.array([row["address"] for row in rows])
    selector = load_selector("dynamic", penalty=0.5)
    for number in range(5):
        values = {"usage_count": torch.from_numpy(usage).float(), "mean_usage": torch.tensor(number * 120 / 236)}
        # The tie-break's seed is the round's own; here it decides nothing beyond 2**-20.
        key = selector.score({**columns, **values}, number * 5 / STEPS).numpy()
        best = np.argsort(-key, kind="stable")[:120]
        folder = unstopped / "train" / "rounds" / f"{number:06d}"
        if files := sorted(folder.glob("0*.npy")):
            chosen = {int(path.stem) * 2**20 + int(row) for path in files for row in np.load(path)["row"]}
            assert chosen == set(addresses[best].tolist())
        usage[best] += 1


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_rounds_of_one_never_stopped(
    recipe_for: Callable[..., TrainRecipe], unstopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    process = start(recipe_for(output, method=DYNAMIC, workers=2), tmp_path)
    wait_for(lambda: len(checkpoints(output)) >= 1, process)
    process.kill()
    process.communicate()
    go_on(recipe_for(output, method=DYNAMIC, workers=2), tmp_path, capsys)
    assert rounds_of(output) == rounds_of(unstopped)
    assert log(output)["loss"].to_pylist() == log(unstopped)["loss"].to_pylist()
    whole, other = (ledger_of(recipe_for(path, method=DYNAMIC)) for path in (output, unstopped))
    assert np.array_equal(whole.usage_histogram(), other.usage_histogram())


@pytest.mark.slow
def test_a_rival_chooses_rounds_of_its_own_size_for_a_classifier(
    recipe_for: Callable[..., TrainRecipe], run: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(
        tmp_path / "out",
        method={"name": "infobatch"},
        train={"num_steps": 16, "objective": "cross_entropy"},
        learner=Weights(model="linear"),
        data=Data(run=str(run), segment_rows=8, features="image_embedding", label="shard"),
    )
    assert train(recipe).failures == []
    rounds = rounds_of(tmp_path / "out")
    # All 236 rows first, then the rows at or above the mean and half of the others.
    assert (rounds[0]["rows"], rounds[0]["steps"], rounds[0]["left_over"]) == (236, 9, 20)
    assert 118 < rounds[1]["rows"] < 236


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_any_more_is_counted_and_the_rounds_go_on(
    ray_session: None, recipe_for: Callable[..., TrainRecipe], write_shard: WriteShard, tmp_path: Path
) -> None:
    # One image of each shard is larger than the training run allows.
    for number in range(2):
        write_shard(tmp_path / "pool" / f"{number:05d}.tar", count=24, seed=number, large=[7])
    run = str(tmp_path / "run")
    pool, embed = Pool(shards=str(tmp_path / "pool")), Embed(model="nano", batch_size=32)
    assert curate(CurateRecipe(pool=pool, embed=embed, compute=Compute(device="cpu"), output=run)).embedded == 48
    summary = train(
        recipe_for(
            tmp_path / "out",
            method={"name": "rs2"},
            data=Data(run=run, segment_rows=8, max_pixels=500),
            train={"num_steps": 8, "sub_batch": 12},
        )
    )
    assert summary.failures == [] and summary.steps == 8
    # Each row has had two turns, the two that cannot be decoded too.
    assert [(head["rows"], head["usage_min"], head["usage_max"]) for head in rounds_of(tmp_path / "out")] == [
        (24, 0, 1),
        (24, 1, 1),
        (24, 1, 2),
        (24, 2, 2),
    ]
    assert summary.samples_not_decoded == 4
    assert summary.samples_trained == 8 * 12 - 4 and summary.ledger["uses"] == 8 * 12


def test_what_a_round_cannot_ask_of_a_method_is_refused_by_name(tmp_path: Path) -> None:
    def recipe(method: dict[str, Any], **train: Any) -> TrainRecipe:
        settings = {"choose": "round", "filter_ratio": 0.0, "keep_fraction": 0.5, **train}
        return TrainRecipe(method=method, train=Train(**settings))

    with pytest.raises(ValueError, match="jest' needs 'image_embedding' of the learner as it is"):
        recipe({"name": "jest"})
    with pytest.raises(ValueError, match="filter_ratio must be 0, got 0.5"):
        recipe({"name": "uniform"}, filter_ratio=0.5)
    with pytest.raises(ValueError, match="keep_fraction 0.5 is for choose round"):
        recipe({"name": "uniform"}, choose="step")
    with pytest.raises(ValueError, match="dynamic' needs 'mean_usage', which only --train.choose round has"):
        recipe({"name": "dynamic"}, choose="step", keep_fraction=1.0)
    with pytest.raises(ValueError, match="ucb' needs a running variance"):
        recipe({"name": "ucb"})
    with pytest.raises(ValueError, match="rcap' has budgets for classes"):
        recipe({"name": "rcap"})
    with pytest.raises(ValueError, match="needs train.micro_batches 1"):
        recipe({"name": "infobatch"}, micro_batches=2)
