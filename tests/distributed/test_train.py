"""A training run: it ends, it is measured, it goes on after kills, and what cannot run is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.data import offered, tables
from curation.data.held_out import held_by_pool
from curation.data.score_log import read_steps
from curation.distributed import train as training
from curation.distributed.run_ledger import ledger_specs
from curation.distributed.train import TrainSummary, TrainWatch, check, train
from curation.distributed.train_plan import checked, commit_to, resolved
from curation.ledger import Ledger
from curation.models.clip import build_network
from curation.recipe import TrainRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, Evaluate, Reference, Remember, Train, Workers
from jobs import train as job

OFFERED = 236
TIMEOUT_S = 300


def recipe_for(run: Path, output: Path, *, method: str = "jest", workers: int = 1, **fields: Any) -> TrainRecipe:
    settings = {"num_steps": 6, "sub_batch": 24, "filter_ratio": 0.5, "score_batch": 64, **fields.pop("train", {})}
    return TrainRecipe(
        data=fields.pop("data", Data(run=str(run), segment_rows=16)),
        learner=fields.pop("learner", Weights(model="nano", seed=1)),
        method={"name": method},
        train=Train(**settings),
        compute=Workers(device="cpu", workers=workers, max_failures=fields.pop("max_failures", 0)),
        output=str(output),
        checkpoint_every=fields.pop("checkpoint_every", 3),
        **fields,
    )


def log(output: Path, name: str = "steps") -> pa.Table:
    return pq.read_table(output / "train" / f"{name}.parquet")


@pytest.fixture(scope="module")
def truth(curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    uids = [uid for path in sorted((curated / "samples").glob("*")) for uid in pq.read_table(path)["uid"].to_pylist()]
    path = tmp_path_factory.mktemp("truth") / "truth.parquet"
    pq.write_table(pa.table({"uid": uids, "junk": [index % 2 == 0 for index in range(len(uids))]}), path)
    return path


class Heard(TrainWatch):
    """What a run says, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def held_out(self, told: dict[str, int]) -> None:
        self.told.append(f"{told['held_by_the_pool']} of {told['evaluated']} held")

    def progress(self, noted: dict[str, Any]) -> None:
        self.told.append("progress")


HEARD = Heard()
"""Of the run `done`."""


@pytest.fixture(scope="module")
def done(curated: Path, truth: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainRecipe, TrainSummary]:
    """A run of two workers that was never stopped: 6 steps of 48 rows, so 1.22 rounds."""
    recipe = recipe_for(
        curated,
        tmp_path_factory.mktemp("done"),
        workers=2,
        data=Data(run=str(curated), segment_rows=16, truth=str(truth)),
        evaluate=Evaluate(shards=str(curated.parent / "pool" / "00003.tar"), every_steps=4),
    )
    return recipe, train(recipe, watch=HEARD)


@pytest.mark.slow
def test_a_run_accounts_for_what_it_loaded_scored_and_used(done: tuple[TrainRecipe, TrainSummary]) -> None:
    _, summary = done
    assert summary.failures == []
    assert (summary.steps, summary.samples_loaded, summary.samples_trained) == (6, 288, 144)
    assert summary.rounds == round(288 / OFFERED, 4) and summary.samples_not_decoded == 0
    assert summary.ledger["samples_scored"] == OFFERED and summary.ledger["uses"] == 144


@pytest.mark.slow
def test_only_the_newest_checkpoints_and_their_ledgers_are_kept(unstopped: Path) -> None:
    assert checkpoints(unstopped) == ["step-0000000033", "step-0000000036"]
    heads = [json.loads(path.read_text()) for path in unstopped.glob("ledger/*/HEAD.json")]
    assert [sorted(head["snapshots"]) for head in heads] == [checkpoints(unstopped)]


