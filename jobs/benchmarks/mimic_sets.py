"""The image sets that Grad-Mimic is shown on: frozen MobileNet features and clean labels, made once and kept as .npz.

Six sets are asked for, as its paper has six. Four can be made from the data at hand; of the paper's own, torchvision
finds none more on the disk, and nothing is downloaded.

    cifar10    13,000 training images with CIFAR-10N's worst human label beside the true one, 2,000 test images
    cifar100   the 2,033 images of CIFAR-100 that are there, by their 20 coarse classes; human labels exist for the fine
    fashion    shop photos by article type, those of at least 40 photos, known copies left out
    emoji      emoji by the one keyword of thirteen that they bear
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from curation.models.frozen import load_frozen
from jobs.benchmarks.tracks import TFLITE, real_data, tar_samples

MIN_PHOTOS = 40
EMOJI_CLASSES = ("face", "animal", "food", "vehicle", "sports", "blue-square", "plant", "weather", "clothing", "couple")
EMOJI_CLASSES += ("hand", "woman", "man")
EVERY = 10**9
CIFAR10_TRAIN, CIFAR10_TEST = 13_000, 2_000
NOT_SHOWN = {"two more that torchvision loads": "data or weights not available"}


class ImageSet(NamedTuple):
    """Features of frozen MobileNet and labels; `is_test` where the set has a test split of its own."""

    features_NF: np.ndarray
    labels_N: np.ndarray
    human_N: np.ndarray
    """A person's label; -1 where there is none."""
    is_test_N: np.ndarray

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.labels_N.max()) + 1


class Labelled(NamedTuple):
    """One image of a set."""

    image: bytes
    label: str | int
    human: int = -1
    is_test: bool = False


def image_set(name: str, folder: Path, *, tiny: bool) -> ImageSet:
    """A set, from its file in `folder` or made now."""
    file = folder / f"{name}{'-tiny' if tiny else ''}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row, _ in zip(SETS[name](), range(120 if tiny else EVERY), strict=False)]
        frozen = load_frozen("tflite", str(real_data() / TFLITE))
        features = [frozen.embed(frozen.resize(Image.open(io.BytesIO(row.image)))[None])[0] for row in rows]
        names = sorted({row.label for row in rows}, key=lambda label: (isinstance(label, str), label))
        partial = file.with_suffix(".part.npz")
        np.savez(
            partial,
            features_NF=np.stack(features).astype(np.float16),
            labels_N=np.array([names.index(row.label) for row in rows]),
            human_N=np.array([row.human for row in rows]),
            is_test_N=np.array([row.is_test for row in rows]),
        )
        partial.rename(file)
    with np.load(file, allow_pickle=False) as stored:
        return ImageSet(**{field: stored[field] for field in ImageSet._fields})


def _cifar10() -> Iterator[Labelled]:
    for split, count in (("train", CIFAR10_TRAIN), ("test", CIFAR10_TEST)):
        columns = ["image", "label", *(["noisy_worst"] if split == "train" else [])]
        rows = pq.read_table(real_data() / "cifar" / f"cifar10-{split}-jpeg.parquet", columns=columns)
        for row in rows.slice(0, count).to_pylist():
            yield Labelled(row["image"], row["label"], row.get("noisy_worst", -1), split == "test")


def _cifar100() -> Iterator[Labelled]:
    for row in pq.read_table(real_data() / "cifar" / "cifar100-lossless-part.parquet").to_pylist():
        yield Labelled(row["image"], row["coarse_label"])


def _fashion() -> Iterator[Labelled]:
    folder = real_data() / "fashion"
    with open(folder / "known_duplicates.csv", newline="") as file:
        groups = list(csv.DictReader(file))
    first = {row["group"]: row["key"] for row in reversed(groups)}
    copies = {row["key"] for row in groups} - set(first.values())
    photos = [
        (image, fields["articleType"])
        for image, fields in tar_samples(folder, limit=EVERY)
        if fields["key"] not in copies
    ]
    counts = Counter(kind for _, kind in photos)
    for image, kind in photos:
        if counts[kind] >= MIN_PHOTOS:
            yield Labelled(image, kind)


def _emoji() -> Iterator[Labelled]:
    for image, fields in tar_samples(real_data() / "emoji-noto", limit=EVERY):
        keywords = fields["keywords"]
        named = set(EMOJI_CLASSES) & set(json.loads(keywords) if isinstance(keywords, str) else keywords)
        if len(named) == 1:
            yield Labelled(image, named.pop())


SETS: dict[str, Callable[[], Iterator[Labelled]]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "fashion": _fashion,
    "emoji": _emoji,
}
