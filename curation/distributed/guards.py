"""What a selection leaves out before its own steps, each with its own name and count: lists, held-out parts, copies of
evaluation sets.

Whether an image is a copy is a column, made once for each evaluation set: its highest cosine with an image of the set,
by exact search in blocks, and whether the set has its very bytes. Both sets must be embedded by the same model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from curation.data import hash_lists, manifest, row_tests, storage, tables
from curation.data.mapped import mapped_arrays
from curation.data.pieces import Record
from curation.data.read_rules import ListKind
from curation.data.row_tests import InPart, NotCopied, NotListed, RowTest, Within
from curation.distributed import stored_columns
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.distributed.tasks import in_groups, ordered
from curation.numerics.neighbors import nearest_centroids
from curation.recipe import CurateRecipe
from curation.recipe.guards import REST, Decontaminate, Exclude, Holdout

HOLDOUTS = "holdouts.json"
"""In the output: every definition of parts that a selection here was made with."""
SETS = "evaluation_sets"
MODEL_FIELDS = ("embed.model", "embed.weights", "embed.cached")


def guards(recipe: CurateRecipe, samples: Mapping[int, Record], numbers: Sequence[int]) -> list[RowTest]:
    """The tests that every row must pass before the selection's own steps; what they read is made here.

    `samples` are the records of the sample tables, `numbers` the shards that the selection is of.
    ValueError if a list or a set cannot be read, parts overlap with those of an earlier selection of this output, or an
    evaluation set is embedded by another model.
    """
    tests = [_not_listed(recipe.output, exclude) for exclude in recipe.exclude]
    if recipe.holdout:
        _check_holdout(recipe.output, recipe.holdout)
        tests += in_parts(recipe.holdout)
    if recipe.decontaminate:
        tests += _no_copies(recipe.output, recipe.decontaminate, samples, numbers)
    return tests


def lists_at_read(recipe: CurateRecipe) -> Iterator[tuple[str, ListKind]]:
    """The lists that are applied while shards are read, made if they are not there: where they are, what they name."""
    for exclude in recipe.exclude:
        if exclude.at_read:
            yield hash_lists.build(recipe.output, hash_lists.listed(exclude.files), exclude.by), exclude.by


def digest_of_lists(lists: Sequence[tuple[str, ListKind]]) -> str | None:
    """64 hex digits that name the lists' entries, wherever they came from; None if there are no lists."""
    entries = sorted((kind, storage.sha256_of(url)) for url, kind in lists)
    return manifest.digest(entries) if entries else None


def _not_listed(output: str, exclude: Exclude) -> RowTest:
    url = hash_lists.build(output, hash_lists.listed(exclude.files), exclude.by)
    return NotListed(f"excluded: {exclude.name}", url, exclude.by)


def in_parts(holdout: Holdout) -> list[RowTest]:
    """The tests that a choice of parts comes down to."""
    chosen = holdout.parts if holdout.keep == REST else {holdout.keep: holdout.parts[holdout.keep]}
    how = {"seed": holdout.seed, "by": holdout.by}
    if holdout.keep == REST:
        return [InPart(f"held out: {name}", *where, **how, inside=False) for name, where in chosen.items()]
    return [InPart(f"not of the part {name}", *where, **how, inside=True) for name, where in chosen.items()]


def _check_holdout(output: str, holdout: Holdout) -> None:
    """ValueError if a part of an earlier selection shares samples with another part of this one; then note this one."""
    url = storage.join(output, HOLDOUTS)
    former = json.loads(storage.read_bytes(url)) if storage.exists(url) else []
    now = holdout.model_dump(mode="json", exclude={"keep"})
    for then in former:
        if (then["seed"], then["by"]) != (holdout.seed, holdout.by):
            raise ValueError(
                f"{url}: an earlier selection of this output held parts out by {then['by']} with seed {then['seed']}; "
                f"with {holdout.by} and seed {holdout.seed} its parts would overlap with these: choose another output"
            )
        row_tests.check_disjoint(holdout.parts, others={name: tuple(where) for name, where in then["parts"].items()})
    if now not in former:
        storage.write_bytes(url, json.dumps([*former, now], indent=1).encode())


def _no_copies(
    output: str, decontaminate: Decontaminate, samples: Mapping[int, Record], numbers: Sequence[int]
) -> list[RowTest]:
    tests: list[RowTest] = []
    for name, run in decontaminate.sets.items():
        maker = _copies_of(output, name, storage.absolute(run), samples, numbers)
        stored_columns.make(output, samples, numbers, maker)
        if decontaminate.exact:
            if not len(_opened_set(maker.folder)[1]):
                raise ValueError(
                    f"decontaminate.sets[{name!r}]: {run} has no sha256 of an image, by which exact copies are found: "
                    "set decontaminate.exact to false"
                )
            tests.append(NotCopied(f"copy in {name}", f"{maker.piece}.exact"))
        if decontaminate.near is not None:
            # The test is of the largest number below the threshold: "at least" is a copy.
            below = float(np.nextafter(decontaminate.near, -np.inf))
            label = f"near copy in {name} (cosine >= {decontaminate.near:g})"
            tests.append(Within(label, f"{maker.piece}.cosine", None, below, "keep"))
    return tests


