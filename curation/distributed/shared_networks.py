"""Which networks a selection was made on, and whether it is measured with one of them, which flatters it.

A selection looks at columns. A network made a column if it embedded it, or what the column was made of: the CLIP score
and an aesthetic head are numbers of the embedding's network. Of a file of uids nothing is known, unless it lies in a
run's folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from curation.data import manifest, storage, tables
from curation.data.derived_columns import sources_of
from curation.distributed.arms import EVERYTHING, is_method, selector_of
from curation.models.frozen import frozen_digest
from curation.models.registry import weights_digest
from curation.recipe import Balance, CurateRecipe, Select, Step
from curation.recipe.curate import Embed
from curation.recipe.evaluate import Arm
from curation.recipe.parts import WeightsSource

EMBEDDED = frozenset({"image_embedding", "text_embedding", "clip_score"})
"""Columns of the sample tables that the run's own network made."""
SELECTION_FILE = re.compile(r"/selection/[^/]+\.(npy|parquet)$")


def shared_networks(run: str, arms: Sequence[Arm], *, selected_on: str, measured_by: frozenset[str]) -> list[str]:
    """Warnings of arms that were selected on what a network of `measured_by`, named as by `networks_of`, made."""
    by_columns: dict[tuple[str, ...], list[str]] = {}
    for arm in arms:
        looked_at = columns_behind(run, arm, selected_on=selected_on)
        if shared := sorted({column for of, column in looked_at if networks_behind(of, column) & measured_by}):
            by_columns.setdefault(tuple(shared), []).append(arm.name)
    return [
        f"{', '.join(names)}: selected on {', '.join(map(repr, columns))} and measured with the network that made it: "
        "that flatters what was selected on it"
        for columns, names in by_columns.items()
    ]


def columns_behind(run: str, arm: Arm, *, selected_on: str) -> list[tuple[str, str]]:
    """The columns that an arm was selected on, each with its run; none where that is not known."""
    if arm.source == EVERYTHING:
        return []
    if is_method(arm):
        return [(run, column) for column in selector_of(arm, selected_on).needs]
    selected = storage.absolute(SELECTION_FILE.sub("", arm.source))
    url = storage.join(selected, "recipe.json")
    if not storage.exists(url):
        return []
    steps = CurateRecipe.model_validate(manifest.read(url)["recipe"]).selection
    return [(selected, source) for step in steps for column in _columns_of(step) for source in sources_of(column)]


def networks_of(run: str, column: str) -> frozenset[str]:
    """Digests of the network that made a column of vectors, weights included; each kind of column has its own form."""
    if column in EMBEDDED:
        embed = Embed.model_validate(manifest.read(storage.join(run, "recipe.json"))["recipe"]["embed"])
        if embed.cached:
            return frozenset({embed.cached})
        source: WeightsSource = {"pretrained": embed.pretrained, "checkpoint": embed.checkpoint, "seed": embed.seed}
        return frozenset({frozen_digest("open_clip", embed.model, **source), weights_digest(embed.model, **source)})
    return frozenset(str(made_by["weights"]) for made_by in _origins(run, column) if "weights" in made_by)


def networks_behind(run: str, column: str) -> frozenset[str]:
    """The networks that made a column, or any column that it was made of."""
    found = networks_of(run, column)
    for source in {source for made_by in _origins(run, column) for source in _sources(made_by)}:
        found |= networks_behind(run, source)
    return found


def _origins(run: str, column: str) -> Iterator[dict[str, Any]]:
    """What made each shard's piece of a column that is beside the sample tables."""
    pieces = manifest.committed(run, tables.piece_stage(tables.piece_of(column)))
    return (record["made_by"] for record in pieces.values())


def _sources(made_by: dict[str, Any]) -> list[str]:
    """The columns that a piece was made of: by a head or a rater, as a percentile, by a trained model, as factors."""
    features = made_by.get("features") or []
    named = [made_by.get("column"), made_by.get("of"), *([features] if isinstance(features, str) else features)]
    return [name for name in named if name]


def _columns_of(step: Step) -> frozenset[str]:
    if isinstance(step, Select):
        return step.selector().needs
    return frozenset({step.balance if isinstance(step, Balance) else step.column})
