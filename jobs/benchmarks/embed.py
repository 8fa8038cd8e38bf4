"""`python -m jobs.benchmark embed`: jobs.curate's embedding against a hand-written loop on the same cores.

Both read the same tars, decode with the same open_clip transform, tokenise, and run the same model in batches of the
same size, in as many processes with as many threads. The loop writes nothing and accounts for nothing. Rates are at
steady state, between 15% and 85% of the rows, so neither side's start-up counts; wall time is reported beside them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from curation.data.storage import list_shards
from jobs.benchmarks.pairs import interleaved, paired_ratio, provenance
from jobs.demo_pool import make_pool

STEADY = (0.15, 0.85)
TARGET_RATIO, TARGET_MEMORY = 0.90, 1.10
BATCH_SIZE, DECODE_THREADS = 64, 2
POOL_GROWTH = 4


@dataclass(frozen=True)
class Run:
    """One run of either side: images/s at steady state, seconds in all."""

    steady: float
    wall: float
    images: int


def benchmark(*, shards: str | None, pairs: int, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark; `shards` defaults to a demo pool made for it."""
    with tempfile.TemporaryDirectory(prefix="curation-bench-") as folder:
        pattern = shards or demo_pool(Path(folder) / "pool", samples=400 if tiny else 20_000)
        figures = race(pattern, Path(folder), pairs=pairs)
        memory = memory_growth(Path(folder), samples=200 if tiny else 4_000)
    return {**provenance(), "benchmark": "embed", "pool": shards or "demo pool", **figures, **memory}


def race(pattern: str, folder: Path, *, pairs: int) -> dict[str, Any]:
    """Ours against the hand-written loop on one pool, in interleaved pairs."""
    ours: list[Run] = []
    rivals: list[Run] = []

    def run_ours() -> float:
        ours.append(run("ours", pattern, str(folder / f"out-{len(ours)}")))
        return ours[-1].steady

    def run_rival() -> float:
        rivals.append(run("rival", pattern, ""))
        return rivals[-1].steady

    ratio = paired_ratio(interleaved(run_ours, run_rival, pairs=pairs))
    wall = paired_ratio([(theirs.wall, mine.wall) for mine, theirs in zip(ours, rivals, strict=True)])
    short = ratio.high < TARGET_RATIO
    outcome = "short" if short else "met" if ratio.median >= TARGET_RATIO else "not told apart"
    print(f"images/s at steady state, ours / hand-written loop: {ratio}")
    print(f"images/s over the wall time, start-up included:      {wall}")
    print(f"target {TARGET_RATIO}: {outcome}")
    return {
        "steady_ratio": {**ratio._asdict(), "target": TARGET_RATIO, "outcome": outcome},
        "wall_ratio": wall._asdict(),
        "ours": [asdict(run) for run in ours],
        "rival": [asdict(run) for run in rivals],
    }


def memory_growth(folder: Path, *, samples: int) -> dict[str, Any]:
    """Peak memory of our process tree for a pool, and for one POOL_GROWTH times as large."""
    sizes = {"pool": samples, f"pool_x{POOL_GROWTH}": POOL_GROWTH * samples}
    mib = {
        name: _peak_mib(demo_pool(folder / f"pool-of-{size}", samples=size), str(folder / f"out-of-{size}"))
        for name, size in sizes.items()
    }
    one, grown = mib.values()
    print(f"peak memory of a {POOL_GROWTH}x larger pool: {grown:,.0f} / {one:,.0f} MiB = {grown / one:.3f}")
    return {"peak_memory_mib": {**mib, "ratio": grown / one, "target": TARGET_MEMORY}}


