"""`python -m jobs.benchmark doctor --output URL`: is this cluster fit for a long run? Pass or fail, and the fix.

Run it where your jobs run (`ray job submit ... -- python -m jobs.benchmark doctor`, or with RAY_ADDRESS set), with an
`--output` that every node can write. It looks at every node by itself: versions, storage, decoding, GPUs; then at all
together: an all-gather, a curation and a training on two workers that are killed and resumed. It takes about fifteen
minutes at most. The floors are what a run needs to make sense, not what good hardware reaches. A cluster that grows is
asked for nodes and waited for as by a run: `--wait-for-nodes-s`. Exit code 1 if a check failed, 4 if it was stopped.
"""

from __future__ import annotations

import io
import json
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from curation.data import storage
from curation.distributed import versions
from curation.distributed.resources import cluster, grown
from curation.distributed.stopping import Stop
from jobs.benchmarks.doctor_runs import resumed
from jobs.benchmarks.pairs import provenance
from jobs.demo_pool import make_pool

STORE_MIB = 64
WRITE_MB_S, READ_MB_S = 20.0, 50.0
DECODED_PER_S = 40.0
"""Images of 512 px that one core decodes and resizes a second."""
GPU_TFLOPS = 10.0
GATHER_MB_S = 50.0
WORKERS = 2
"""Of the training; each takes a CPU."""
NODE_LIMIT_S, RUN_LIMIT_S = 180, 600


@dataclass(frozen=True)
class Check:
    """One verdict; `passed` is None where there was nothing to check."""

    name: str
    passed: bool | None
    told: str
    fix: str = ""


NO_WORKER = Check(
    "worker nodes",
    False,
    "no worker node is there; the head alone runs no task",
    "start one; where an autoscaler does it, ask for it and wait: --wait-for-nodes-s 1800",
)


def benchmark(*, output: str, wait_for_nodes_s: float = 0.0, tiny: bool) -> dict[str, Any]:
    """All checks, told as they come; `failed` counts those that failed. Interrupted by SIGTERM."""
    folder = storage.join(storage.absolute(output), f"doctor-{secrets.token_hex(4)}")
    checks: list[Check] = []

    def noted(found: Iterator[Check]) -> None:
        for check in found:
            checks.append(check)
            told = {True: "pass", False: "FAIL", None: "none"}[check.passed]
            print(
                f"{told}  {check.name}: {check.told}"
                + (f"\n      fix: {check.fix}" if not check.passed and check.fix else "")
            )

    with cluster(num_cpus=WORKERS), Stop().on_sigterm(interrupts=True):
        grown({"CPU": 1.0}, WORKERS, wait_s=wait_for_nodes_s)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        can_work = any(node["Resources"].get("CPU", 0) >= 1 for node in nodes)
        if can_work:
            noted(of_nodes(nodes, folder, mib=1 if tiny else STORE_MIB))
            noted(all_gather(nodes, mib=1 if tiny else 64))
        else:
            noted(iter([NO_WORKER]))
    if can_work and not tiny:
        with Stop().on_sigterm(interrupts=True):
            noted(killed_and_resumed(folder, wait_for_nodes_s=wait_for_nodes_s))
    failed = sum(check.passed is False for check in checks)
    where = f"; what was written lies in {folder}" if can_work else ""
    print(f"{len(nodes)} nodes, {len(checks)} checks, {failed} failed{where}")
    told = [asdict(check) for check in checks]
    return {**provenance(), "benchmark": "doctor", "nodes": len(nodes), "checks": told, "failed": failed}


# Each node by itself.


def of_nodes(nodes: list[dict[str, Any]], folder: str, *, mib: int) -> Iterator[Check]:
    """Versions, storage, decoding and GPUs of every node; nodes are asked side by side, each is told by its name."""
    here = versions.packages()
    asked = {
        node["NodeManagerHostname"] + " " + node["NodeID"][:6]: (
            _on(node, node_facts).remote(folder, mib),
            _on(node, gpu_tflops, num_gpus=1).remote() if node["Resources"].get("GPU", 0) >= 1 else None,
        )
        for node in nodes
    }
    for name, (facts_ref, gpu_ref) in asked.items():
        try:
            facts: Any = ray.get(facts_ref, timeout=NODE_LIMIT_S)
            gpu: Any = None if gpu_ref is None else ray.get(gpu_ref, timeout=NODE_LIMIT_S)
        except RayError as error:
            why = str(error).strip().splitlines()[-1:]
            yield Check(
                f"{name}: answers",
                False,
                f"{type(error).__name__} {why}",
                "see that node's logs: code, weights and output must be there for the user who runs Ray",
            )
            continue
        yield from verdicts(name, facts, gpu, here=here)


