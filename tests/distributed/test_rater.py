"""A rater from end to end: taught on Ray Train workers, its ratings a column of the pool, its selection audited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from curation.data import storage, tables
from curation.data.manifest import OtherRun
from curation.data.rater_files import load_rater
from curation.distributed.fit_rater import checked_rater, fit_rater
from curation.distributed.rater_loop import teach
from curation.distributed.rater_rows import check_disjoint, gather_rows, part_of
from curation.distributed.rating_columns import rating_maker
from curation.distributed.train import TrainFailed
from curation.numerics.percentiles import percentiles, sorted_sample
from curation.recipe import CurateRecipe, Select
from curation.recipe.made_columns import Percentile, Rating
from curation.recipe.rater import RaterRecipe, Splits
from jobs import fit
from jobs.recipes import rater_debug
from tests.distributed.conftest import select_again


def recipe_for_rater(run: Path, output: Path, **fields: Any) -> RaterRecipe:
    base = rater_debug()
    fields = {"splits": Splits(validation_share=0.25, test_share=0.15), "workers": 2, **fields}
    return base.model_copy(update={"run": str(run), "output": str(output), "checkpoint_every": 3, **fields})


@pytest.fixture(scope="module")
def run(curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the curated run, for it gets columns."""
    return Path(shutil.copytree(curated, tmp_path_factory.mktemp("rater") / "run"))


@pytest.fixture(scope="module")
def taught(run: Path) -> tuple[RaterRecipe, dict[str, Any]]:
    """A rater taught by two workers, and what was told of it."""
    recipe = recipe_for_rater(run, run.parent / "rater")
    return recipe, fit_rater(recipe)


def test_two_workers_teach_the_rater_that_one_process_teaches(
    taught: tuple[RaterRecipe, dict[str, Any]], tmp_path: Path
) -> None:
    recipe, told = taught
    assert told["rows"]["train"] + told["rows"]["validation"] + told["rows"]["test"] == 236
    alone = recipe.model_copy(update={"output": str(tmp_path / "alone")})
    shutil.copytree(Path(recipe.output) / "rows", tmp_path / "alone" / "rows")
    teach(alone, device="cpu")
    ours, theirs = load_rater(recipe.output), load_rater(alone.output)
    assert ours.about["steps"] == theirs.about["steps"] > 0
    for name, value in theirs.state.items():
        torch.testing.assert_close(ours.state[name], value, rtol=1e-3, atol=1e-4, msg=name)
    epochs = json.loads((Path(recipe.output) / "fit" / "dynamics.json").read_text())
    assert len(epochs["epochs"]) == 4 and np.shape(epochs["loss"]) == (4, 10)
    assert fit_rater(recipe)["sha256"] == told["sha256"]  # what is done is not done again
    with pytest.raises(OtherRun, match="a rater made with another recipe .*seed was 0, now 1"):
        fit_rater(recipe.model_copy(update={"seed": 1}))