@pytest.mark.slow
def test_every_step_is_noted(done: tuple[TrainRecipe, TrainSummary]) -> None:
    recipe, _ = done
    steps = log(Path(recipe.output))
    assert steps["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert steps["samples_loaded"].to_pylist() == [48 * step for step in range(1, 7)]
    assert steps["samples_trained"].to_pylist() == [24 * step for step in range(1, 7)]
    per_step = np.diff(np.array(steps["flops"].to_pylist()))
    # Every row is scored once and half of them cost three times that: 48 + 3 * 24 forward passes.
    assert len(set(per_step)) == 1 and per_step[0] % 120 == 0
    for name in ("loss", "accuracy", "learnability", "effective_clusters", "duplicate_share", "junk_share", "seconds"):
        assert np.isfinite(steps[name].to_numpy().astype(float)).all(), name
    for phase in ("wait", "score", "select", "exchange", "step", "ledger"):
        assert (steps[f"seconds_{phase}"].to_numpy() >= 0).all()
    assert "joules" not in steps.column_names  # nothing counts them on a CPU


@pytest.mark.slow
def test_held_out_pairs_are_measured_at_intervals_and_at_the_end(done: tuple[TrainRecipe, TrainSummary]) -> None:
    recipe, summary = done
    evaluations = log(Path(recipe.output), "evaluations")
    assert evaluations["step"].to_pylist() == [4, 6]
    assert evaluations["samples_trained"].to_pylist() == [96, 144]
    for name in ("image_to_text_r1", "text_to_image_r10", "mean_r1"):
        assert all(0 <= share <= 1 for share in evaluations[name].to_pylist())
    assert summary.last["mean_r1"] == evaluations["mean_r1"].to_pylist()[-1]


@pytest.mark.slow
def test_a_run_says_before_any_figure_what_of_its_held_out_samples_the_pool_holds(
    done: tuple[TrainRecipe, TrainSummary],
) -> None:
    _, summary = done  # it is measured on a shard of the pool itself
    assert HEARD.told[0] == "40 of 40 held" and HEARD.told.count("40 of 40 held") == 1
    assert summary.held_out == {"evaluated": 40, "held_by_the_pool": 40}
    assert "40 of the 40 held-out samples are in the pool that was trained on" in summary.warnings[0]


def test_a_held_out_sample_is_in_the_pool_by_its_uid_or_by_its_bytes(curated: Path) -> None:
    table = tables.read(str(curated), 1, ["uid", "sha256", "status"]).to_pylist()
    good, dropped = table[1], table[0]
    assert (good["status"], dropped["status"]) == ("ok", "dropped")
    samples = [(good["uid"], "0" * 64), ("0" * 32, good["sha256"]), ("1" * 32, "1" * 64), (dropped["uid"], "2" * 64)]
    uids, sha256s = map(list, zip(*[*samples, ("3" * 32, "")], strict=True))
    assert held_by_pool(uids, sha256s, str(curated), range(6)) == 2
    assert held_by_pool(uids, sha256s, str(curated), [0, 2, 3]) == 0
    assert held_by_pool(uids, sha256s, str(curated), range(6), among=["3" * 32]) == 0


@pytest.mark.slow
def test_the_learner_is_a_checkpoint_that_curate_and_open_clip_load(done: tuple[TrainRecipe, TrainSummary]) -> None:
    _, summary = done
    trained = build_network("nano", checkpoint=summary.weights).clip.state_dict()
    begun = build_network("nano", seed=1).clip.state_dict()
    assert any(not trained[name].equal(begun[name]) for name in begun)


@pytest.mark.slow
def test_a_run_that_is_done_is_not_done_again(
    done: tuple[TrainRecipe, TrainSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, summary = done
    monkeypatch.setattr(training, "_run", None)
    assert train(recipe) == summary


@pytest.mark.slow
def test_another_recipe_in_the_same_output_is_refused_and_named(done: tuple[TrainRecipe, TrainSummary]) -> None:
    recipe, _ = done
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(ValueError, match=r"train.learning_rate was 0.001, now 0.5"):
        train(other)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_batch(
    curated: Path, ray_session: None, tmp_path: Path
) -> None:
    recipe = recipe_for(curated, tmp_path / "out", train={"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup": 0})
    summary = train(recipe)
    assert summary.steps < 6 and "rank 0" in summary.failures[0] and "not finite" in summary.failures[0]
    [saved] = [json.loads(path.read_text()) for path in (tmp_path / "out" / "train" / "failure").iterdir()]
    assert len(saved["addresses"]) == 48 and saved["step"] >= 0


# Kills. Each run is a process of its own.


def start(recipe: TrainRecipe, folder: Path) -> subprocess.Popen[str]:
    file = folder / "recipe.json"
    file.write_text(recipe.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.train", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    while not condition():
        assert process.poll() is None, f"the run ended first: {process.communicate()[0]}"
        assert time.monotonic() - begun < TIMEOUT_S
        time.sleep(0.02)


def checkpoints(output: Path) -> list[str]:
    return sorted(path.parent.name for path in (output / "train" / "checkpoints").glob("step-*/position.json"))


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [below for child in found for below in descendants(child)]


def workers_of(pid: int) -> list[int]:
    alive = [child for child in descendants(pid) if Path(f"/proc/{child}/cmdline").exists()]
    return [child for child in alive if b"RayTrainWorker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def ledger_of(recipe: TrainRecipe) -> Ledger:
    """The run's ledger, read from its last snapshot without any actor."""
    shards = offered.load(str(Path(recipe.output) / "train" / "pool.parquet"))
    sizes = np.array([shard.rows for shard in shards])
    newest = sorted(Path(recipe.output).glob("ledger/*/snapshots/*/ledger.json"))[-1].parent
    return Ledger.load(lambda name: open(newest / name, "rb"), sizes, ledger_specs(recipe))


@pytest.fixture(scope="module")
def long_recipe(curated: Path) -> Callable[..., TrainRecipe]:
    def make(output: Path, **fields: Any) -> TrainRecipe:
        return recipe_for(curated, output, train={"num_steps": 36, "sub_batch": 12}, **fields)

    return make


@pytest.fixture(scope="module")
def unstopped(
    ray_session: None, long_recipe: Callable[..., TrainRecipe], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("unstopped")
    assert not train(long_recipe(output)).failures
    return output


def go_on(recipe: TrainRecipe, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The same command again, in this process, whose Ray is there already; what it said."""
    file = folder / "again.json"
    file.write_text(recipe.model_dump_json())
    code = job.main([str(file)])
    told = capsys.readouterr()
    assert code == 0, told
    return told.out + told.err


@pytest.mark.slow
def test_a_killed_driver_goes_on_to_the_curve_of_a_run_never_stopped(
    long_recipe: Callable[..., TrainRecipe], unstopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = long_recipe(tmp_path / "out")
    process = start(recipe, tmp_path)
    wait_for(lambda: len(checkpoints(tmp_path / "out")) >= 1, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out" / "train" / "summary.json").exists()
    before = checkpoints(tmp_path / "out")
    said = go_on(recipe, tmp_path, capsys)
    assert before and f"{int(before[-1][5:])} steps done before" in said
    same = ["step", "loss", "learnability", "effective_clusters", "samples_loaded", "flops"]
    assert log(tmp_path / "out").select(same).equals(log(unstopped).select(same))


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_each_sample_is_offered_once_a_round_by_two_and_by_three_workers(
    ray_session: None, long_recipe: Callable[..., TrainRecipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 9 steps of 24 rows, then 9 more: 216 of 236 rows, so none is offered twice.
    fields = {"num_steps": 9, "sub_batch": 12}
    remember = Remember(score_log="on")
    recipe = long_recipe(tmp_path / "out", workers=2, max_failures=2, checkpoint_every=2, ledger=remember)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=fields)})
    process = start(recipe, tmp_path)
    wait_for(lambda: checkpoints(tmp_path / "out") and workers_of(process.pid), process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    wait_for(lambda: len(checkpoints(tmp_path / "out")) >= 2 or not workers_of(process.pid), process)
    process.kill()
    process.communicate()
    three = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"workers": 3})})
    go_on(three, tmp_path, capsys)
    assert log(tmp_path / "out")["step"].to_pylist() == list(range(1, 10))
    ledger = ledger_of(recipe)
    assert ledger.known("score") == 216 and ledger.usage_histogram()[1] == 108
    counts = np.bincount(ledger.read("score", all_addresses(recipe))["ledger_count"])
    assert counts.tolist() == [OFFERED - 216, 216]
    scored = list(read_steps(str(tmp_path / "out")))
    assert [step.step for step in scored] == list(range(1, 10))
    assert len({address for step in scored for address in step.addresses.tolist()}) == 216
    assert all(len(step.addresses) == 24 and (step.weights > 0).sum() == 12 for step in scored)


def all_addresses(recipe: TrainRecipe) -> np.ndarray:
    shards = offered.load(str(Path(recipe.output) / "train" / "pool.parquet"))
    return np.concatenate([(s.number << 20) + s.row_numbers(0, s.offered) for s in shards])


# What cannot be is said before anything starts.


def test_a_plan_is_checked_without_ray(curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(recipe_for(curated, tmp_path / "out")) == OFFERED
    flags = ["--data.run", str(curated), "--output", str(tmp_path / "out"), "--train.sub-batch", "8"]
    assert job.main(["debug", *flags, "--dry-run"]) == 0
    assert "nothing was touched" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_no_run_no_output_or_the_same_folder_for_both(curated: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.run is empty"):
        check(recipe_for(Path(), tmp_path, data=Data()))
    with pytest.raises(ValueError, match="output is empty"):
        check(recipe_for(curated, tmp_path).model_copy(update={"output": ""}))
    with pytest.raises(ValueError, match="output must not be data.run itself"):
        check(recipe_for(curated, curated))


def test_a_missing_cache_is_an_error_that_says_how_to_make_it(curated: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run of jobs.curate; make it with: python -m jobs.curate"):
        check(recipe_for(tmp_path, tmp_path / "out"))
    part = tmp_path / "part"
    shutil.copytree(curated, part)
    (part / "manifest" / "embed" / "00000002.json").unlink()
    with pytest.raises(ValueError, match=r"1 of 6 shards are not embedded yet, .*00002.tar first; go on with"):
        check(recipe_for(part, tmp_path / "out"))


def test_a_shard_that_left_the_pool_offers_nothing_and_a_run_goes_on_as_it_began(curated: Path, tmp_path: Path) -> None:
    recipe = resolved(recipe_for(curated, tmp_path / "out"))
    shard = checked(recipe).shards[1]
    url, away = Path(shard.url), tmp_path / "away.tar"
    url.rename(away)
    try:
        plan = checked(recipe)
        assert plan.absent == [shard.url] and [of.number for of in plan.shards] == [0, 2, 3, 4, 5]
        assert check(recipe) == OFFERED - shard.offered
        commit_to(recipe, plan)
    finally:
        away.rename(url)
    again = checked(recipe)
    assert again.absent == [shard.url] and sum(of.offered for of in again.shards) == OFFERED - shard.offered
    assert check(recipe_for(curated, tmp_path / "other")) == OFFERED


def test_a_failure_is_told_by_its_own_cause_and_not_by_what_ray_wraps_around_it() -> None:
    wrapped = "FileNotFoundError: [Errno 2] no such file: 'a.tar'\n\nray.exceptions.UserCodeException: UDF failed"
    error = RuntimeError("training failed")
    error.worker_failures = {0: wrapped}  # pyright: ignore
    assert training.cause_of(error) == "rank 0: FileNotFoundError: [Errno 2] no such file: 'a.tar'"
    error.worker_failures = {1: "ray.exceptions.OutOfMemoryError: full"}  # pyright: ignore
    assert training.cause_of(error) == "rank 1: ray.exceptions.OutOfMemoryError: full"


def test_a_cache_of_another_model_is_an_error_that_says_how_to_make_one(curated: Path, tmp_path: Path) -> None:
    right = Reference(weights=Weights(model="nano", seed=7))
    assert check(recipe_for(curated, tmp_path / "out", reference=right)) == OFFERED
    message = r"made by another model \(nano\), not by nano \(seed 8\).*python -m jobs.curate"
    with pytest.raises(ValueError, match=message):
        check(recipe_for(curated, tmp_path / "out", reference=Reference(weights=Weights(model="nano", seed=8))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": {"sub_batch": 200}}, r"train.super_batch is 400 .* offers 236 rows"),
        ({"data_truth": "absent.parquet"}, "data.truth: no file"),
        ({"evaluate": Evaluate(shards="absent/*.tar")}, "no shard matches"),
        ({"method": "grad_mimics"}, "no method is named"),
    ],
)
def test_what_cannot_run_is_refused_by_name(curated: Path, tmp_path: Path, fields: dict, message: str) -> None:
    if truth := fields.pop("data_truth", None):
        fields["data"] = Data(run=str(curated), truth=str(tmp_path / truth))
    with pytest.raises(ValueError, match=message):
        check(recipe_for(curated, tmp_path / "out", **fields))


def test_workers_must_share_a_batch_alike(curated: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute.workers=5 must divide train.sub_batch=24"):
        recipe_for(curated, tmp_path, workers=5)


@pytest.mark.slow
def test_an_online_reference_gives_the_columns_that_the_cache_holds(
    curated: Path, ray_session: None, tmp_path: Path
) -> None:
    online = Reference(weights=Weights(model="nano", seed=7), online=True)
    fields = {"train": {"num_steps": 2}, "ledger": Remember(actors=2)}
    cached = train(recipe_for(curated, tmp_path / "cached", **fields))
    again = train(recipe_for(curated, tmp_path / "online", reference=online, **fields))
    assert again.failures == cached.failures == []
    first, second = log(tmp_path / "cached"), log(tmp_path / "online")
    # float16 at rest: the two differ by its rounding.
    np.testing.assert_allclose(first["learnability"].to_numpy(), second["learnability"].to_numpy(), atol=0.2)
    # 48 rows more cost a forward pass of the reference, which is as large as the learner.
    assert again.flops / cached.flops == pytest.approx((48 + 72 + 48) / (48 + 72))
