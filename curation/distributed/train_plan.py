"""What a training recipe and the curated run it names come to; what cannot run is said here, before anything starts.

A cache that is missing or another model's, impossible sizes, an output that another recipe made: each is an error that
names the field, and the command that mends it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from curation.columns import FORMAT_VERSION, JSON_PREFIX, LEDGER_COLUMNS
from curation.data import manifest, offered, shard_list, storage, tables
from curation.data.offered import OfferedShard
from curation.data.shards import ReadRules
from curation.distributed import versions
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.models.clip import weights_digest
from curation.recipe import Pool, TrainRecipe
from curation.training.online_step import LEARNER_COLUMNS, REFERENCE_COLUMNS

MADE_HERE = frozenset(
    {"address", "uid", "ok", "logit_scale", "logit_bias", "reference_logit_scale", "reference_logit_bias", "round"}
    | {"reference_loss"}
    | LEARNER_COLUMNS
    | REFERENCE_COLUMNS
    | LEDGER_COLUMNS
)
"""Columns and run values that a training run has without reading them from the run's tables under their own name."""


@dataclass(frozen=True)
class TrainPlan:
    """What the recipe and the curated run come to."""

    shards: list[OfferedShard]
    rules: ReadRules
    columns: tuple[str, ...]
    reference_scale: float | None
    reference_bias: float | None
    identity: dict[str, Any]
    """All that decides what a step does; a run goes on only with the same."""


def resolved(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with URLs that every node may open. ValueError if it names no pool or no output, or one for both."""
    if not recipe.data.run:
        raise ValueError("data.run is empty: name the folder of a curated pool, as in --data.run runs/first")
    if not recipe.output:
        raise ValueError("output is empty: name a folder or URL for the run, as in --output DIR")
    run, output = storage.absolute(recipe.data.run), storage.absolute(recipe.output)
    if run == output:
        raise ValueError(f"output must not be data.run itself, got {output} for both")
    return recipe.model_copy(update={"output": output, "data": recipe.data.model_copy(update={"run": run})})


def checked(recipe: TrainRecipe) -> TrainPlan:
    """ValueError that says what is missing, and which command makes it."""
    run = recipe.data.run
    curate_command = f"python -m jobs.curate RECIPE --pool.shards 'PATTERN' --output {run}"
    if not storage.exists(storage.join(run, "recipe.json")):
        raise ValueError(f"data.run: {run} is no run of jobs.curate; make it with: {curate_command}")
    curated = manifest.read(storage.join(run, "recipe.json"))
    records = manifest.committed(run, EMBED_STAGE)
    known = [shard for shard in shard_list.load(run) if not shard.retired]
    if pending := [shard.url for shard in known if shard.number not in records]:
        raise ValueError(
            f"data.run: {len(pending)} of {len(known)} shards are not embedded yet, {pending[0]} first; "
            f"go on with: {curate_command}"
        )
    shards = offered.offered_shards(run, records)
    num_rows = sum(shard.offered for shard in shards)
    if recipe.train.super_batch > num_rows:
        raise ValueError(
            f"train.super_batch is {recipe.train.super_batch} (sub_batch {recipe.train.sub_batch}, filter_ratio "
            f"{recipe.train.filter_ratio}), but {run} offers {num_rows} rows"
        )
    columns = _columns(recipe, run, shards)
    scale, bias = _cached_reference(recipe, curated, records, shards)
    if recipe.data.truth is not None and not storage.exists(recipe.data.truth):
        raise ValueError(f"data.truth: no file {recipe.data.truth}")
    if recipe.evaluate.shards:
        storage.list_shards(recipe.evaluate.shards)
    learner = recipe.learner
    learner_digest = weights_digest(
        learner.model, pretrained=learner.pretrained, checkpoint=learner.checkpoint, seed=learner.seed
    )
    # What may change between two starts of one run: where it runs, how often it saves and measures.
    described = recipe.model_dump(
        mode="json", exclude={"name", "output", "compute", "checkpoint_every", "evaluate", "format_version"}
    )
    identity = {**_flat(described), "learner.weights": learner_digest}
    identity["data.embedded_by"] = curated["embedded_by"]["embed.weights"]
    rules = Pool.model_validate(curated["recipe"]["pool"]).read_rules()
    return TrainPlan(shards, rules, columns, scale, bias, identity)


def _columns(recipe: TrainRecipe, run: str, shards: list[OfferedShard]) -> tuple[str, ...]:
    """Columns of the run's tables that travel with the rows. ValueError if the method needs one that they lack."""
    needs = recipe.selector().needs
    available = set(tables.column_names(run, shards[0].number))
    stored = sorted(needs - MADE_HERE)
    missing = [name for name in stored if name not in available and not name.startswith(JSON_PREFIX)]
    if missing:
        raise ValueError(f"method {recipe.method['name']!r} needs the column {missing[0]!r}, which {run} lacks")
    # A method that needs no reference has its learnability noted all the same, at 2 kB a row beside an image of 50.
    cached = [] if recipe.reference.online else ["image_embedding", "text_embedding"]
    return (*stored, *cached)


def _cached_reference(
    recipe: TrainRecipe, curated: dict[str, Any], records: dict[int, dict], shards: list[OfferedShard]
) -> tuple[float | None, float | None]:
    """Logit scale and bias of the model that made the tables' embeddings. ValueError if another one is asked for."""
    if recipe.reference.online:
        return None, None
    made_by, weights = curated["embedded_by"], recipe.reference.weights
    if weights is not None:
        digest = weights_digest(
            weights.model, pretrained=weights.pretrained, checkpoint=weights.checkpoint, seed=weights.seed
        )
        if digest != made_by["embed.weights"]:
            wanted = weights.checkpoint or weights.pretrained or f"seed {weights.seed}"
            raise ValueError(
                f"reference.weights: the cache in {recipe.data.run} was made by another model ({made_by['embed.model']}"
                f"), not by {weights.model} ({wanted}). Make one of this model: python -m jobs.curate RECIPE "
                f"--pool.shards 'PATTERN' --embed.model {weights.model} ... --output OTHER"
            )
    record = records[shards[0].number]
    if "logit_scale" not in record:
        raise ValueError(f"data.run: {recipe.data.run} was made by an older version; curate it again to another output")
    return record["logit_scale"], record["logit_bias"]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    parts = [_flat(inner, f"{prefix}.{name}" if prefix else name) for name, inner in value.items()]
    return {name: inner for part in parts for name, inner in part.items()}


def commit_to(recipe: TrainRecipe, plan: TrainPlan) -> None:
    """Save what the run is before its first step, or check that it is still the same."""
    url = storage.join(recipe.output, "recipe.json")
    if storage.exists(url):
        saved = manifest.read(url)
        manifest.check_same(saved.get("identity", {}), plan.identity, what="a run")
        return
    offered.save(pool_url(recipe), plan.shards)
    whole = {
        "format_version": FORMAT_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "identity": plan.identity,
        "versions": versions.packages(),
        "code": versions.code(),
        "seeds": {"rounds_and_selection": recipe.seed, "random_weights": recipe.learner.seed},
    }
    storage.write_bytes(url, json.dumps(whole, indent=1).encode())


def pool_url(recipe: TrainRecipe) -> str:
    return storage.join(recipe.output, "train", "pool.parquet")
