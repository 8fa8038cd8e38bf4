"""What the study of dynamic selection is shown on: frozen features, 64 principal components, factors of those.

    mobilenet   CIFAR-10, the first 10,000 training images under ImageNet's MobileNet; 2,000 test images
    resnet20    the same images under a ResNet-20 that was trained on CIFAR-10 itself, so it has seen their labels
    text        captions of the web, from Conceptual Captions or LAION's raw alt text: which of the two is the class;
                hashed words and letter triples, tf-idf

Components are fitted on the training rows. Factors are fitted for each seed, on the components, and never see a label.
"""

from __future__ import annotations

import io
import json
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from curation.evaluation.correlation import spearman
from curation.models.frozen import load_frozen
from curation.numerics.factors import Encoder, RankCounts, count_units, facts_of, rarity, representativeness
from curation.training.factor_encoders import EncoderKind, EncoderSettings, fit_encoder
from jobs.benchmarks.dynamic_runs import Pool
from jobs.benchmarks.mimic_runs import symmetric_noise
from jobs.benchmarks.mimic_sets import CIFAR10_TEST, CIFAR10_TRAIN, ImageSet, image_set
from jobs.benchmarks.tracks import real_data

ROWS, TEST_ROWS, COMPONENTS = 10_000, 2_000, 64
TINY_ROWS, TINY_TEST_ROWS = 800, 80
NOISE_SHARE = 0.2
RESNET20 = "weights/resnet20-12fca82f.th"
BUCKETS = 4096
ENCODERS: dict[str, EncoderKind] = {"factors": "sae", "kmeans": "kmeans", "pca": "pca", "random": "random"}
"""The piece of each encoder's ranks."""
ENCODER = EncoderSettings(units_per_feature=8, num_active=16, epochs=60, batch_size=1024, learning_rate=2e-3)


class Rows(NamedTuple):
    """A set: components of training and test rows, labels, and a person's label where there is one."""

    train_NF: np.ndarray
    train_labels: np.ndarray
    human_labels: np.ndarray
    test_NF: np.ndarray
    test_labels: np.ndarray


def rows_of(name: str, folder: Path, *, tiny: bool) -> Rows:
    """A set, from its file in `folder` or made now."""
    file = folder / f"{name}{'-tiny' if tiny else ''}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = projected(SETS[name](folder, tiny=tiny))
        partial_file = file.with_suffix(".part.npz")
        np.savez(partial_file, **made._asdict())
        partial_file.rename(file)
    with np.load(file, allow_pickle=False) as stored:
        return Rows(**{field: stored[field] for field in Rows._fields})


def pool_of(rows: Rows, noise: str, found: Found, *, seed: int) -> Pool:
    """The pool of a seed: labels with noise, and the seed's factors."""
    clean = torch.from_numpy(rows.train_labels)
    labels = clean
    if noise == "symmetric":
        rng = torch.Generator().manual_seed(1_000 + seed)
        labels = symmetric_noise(clean, share=NOISE_SHARE, num_classes=int(clean.max()) + 1, rng=rng)
    elif noise == "human":
        labels = torch.from_numpy(rows.human_labels)
    return Pool(
        features_NF=torch.from_numpy(rows.train_NF),
        labels_N=labels,
        is_wrong_N=(labels != clean).numpy(),
        factors=found.ranks,
        test_features=torch.from_numpy(rows.test_NF),
        test_labels=torch.from_numpy(rows.test_labels),
    )


class Found(NamedTuple):
    """Ranks of a set's rows by every encoder, and what there is to say of them."""

    ranks: dict[str, tuple[Tensor, Tensor]]
    report: dict[str, dict[str, Any]]


