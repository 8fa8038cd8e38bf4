"""Pools whose junk is known, for studies of what a selection picks: features to select on, others to measure with.

    planted   points (`jobs.planted_pool`), 3% of them outliers and 5% near-duplicates
    cifar10   2,400 CIFAR-10 images a pool, near-duplicates of some, and images that are not of its kind
    flickr8k  1,200 photos a pool, likewise

Images are selected on MobileNet v1's features and measured with ResNet-20's, so that no rule is judged by the features
it saw. Pools of one track share no image. Outliers are drawn in equal shares from emoji, shop photos and blocks of
noise; near-duplicates are crops of up to 6% a side, brightened or darkened. What is in the folder is not made again.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from curation.models.frozen import Frozen, load_frozen
from jobs.benchmarks.real_data import RESNET20, TFLITE, real_data, tar_samples
from jobs.planted_pool import planted_pool

NUM_POOLS = 5
CLEAN, NEAR, OUTLIER = "clean", "near_duplicate", "outlier"


class Track(NamedTuple):
    """How large a pool is: clean images, near-duplicates and outliers that may be planted in it."""

    clean: int
    near: int
    outliers: int


TRACKS = {"cifar10": Track(2_400, 120, 282), "flickr8k": Track(1_200, 60, 141)}
TINY = {"cifar10": Track(120, 10, 30), "flickr8k": Track(120, 10, 30)}


class Part(NamedTuple):
    """n images of one kind: what rules see (n, F), what judges see (n, G), of which clean image it is a copy (n,)."""

    selection: np.ndarray
    metric: np.ndarray
    copy_of: np.ndarray


class StudyPool(NamedTuple):
    """N rows: unit features (N, F) to select on, others (N, G) to measure with, kinds (N,); of a near-duplicate the
    row that it copies, else -1 (N,)."""

    selection: np.ndarray
    metric: np.ndarray
    kind: np.ndarray
    copy_of: np.ndarray


def point_pool(seed: int) -> StudyPool:
    """The planted points; rules and judges see the same."""
    planted = planted_pool(seed=seed)
    copy_of = planted.copy_of.numpy()
    kind = np.where(planted.is_outlier.numpy(), OUTLIER, np.where(copy_of >= 0, NEAR, CLEAN))
    return StudyPool(planted.rows.numpy(), planted.rows.double().numpy(), kind, copy_of)


def image_pool(parts: dict[str, Part], *, outlier_share: float, near_share: float = 0.05, seed: int = 0) -> StudyPool:
    """A pool of all clean images, some of the near-duplicates, and outliers that make up `outlier_share` of it."""
    rng = np.random.default_rng(seed)
    clean = parts[CLEAN]
    num_near = round(near_share * len(clean.metric))
    num_outliers = round(outlier_share / (1 - outlier_share) * (len(clean.metric) + num_near))
    chosen = [clean]
    for name, wanted in ((NEAR, num_near), (OUTLIER, num_outliers)):
        if wanted > len(parts[name].metric):
            raise ValueError(f"{wanted} rows of kind {name} are wanted, the track has {len(parts[name].metric)}")
        rows = rng.permutation(len(parts[name].metric))[:wanted]
        chosen.append(Part(*(column[rows] for column in parts[name])))
    selection = np.concatenate([part.selection for part in chosen]).astype(np.float32)
    kind = np.repeat([CLEAN, NEAR, OUTLIER], [len(part.metric) for part in chosen])
    return StudyPool(
        selection / np.linalg.norm(selection, axis=1, keepdims=True),
        np.concatenate([part.metric for part in chosen]).astype(np.float64),
        kind,
        np.concatenate([part.copy_of for part in chosen]),
    )


def image_parts(track: str, number: int, folder: Path, *, tiny: bool = False) -> dict[str, Part]:
    """The three parts of one pool of a track, by kind; their features are kept in the folder."""
    size = (TINY if tiny else TRACKS)[track]
    made: dict[str, Callable[[], Iterator[tuple[Image.Image, int]]]] = {
        CLEAN: lambda: _clean(track, number, size),
        NEAR: lambda: _near(track, number, size),
        OUTLIER: lambda: _outliers(number, size),
    }
    return {kind: _featured(folder / track / f"{number}-{kind}.npz", images) for kind, images in made.items()}


def networks() -> tuple[Frozen, Frozen]:
    """The network whose features rules see, and the one whose features judges see."""
    data = real_data()
    return load_frozen("tflite", str(data / TFLITE)), load_frozen("cifar", "resnet20", checkpoint=str(data / RESNET20))


def _featured(path: Path, images: Callable[[], Iterator[tuple[Image.Image, int]]]) -> Part:
    if not path.exists():
        seen, judged = networks()
        rows = [(seen.embed(seen.resize(image)[None])[0], judged.resize(image), copy_of) for image, copy_of in images()]
        pixels = np.stack([row[1] for row in rows])
        metric = np.concatenate([judged.embed(pixels[at : at + 256]) for at in range(0, len(pixels), 256)])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, selection=np.stack([r[0] for r in rows]), metric=metric, copy_of=[r[2] for r in rows])
        os.replace(partial, path)
    held = np.load(path, allow_pickle=False)
    return Part(held["selection"], held["metric"], held["copy_of"])


def _clean(track: str, number: int, size: Track) -> Iterator[tuple[Image.Image, int]]:
    data, first = real_data(), number * size.clean
    if track == "cifar10":
        table = pq.read_table(data / "cifar" / "cifar10-train-jpeg.parquet", columns=["image"])
        encoded = table["image"].slice(first, size.clean).to_pylist()
    else:
        encoded = [image for image, _ in tar_samples(data / "flickr8k", limit=first + size.clean)][first:]
    for image in encoded:
        yield _opened(image), -1


def _near(track: str, number: int, size: Track) -> Iterator[tuple[Image.Image, int]]:
    rng = np.random.default_rng([1, number])
    originals = set(rng.choice(size.clean, size.near, replace=False).tolist())
    for place, (image, _) in enumerate(_clean(track, number, size)):
        if place in originals:
            width, height = image.size
            cut = 0.06 * rng.random(4)
            box = (cut[0] * width, cut[1] * height, (1 - cut[2]) * width, (1 - cut[3]) * height)
            cropped = np.asarray(image.resize(image.size, Image.Resampling.BICUBIC, box=box), np.float32)
            brightened = np.clip(cropped * rng.uniform(0.8, 1.2), 0, 255).astype(np.uint8)
            yield Image.fromarray(brightened), place


def _outliers(number: int, size: Track) -> Iterator[tuple[Image.Image, int]]:
    data, third = real_data(), size.outliers // 3
    for source in ("emoji-noto", "fashion"):
        for image in _foreign(data / source, first=number * third, stop=(number + 1) * third):
            yield _opened(image), -1
    rng = np.random.default_rng([2, number])
    for _ in range(size.outliers - 2 * third):
        block = int(rng.integers(1, 9))
        noise = rng.integers(0, 256, (-(-32 // block), -(-32 // block), 3), dtype=np.uint8)
        yield Image.fromarray(np.ascontiguousarray(noise.repeat(block, 0).repeat(block, 1)[:32, :32])), -1


def _foreign(folder: Path, *, first: int, stop: int) -> list[bytes]:
    return [image for image, _ in tar_samples(folder, limit=stop)][first:]


def _opened(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")
