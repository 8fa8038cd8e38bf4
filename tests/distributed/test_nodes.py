"""Staged mode on two nodes: one with the model's GPU and no CPU, one with CPUs alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.distributed.pipeline import curate
from curation.recipe import Compute, CurateRecipe, Embed, Pool
from tests.distributed.conftest import WriteShard

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
