"""The three parts of a pool that a rater is taught on, gathered once and kept in the run's folder.

A row is in a part by the hash of its content (sha256; the uid where there is none), so copies of one image are in one
part; of each part the rows with the lowest hash are taken, up to a limit, in that order. So the rows are the same for
any order and number of shards. Where another run's rows validate, one of them that is in the pool's parts too is an
error.

n rows, F features, G numbers that the proxy models, C numbers of its condition.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.columns import FORMAT_VERSION
from curation.data import manifest, shard_list, storage, tables
from curation.data.mapped import mapped_arrays
from curation.distributed.bucket_select import columns_of
from curation.distributed.diffusion_loop import save_array
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.distributed.tasks import in_groups, ordered
from curation.numerics.sampling import hash_uniform, hash_words
from curation.recipe.rater import RaterRecipe, Splits
from curation.training.rater_run import Split

PARTS = ("test", "validation", "train")
FOLDER = "rows"


class Sampled(NamedTuple):
    """Rows in the order of their hash: hashes (n,), content words (n, 2), addresses (n,), and the columns (n, ...)."""

    hashes: np.ndarray
    words: np.ndarray
    addresses: np.ndarray
    columns: list[np.ndarray]


def gather_rows(recipe: RaterRecipe) -> dict[str, int]:
    """Write the parts' arrays unless they are there; rows of each part.

    ValueError if a part is empty, or a validation run shares samples with the pool's parts.
    """
    counts = storage.join(recipe.output, FOLDER, "counts.json")
    if storage.exists(counts):
        return manifest.read(counts)["rows"]
    wanted = _columns(recipe)
    parts = _sampled(recipe.run, wanted, recipe.splits, with_validation=not recipe.splits.validation_run)
    if recipe.splits.validation_run:
        everything = recipe.splits.model_copy(update={"validation_share": 1.0, "test_share": 0.0})
        parts["validation"] = _sampled(recipe.splits.validation_run, wanted, everything, with_validation=True)[
            "validation"
        ]
    check_disjoint({name: part.words for name, part in parts.items()})
    for name, part in parts.items():
        if not len(part.hashes):
            raise ValueError(f"splits: the part {name} has no row")
        save_array(storage.join(recipe.output, FOLDER, f"{name}-addresses.npy"), part.addresses)
        for place, column in enumerate(part.columns):
            save_array(storage.join(recipe.output, FOLDER, f"{name}-{place}.npy"), column)
    rows = {name: len(part.hashes) for name, part in parts.items()}
    storage.write_bytes(counts, json.dumps({"format_version": FORMAT_VERSION, "rows": rows}).encode())
    return rows


def load_split(recipe: RaterRecipe, part: str) -> Split:
    """A part's arrays, mapped."""
    names = [f"{part}-{place}.npy" for place in range(len(_columns(recipe)))]
    arrays = dict(zip(_columns(recipe), mapped_arrays(storage.join(recipe.output, FOLDER), names), strict=True))
    return Split(
        seen=arrays[recipe.features],
        modelled=arrays[recipe.modelled or recipe.features],
        condition=None if recipe.condition is None else arrays[recipe.condition],
    )


def check_disjoint(words: dict[str, np.ndarray]) -> None:
    """ValueError if two parts, by the content words (n, 2) of their rows, share one."""
    names = sorted(words)
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            mine, theirs = ({tuple(row) for row in words[part].tolist()} for part in (name, other))
            if shared := len(mine & theirs):
                raise ValueError(
                    f"splits: {shared} samples are in {name} and in {other}, by their content's hash; training, "
                    "validation and test must share none"
                )


def part_of(words_N2: np.ndarray, splits: Splits) -> np.ndarray:
    """Which of PARTS each row is in, (n,) int64, by content words (n, 2) uint64."""
    where = hash_uniform(words_N2, splits.seed)
    return np.digitize(where, [splits.test_share, splits.test_share + splits.validation_share])


def _columns(recipe: RaterRecipe) -> list[str]:
    return list(dict.fromkeys(filter(None, [recipe.features, recipe.modelled, recipe.condition])))


def _sampled(run: str, columns: list[str], splits: Splits, *, with_validation: bool) -> dict[str, Sampled]:
    """The rows of each part; a pool's validation part goes to training when another run validates."""
    embedded = manifest.committed(run, EMBED_STAGE)
    numbers = [shard.number for shard in shard_list.load(run) if shard.number in embedded and not shard.retired]
    if not with_validation:
        splits = splits.model_copy(update={"validation_share": 0.0})
    inputs = ((run, group, columns, splits) for group in in_groups(numbers))
    parts: dict[str, Sampled] = {}
    for told in ordered(_parts_of, inputs):
        for name, part in told.items():
            parts[name] = part if name not in parts else _merged([parts[name], part], _limit(splits, name))
    return parts


def _limit(splits: Splits, part: str) -> int:
    return {"train": splits.max_train_rows, "validation": splits.max_validation_rows, "test": splits.max_test_rows}[
        part
    ]


def _merged(parts: Sequence[Sampled], limit: int) -> Sampled:
    hashes, words, addresses = (np.concatenate([part[place] for part in parts]) for place in range(3))
    order = np.lexsort((addresses, hashes))[:limit]
    columns = [np.concatenate(same) for same in zip(*(part.columns for part in parts), strict=True)]
    return Sampled(hashes[order], words[order], addresses[order], [column[order] for column in columns])


# What runs in a task.


def _parts_of(run: str, numbers: list[int], columns: list[str], splits: Splits) -> dict[str, Sampled]:
    found: dict[str, list[Sampled]] = {}
    for number in numbers:
        table = tables.read(run, number, list(dict.fromkeys(["status", "uid", "sha256", "address", *columns])))
        table = table.filter(pc.field("status") == "ok")
        for column in columns:
            table = table.filter(pc.field(column).is_valid())
        if not table.num_rows:
            continue
        words = columns_of(table, frozenset({"uid", "sha256"}))["sha256"].view(np.uint64)
        parts, hashes = part_of(words, splits), hash_words(words, splits.seed + 1)
        for place, name in enumerate(PARTS):
            here = np.flatnonzero(parts == place)
            some = table.take(pa.array(here))
            arrays = [tables.as_array(some[column], name=column) for column in columns] if len(here) else []
            if len(here):
                part = Sampled(hashes[here], words[here], some["address"].to_numpy(), arrays)
                found.setdefault(name, []).append(_merged([part], _limit(splits, name)))
    return {name: _merged(parts, _limit(splits, name)) for name, parts in found.items()}