def factors_of(rows: Rows, file: Path, *, seed: int, tiny: bool) -> Found:
    """Ranks by the factors of every encoder, fitted on the training rows; from their file, or made now."""
    if not file.exists():
        arrays: dict[str, np.ndarray] = {}
        for piece, kind in ENCODERS.items():
            begun = time.process_time()
            ranks, told = _ranked(torch.from_numpy(rows.train_NF), _settings(kind, seed=seed, tiny=tiny))
            told["cpu_seconds"] = time.process_time() - begun
            arrays |= {piece: torch.stack(ranks).numpy(), f"{piece}.report": np.array(json.dumps(told))}
        partial_file = file.with_suffix(".part.npz")
        np.savez(partial_file, **arrays)  # pyright: ignore[reportArgumentType]
        partial_file.rename(file)
    with np.load(file, allow_pickle=False) as stored:
        ranks = {piece: torch.from_numpy(stored[piece]) for piece in ENCODERS}
        report = {piece: json.loads(str(stored[f"{piece}.report"])) for piece in ENCODERS}
    return Found({piece: (of[0], of[1]) for piece, of in ranks.items()}, report)


def factor_seconds(rows: Rows, *, seed: int, tiny: bool) -> float:
    """CPU seconds for the autoencoder's ranks, made once more."""
    begun = time.process_time()
    _ranked(torch.from_numpy(rows.train_NF), _settings("sae", seed=seed, tiny=tiny))
    return time.process_time() - begun


def _settings(kind: EncoderKind, *, seed: int, tiny: bool) -> EncoderSettings:
    settings = replace(ENCODER, kind=kind, seed=seed)
    return replace(settings, epochs=2, units_per_feature=2) if tiny else settings


def _ranked(rows_NF: Tensor, settings: EncoderSettings) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    mean_F = rows_NF.mean(dim=0)
    length = (rows_NF - mean_F).norm(dim=1).mean().item()
    width = rows_NF.shape[1]
    plain = Encoder(mean_F, 1 / length, torch.zeros(0, width), torch.zeros(0), settings.num_active)
    standard_NF = plain.standardised(rows_NF)
    fitted = fit_encoder(partial(_batches, standard_NF, settings.seed), settings, num_rows=len(rows_NF), width=width)
    active = plain._replace(weight_MD=fitted.weight_MD, bias_M=fitted.bias_M).active(rows_NF)
    facts = facts_of(count_units(active, len(fitted.weight_MD)), len(rows_NF))
    scores = representativeness(active, facts).numpy(), rarity(active, facts).numpy()
    first, second = (torch.from_numpy(RankCounts.of(score).ranks(score)) for score in scores)
    explained = None
    if fitted.decoder is not None:
        with torch.no_grad():
            left_over = standard_NF - fitted.decoder(standard_NF).rows_nD
        explained = 1 - (left_over.square().sum() / standard_NF.square().sum()).item()
    return (first, second), {
        "explained_variance": explained,
        "dead_share": facts.dead_share,
        "alive": int(facts.alive_M.sum()),
        "common": int(facts.common_M.sum()),
        "rank_correlation": spearman(first.numpy(), second.numpy()),
    }