def demo_pool(folder: Path, *, samples: int) -> str:
    """A demo pool in shards of 1,000, a tenth of what img2dataset writes: the harder case for us."""
    return make_pool(folder, samples=samples, samples_per_shard=min(1_000, samples // 4)).shards


def run(side: str, pattern: str, output: str) -> Run:
    """One side, "ours" or "rival", in a process of its own, on the cores that this process may use."""
    begun = time.time()
    with _started(side, pattern, output) as process:
        ends = _answer(process)
    return Run(steady_rate(ends), time.time() - begun, sum(rows for _, rows in ends))


def _peak_mib(pattern: str, output: str) -> float:
    """Peak memory of our process tree, in a run of its own: watching costs time that the others shall not pay."""
    with _started("ours", pattern, output) as process:
        peak = PeakMemory(process.pid)
        _answer(process)
        peak.stop()
    return peak.mib


def _started(side: str, pattern: str, output: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.benchmarks.embed", side, pattern, output]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _answer(process: subprocess.Popen[str]) -> list[tuple[float, int]]:
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with exit code {process.returncode}")
    return [(when, rows) for when, rows in json.loads(out.splitlines()[-1])]


def steady_rate(ends: Sequence[tuple[float, int]]) -> float:
    """Rows per second between 15% and 85% of the rows, from (time a batch ended, its rows) of all workers."""
    ends = sorted(ends)
    total, done = sum(rows for _, rows in ends), 0
    marks: list[tuple[float, int]] = []
    for when, rows in ends:
        done += rows
        if STEADY[0] * total <= done <= STEADY[1] * total:
            marks.append((when, done))
    if len(marks) < 2:
        raise ValueError(f"{len(ends)} batches are too few for a steady rate")
    (first, before), (last, after) = marks[0], marks[-1]
    return (after - before) / (last - first)


class PeakMemory:
    """Peak proportional memory of a process and all its descendants, sampled while it runs."""

    def __init__(self, pid: int, *, every_s: float = 0.25):
        self.mib = 0.0
        self._pid, self._every_s, self._done = pid, every_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling; `mib` is final."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._every_s):
            self.mib = max(self.mib, sum(map(_pss_mib, family(self._pid))))


def family(pid: int) -> list[int]:
    """A process and all its descendants that are alive."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
    family, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in family} - family
        grown = bool(more)
        family |= more
    return sorted(family)


def _pss_mib(pid: int) -> float:
    """Memory of a process, shared pages counted by share; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def _ours(pattern: str, output: str) -> list[tuple[float, int]]:
    """jobs.curate's own pipeline, whole: embed, account, select, write."""
    from curation.distributed.pipeline import Record, Watch, curate
    from curation.recipe import Compute, CurateRecipe, Embed, Pool

    ends: list[tuple[float, int]] = []

    class Collect(Watch):
        def committed(self, record: Record) -> None:
            ends.extend((when, rows) for when, rows in record["batch_ends"])

    recipe = CurateRecipe(
        pool=Pool(shards=pattern),
        embed=Embed(model="nano", batch_size=BATCH_SIZE),
        compute=Compute(device="cpu", actors=_processes(), decode_threads=DECODE_THREADS),
        output=output,
        max_drop_fraction=1.0,
    )
    summary = curate(recipe, watch=Collect())
    if summary.failures:
        raise RuntimeError(f"curation failed: {summary.failures}")
    return ends


def _rival(pattern: str) -> list[tuple[float, int]]:
    """The loop one would write by hand: a process per core over its share of the tars, decode threads, forward."""
    tars = [shard.url for shard in list_shards(pattern)]
    n = _processes()
    workers = [_started("rival-worker", "::".join(tars[rank::n]), "") for rank in range(n)]
    return [end for worker in workers for end in _answer(worker)]


def _rival_worker(tars: str) -> list[tuple[float, int]]:
    import io
    import tarfile
    from collections import deque
    from collections.abc import Iterator
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from open_clip.transform import image_transform_v2
    from PIL import Image, UnidentifiedImageError

    from curation.models.clip import build_network, load_tokenizer

    torch.set_num_threads(1)
    network = build_network("nano").eval()
    clip = cast(Any, network.clip)
    tokenizer = load_tokenizer("nano")
    transform = image_transform_v2(network.preprocess, is_train=False)

    def samples() -> Iterator[tuple[bytes, str]]:
        for tar in tars.split("::"):
            with tarfile.open(tar, "r|") as file:
                image = b""
                for member in file:
                    data = file.extractfile(member)
                    if data is None:
                        continue
                    if member.name.endswith(".jpg"):
                        image = data.read()
                    elif member.name.endswith(".txt"):
                        yield image, data.read().decode()

    def decode(sample: tuple[bytes, str]) -> Any:
        try:
            return transform(Image.open(io.BytesIO(sample[0]))), tokenizer([sample[1]])[0]  # pyright: ignore
        except (UnidentifiedImageError, OSError):
            return None

    ends: list[tuple[float, int]] = []

    def forward(batch: list[Any]) -> None:
        with torch.inference_mode():
            images = clip.encode_image(torch.stack([image for image, _ in batch]), normalize=True)
            texts = clip.encode_text(torch.stack([text for _, text in batch]), normalize=True)
            (images * texts).sum(-1).numpy()
        ends.append((time.time(), len(batch)))

    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        waiting: deque[Any] = deque()
        batch: list[Any] = []
        source = samples()
        more = True
        while more or waiting:
            while more and len(waiting) < 2 * BATCH_SIZE:
                sample = next(source, None)
                more = sample is not None
                if sample is not None:
                    waiting.append(pool.submit(decode, sample))
            if waiting and (row := waiting.popleft().result()) is not None:
                batch.append(row)
            if len(batch) == BATCH_SIZE:
                forward(batch)
                batch = []
        if batch:
            forward(batch)
    return ends


def _processes() -> int:
    return max(1, len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    side, pattern, output = sys.argv[1:4]
    if side == "ours":
        result = _ours(pattern, output)
    else:
        result = _rival(pattern) if side == "rival" else _rival_worker(pattern)
    print(json.dumps(result))
