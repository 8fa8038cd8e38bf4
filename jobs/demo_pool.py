"""The demo pool: rendered image–caption pairs in img2dataset's layout, most of them junk, and the truth about each.

THE GENERATOR IS FROZEN, with `demo_scenes`: changing what it writes, in any way, invalidates every race that was
published on it. The bytes are the same for any number of workers, given the pinned versions of numpy and Pillow.

Shares of the pool; places are random, and mismatching is independent of the rest, so the two overlap:

    mismatched caption   60%    the caption of another sample
    exact duplicate       4%    the bytes of another sample (one whose caption matches), and its words if it matches
    near duplicate        4%    cropped, brightened or darkened, compressed again; in other words if it matches
    plain                 3%    a blank or a gradient instead of the scene
    chaotic               3%    noise, or a heap of random polygons, instead of the scene
    corrupt               1%    40% of a JPEG, an empty file, or a web page

Junk is what a perfect curator would not keep: a caption that does not match (a plain, chaotic or corrupt image matches
none), or a copy. That is 66% of the pool: 60%, and of the other 40% the 7% that show no scene and the 8% of copies.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import multiprocessing
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from jobs.demo_scenes import (
    COLOURS,
    Scene,
    describe,
    draw_scene,
    encode,
    jittered,
    paint,
    photograph,
    pick,
    render,
    stream_rng,
    texture_share,
)

GENERATOR_VERSION = 1

SHARES = {"exact_duplicate": 0.04, "near_duplicate": 0.04, "plain": 0.03, "chaotic": 0.03, "corrupt": 0.01}
MISMATCHED_SHARE = 0.60

TRUTH_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # the tar's file name
        ("uid", pa.string()),
        ("kind", pa.string()),  # "scene" or a name in SHARES
        ("caption_matches", pa.bool_()),
        ("junk", pa.bool_()),
        ("duplicate_of", pa.string()),  # key of the sample it copies, else null
        ("colour", pa.string()),  # of the first group in the image; null if it shows no scene
        ("shape", pa.string()),
    ]
)


class DemoPool(NamedTuple):
    """Where a pool is: its shards (a glob pattern) and its truth (a table of TRUTH_SCHEMA, in the pool's order)."""

    shards: str
    truth: Path


class _Plan(NamedTuple):
    """Which sample is of which kind; arrays by sample index."""

    kind: NDArray[np.str_]
    scene: NDArray[np.int64]  # the sample whose scene it shows; its own index unless it is a copy
    caption: NDArray[np.int64]  # the sample whose caption it bears; its own index unless mismatched


def make_pool(
    folder: Path,
    *,
    samples: int = 20_000,
    samples_per_shard: int = 1_000,
    seed: int = 0,
    workers: int = 2,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> DemoPool:
    """Write `folder`/shards/00000.tar, ... and `folder`/truth.parquet; a no-op if that was done before.

    `report(done, total)` is called after each shard. The folder appears under its name only when it is complete.
    ValueError if it exists and is anything but this pool.
    """
    if samples < 100 or not 1 <= samples_per_shard <= 10_000 or workers < 1:
        raise ValueError(
            "samples must be >= 100, samples_per_shard in [1, 10000] and workers >= 1, "
            f"got {samples}, {samples_per_shard} and {workers}"
        )
    pool = DemoPool(str(folder / "shards" / "*.tar"), folder / "truth.parquet")
    made_with = f"version {GENERATOR_VERSION}, {samples} samples, {samples_per_shard} per shard, seed {seed}"
    if folder.exists() and any(folder.iterdir()):
        metadata = (pq.read_schema(pool.truth).metadata or {}) if pool.truth.exists() else {}
        if metadata.get(b"made_with") != made_with.encode():
            found = metadata.get(b"made_with", b"something else").decode()
            raise ValueError(f"{folder} holds {found}, wanted an empty folder or a demo pool of {made_with}")
        return pool
    # What a killed run left under this name was made with the same arguments, so writing over it leaves nothing stale.
    partial = folder.with_name(f"{folder.name}.{hashlib.sha256(made_with.encode()).hexdigest()[:12]}.partial")
    (partial / "shards").mkdir(parents=True, exist_ok=True)
    num_shards = math.ceil(samples / samples_per_shard)
    write = functools.partial(
        _write_shard, folder=partial / "shards", samples=samples, samples_per_shard=samples_per_shard, seed=seed
    )
    tables: list[pa.Table] = []
    for table in _mapped(write, num_shards, workers=workers):
        tables.append(table)
        report(len(tables), num_shards)
    pq.write_table(
        pa.concat_tables(tables).replace_schema_metadata({"made_with": made_with}), partial / "truth.parquet"
    )
    partial.rename(folder)
    return pool


def _mapped(write: Callable[[int], pa.Table], num_shards: int, *, workers: int) -> Iterator[pa.Table]:
    """`write(shard)` of each shard, in order."""
    if workers == 1:
        yield from map(write, range(num_shards))
        return
    # spawn, not fork: the caller may already run Ray's and torch's threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield from executor.map(write, range(num_shards))


def _write_shard(shard: int, *, folder: Path, samples: int, samples_per_shard: int, seed: int) -> pa.Table:
    """One tar and its _stats.json, as img2dataset would; returns its rows of the truth."""
    plan, path = _draw_plan(samples, seed=seed), folder / f"{shard:05d}.tar"
    rows = []

    def key_of(index: int) -> str:
        return f"{index // samples_per_shard:05d}{index % samples_per_shard:04d}"

    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(shard * samples_per_shard, min(samples, (shard + 1) * samples_per_shard)):
            image, shown, size = _image(plan, index, seed=seed)
            caption = _own_caption(plan, int(plan.caption[index]), seed=seed)
            fields = {"uid": _uid(index, seed=seed), **_json_fields(image, caption, key=key_of(index), size=size)}
            members = {"jpg": image, "json": json.dumps(fields, indent=4).encode(), "txt": caption.encode()}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key_of(index)}.{extension}")
                member.size, member.mode, member.uname, member.gname = len(content), 0o444, "bigdata", "bigdata"
                tar.addfile(member, io.BytesIO(content))
            kind = str(plan.kind[index])
            is_copy, matches = kind.endswith("duplicate"), shown is not None and plan.caption[index] == index
            rows.append(
                {
                    "key": key_of(index),
                    "shard": path.name,
                    "uid": fields["uid"],
                    "kind": kind,
                    "caption_matches": bool(matches),
                    "junk": is_copy or not matches,
                    "duplicate_of": key_of(int(plan.scene[index])) if is_copy else None,
                    "colour": shown.groups[0].colour if shown else None,
                    "shape": shown.groups[0].shape if shown else None,
                }
            )
    stats = {"count": len(rows), "successes": len(rows), "failed_to_download": 0, "failed_to_resize": 0}
    path.with_name(f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))
    return pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA)


