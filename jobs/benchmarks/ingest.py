"""`python -m jobs.benchmark ingest`: our tar reader against webdataset's and `ray.data.read_webdataset`; damaged tars.

All read the same shards, in img2dataset's layout, from the page cache, and decode nothing. What is compared is the same
product: each sample's members as bytes, grouped by key, no hash taken. A second figure is of our samples as the engine
takes them: json parsed, uid, the image's hash and the shard's, three times the bytes through sha256.

Against webdataset, both in one thread, CPU time counts. Against Ray it is the wall time of one process of ours and of
all the processes of a Ray that has every core, warm, from the first read to the last row.

Then three damaged shards, decoded as well: what was begun, what came out, what was dropped and told, what was lost.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from curation.data.read_rules import ReadRules, split_name
from curation.data.samples import Sample
from curation.data.shards import ShardReader
from curation.data.storage import list_shards
from curation.data.tar import TarReader
from jobs.benchmarks.decode import QUALITY, jpegs
from jobs.benchmarks.pairs import interleaved, paired_ratio, provenance
from jobs.demo_scenes import make_pairs

TARGET_WEBDATASET, TARGET_RAY = 2.0, 4.0
SHARDS = 4
RULES = ReadRules()
MAX_PIXELS = 90_000_000


def benchmark(*, pairs: int, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark."""
    with tempfile.TemporaryDirectory(prefix="curation-bench-") as name:
        folder = Path(name)
        distinct = 16 if tiny else 128
        sizes = {
            "512 px": jpegs(distinct, QUALITY),
            "96 px": [p.image for p in make_pairs(distinct, stream="held_out")],
        }
        speed = {}
        for size, images in sizes.items():
            pattern = _write_pool(folder / size, images, samples=32 if tiny else 1_500)
            speed[size] = race(pattern, pairs=pairs, kilobytes=sum(map(len, images)) / len(images) / 1e3)
            _print_speed(size, speed[size])
        damaged = damages(folder / "damaged", images=sizes["96 px"])
    return {**provenance(), "benchmark": "ingest", "speed": speed, "damaged": damaged}


def race(pattern: str, *, pairs: int, kilobytes: float) -> dict[str, Any]:
    """Samples/s of ours against both rivals, in interleaved pairs."""
    urls = [shard.url for shard in list_shards(pattern)]
    seen: dict[str, list[float]] = {
        "members_cpu": [],
        "samples_cpu": [],
        "webdataset_cpu": [],
        "members": [],
        "ray": [],
    }

    def run(side: str, rate: Callable[[], float]) -> Callable[[], float]:
        def once() -> float:
            seen[side].append(rate())
            return seen[side][-1]

        return once

    ours = run("members_cpu", lambda: _rate(members(urls), time.process_time))
    rival = run("webdataset_cpu", lambda: _rate(webdataset_samples(urls), time.process_time))
    webdataset = paired_ratio(interleaved(ours, rival, pairs=pairs))
    ours_whole = run("samples_cpu", lambda: _rate(samples(urls), time.process_time))
    whole = paired_ratio([(ours_whole(), theirs) for theirs in seen["webdataset_cpu"]])
    wall = run("members", lambda: _rate(members(urls), time.perf_counter))
    of_ray = run("ray", lambda: _answer("rate", pattern)["rate"])
    ray_data = paired_ratio(interleaved(wall, of_ray, pairs=pairs))
    return {
        "mean_image_kilobytes": round(kilobytes, 1),
        "over_webdataset": _with_outcome(webdataset, TARGET_WEBDATASET),
        "over_ray": _with_outcome(ray_data, TARGET_RAY),
        "samples_over_webdataset": whole._asdict(),
        "samples_per_second": seen,
    }


def _with_outcome(ratio: Any, target: float) -> dict[str, Any]:
    outcome = "met" if ratio.median >= target else "not told apart" if ratio.high >= target else "short"
    return {**ratio._asdict(), "target": target, "outcome": outcome}


def _rate(samples: Iterator[Any], clock: Callable[[], float]) -> float:
    begun = clock()
    n = sum(1 for _ in samples)
    return n / (clock() - begun)


def members(urls: list[str]) -> Iterator[dict[str, Any]]:
    """What the rivals give: a sample's members by extension, and its key."""
    for url in urls:
        with open(url, "rb") as raw:
            named = (
                (split_name(member.name), member) for member in TarReader(raw, max_bytes=RULES.max_bytes, hashed=False)
            )
            parts = ((name, member) for name, member in named if name is not None)
            for key, group in groupby(parts, key=lambda part: part[0][0]):
                yield {"__key__": key, **{name[1]: member.data for name, member in group}}


def samples(urls: list[str]) -> Iterator[Sample]:
    """What the engine takes."""
    for url in urls:
        with open(url, "rb") as raw:
            yield from ShardReader(raw, url=url, rules=RULES)


def webdataset_samples(urls: list[str]) -> Iterator[dict[str, Any]]:
    """A sample's members by extension, its key, and where it is from."""
    import webdataset as wds

    return iter(cast(Any, wds).WebDataset(urls, shardshuffle=False))


def _write_pool(folder: Path, images: list[bytes], *, samples: int) -> str:
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        chosen = [images[(shard + row) % len(images)] for row in range(samples)]
        (folder / f"{shard:05d}.tar").write_bytes(tar_of(chosen))
    return str(folder)


