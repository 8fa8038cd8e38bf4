"""`python -m jobs.benchmark ledger`, in one process: a billion samples in memory, and updates against their rivals.

The billion runs in processes of its own, so that the peak is the ledger's: every address is updated once in a scattered
order, then random batches of 65,536 with repeats are timed, then the snapshot goes to disk and back, and what is read
back must be what was there. The race gives all sides the same samples, the same batches and the same figures to keep
(value, count, last step), which must agree in the end. Every rate is one core's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args

import numpy as np

from curation.addresses import ROW_BITS, flat_positions, prefix_sums
from curation.ledger import Ledger, LedgerSpec, Statistic
from jobs.benchmarks.pairs import interleaved, paired_ratio

BATCH, REPEATS = 65_536, 1_300
"""Rows of a batch, and how many of them (2%) repeat an address of the same batch."""

TARGET_GB, TARGET_RATE, TARGET_RATIO = 13.0, 5e6, 50.0
RAY_CALLS = 300
PROBES = 1_000_000


def in_process(*, pairs: int, tiny: bool) -> dict[str, Any]:
    """All figures of the ledger without actors."""
    shards, rows = (100, 10_000) if tiny else (100_000, 10_000)
    figures: dict[str, Any] = {"pool": {"shards": shards, "rows_per_shard": rows, "batch": BATCH, "repeats": REPEATS}}
    figures |= billion(shards, rows, batches=20 if tiny else 400)
    figures |= race(100_000 if tiny else 10_000_000, pairs=pairs, batches=2 if tiny else 8)
    slowest = min(figures["updates_per_s"].values())
    full = slowest / figures["race"]["dict"]["rival_per_s"]
    print(
        f"slowest statistic at {shards * rows:,} addresses / dict of {figures['race']['samples']:,} uids: {full:.1f}x"
    )
    return {**figures, "billion_to_dict": full}


# a billion samples


def billion(shards: int, rows: int, *, batches: int) -> dict[str, Any]:
    """Memory, updates per second of every statistic, and a snapshot to disk and back.

    RuntimeError if memory or disk are too small, or if what comes back from disk is not what went there.
    """
    samples = shards * rows
    first, *others = get_args(Statistic)
    with tempfile.TemporaryDirectory(prefix="curation-ledger-") as folder:
        check_room(Path(folder), samples)
        filled = _child("fill", first, shards, rows, batches, folder)
        copied_s = _copy(Path(folder))
        loaded = _child("load", first, shards, rows, folder)
    saved, peak_gb = filled["saved"], filled["peak_gb"]
    if loaded["probe"] != saved["probe"]:
        raise RuntimeError("the snapshot that was read back is not the ledger that was saved")
    filled_by = {first: filled, **{other: _child("fill", other, shards, rows, batches, "") for other in others}}
    rates = {statistic: figures["updates_per_s"] for statistic, figures in filled_by.items()}
    for statistic, rate in rates.items():
        print(f"updates/s, {statistic:4}, {samples:,} addresses: {rate / 1e6:.1f} million")
    gb = saved["bytes"] / 1e9
    snapshot = {
        "gb": gb,
        "save_gb_per_s": gb / saved["seconds"],
        "load_gb_per_s": gb / loaded["seconds"],
        "copy_gb_per_s": gb / copied_s,
        "save_extra_mib": saved["extra_mib"],
    }
    met = {"memory": peak_gb <= TARGET_GB, "rate": min(rates.values()) >= TARGET_RATE}
    print(f"peak memory: {peak_gb:.2f} GB, {peak_gb * 1e9 / samples:.2f} bytes a sample (target {TARGET_GB:.0f} GB)")
    print(
        f"snapshot of {gb:.2f} GB: save {snapshot['save_gb_per_s']:.2f} GB/s with {saved['extra_mib']:.0f} MiB extra, "
        f"load {snapshot['load_gb_per_s']:.2f} GB/s; a plain copy of its files {snapshot['copy_gb_per_s']:.2f} GB/s"
    )
    print(f"targets: memory {_word(met['memory'])}, {TARGET_RATE / 1e6:.0f} million updates/s {_word(met['rate'])}")
    return {"peak_gb": peak_gb, "updates_per_s": rates, "snapshot": snapshot, "met": met}


def check_room(folder: Path, samples: int) -> None:
    """RuntimeError if 14 bytes a sample do not fit into memory, or 17 on the disk: the snapshot and a column's copy."""
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemAvailable:"))
    for what, free, wanted in (
        ("memory", available, 14 * samples),
        (f"disk of {folder}", shutil.disk_usage(folder).free, 17 * samples),
    ):
        if free < wanted:
            raise RuntimeError(f"{wanted / 1e9:.1f} GB of {what} are needed, {free / 1e9:.1f} GB are free")