def test_parts_share_no_content_and_do_not_depend_on_the_order_of_shards(
    run: Path, taught: tuple[RaterRecipe, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, told = taught
    monkeypatch.setattr("curation.distributed.tasks.SHARDS_PER_TASK", 2)
    other = recipe.model_copy(update={"output": str(tmp_path / "other")})
    assert gather_rows(other) == told["rows"]
    for part in told["rows"]:
        ours, theirs = (np.load(Path(r.output) / "rows" / f"{part}-addresses.npy") for r in (recipe, other))
        np.testing.assert_array_equal(ours, theirs)
    words = np.random.default_rng(0).integers(0, 2**63, (4000, 2), np.uint64)
    shares = np.bincount(part_of(words, Splits(validation_share=0.2, test_share=0.1)), minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.7], atol=0.03)
    with pytest.raises(ValueError, match="splits: 2 samples are in train and in validation"):
        check_disjoint({"train": words[:5], "validation": words[3:9], "test": words[10:]})
    # A validation run that is the pool itself shares its samples.
    with pytest.raises(ValueError, match=r"splits: \d+ samples are in test and in validation"):
        gather_rows(
            recipe.model_copy(update={"output": str(tmp_path / "x"), "splits": Splits(validation_run=str(run))})
        )


def test_ratings_are_columns_a_selection_draws_from_them_and_its_deciles_are_audited(
    run: Path, taught: tuple[RaterRecipe, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = taught
    curated = CurateRecipe.model_validate(json.loads((run / "recipe.json").read_text())["recipe"])
    again = curated.model_copy(update={"output": str(run)})
    columns = (Rating(make="rating", rater=recipe.output), Percentile(make="percentile"))
    steps = (Select(method={"name": "alchemist"}, keep_fraction=0.5),)
    summary = select_again(again, columns=columns, selection=steps)
    table = tables.read_unified(
        str(run), range(6), ["status", "address", "image_embedding", "rating.logit", "rating_percentile"]
    )
    table = table.filter(pc.field("status") == "ok")
    logits = table["rating.logit"].to_numpy()
    np.testing.assert_allclose(
        table["rating_percentile"].to_numpy(), percentiles(logits, sorted_sample(logits)), atol=1e-6
    )
    # The plain loop over rows in another order: what a row is rated does not depend on its neighbours.
    maker, order = rating_maker(columns[0]), np.random.default_rng(0).permutation(len(table))
    shuffled = maker.make(table.take(order))["logit"].to_numpy()
    np.testing.assert_allclose(shuffled, logits[order], atol=1e-5)
    audit = pq.read_table(run / "selection" / "audit.parquet").to_pylist()
    deciles = {row["group"]: row for row in audit if row["column"] == "rating_percentile" and row["step"] == -1}
    assert len(deciles) == 10 and not any(row["warned"] for row in deciles.values())
    assert sum(row["rows_out"] for row in deciles.values()) == summary.selected == 118
    assert deciles["< 0.1"]["kept_share"] == deciles["0.1 to 0.2"]["kept_share"] == 0
    assert deciles["0.6 to 0.7"]["kept_share"] > 0.8
    # The command of a finished rater, from its own recipe.
    assert fit.main(["rater", str(Path(recipe.output) / "recipe.json")]) == 0
    assert '"make": "percentile"' in capsys.readouterr().out
    assert fit.main(["rater", "debug", "--run", str(run), "--output", str(run.parent / "x"), "--dry-run"]) == 0
    assert not (run.parent / "x").exists()
    # Pictures and tables of the ranges.
    assert fit.main(["ratings", "default", "--run", str(run), "--rater", recipe.output, "--rows", "60"]) == 0
    folder = run / "fit" / "rating_percentile"
    names = {"head-0-20.png", "middle-30-80.png", "tail-80-100.png", "dynamics.png", "dynamics.json"}
    names.add("correlations.json")
    assert names <= {path.name for path in folder.iterdir()}
    facts = json.loads((folder / "correlations.json").read_text())
    assert facts["rows"] == 60 and -1 <= facts["facts"]["edge_density"]["spearman_with_rating"] <= 1
    assert facts["facts"]["png_bytes"]["spearman_with_rating"] is None  # of noise all are as large
    percentile_of = dict(zip(table["address"].to_pylist(), table["rating_percentile"].to_pylist(), strict=True))
    of_range = {name: [percentile_of[address] for address in shown] for name, shown in facts["images"].items()}
    assert max(of_range["head-0-20"]) < 0.2 and min(of_range["tail-80-100"]) >= 0.8
    assert all(0.3 <= percentile < 0.8 for percentile in of_range["middle-30-80"])


def test_a_stopped_teaching_goes_on_from_its_checkpoint(
    taught: tuple[RaterRecipe, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = taught
    ends = {}
    for name in ("whole", "stopped"):
        ends[name] = recipe.model_copy(update={"output": str(tmp_path / name)})
        shutil.copytree(Path(recipe.output) / "rows", tmp_path / name / "rows")
    teach(ends["whole"], device="cpu")

    class Killed(Exception):
        pass

    from curation.training.rater_run import RaterRun

    step, calls = RaterRun.step, iter(range(100))

    def dies(self: RaterRun) -> Any:
        if next(calls) == 8:
            raise Killed
        return step(self)

    monkeypatch.setattr(RaterRun, "step", dies)
    with pytest.raises(Killed):
        teach(ends["stopped"], device="cpu")
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "rater.json").exists()
    teach(ends["stopped"], device="cpu")
    whole, stopped = (load_rater(end.output) for end in ends.values())
    assert all(torch.equal(stopped.state[name], value) for name, value in whole.state.items())
    assert stopped.about["last_epoch"] == whole.about["last_epoch"]


def test_a_collapse_is_an_end_that_says_why_and_a_rater_that_is_not_there_is_refused(
    taught: tuple[RaterRecipe, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = taught
    output = tmp_path / "paper"
    paper = recipe.model_copy(
        update={"output": str(output), "teach": recipe.teach.model_copy(update={"mode": "paper", "warmup_steps": 1})}
    )
    shutil.copytree(Path(recipe.output) / "rows", output / "rows")
    monkeypatch.setattr("curation.training.rater.COLLAPSED_BELOW", 1.1)  # any weight will do
    teach(paper, device="cpu")
    assert "the batch's weight fell to" in json.loads((output / "collapsed.json").read_text())["why"]
    with pytest.raises(TrainFailed, match="Use mode clean"):
        fit_rater(paper)
    with pytest.raises(ValueError, match="holds no taught rater"):
        rating_maker(Rating(make="rating", rater=str(output)))
    with pytest.raises(ValueError, match="output: name a folder"):
        checked_rater(recipe.model_copy(update={"output": ""}))
    with pytest.raises(ValueError, match="workers=3 must divide teach.groups=2"):
        RaterRecipe(workers=3)
    storage.write_bytes(str(tmp_path / "other" / "rater.pt"), b"not those weights")
    shutil.copy(Path(recipe.output) / "rater.json", tmp_path / "other" / "rater.json")
    with pytest.raises(ValueError, match="is not the file that rater.json tells of"):
        load_rater(str(tmp_path / "other"))