def _batches(rows_NF: Tensor, seed: int, batch: int) -> Iterator[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    while True:
        whole = len(rows_NF) // batch * batch
        yield from rows_NF[torch.randperm(len(rows_NF), generator=rng)[:whole]].split(batch)


def projected(rows: Rows) -> Rows:
    """The rows' principal components, scaled to a mean length of sqrt(F)."""
    train_NF = torch.from_numpy(rows.train_NF.astype(np.float32))
    mean_F = train_NF.mean(dim=0)
    centred_NF = train_NF - mean_F
    values, vectors = torch.linalg.eigh((centred_NF.T @ centred_NF).double())
    basis_FP = vectors[:, values.argsort(descending=True)[:COMPONENTS]].float()
    scale = COMPONENTS**0.5 / (centred_NF @ basis_FP).norm(dim=1).mean()
    test_NF = torch.from_numpy(rows.test_NF.astype(np.float32)) - mean_F
    return Rows(
        (centred_NF @ basis_FP * scale).numpy(),
        rows.train_labels.astype(np.int64),
        rows.human_labels.astype(np.int64),
        (test_NF @ basis_FP * scale).numpy(),
        rows.test_labels.astype(np.int64),
    )


def _sizes(*, tiny: bool) -> tuple[int, int]:
    return (TINY_ROWS, TINY_TEST_ROWS) if tiny else (ROWS, TEST_ROWS)


def _mobilenet(folder: Path, *, tiny: bool) -> Rows:
    whole = image_set("cifar10", folder, tiny=False) if not tiny else _tiny_images()
    train, test = _sizes(tiny=tiny)
    is_train, is_test = np.flatnonzero(~whole.is_test_N)[:train], np.flatnonzero(whole.is_test_N)[:test]
    features, labels = whole.features_NF, whole.labels_N
    return Rows(features[is_train], labels[is_train], whole.human_N[is_train], features[is_test], labels[is_test])


def _tiny_images() -> ImageSet:
    """Random features in the place of MobileNet's, which take minutes; the labels are those of the images."""
    rng, rows = np.random.default_rng(0), TINY_ROWS + TINY_TEST_ROWS
    labels = rng.integers(0, 10, rows)
    centres = rng.normal(size=(10, 96))
    human = np.where(rng.random(rows) < 0.4, rng.integers(0, 10, rows), labels)
    features = (centres[labels] + rng.normal(size=(rows, 96))).astype(np.float16)
    return ImageSet(features, labels, human, np.arange(rows) >= TINY_ROWS)


def _resnet20(folder: Path, *, tiny: bool) -> Rows:
    network = load_frozen("cifar", "resnet20", checkpoint=str(real_data() / RESNET20))
    assert CIFAR10_TRAIN >= ROWS and CIFAR10_TEST >= TEST_ROWS
    parts: list[np.ndarray] = []
    for split, count in zip(("train", "test"), _sizes(tiny=tiny), strict=True):
        columns = ["image", "label", *(["noisy_worst"] if split == "train" else [])]
        table = pq.read_table(real_data() / "cifar" / f"cifar10-{split}-jpeg.parquet", columns=columns).slice(0, count)
        images = [network.resize(Image.open(io.BytesIO(image))) for image in table["image"].to_pylist()]
        parts.append(np.concatenate([network.embed(np.stack(images[at : at + 500])) for at in range(0, count, 500)]))
        parts += [table[name].to_numpy() for name in columns[1:]]
    return Rows(*parts)


def _text(folder: Path, *, tiny: bool) -> Rows:
    data = real_data() / "web-text"
    captions, labels = [], []
    for label, name in enumerate(("conceptual-captions-val", "laion-alt-text")):
        found = [text for text in pq.read_table(data / f"{name}.parquet")["caption"].to_pylist() if text]
        captions += found
        labels += [label] * len(found)
    train, test = _sizes(tiny=tiny)
    order = np.random.default_rng(0).permutation(len(captions))[: train + test]
    counts_NB = np.stack([_hashed(captions[place]) for place in order])
    in_rows = (counts_NB[:train] > 0).sum(axis=0)
    weighed_NB = np.log1p(counts_NB) * np.log((1 + train) / (1 + in_rows))
    weighed_NB /= np.linalg.norm(weighed_NB, axis=1, keepdims=True).clip(1e-9)
    chosen = np.array(labels)[order]
    none = np.full(train, -1)
    features = weighed_NB.astype(np.float32)
    return Rows(features[:train], chosen[:train], none, features[train:], chosen[train:])


def _hashed(caption: str) -> np.ndarray:
    """Counts (4096,) float32 of a caption's words and letter triples by their CRC."""
    text = f" {caption.lower()} "
    parts = Counter([*text.split(), *(text[at : at + 3] for at in range(len(text) - 2))])
    counts = np.zeros(BUCKETS, np.float32)
    for part, times in parts.items():
        counts[zlib.crc32(part.encode()) % BUCKETS] += times
    return counts


SETS = {"mobilenet": _mobilenet, "resnet20": _resnet20, "text": _text}