def _uid(index: int, *, seed: int) -> str:
    return hashlib.sha256(f"demo pool {seed} {index}".encode()).hexdigest()[:32]


def _json_fields(image: bytes, caption: str, *, key: str, size: tuple[int, int]) -> dict[str, object]:
    """What a downloader would have noted; nothing in it tells junk."""
    sha256 = hashlib.sha256(image + key.encode()).hexdigest()
    digits = int(sha256[:8], 16)
    return {
        "url": f"https://images{digits % 7}.example/{sha256[:12]}.jpg",
        "license": ("CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0", None)[digits % 4],
        "punsafe": (digits >> 8) % 1000 / 10_000,
        "pwatermark": None if digits % 11 == 0 else (digits >> 18) % 1000 / 1000,
        "caption": caption,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": size[0],
        "height": size[1],
        "original_width": size[0],
        "original_height": size[1],
        "exif": "{}",
        "sha256": hashlib.sha256(image).hexdigest(),
    }


def _draw_plan(samples: int, *, seed: int) -> _Plan:
    """Kinds and captions of the whole pool. Copies are of scenes with a matching caption, in any shard."""
    rng, indices = stream_rng("plan", seed, 0), np.arange(samples)
    kind, scene, caption = np.full(samples, "scene", dtype="<U16"), indices.copy(), indices.copy()
    order, start = rng.permutation(samples), 0
    for name, share in SHARES.items():
        kind[order[start : start + round(share * samples)]] = name
        start += round(share * samples)
    mismatched = rng.permutation(samples)[: round(MISMATCHED_SHARE * samples)]
    copies = np.flatnonzero(np.char.endswith(kind, "duplicate"))
    originals = np.setdiff1d(np.flatnonzero(kind == "scene"), mismatched)
    scene[copies] = rng.choice(originals, len(copies))
    while True:  # Seldom twice: a mismatched caption must not be that of a copy of the same scene.
        caption[mismatched] = np.roll(mismatched, 1)
        if (scene[caption[mismatched]] != scene[mismatched]).all():
            return _Plan(kind, scene, caption)
        rng.shuffle(mismatched)