def _word(met: bool) -> str:
    return "met" if met else "short"


def _child(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.benchmarks.ledger", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _fill(statistic: Statistic, shards: int, rows: int, batches: int, folder: str) -> dict[str, Any]:
    ledger = Ledger(np.full(shards, rows), {"score": LedgerSpec(statistic)})
    rng = np.random.default_rng(0)
    for step, addresses in enumerate(scattered(shards, rows)):
        ledger.update("score", addresses, rng.random(len(addresses), dtype=np.float32), step=step)
        ledger.add_usage(addresses)
    if ledger.known("score") != shards * rows:
        raise RuntimeError(f"{ledger.known('score')} of {shards * rows} addresses were updated")
    seconds = []
    for number in range(batches):
        addresses, values = random_batch(rng, shards, rows)
        begun = time.perf_counter()
        ledger.update("score", addresses, values, step=10**6 + number)
        seconds.append(time.perf_counter() - begun)
    figures: dict[str, Any] = {"updates_per_s": BATCH / statistics.median(seconds), "peak_gb": _peak_bytes() / 1e9}
    figures["saved"] = _save(ledger, Path(folder), shards, rows) if folder else None
    return figures


def _save(ledger: Ledger, folder: Path, shards: int, rows: int) -> dict[str, Any]:
    before, begun = _peak_bytes(), time.perf_counter()
    ledger.save(lambda name: durable(folder / name))
    return {
        "seconds": time.perf_counter() - begun,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "extra_mib": (_peak_bytes() - before) / 2**20,
        "probe": _probe(ledger, shards, rows),
    }


def _load(statistic: Statistic, shards: int, rows: int, folder: Path) -> dict[str, Any]:
    begun = time.perf_counter()
    ledger = Ledger.load(
        lambda name: (folder / name).open("rb"), np.full(shards, rows), {"score": LedgerSpec(statistic)}
    )
    return {"seconds": time.perf_counter() - begun, "probe": _probe(ledger, shards, rows)}


def scattered(shards: int, rows: int) -> Iterator[np.ndarray]:
    """Every address of a pool once, in batches whose addresses lie far apart."""
    samples = shards * rows
    stride = int(samples * 0.618) | 1
    while np.gcd(stride, samples) != 1:
        stride += 2
    for start in range(0, samples, BATCH):
        flat = np.arange(start, min(start + BATCH, samples)) * stride % samples
        yield ((flat // rows) << ROW_BITS) | (flat % rows)


def random_batch(rng: np.random.Generator, shards: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Addresses (65536,), some of which repeat, and values."""
    addresses = (rng.integers(0, shards, BATCH) << ROW_BITS) | rng.integers(0, rows, BATCH)
    addresses[-REPEATS:] = addresses[:REPEATS]
    return addresses, rng.random(BATCH, dtype=np.float32)


def _probe(ledger: Ledger, shards: int, rows: int) -> int:
    """A checksum over what is read at a million random addresses."""
    rng = np.random.default_rng(1)
    addresses = (rng.integers(0, shards, PROBES) << ROW_BITS) | rng.integers(0, rows, PROBES)
    return zlib.crc32(b"".join(column.tobytes() for column in ledger.read("score", addresses).values()))


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """A file for writing that is on the disk when it is closed, and no longer in the page cache."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(folder: Path) -> float:
    """Seconds that a plain copy of the folder's files takes, each of which is deleted again."""
    begun = time.perf_counter()
    for path in sorted(folder.iterdir()):
        copy = path.with_name("copy")
        with path.open("rb") as source, durable(copy) as target:
            while data := source.read(16 << 20):
                target.write(data)
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        copy.unlink()
    return time.perf_counter() - begun


def _peak_bytes() -> int:
    """Peak resident memory of this process. Not `ru_maxrss`, which a child takes over from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


# the race


def uid_strings(words_N2: np.ndarray) -> list[str]:
    """New strings of 32 hex digits, as they come from a table; `numerics.sampling` would bring torch into memory."""
    digits = words_N2.tobytes().hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]


class Race:
    """One pool of uids, and four sides that keep value, count and last step of its samples."""

    def __init__(self, samples: int, *, batches: int) -> None:
        self.shards, self.rows = samples // 10_000, 10_000
        self.batches, self.step, self.rng = batches, 0, np.random.default_rng(2)
        self.words = self.rng.integers(0, 2**63, (samples, 2), dtype=np.uint64)
        self.offsets = prefix_sums(np.full(self.shards, self.rows))
        self.ledger = Ledger(np.full(self.shards, self.rows), {"score": LedgerSpec("last")})
        self.by_uid: dict[str, list[Any]] = {}
        for start in range(0, samples, BATCH):
            self.by_uid |= {uid: [0.0, 0, 0] for uid in uid_strings(self.words[start : start + BATCH])}
        self.value, self.count, self.last_step = (np.zeros(samples, dtype) for dtype in ("f4", "u2", "u4"))

    def run(self, update: Callable[[np.ndarray, np.ndarray, int], float]) -> float:
        """Updates per second over some batches of steps that no side has seen."""
        seconds = 0.0
        for _ in range(self.batches):
            self.step += 1
            seconds += update(*random_batch(self.rng, self.shards, self.rows), self.step)
        return self.batches * BATCH / seconds

    def give_all(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """The same batch to every side, as a step of its own."""
        self.step += 1
        for update in (self.to_ledger, self.to_dict, self.to_arrays):
            update(addresses, values, self.step)

    def to_ledger(self, addresses: np.ndarray, values: np.ndarray, step: int) -> float:
        """Seconds of one batch in the ledger."""
        begun = time.perf_counter()
        self.ledger.update("score", addresses, values, step=step)
        return time.perf_counter() - begun

    def to_dict(self, addresses: np.ndarray, values: np.ndarray, step: int) -> float:
        """Seconds of one batch in a dict of lists by uid; the strings are made beforehand."""
        uids = uid_strings(self.words[flat_positions(addresses, self.offsets)])
        begun = time.perf_counter()
        keep_in_dict(self.by_uid, uids, values.tolist(), step)
        return time.perf_counter() - begun

    def to_checked_dict(self, addresses: np.ndarray, values: np.ndarray, step: int) -> float:
        """As `to_dict`, with the ledger's promise that a bad batch is applied nowhere."""
        uids = uid_strings(self.words[flat_positions(addresses, self.offsets)])
        begun = time.perf_counter()
        scores = values.tolist()
        if not all(map(math.isfinite, scores)) or not all(map(self.by_uid.__contains__, uids)):
            raise ValueError("a score is not finite, or a uid is unknown")
        keep_in_dict(self.by_uid, uids, scores, step)
        return time.perf_counter() - begun

    def to_arrays(self, addresses: np.ndarray, values: np.ndarray, step: int) -> float:
        """Seconds of one batch through `numpy.ufunc.at`, which needs no folding."""
        begun = time.perf_counter()
        positions = flat_positions(addresses, self.offsets)
        self.value[positions] = -np.inf  # every batch is of a later step than all before
        np.maximum.at(self.value, positions, values)
        np.maximum.at(self.last_step, positions, np.uint32(step))
        np.add.at(self.count, positions, np.uint16(1))
        return time.perf_counter() - begun


def keep_in_dict(by_uid: dict[str, list[Any]], uids: Sequence[str], values: Sequence[float], step: int) -> None:
    """What one would write first: value, count and last step in a list per uid."""
    for uid, value in zip(uids, values, strict=True):
        kept = by_uid[uid]
        if step > kept[2] or (step == kept[2] and value > kept[0]):
            kept[0], kept[2] = value, step
        kept[1] += 1


def race(samples: int, *, pairs: int, batches: int) -> dict[str, Any]:
    """The ledger against a dict, `numpy.ufunc.at` and one `ray.get` a sample, in interleaved pairs."""
    sides = Race(samples, batches=batches)
    for addresses in scattered(sides.shards, sides.rows):  # so that nobody touches a page for the first time
        sides.give_all(addresses, np.zeros(len(addresses), np.float32))
    agree(sides)
    figures: dict[str, Any] = {"samples": samples}
    with _ray_dict(sides) as to_actor:
        for name, rival in (
            ("dict", lambda: sides.run(sides.to_dict)),
            ("checked dict", lambda: sides.run(sides.to_checked_dict)),
            ("ufunc.at", lambda: sides.run(sides.to_arrays)),
            ("ray.get", to_actor),
        ):
            measured = interleaved(lambda: sides.run(sides.to_ledger), rival, pairs=pairs)
            ratio = paired_ratio(measured)
            ours, theirs = (statistics.median(side) for side in zip(*measured, strict=True))
            figures[name] = {**ratio._asdict(), "ours_per_s": ours, "rival_per_s": theirs}
            print(f"updates/s, {samples:,} samples, ledger / {name}: {ours:,.0f} / {theirs:,.0f} = {ratio}")
    ratio = figures["dict"]
    short = ratio["high"] < TARGET_RATIO
    figures["outcome"] = "short" if short else "met" if ratio["median"] >= TARGET_RATIO else "not told apart"
    print(f"target {TARGET_RATIO:.0f}x a dict: {figures['outcome']}")
    return {"race": figures}


def agree(sides: Race) -> None:
    """Gives all sides the same batches. RuntimeError if they do not keep the same figures."""
    for _ in range(2):
        addresses, values = random_batch(sides.rng, sides.shards, sides.rows)
        sides.give_all(addresses, values)
        read = sides.ledger.read("score", addresses)
        positions = flat_positions(addresses, sides.offsets)
        kept = [sides.by_uid[uid] for uid in uid_strings(sides.words[positions])]
        kept_by_ledger = [read[name] for name in ("ledger_value", "ledger_count", "last_step")]
        kept_by_arrays = [column[positions] for column in (sides.value, sides.count, sides.last_step)]
        for columns in (kept_by_ledger, kept_by_arrays):
            if not np.array_equal(np.column_stack([column.astype(np.float64) for column in columns]), np.array(kept)):
                raise RuntimeError("the sides of the race do not keep the same figures")


@contextmanager
def _ray_dict(sides: Race) -> Iterator[Callable[[], float]]:
    """A run of one `ray.get` a sample against an actor that holds a dict."""
    import ray  # not above: the processes whose memory is measured do not need it

    ours = not ray.is_initialized()
    if ours:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    words = sides.words[:RAY_CALLS]

    @ray.remote(num_cpus=0)
    class Holder:
        def __init__(self) -> None:
            self.by_uid = {uid: [0.0, 0, 0] for uid in uid_strings(words)}

        def update(self, uid: str, value: float, step: int) -> None:
            keep_in_dict(self.by_uid, [uid], [value], step)

    holder = cast(Any, Holder).remote()

    def run() -> float:
        uids = uid_strings(words)
        ray.get(holder.update.remote(uids[0], 0.0, 0))
        begun = time.perf_counter()
        for uid in uids:
            ray.get(holder.update.remote(uid, 1.0, 1))
        return len(uids) / (time.perf_counter() - begun)

    try:
        yield run
    finally:
        ray.kill(holder)
        if ours:
            ray.shutdown()


if __name__ == "__main__":
    task, statistic, *rest = sys.argv[1:]
    if task == "fill":
        result = _fill(cast(Statistic, statistic), int(rest[0]), int(rest[1]), int(rest[2]), rest[3])
    else:
        result = _load(cast(Statistic, statistic), int(rest[0]), int(rest[1]), Path(rest[2]))
    print(json.dumps(result))
