"""`python -m jobs.benchmark feed`: a step of `jobs.train` on everything against a hand-written loop over webdataset.

Both train the nano model with the softmax loss over the gathered batch, on the same shards, with as many processes
under DistributedDataParallel, one torch thread each, and one process that decodes ahead for each of them. The figure is
the median time from one step's end to the next, without the first third. The loop keeps no ledger, log or position.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq

from curation.data.storage import list_shards
from curation.distributed.pipeline import curate
from curation.recipe import Compute, CurateRecipe, Embed, Pool, TrainRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, Train, Workers
from jobs.benchmarks.pairs import interleaved, paired_ratio, provenance
from jobs.demo_pool import make_pool

WORKERS, BATCH, STEPS = 2, 256, 60
TARGET = 1.15


def benchmark(*, shards: str | None, pairs: int, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark; `shards` defaults to a demo pool made for it."""
    workers, batch, steps = (1, 16, 6) if tiny else (WORKERS, BATCH, STEPS)
    with tempfile.TemporaryDirectory(prefix="curation-bench-") as name:
        folder = Path(name)
        pattern = (
            shards
            or make_pool(
                folder / "pool", samples=400 if tiny else 20_000, samples_per_shard=100 if tiny else 1000
            ).shards
        )
        _cache(pattern, folder / "run")
        runs: dict[str, list[float]] = {"ours": [], "loop": []}

        def ours() -> float:
            runs["ours"].append(_ours(folder, number=len(runs["ours"]), workers=workers, batch=batch, steps=steps))
            return runs["ours"][-1]

        def loop() -> float:
            runs["loop"].append(
                _loop(pattern, folder, number=len(runs["loop"]), workers=workers, batch=batch, steps=steps)
            )
            return runs["loop"][-1]

        ratio = paired_ratio(interleaved(ours, loop, pairs=pairs))
    outcome = "met" if ratio.median <= TARGET else "missed"
    print(f"seconds a step, ours / loop over webdataset: {ratio} (target at most {TARGET}: {outcome})")
    print(f"  ours {statistics.median(runs['ours']):.4f} s, loop {statistics.median(runs['loop']):.4f} s")
    return {
        **provenance(),
        "benchmark": "feed",
        "workers": workers,
        "batch": batch,
        "ratio": {**ratio._asdict(), "target": TARGET, "outcome": outcome},
        **runs,
    }


def _cache(pattern: str, run: Path) -> None:
    """The curated run that `jobs.train` reads; in a process of its own, so that no Ray stays behind."""
    command = [sys.executable, "-m", "jobs.benchmarks.feed", "cache", pattern, str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _ours(folder: Path, *, number: int, workers: int, batch: int, steps: int) -> float:
    output = folder / f"train-{number}"
    recipe = TrainRecipe(
        data=Data(run=str(folder / "run")),
        learner=Weights(model="nano", seed=1),
        method={"name": "uniform"},
        train=Train(num_steps=steps, sub_batch=batch, filter_ratio=0.0, objective="softmax"),
        compute=Workers(device="cpu", workers=workers, decode_threads=1),
        output=str(output),
        checkpoint_every=steps,
    )
    file = folder / f"train-{number}.json"
    file.write_text(recipe.model_dump_json())
    subprocess.run([sys.executable, "-m", "jobs.train", str(file)], check=True, capture_output=True)
    seconds = pq.read_table(output / "train" / "steps.parquet")["seconds"].to_numpy()
    return _steady(seconds)


def _loop(pattern: str, folder: Path, *, number: int, workers: int, batch: int, steps: int) -> float:
    store = folder / f"store-{number}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "jobs.benchmarks.feed", "loop", pattern, str(store), str(batch), str(steps)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(workers), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("the loop over webdataset failed, its message is above")
    return _steady(np.array(json.loads(said[0].splitlines()[-1])))


def _steady(ends: np.ndarray) -> float:
    """Median seconds between the ends of steps, without the first third."""
    return float(np.median(np.diff(ends[len(ends) // 3 :])))


def _run_loop(pattern: str, store: str, batch: int, steps: int) -> list[float]:
    """The loop one would write by hand; when each step ended."""
    import torch
    import torch.distributed as dist
    import webdataset
    from open_clip.loss import ClipLoss
    from open_clip.transform import image_transform_v2
    from torch.nn.parallel import DistributedDataParallel

    from curation.models.clip import build_network, load_tokenizer

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    network, tokenize = build_network("nano", seed=1), load_tokenizer("nano")
    transform = image_transform_v2(network.preprocess, is_train=False)
    cast(Any, network.clip).logit_bias.requires_grad_(False)  # this loss has no use for it, and DDP waits for all
    model = DistributedDataParallel(network.clip)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    loss_of = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
    wds: Any = webdataset
    skip = wds.handlers.ignore_and_continue
    urls = [shard.url for shard in list_shards(pattern)]
    samples = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node, handler=skip)
        .shuffle(1000)
        .decode("pil", handler=skip)
        .to_tuple("jpg", "txt", handler=skip)
        .map_tuple(transform, lambda text: tokenize([text])[0], handler=skip)
        .repeat()
        .batched(batch // world_size, partial=False)
    )
    loader = iter(torch.utils.data.DataLoader(samples, batch_size=None, num_workers=1, prefetch_factor=4))
    ends = []
    for _ in range(steps):
        images, tokens = next(loader)
        optimizer.zero_grad(set_to_none=True)
        image_features, text_features, logit_scale, *_ = model(images, tokens)
        loss = loss_of(image_features, text_features, logit_scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        loss.item()
        ends.append(time.perf_counter())
    dist.destroy_process_group()
    return ends


if __name__ == "__main__":
    side, pattern, *rest = sys.argv[1:]
    if side == "cache":
        recipe = CurateRecipe(
            pool=Pool(shards=pattern),
            embed=Embed(model="nano", batch_size=64),
            compute=Compute(device="cpu"),
            output=rest[0],
            max_drop_fraction=1.0,
        )
        sys.exit(bool(curate(recipe).failures))
    store, batch, steps = rest
    print(json.dumps(_run_loop(pattern, store, int(batch), int(steps))))