def tar_of(images: list[bytes]) -> bytes:
    """A shard as img2dataset writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for row, image in enumerate(images):
            fields = {
                "caption": f"picture {row}",
                "url": f"https://example.org/{row}",
                "key": f"{row:09d}",
                "width": 512,
            }
            members = {"jpg": image, "json": json.dumps(fields).encode(), "txt": fields["caption"].encode()}
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{row:09d}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return out.getvalue()


def _print_speed(size: str, figures: dict[str, Any]) -> None:
    medians = {side: statistics.median(rates) for side, rates in figures["samples_per_second"].items()}

    def line(name: str, ratio: dict[str, Any], ours: str, theirs: str) -> None:
        target = f"target {ratio['target']:g}: {ratio['outcome']}" if "target" in ratio else "no target"
        print(f"  {name}: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] ({target});", end=" ")
        print(f"{medians[ours]:,.0f} against {medians[theirs]:,.0f} samples/s")

    print(f"reading tars, images of {size}, {figures['mean_image_kilobytes']:.0f} kB:")
    line("members, ours / webdataset", figures["over_webdataset"], "members_cpu", "webdataset_cpu")
    line("members, ours / ray.data.read_webdataset", figures["over_ray"], "members", "ray")
    line(
        "with uid, json and hashes, ours / webdataset",
        figures["samples_over_webdataset"],
        "samples_cpu",
        "webdataset_cpu",
    )


ROWS = 200


def damages(folder: Path, *, images: list[bytes]) -> dict[str, Any]:
    """What each reader makes of three damaged shards of ROWS samples; ours must account for all that was begun."""
    folder.mkdir()
    rows = [images[row % len(images)] for row in range(ROWS)]
    broken = [b"<html>404</html>" if row % 20 == 3 else image[: len(image) // 2] if row % 20 == 9 else image
              for row, image in enumerate(rows)]  # fmt: skip
    whole = bytearray(tar_of(rows))
    at = whole.index(b"000000100.jpg")
    header = bytes(whole[:at]) + b"\xff" * 100 + bytes(whole[at + 100 :])
    cut = bytes(whole[: whole.index(b"000000150.jpg") + 700])
    shards = {
        "10% broken images": (tar_of(broken), ROWS),
        "one damaged header": (header, ROWS),
        "cut inside sample 150": (cut, 151),
    }
    told = {}
    for name, (data, begun) in shards.items():
        url = str(folder / f"{name.replace(' ', '-').replace('%', '')}.tar")
        Path(url).write_bytes(data)
        told[name] = {"begun": begun, **{side: reader(url) for side, reader in READERS.items()}}
        ours = told[name]["ours"]
        if ours["out"] + sum(ours["dropped"].values()) != begun:
            raise RuntimeError(f"{name}: {begun} samples were begun, ours accounts for {ours}")
        print(f"{name}: {begun} samples begun")
        for side in READERS:
            print(f"  {side}: {_verdict(told[name][side], begun)}")
    return told


def _verdict(result: dict[str, Any], begun: int) -> str:
    dropped = result.get("dropped", {})
    lost = begun - result["out"] - sum(dropped.values())
    told = f"dropped {dropped}" if dropped else f"ended with {result['error']}" if result["error"] else "no error"
    return f"{result['out']} out, {told}, {lost} without a trace" if lost else f"{result['out']} out, {told}"


def _decoded_by_us(url: str) -> dict[str, Any]:
    from curation.data.images import ImageError, open_image

    out, dropped = 0, Counter[str]()
    for sample in samples([url]):
        reason = sample.reason
        if reason is None and sample.image is not None:
            try:
                open_image(sample.image, max_pixels=MAX_PIXELS)
            except ImageError as error:
                reason = error.reason
        out += reason is None
        dropped.update([reason] if reason else [])
    return {"out": out, "dropped": dict(dropped), "error": None}


def _decoded_by_webdataset(url: str, *, goes_on: bool) -> dict[str, Any]:
    import webdataset as wds

    handler = cast(Any, wds).warn_and_continue if goes_on else cast(Any, wds).reraise_exception
    out, error = 0, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            source = (
                cast(Any, wds).WebDataset([url], shardshuffle=False, handler=handler).decode("pil", handler=handler)
            )
            for sample in source:
                out += "jpg" in sample and "txt" in sample
        except Exception as stopped:  # whatever it is, it is what a user of it would see
            error = type(stopped).__name__
    return {"out": out, "error": error}


READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "ours": _decoded_by_us,
    "webdataset": lambda url: _decoded_by_webdataset(url, goes_on=False),
    "webdataset, warn_and_continue": lambda url: _decoded_by_webdataset(url, goes_on=True),
    "ray.data.read_webdataset": lambda url: _answer("decode", url),
}


def _answer(what: str, pattern: str) -> dict[str, Any]:
    """The Ray side, in a process of its own, so that no Ray stays behind."""
    command = [sys.executable, "-m", "jobs.benchmarks.ingest", what, pattern]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(what: str, pattern: str) -> None:
    """The Ray side of a run, told as JSON."""
    import os

    import ray.data

    from curation.distributed.resources import cluster

    urls = [shard.url for shard in list_shards(pattern)]
    with cluster(num_cpus=len(os.sched_getaffinity(0))):
        ray.data.range(8).map_batches(lambda rows: rows).materialize()  # workers and imports, before the clock runs
        if what == "rate":
            rows = ray.data.read_webdataset(urls, decoder=None, override_num_blocks=len(urls)).iter_batches(
                batch_size=256
            )
            begun = time.perf_counter()
            n = sum(len(batch["__key__"]) for batch in rows)
            print(json.dumps({"rate": n / (time.perf_counter() - begun)}))
            return
        out, error = 0, None
        try:
            for batch in ray.data.read_webdataset(urls, override_num_blocks=1).iter_batches(batch_size=16):
                out += len(batch["__key__"])
        except Exception as stopped:
            error = type(stopped).__name__
        print(json.dumps({"out": out, "error": error}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