@dataclass(frozen=True)
class Copies:
    """Columns PIECE.exact (1 if the set has an image of the same bytes) and PIECE.cosine (the highest with one)."""

    piece: str
    digest: str
    folder: str
    """Where the set's arrays lie."""
    needs = frozenset({"image_embedding", "sha256"})

    @property
    def made_by(self) -> dict[str, Any]:
        """The set's content."""
        return {"evaluation_set": self.digest}

    def make(self, table: pa.Table) -> dict[str, pa.Array]:
        """Exact and cosine of each row."""
        embeddings_MD, images_M = _opened_set(self.folder)
        has_sha = table["sha256"].is_valid().to_numpy()
        exact = np.zeros(table.num_rows, np.float32)
        entries = hash_lists.entries_of(table["sha256"].drop_null().to_pylist(), "sha256")
        exact[has_sha] = hash_lists.contains(images_M, entries)
        cosine = np.full(table.num_rows, -1.0, np.float32)
        if table.num_rows:
            rows_ND = tables.as_array(table["image_embedding"], name="image_embedding")
            cosine = highest_cosine(rows_ND, embeddings_MD)
        return {"exact": pa.array(exact), "cosine": pa.array(cosine)}


def highest_cosine(rows_ND: np.ndarray, others_MD: np.ndarray) -> np.ndarray:
    """Each row's highest cosine with one of the others, (n,) float32, by exact search in blocks."""
    rows, others = (F.normalize(torch.from_numpy(np.array(part, np.float32)), dim=1) for part in (rows_ND, others_MD))
    nearest_N = nearest_centroids(rows, others)
    return (rows * others[nearest_N]).sum(1).numpy()


@functools.lru_cache(maxsize=4)
def _opened_set(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (M, D) float16 and images' entries (M',) S16, mapped."""
    embeddings_MD, images_M = mapped_arrays(folder, ["image_embedding.npy", "sha256.npy"])
    return embeddings_MD, images_M


def _copies_of(output: str, name: str, run: str, samples: Mapping[int, Record], numbers: Sequence[int]) -> Copies:
    """The maker of a set's columns; its arrays are gathered from its run, once."""
    theirs = embedded_by(run, what=f"decontaminate.sets[{name!r}]", samples=samples, numbers=numbers)
    digest = manifest.digest([run, *[[number, theirs[number]["sha256"], theirs[number]["key"]] for number in theirs]])
    folder = storage.join(output, SETS, digest[:16])
    if not storage.exists(storage.join(folder, "sha256.npy")):
        _gather(run, sorted(theirs), folder)
    return Copies(f"contamination-{name}-{digest[:8]}", digest, folder)


def embedded_by(run: str, *, what: str, samples: Mapping[int, Record], numbers: Sequence[int]) -> Mapping[int, Record]:
    """The records of another run's sample tables. ValueError if there are none, or another model embedded them."""
    theirs = manifest.committed(run, EMBED_STAGE)
    if not theirs:
        raise ValueError(f"{what}: {run} is no run of jobs.curate that embedded anything")
    ours = [samples[number] for number in numbers[:1]]
    models = [
        {field: record["made_by"].get(field) for field in MODEL_FIELDS}
        for record in (*ours, *theirs.one_of_each_run().values())
    ]
    if any(model != models[0] for model in models):
        raise ValueError(
            f"{what} is embedded by {models[-1]}, this pool by {models[0]}: embeddings compare under one model only; "
            "curate it with this run's model"
        )
    return theirs


def _gather(run: str, numbers: Sequence[int], folder: str) -> None:
    """Write a set's arrays: an evaluation set fits in memory, 1 kB an image."""
    parts = list(ordered(_arrays_of, ((run, group) for group in in_groups(numbers))))
    embeddings, images = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(embeddings):
        raise ValueError(f"{run} holds no embedded image")
    for array_name, array in (("image_embedding.npy", embeddings), ("sha256.npy", np.unique(images))):
        with storage.write_atomic(storage.join(folder, array_name)) as out:
            np.save(out, array)


def _arrays_of(run: str, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (m, D) and images' entries (m',) of a group of shards; runs in a task."""
    columns = ["status", "sha256", "image_embedding"]
    table = pa.concat_tables(tables.read(run, number, columns) for number in numbers)
    table = table.filter(pc.field("status") == "ok")
    entries = hash_lists.entries_of(table["sha256"].drop_null().to_pylist(), "sha256")
    return tables.as_array(table["image_embedding"], name="image_embedding"), entries
