"""Pools whose junk is known, for studies of what a selection picks: features to select on, others to measure with.

    planted   points (`jobs.planted_pool`), 3% of them outliers and 5% near-duplicates
    cifar10   2,400 CIFAR-10 images a pool, near-duplicates of some, and images that are not of its kind
    flickr8k  1,200 photos a pool, likewise

Images are selected on MobileNet v1's features and measured with ResNet-20's, so that no rule is judged by the features
it saw. Pools of one track share no image. Outliers are drawn in equal shares from emoji, shop photos and blocks of
noise; near-duplicates are crops of up to 6% a side, brightened or darkened. What is in the folder is not made again.

Captions are Flickr8k's; of CIFAR-10 "a photo of a CLASS" by CIFAR-10N's worst label, of which 40% are wrong; a copy has
its original's, emoji and shop photos their own titles, noise has none.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from curation.models.frozen import Frozen, load_frozen
from jobs.benchmarks.real_data import RESNET20, TFLITE, real_data, tar_samples
from jobs.benchmarks.straw_men import AESTHETIC, CLARITY, MATCH, match, measured
from jobs.benchmarks.tracks import CIFAR_CLASSES
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
    """n images of one kind: what rules see (n, F), what judges see (n, G), of which clean image it is a copy (n,),
    clarity and colourfulness (n, 2), captions (n,)."""

    selection: np.ndarray
    metric: np.ndarray
    copy_of: np.ndarray
    measured: np.ndarray
    captions: np.ndarray


class Planted(NamedTuple):
    """An RGB image, its caption, and of which clean image it is a copy, or -1."""

    image: Image.Image
    caption: str
    copy_of: int


class StudyPool(NamedTuple):
    """N rows: unit features (N, F) to select on, others (N, G) to measure with, kinds (N,); of a near-duplicate the
    row that it copies, else -1 (N,); captions (N,), and straw men by name, (N,) each: none of points."""

    selection: np.ndarray
    metric: np.ndarray
    kind: np.ndarray
    copy_of: np.ndarray
    captions: np.ndarray
    straw: dict[str, np.ndarray]


def point_pool(seed: int) -> StudyPool:
    """The planted points; rules and judges see the same."""
    planted = planted_pool(seed=seed)
    copy_of = planted.copy_of.numpy()
    kind = np.where(planted.is_outlier.numpy(), OUTLIER, np.where(copy_of >= 0, NEAR, CLEAN))
    no_captions = np.full(len(kind), "")
    return StudyPool(planted.rows.numpy(), planted.rows.double().numpy(), kind, copy_of, no_captions, {})


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
    whole = Part(*(np.concatenate(columns) for columns in zip(*chosen, strict=True)))
    kind = np.repeat([CLEAN, NEAR, OUTLIER], [len(part.metric) for part in chosen])
    straw: dict[str, np.ndarray] = dict(zip((CLARITY, AESTHETIC), whole.measured.T, strict=True))
    return StudyPool(
        _unit(whole.selection), whole.metric.astype(np.float64), kind, whole.copy_of, whole.captions, straw
    )


def matched(pool: StudyPool, others: Sequence[Part]) -> StudyPool:
    """The pool with one straw man more: how well its captions match, as the other pools' clean pairs teach it."""
    known = np.concatenate([_unit(part.selection) for part in others])
    captions = np.concatenate([part.captions for part in others]).tolist()
    found = match(pool.captions.tolist(), pool.selection, known_captions=captions, known_mF=known)
    return pool._replace(straw={**pool.straw, MATCH: found})


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def image_parts(track: str, number: int, folder: Path, *, tiny: bool = False) -> dict[str, Part]:
    """The three parts of one pool of a track, by kind; their features are kept in the folder."""
    size = (TINY if tiny else TRACKS)[track]
    made: dict[str, Callable[[], Iterator[Planted]]] = {
        CLEAN: lambda: _clean(track, number, size),
        NEAR: lambda: _near(track, number, size),
        OUTLIER: lambda: _outliers(number, size),
    }
    return {kind: _featured(folder / track / f"{number}-{kind}.npz", images) for kind, images in made.items()}


def networks() -> tuple[Frozen, Frozen]:
    """The network whose features rules see, and the one whose features judges see."""
    data = real_data()
    return load_frozen("tflite", str(data / TFLITE)), load_frozen("cifar", "resnet20", checkpoint=str(data / RESNET20))


def _featured(path: Path, images: Callable[[], Iterator[Planted]]) -> Part:
    if not path.exists():
        seen, judged = networks()
        planted = list(images())
        pixels = np.stack([judged.resize(one.image) for one in planted])
        part = Part(
            selection=np.stack([seen.embed(seen.resize(one.image)[None])[0] for one in planted]),
            metric=np.concatenate([judged.embed(pixels[at : at + 256]) for at in range(0, len(pixels), 256)]),
            copy_of=np.array([one.copy_of for one in planted]),
            measured=np.array([measured(one.image) for one in planted]),
            captions=np.array([one.caption for one in planted]),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **part._asdict())
        os.replace(partial, path)
    with np.load(path, allow_pickle=False) as held:
        return Part(**{name: held[name] for name in Part._fields})


def _clean(track: str, number: int, size: Track) -> Iterator[Planted]:
    data, first = real_data(), number * size.clean
    if track == "cifar10":
        table = pq.read_table(data / "cifar" / "cifar10-train-jpeg.parquet", columns=["image", "noisy_worst"])
        rows = table.slice(first, size.clean).to_pylist()
        pairs = [(row["image"], f"a photo of a {CIFAR_CLASSES[row['noisy_worst']]}.") for row in rows]
    else:
        samples = list(tar_samples(data / "flickr8k", limit=first + size.clean))[first:]
        pairs = [(image, fields["caption"]) for image, fields in samples]
    for image, caption in pairs:
        yield Planted(_opened(image), caption, -1)


def _near(track: str, number: int, size: Track) -> Iterator[Planted]:
    rng = np.random.default_rng([1, number])
    originals = set(rng.choice(size.clean, size.near, replace=False).tolist())
    for place, (image, caption, _) in enumerate(_clean(track, number, size)):
        if place in originals:
            width, height = image.size
            cut = 0.06 * rng.random(4)
            box = (cut[0] * width, cut[1] * height, (1 - cut[2]) * width, (1 - cut[3]) * height)
            cropped = np.asarray(image.resize(image.size, Image.Resampling.BICUBIC, box=box), np.float32)
            brightened = np.clip(cropped * rng.uniform(0.8, 1.2), 0, 255).astype(np.uint8)
            yield Planted(Image.fromarray(brightened), caption, place)


def _outliers(number: int, size: Track) -> Iterator[Planted]:
    data, third = real_data(), size.outliers // 3
    for source in ("emoji-noto", "fashion"):
        for image, fields in list(tar_samples(data / source, limit=(number + 1) * third))[number * third :]:
            yield Planted(_opened(image), fields["caption"], -1)
    rng = np.random.default_rng([2, number])
    for _ in range(size.outliers - 2 * third):
        block = int(rng.integers(1, 9))
        noise = rng.integers(0, 256, (-(-32 // block), -(-32 // block), 3), dtype=np.uint8)
        yield Planted(Image.fromarray(np.ascontiguousarray(noise.repeat(block, 0).repeat(block, 1)[:32, :32])), "", -1)


def _opened(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")
