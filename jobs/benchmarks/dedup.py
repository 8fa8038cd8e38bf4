"""`python -m jobs.benchmark dedup`: the true copies that exact and perceptual dedup find, and what else they remove.

On the real sets with `known_duplicates.csv` (copies of the same source file) and on the demo pool, whose generator
knows which sample is a copy of which. Counted are rows that fall: a row is rightly removed if a copy of it stays, and
should have been removed if a copy of it stays beside it. Radii are Hamming distances of 64-bit hashes; RADIUS was fixed
before anything was measured. A run of `jobs.demo` in `--folder` adds dedup by its embeddings.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Generator, Tensor

from curation.data import storage, tables
from curation.data.images import ImageError, pixels
from curation.data.open_shard import open_shard
from curation.data.read_rules import ReadRules
from curation.methods.exact_duplicates import ExactDuplicates
from curation.methods.semantic_dedup import SemanticDedup
from curation.models.perceptual_hash import cosine_within, grey_square, perceptual_hashes
from curation.numerics.sampling import uid_words
from curation.selector import Rows
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.tracks import real_data
from jobs.demo_pool import make_pool

RADIUS = 4
RADII = (0, 2, 4, 6, 8, 10)
COSINES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
REAL = ("flickr8k", "fashion", "vietnamese", "emoji-noto")
MAX_PIXELS = 90_000_000


class Pool(NamedTuple):
    """Images of a pool as a dedup sees them, and the truth: rows of an equal group are copies of one another."""

    rows: Rows
    group: np.ndarray


class Outcome(NamedTuple):
    """What a dedup removed, held against the truth."""

    removed: int
    rightly: int
    should: int

    @property
    def precision(self) -> float | None:
        """Share of the removed rows of which a copy stays; None if none was removed."""
        return self.rightly / self.removed if self.removed else None

    @property
    def recall(self) -> float | None:
        """Share of the redundant rows that were removed; None if there is none."""
        return self.rightly / self.should if self.should else None


def outcome(group: np.ndarray, stays: np.ndarray) -> Outcome:
    """Count what fell: `group` (n,) says what is a copy of what, `stays` are the places of the rows that were kept."""
    removed = np.ones(len(group), bool)
    removed[stays] = False
    rightly = removed & np.isin(group, group[~removed])
    return Outcome(int(removed.sum()), int(rightly.sum()), len(group) - len(np.unique(group)))


def benchmark(*, tiny: bool, folder: Path) -> dict[str, Any]:
    """All figures of this study."""
    figures: dict[str, Any] = {**provenance(), "benchmark": "dedup", "radius": RADIUS}
    names = REAL[2:3] if tiny else REAL
    pools = {name: (_shards(real_data() / name), _known_groups(real_data() / name)) for name in names}
    demo = make_pool(folder / "pool", samples=300 if tiny else 20_000, samples_per_shard=100 if tiny else 1000)
    pools["demo"] = (_shards(Path(demo.shards).parent), _demo_groups(demo.truth))
    for name, (shards, groups) in pools.items():
        figures[name] = _measured(name, _read(shards, groups))
    if (folder / "run" / "recipe.json").exists():
        figures["demo embeddings"] = _by_embedding(str(folder / "run"), pools["demo"][1])
    return figures


def _measured(name: str, pool: Pool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "rows": len(pool.group),
        "exact": _told(name, "exact", pool, ExactDuplicates(prefer="worth")),
    }
    for radius in RADII:
        # Half a bit of slack: float16 holds 1/8 exactly, but a sum of 64 products may be rounded.
        selector = SemanticDedup(min_cosine=cosine_within(radius) - 1 / 64, prefer="worth", column="hash")
        told[f"phash {radius}"] = _told(name, f"phash <= {radius}", pool, selector)
    return told


def _by_embedding(run: str, groups: dict[str, str]) -> dict[str, Any]:
    """Semantic dedup of the demo's run, on the embeddings of its trained reference."""
    numbers = range(len(storage.names_in(storage.join(run, tables.FOLDER))))
    table = tables.read_unified(run, numbers, ["key", "uid", "status", "image_embedding"])
    table = table.filter(np.array(table["status"]) == "ok")
    keys = [str(key) for key in table["key"].to_pylist()]
    vectors = torch.from_numpy(tables.as_array(table["image_embedding"], name="image_embedding").astype(np.float32))
    pool = Pool(_rows(table["uid"].to_pylist(), image_embedding=vectors), _numbered([groups.get(k, k) for k in keys]))
    return {
        f"cosine {cosine}": _told("demo", f"cosine >= {cosine}", pool, SemanticDedup(min_cosine=cosine))
        for cosine in COSINES
    }


def _told(pool_name: str, name: str, pool: Pool, selector: ExactDuplicates | SemanticDedup) -> dict[str, Any]:
    stays = selector.select(pool.rows, None, 0.0, Generator()).indices.numpy()
    found = outcome(pool.group, stays)
    shown = [f"{share:7.1%}" if share is not None else "      -" for share in (found.precision, found.recall)]
    print(
        f"{pool_name:<12} {name:<16} removed {found.removed:>6,}  precision {shown[0]}  recall {shown[1]}", flush=True
    )
    return {**found._asdict(), "precision": found.precision, "recall": found.recall}


def _read(shards: Sequence[str], groups: dict[str, str]) -> Pool:
    """The images of the shards that decode: their sha256, their hash, and the group that the truth puts them in."""
    uids, keys, words, greys = [], [], [], []
    for key, uid, sha256, grey in _decoded(shards):
        uids.append(uid)
        keys.append(groups.get(key, key))
        words.append(sha256[:32])
        greys.append(grey)
    hashes = torch.from_numpy(perceptual_hashes(np.stack(greys)))
    sha256 = torch.from_numpy(uid_words(words).view(np.int64))
    return Pool(_rows(uids, sha256=sha256, hash=hashes), _numbered(keys))


def _decoded(shards: Sequence[str]) -> Iterator[tuple[str, str, str, np.ndarray]]:
    for url in shards:
        with open_shard(url, ReadRules()) as reader:
            for sample in reader:
                if sample.image is None or sample.sha256 is None:
                    continue
                try:
                    grey = pixels(sample.image, max_pixels=MAX_PIXELS, resize=grey_square).pixels
                except ImageError:
                    continue
                yield sample.key, sample.uid, sample.sha256, grey


def _rows(uids: list[str], **columns: Tensor) -> Rows:
    uid = torch.from_numpy(uid_words(uids).view(np.int64))
    # Nothing is known of the samples' worth, so all are preferred alike and the hash of the uid decides.
    return {"uid": uid, "worth": torch.zeros(len(uids)), **columns}


def _numbered(names: Sequence[str]) -> np.ndarray:
    return np.unique(np.array(names), return_inverse=True)[1]


def _shards(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def _known_groups(folder: Path) -> dict[str, str]:
    """Key -> name of its group, of the samples that have a copy."""
    with open(folder / "known_duplicates.csv", newline="") as file:
        return {row["key"]: f"group {row['group']}" for row in csv.DictReader(file)}


def _demo_groups(truth: Path) -> dict[str, str]:
    """Key -> key of the sample that it is a copy of, exact or near; a group is named after its original."""
    table = pq.read_table(truth, columns=["key", "duplicate_of"])
    pairs = zip(table["key"].to_pylist(), table["duplicate_of"].to_pylist(), strict=True)
    return {key: original for key, original in pairs if original is not None}