def _own_caption(plan: _Plan, index: int, *, seed: int) -> str:
    """The caption that describes the scene of sample `index`; a near duplicate says it in its own words."""
    rng = stream_rng("pool", seed, int(plan.scene[index]))
    scene = draw_scene(rng)
    return describe(scene, stream_rng("damage", seed, index) if plan.kind[index] == "near_duplicate" else rng)


def _image(plan: _Plan, index: int, *, seed: int) -> tuple[bytes, Scene | None, tuple[int, int]]:
    """The image file of sample `index`, the scene it shows if it shows one, and its width and height."""
    rng, damage = stream_rng("pool", seed, int(plan.scene[index])), stream_rng("damage", seed, index)
    scene = draw_scene(rng)
    describe(scene, rng)
    image = render(scene, rng)
    whole = encode(image, rng)
    match str(plan.kind[index]):
        case "near_duplicate":
            near = _near_copy(whole, damage)
            return encode(near, damage), scene, near.size
        case "plain" | "chaotic" as kind:
            image = _plain(damage) if kind == "plain" else _chaotic(damage)
            return encode(image, damage), None, image.size
        case "corrupt":
            return _corrupt(whole, damage), None, image.size
        case _:
            return whole, scene, image.size


def _plain(rng: Generator) -> Image.Image:
    first, second = (jittered(pick(rng, tuple(COLOURS.values())), rng) for _ in range(2))
    side = 64 + int(rng.random() * 33)
    share = texture_share(pick(rng, ("", "gradient")), width=side, height=side, period=1, rng=rng)
    return photograph(paint(first, second, share), rng)


def _chaotic(rng: Generator) -> Image.Image:
    side, block = 64 + int(rng.random() * 33), 1 + int(rng.random() * 6)
    if rng.random() < 0.5:
        noise = rng.integers(0, 256, (side // block + 1, side // block + 1, 3), dtype=np.uint8)
        return Image.fromarray(np.ascontiguousarray(noise.repeat(block, 0).repeat(block, 1)[:side, :side]))
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        corners = [(side * (1.2 * rng.random() - 0.1), side * (1.2 * rng.random() - 0.1)) for _ in range(3)]
        draw.polygon(corners, fill=jittered(pick(rng, tuple(COLOURS.values())), rng))
    return photograph(np.asarray(image), rng)


def _near_copy(original: bytes, rng: Generator) -> Image.Image:
    """Cropped by up to 6% a side, brightened or darkened."""
    image = Image.open(io.BytesIO(original))
    width, height = image.size
    cuts = [0.06 * rng.random() for _ in range(4)]
    box = (int(cuts[0] * width), int(cuts[1] * height), int((1 - cuts[2]) * width), int((1 - cuts[3]) * height))
    brightened = np.asarray(image.crop(box), dtype=np.float32) * (0.8 + 0.4 * rng.random())
    return Image.fromarray(np.clip(brightened, 0, 255).astype(np.uint8))


def _corrupt(whole: bytes, rng: Generator) -> bytes:
    page = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head><body>Hotlinking denied</body></html>\n"
    return pick(rng, (whole[: len(whole) * 2 // 5], b"", page))
