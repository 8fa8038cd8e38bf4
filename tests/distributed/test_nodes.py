"""Several nodes on this machine: some without a GPU, some without a CPU, and one that is taken away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.distributed.pipeline import curate
from curation.recipe import Compute, CurateRecipe, Embed, Pool, TrainRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, Train, Workers
from tests.distributed.conftest import WriteShard

STEPS = 150

# A Ray of its own: the nodes' resources are the law. The GPU is one in name only, the model runs on the CPU.
TWO_NODES = """
import dataclasses, sys
import ray
from ray.cluster_utils import Cluster

from curation.distributed import pipeline
from curation.distributed.resources import Placement
from curation.recipe import CurateRecipe

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 1, "include_dashboard": False})
nodes.add_node(num_cpus=2, num_gpus=0)
nodes.wait_for_nodes()
ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
pipeline.place = lambda compute, precision: Placement("cpu", "float32", actors=1, num_cpus=0, num_gpus=1)
with open(sys.argv[1]) as file:
    summary = pipeline.curate(CurateRecipe.model_validate_json(file.read()))
ray.shutdown()
nodes.shutdown()
assert not summary.failures, summary.failures
print(summary.read, summary.embedded)
"""


@pytest.mark.slow
def test_nodes_without_a_gpu_decode_for_a_node_without_a_cpu_and_the_tables_are_the_same(
    ray_session: None, tmp_path: Path, write_shard: WriteShard
) -> None:
    for number in range(3):
        write_shard(tmp_path / "pool" / f"{number:05d}.tar", count=30, seed=number, broken=[number])
    recipe = CurateRecipe(
        pool=Pool(shards=str(tmp_path / "pool")),
        embed=Embed(model="nano", batch_size=8),
        compute=Compute(device="cpu", actors=1, mode="staged"),
        output=str(tmp_path / "apart"),
    )
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", TWO_NODES, str(tmp_path / "recipe.json")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-1] == "90 87"

    fused = recipe.model_copy(update={"output": str(tmp_path / "here"), "compute": Compute(device="cpu", actors=1)})
    assert not curate(fused).failures
    for number in range(3):
        name = f"samples/{number:08d}.parquet"
        assert pq.read_table(tmp_path / "apart" / name) == pq.read_table(tmp_path / "here" / name)


# The only node that can work is drained, as a cloud's notice drains it, and killed once the run has answered.
DRAINED = """
import subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from curation.distributed.train import train
from curation.recipe import TrainRecipe

recipe = TrainRecipe.model_validate_json(Path(sys.argv[1]).read_text())
trained = Path(recipe.output) / "train"
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
first = nodes.add_node(num_cpus=8)
nodes.wait_for_nodes()
ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)

def wait_for(condition):
    while not condition():
        assert not running.done(), running.result()
        time.sleep(0.02)

running = ThreadPoolExecutor().submit(train, recipe)
wait_for((trained / "progress.json").exists)
words = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", nodes.address]
words += ["--node-id", first.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
subprocess.run([*words, "--deadline-remaining-seconds", "90"], check=True, stdout=subprocess.DEVNULL)
wait_for(lambda: list((trained / "checkpoints").glob("step-*/position.json")))
[saved] = (trained / "checkpoints").glob("step-*")
nodes.add_node(num_cpus=8)
nodes.remove_node(first, allow_graceful=False)
summary = running.result()
ray.shutdown()
nodes.shutdown()
assert not summary.failures, summary.failures
print(int(saved.name.split("-")[1]), summary.steps, summary.ledger["uses"])
"""


@pytest.mark.slow
@pytest.mark.alone
def test_a_node_that_is_taken_gets_a_checkpoint_first_and_another_node_goes_on_from_it(
    curated: Path, tmp_path: Path
) -> None:
    recipe = TrainRecipe(
        data=Data(run=str(curated), segment_rows=16),
        learner=Weights(model="nano", seed=1),
        train=Train(num_steps=STEPS, sub_batch=24, filter_ratio=0.5, score_batch=64),
        compute=Workers(device="cpu"),
        output=str(tmp_path / "out"),
        checkpoint_every=STEPS,
    )
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", DRAINED, str(tmp_path / "recipe.json")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr
    saved, ended, uses = map(int, told.stdout.split()[-3:])
    assert 0 < saved < ended == STEPS and uses == STEPS * 24
    steps = pq.read_table(tmp_path / "out" / "train" / "steps.parquet")
    assert steps["step"].to_pylist() == list(range(1, STEPS + 1))
    assert steps["samples_loaded"].to_pylist()[-1] == STEPS * 48
