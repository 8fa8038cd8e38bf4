"""Sub-batches for a trainer of one's own: what they hold, on one rank and two; going on; open_clip's own loop."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from open_clip.loss import SigLipLoss
from open_clip_train.train import train_one_epoch

from curation.distributed.selected_batches import OpenClipData, SelectedBatches
from curation.distributed.train import train
from curation.models.clip import build_network
from curation.recipe import TrainRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, LowResolution, Train, Workers

WORKER = Path(__file__).parent / "selected_worker.py"


def recipe_for(run: Path, output: Path, *, method: str = "jest", **fields: Any) -> TrainRecipe:
    return TrainRecipe(
        data=Data(run=str(run), segment_rows=16),
        learner=Weights(model="nano", seed=1),
        method={"name": method},
        train=Train(**{"num_steps": 6, "sub_batch": 24, "filter_ratio": 0.5, "score_batch": 64, **fields}),
        compute=Workers(device="cpu"),
        output=str(output),
        checkpoint_every=6,
    )


def loop_of_ones_own(
    recipe: TrainRecipe, folder: Path, *, world_size: int, stop_after: int = -1, state: Path | None = None
) -> list[dict[str, Any]]:
    """What each rank of selected_worker.py had."""
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    arguments = [str(world_size), str(folder / "store"), str(folder / "recipe.json"), str(folder), str(stop_after)]
    ranks = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), *arguments, str(state or "")])
        for rank in range(world_size)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0] * world_size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


@pytest.mark.slow
def test_two_ranks_share_each_selection_and_a_state_goes_on_where_it_was(curated: Path, tmp_path: Path) -> None:
    whole = loop_of_ones_own(recipe_for(curated, tmp_path / "a"), tmp_path / "whole", world_size=2)
    first = loop_of_ones_own(recipe_for(curated, tmp_path / "b"), tmp_path / "first", world_size=2, stop_after=3)
    rest = loop_of_ones_own(
        recipe_for(curated, tmp_path / "b"), tmp_path / "rest", world_size=2, state=tmp_path / "first" / "0.pt"
    )
    for one, begun, gone_on in zip(whole, first, rest, strict=True):
        assert begun["trained"] + gone_on["trained"] == one["trained"]
        np.testing.assert_allclose(begun["losses"] + gone_on["losses"], one["losses"], rtol=1e-4)
    for step in range(6):
        rows = [address for rank in whole for address in rank["trained"][step]]
        assert len(set(rows)) == 24 and [len(rank["trained"][step]) for rank in whole] == [12, 12]
    log = pq.read_table(tmp_path / "b" / "train" / "steps.parquet")
    assert log["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert log["samples_trained"].to_pylist() == [24 * step for step in range(1, 7)]
    assert all(np.isfinite(log["loss"].to_pylist()))


@pytest.mark.slow
def test_open_clips_own_loop_trains_on_what_jobs_train_would_choose(
    ray_session: None, curated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a learning rate of nearly 0 both loops score with the same weights throughout."""
    settings = {"learning_rate": 1e-12, "num_steps": 4}
    assert train(recipe_for(curated, tmp_path / "ours", **settings)).failures == []
    clip = cast(Any, build_network("nano", seed=1).clip)
    clip.output_dict = True
    optimizer = torch.optim.SGD(clip.parameters(), lr=1e-12)
    arguments = argparse.Namespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=None,
        horovod=False, rank=0, local_rank=0, log_local=False, log_every_n_steps=1, world_size=1, batch_size=24,
        wandb=False, val_frequency=0, save_logs=False,
    )  # fmt: skip
    with SelectedBatches(recipe_for(curated, tmp_path / "theirs", **settings), clip) as batches:
        data = {"train": OpenClipData(batches, steps_per_epoch=2)}
        with caplog.at_level(logging.INFO):
            for epoch in range(2):
                train_one_epoch(
                    clip, data, SigLipLoss(), epoch, optimizer, None, None, None, arguments
                )  # fmt: skip
    assert sum("Train Epoch" in record.message for record in caplog.records) == 4
    ours, theirs = (pq.read_table(tmp_path / name / "train" / "steps.parquet") for name in ("ours", "theirs"))
    for name in ("samples_loaded", "samples_trained", "effective_clusters", "flops"):
        assert theirs[name].to_pylist() == ours[name].to_pylist()


def test_what_it_does_not_serve_is_refused(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "run", tmp_path / "out")
    low = recipe.model_copy(update={"low_resolution": LowResolution(patch_size=16)})
    with pytest.raises(ValueError, match="at the learner's own resolution"):
        SelectedBatches(low, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"data.run: .* is no run of jobs.curate"):
        SelectedBatches(recipe, build_network("nano").clip)


@pytest.mark.slow
def test_another_model_than_the_recipes_is_refused(ray_session: None, curated: Path, tmp_path: Path) -> None:
    other = cast(Any, build_network("nano").clip)
    other.visual.proj = torch.nn.Parameter(torch.zeros(96, 64))
    with pytest.raises(ValueError, match="the model is not the one that learner.model names"):
        SelectedBatches(recipe_for(curated, tmp_path / "out"), other)