def verdicts(name: str, facts: dict[str, Any], gpu: float | None, *, here: dict[str, str]) -> Iterator[Check]:
    """What a node's figures mean."""
    other = sorted(package for package in here if facts["versions"].get(package) != here[package])
    yield Check(
        f"{name}: versions",
        not other,
        f"{len(here)} packages, other than the driver's: {other or 'none'}",
        "use one image for all nodes (cluster/Dockerfile)",
    )
    write, read, cores = facts["write_mb_s"], facts["read_mb_s"], facts["cores"]
    yield Check(
        f"{name}: storage",
        write >= WRITE_MB_S and read >= READ_MB_S,
        f"writes {write:,.0f} MB/s, reads {read:,.0f} MB/s (floors {WRITE_MB_S:g}, {READ_MB_S:g})",
        "put pool and output nearer to the nodes: a bucket in their region, a faster volume (docs/stores.md)",
    )
    rate = facts["decoded_per_s"]
    yield Check(
        f"{name}: decoding",
        rate >= DECODED_PER_S,
        f"{rate:,.0f} images/s a core, {rate * cores:,.0f} on its {cores} (floor {DECODED_PER_S:g} a core)",
        "other work holds the cores, or the container's CPU limit does",
    )
    if gpu is None:
        yield Check(f"{name}: GPU", None, "no GPU here")
    else:
        yield Check(
            f"{name}: GPU",
            gpu >= GPU_TFLOPS,
            f"{gpu:,.1f} TFLOP/s in bfloat16 (floor {GPU_TFLOPS:g})",
            "another process on the GPU, a driver older than torch's CUDA, or a power limit: nvidia-smi",
        )


def _on(node: dict[str, Any], function: Callable[..., Any], *, num_gpus: int = 0) -> Any:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(function).options(scheduling_strategy=there)


def node_facts(folder: str, mib: int) -> dict[str, Any]:
    """Runs on the node."""
    import os

    url = storage.join(folder, f"store-{secrets.token_hex(4)}.bin")
    data = np.random.default_rng(0).integers(0, 256, mib << 20, np.uint8).tobytes()
    begun = time.perf_counter()
    storage.write_bytes(url, data)
    written = time.perf_counter()
    if storage.read_bytes(url) != data:
        raise OSError(f"{url} does not hold what was written to it")
    read = time.perf_counter()
    storage.delete(url)
    return {
        "write_mb_s": len(data) / 1e6 / (written - begun),
        "read_mb_s": len(data) / 1e6 / (read - written),
        "decoded_per_s": decoded_per_s(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions.packages(),
    }


def decoded_per_s(*, seconds: float = 1.0) -> float:
    """Images a second that this core brings from a JPEG of 512 px to a model's 224."""
    from curation.data.images import pixels
    from curation.models.resize import load_resize

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((512, 512)).save(out, "JPEG", quality=90)
    resize, count, begun = load_resize("ViT-B-32"), 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        pixels(out.getvalue(), max_pixels=1 << 20, resize=resize)
        count += 1
    return count / (time.perf_counter() - begun)


def gpu_tflops(*, side: int = 8192, repeats: int = 20) -> float:
    """TFLOP/s of square products in bfloat16 on this task's GPU."""
    import torch

    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        torch.mm(a, a)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, a)
    torch.cuda.synchronize()
    return 2 * side**3 * repeats / (time.perf_counter() - begun) / 1e12


# All together.


class Rank:
    """One of the processes that gather."""

    def address(self) -> str:
        """Where the ranks may meet, if this one is the first."""
        import socket

        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def gather(self, address: str, rank: int, world: int, mib: int) -> float:
        """MB/s that this rank takes in."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        on_gpu = torch.cuda.is_available() and bool(ray.get_gpu_ids())
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=address,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        part = torch.full((mib << 18,), float(rank), device="cuda" if on_gpu else "cpu")
        parts = [torch.empty_like(part) for _ in range(world)]
        dist.all_gather(parts, part)  # the first makes the connections
        begun = time.perf_counter()
        dist.all_gather(parts, part)
        sums = [float(got[-1]) for got in parts]  # also waits for the GPU
        seconds = time.perf_counter() - begun
        dist.destroy_process_group()
        if sums != [float(other) for other in range(world)]:
            raise RuntimeError(f"rank {rank} gathered {sums}")
        return (world - 1) * mib * 1.048576 / seconds


def all_gather(nodes: list[dict[str, Any]], *, mib: int) -> Iterator[Check]:
    """What training does in every step: one rank for each GPU, else one for each node, at least two."""
    gpus = [node for node in nodes for _ in range(int(node["Resources"].get("GPU", 0)))]
    places = gpus if len(gpus) > 1 else (nodes * 2)[: max(2, len(nodes))]
    ranks: list[Any] = [
        ray.remote(Rank)
        .options(
            num_cpus=0,
            num_gpus=1 if places is gpus else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote()
        for node in places
    ]
    fix = "open all ports among the nodes; with several networks name one (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
    try:
        address = ray.get(ranks[0].address.remote(), timeout=NODE_LIMIT_S)
        world = len(ranks)
        told = [actor.gather.remote(address, rank, world, mib) for rank, actor in enumerate(ranks)]
        rate = min(ray.get(told, timeout=NODE_LIMIT_S))
        yield Check(
            "all-gather",
            rate >= GATHER_MB_S,
            f"{rate:,.0f} MB/s at the slowest of {world} ranks (floor {GATHER_MB_S:g})",
            fix,
        )
    except RayError as error:
        yield Check("all-gather", False, f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}", fix)
    finally:
        for actor in ranks:
            ray.kill(actor)


def killed_and_resumed(folder: str, *, wait_for_nodes_s: float) -> Iterator[Check]:
    """A curation, and a training that selects online on two workers, each killed once and given again.

    Each waits for nodes as long as the doctor did, for those that came may have left again.
    """
    wait, limit_s = ["--compute.wait-for-nodes-s", f"{wait_for_nodes_s:g}"], RUN_LIMIT_S + wait_for_nodes_s
    fix = "run the command by itself and read what it says; pool and output must be on every node"
    pool = storage.join(folder, "pool")
    with tempfile.TemporaryDirectory(prefix="curation-doctor-") as made:
        make_pool(Path(made) / "pool", samples=2000, samples_per_shard=100)
        for shard in (Path(made) / "pool" / "shards").glob("*.tar"):
            storage.copy(str(shard), storage.join(pool, shard.name))
    run, trained = storage.join(folder, "run"), storage.join(folder, "train")
    curate = ["jobs.curate", "debug", "--pool.shards", pool, "--output", run, "--max-drop-fraction", "1", *wait]
    manifests = storage.join(run, "manifest", "embed")
    ok, told = resumed(curate, killed_when=lambda: len(storage.names_in(manifests)) >= 3, limit_s=limit_s)
    kept = storage.exists(storage.join(run, "summary.json")) and json.loads(
        storage.read_bytes(storage.join(run, "summary.json"))
    )
    ok = ok and bool(kept) and kept["read"] == kept["embedded"] + sum(kept["dropped"].values()) == 2000
    yield Check("curate, killed and resumed", ok, told + (f", {kept['read']:,} samples read" if kept else ""), fix)
    if not ok:
        return
    steps = 12
    train = ["jobs.train", "debug", "--data.run", run, "--output", trained, "--compute.workers", str(WORKERS), *wait]
    train += ["--train.num-steps", str(steps), "--train.sub-batch", "32", "--checkpoint-every", "4"]
    checkpoints = storage.join(trained, "train", "checkpoints")
    ok, told = resumed(train, killed_when=lambda: bool(storage.folders_in(checkpoints)), limit_s=limit_s)
    url = storage.join(trained, "train", "summary.json")
    done = json.loads(storage.read_bytes(url))["steps"] if storage.exists(url) else 0
    yield Check(
        "online selection on 2 workers, killed and resumed",
        ok and done == steps,
        f"{told}, {done} of {steps} steps",
        fix,
    )
