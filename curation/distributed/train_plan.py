"""What a training recipe and the curated run it names come to; what cannot run is said here, before anything starts.

A cache that is missing or another model's, impossible sizes, an output that another recipe made: each is an error that
names the field, and the command that mends it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from curation.columns import FORMAT_VERSION, JSON_PREFIX, LEDGER_COLUMNS, RUN_VALUES
from curation.data import manifest, offered, open_shard, shard_list, storage, tables
from curation.data.offered import OfferedShard
from curation.data.read_rules import ReadRules
from curation.data.redact import redacted_json
from curation.distributed import versions
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.models.classifier import is_on_features
from curation.models.registry import check_resolution, weights_digest
from curation.recipe import Pool, TrainRecipe
from curation.training.learner import LEARNER_COLUMNS, REFERENCE_COLUMNS

MADE_HERE = frozenset(
    {"address", "uid", "ok", "label", "reference_loss", "mimic_score"}
    | RUN_VALUES
    | LEARNER_COLUMNS
    | REFERENCE_COLUMNS
    | LEDGER_COLUMNS
)
"""Columns and run values that a training run has without reading them from the run's tables under their own name."""


@dataclass(frozen=True)
class TrainPlan:
    """What the recipe and the curated run come to."""

    shards: list[OfferedShard]
    absent: list[str]
    """URLs of shards that had left the pool when the run began, and could not be read without: they offer nothing."""
    rules: ReadRules
    columns: tuple[tuple[str, str], ...]
    """Columns of the run's tables that travel with the rows: each one's name there, and in the rows."""
    num_features: int | None
    classes: tuple[str, ...]
    """The labels, in order of the learner's classes; none if it learns pairs."""
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
    truth = storage.absolute(recipe.data.truth) if recipe.data.truth else None
    held_out = recipe.evaluate.model_copy(
        update={
            "shards": storage.absolute_patterns(recipe.evaluate.shards),
            "run": storage.absolute(recipe.evaluate.run) if recipe.evaluate.run else "",
        }
    )
    data = recipe.data.model_copy(update={"run": run, "truth": truth})
    compared = recipe.comparison.run
    comparison = recipe.comparison.model_copy(update={"run": storage.absolute(compared) if compared else ""})
    return recipe.model_copy(update={"output": output, "data": data, "evaluate": held_out, "comparison": comparison})


def checked(recipe: TrainRecipe) -> TrainPlan:
    """ValueError that says what is missing, and which command makes it."""
    run = recipe.data.run
    curate_command = f"python -m jobs.curate RECIPE --pool.shards 'PATTERN' --output {run}"
    if not storage.exists(storage.join(run, "recipe.json")):
        raise ValueError(f"data.run: {run} is no run of jobs.curate; make it with: {curate_command}")
    curated = manifest.read(storage.join(run, "recipe.json"))
    if cached := curated["embedded_by"].get("embed.cached"):
        raise ValueError(f"data.run: {run} is made from cached embeddings ({cached}) and holds no images to train on")
    records = manifest.committed(run, EMBED_STAGE)
    known = [shard for shard in shard_list.load(run) if not shard.retired]
    waiting = [shard.url for shard in known if shard.number not in records]
    gone = set(open_shard.absent(waiting))
    if pending := [url for url in waiting if url not in gone]:
        raise ValueError(
            f"data.run: {len(pending)} of {len(known)} shards are not embedded yet, {pending[0]} first; "
            f"go on with: {curate_command}"
        )
    shards, absent = _offered(recipe, records)
    records = {shard.number: records[shard.number] for shard in shards}
    num_rows = sum(shard.offered for shard in shards)
    if recipe.train.super_batch > num_rows:
        raise ValueError(
            f"train.super_batch is {recipe.train.super_batch} (sub_batch {recipe.train.sub_batch}, filter_ratio "
            f"{recipe.train.filter_ratio}), but {run} offers {num_rows} rows"
        )
    columns = _columns(recipe, run, shards)
    pieces = _pieces(recipe, records)
    features = recipe.data.features
    num_features = tables.vector_width(run, shards[0].number, features) if features else None
    classes = _classes(recipe, shards) if recipe.data.label else ()
    _check_low_resolution(recipe)
    scale, bias = _cached_reference(recipe, curated, records[shards[0].number], pieces)
    if recipe.data.truth is not None and not storage.exists(recipe.data.truth):
        raise ValueError(f"data.truth: no file {recipe.data.truth}")
    if recipe.evaluate.shards:
        storage.list_shards(recipe.evaluate.shards)
    if recipe.evaluate.run and not storage.exists(storage.join(recipe.evaluate.run, "recipe.json")):
        raise ValueError(f"evaluate.run: {recipe.evaluate.run} is no run of jobs.curate")
    if recipe.compares:
        _check_comparison(recipe, num_features)
    # What may change between two starts of one run: where it runs, how often it saves and measures.
    described = recipe.model_dump(
        mode="json", exclude={"name", "output", "compute", "checkpoint_every", "evaluate", "format_version"}
    )
    identity = {**_flat(described), "learner.weights": learner_digest(recipe)}
    if classes:
        identity["data.classes"] = list(classes)
    identity["data.embedded_by"] = curated["embedded_by"]["embed.weights"]
    for field, record in pieces.items():
        identity[f"{field}.made_by"] = {name: value for name, value in record["made_by"].items() if name != "samples"}
    rules = Pool.model_validate(curated["recipe"]["pool"]).read_rules()
    return TrainPlan(shards, absent, rules, columns, num_features, classes, scale, bias, identity)


def _columns(recipe: TrainRecipe, run: str, shards: list[OfferedShard]) -> tuple[tuple[str, str], ...]:
    """Columns that travel with the rows, by their names there and here. ValueError if the method needs another one."""
    needs = recipe.selector().needs
    available = set(tables.column_names(run, shards[0].number))
    stored = sorted(needs - MADE_HERE)
    missing = [name for name in stored if name not in available and not name.startswith(JSON_PREFIX)]
    if missing:
        raise ValueError(f"method {recipe.method['name']!r} needs the column {missing[0]!r}, which {run} lacks")
    # What a round is chosen by is read when it is chosen, and does not travel with the rows.
    own = [] if recipe.is_round_wise else [(name, name) for name in stored]
    if recipe.reference.online or recipe.is_classifier or recipe.mimics:
        return tuple(own)
    # A method that needs no reference has its learnability noted all the same, at 2 kB a row beside an image of 50.
    prefix = f"{recipe.reference.columns}." if recipe.reference.columns else ""
    return (*own, *((f"{prefix}{side}_embedding", f"reference_{side}_embedding") for side in ("image", "text")))


def _offered(recipe: TrainRecipe, records: Mapping[int, dict]) -> tuple[list[OfferedShard], list[str]]:
    """What is offered, and the URLs of shards that are gone where their file is needed: by a learner that sees images,
    or for a column that they lack, which nobody can make any more. As a run began, so it goes on.
    """
    begun = storage.join(recipe.output, "recipe.json")
    if storage.exists(begun):
        return offered.load(pool_url(recipe)), manifest.read(begun).get("absent", [])
    run = recipe.data.run
    shards = offered.offered_shards(run, records)
    doubtful = {shard.number for shard in shards}
    if recipe.data.features:
        lacking = (_lacking(_made(run, piece), records) for piece, _ in _named_pieces(recipe).values())
        doubtful &= set().union(*lacking)
    gone = set(open_shard.absent([shard.url for shard in shards if shard.number in doubtful]))
    there = [shard for shard in shards if shard.url not in gone]
    if not there:
        raise ValueError(
            f"data.run: of the {len(shards)} shards of {run} none is there any more, such as {shards[0].url}: bring "
            "the pool back to where it was curated"
        )
    return there, sorted(gone)


def _named_pieces(recipe: TrainRecipe) -> dict[str, tuple[str, str]]:
    """By the field that names it, each piece that the run reads, and the command of `jobs.fit` that makes it."""
    named = {}
    features = recipe.data.features
    if features and features not in ("image_embedding", "text_embedding"):
        named["data.features"] = (tables.piece_of(features), "features")
    if recipe.reference.columns and not recipe.reference.online:
        named["reference.columns"] = (recipe.reference.columns, "embeddings")
    return named


def _pieces(recipe: TrainRecipe, records: Mapping[int, dict]) -> dict[str, dict]:
    """By the field that names it, a record of each piece that the run reads. ValueError if a shard lacks one."""
    return {
        field: check_piece(recipe.data.run, piece, records, command=command)[min(records)]
        for field, (piece, command) in _named_pieces(recipe).items()
    }


def _classes(recipe: TrainRecipe, shards: list[OfferedShard]) -> tuple[str, ...]:
    """The labels that the pool's embedded samples bear, sorted. ValueError if one has none."""
    label, found = str(recipe.data.label), set[str]()
    for shard in shards:
        table = tables.read(recipe.data.run, shard.number, [label, "status"])
        labels = table.filter(pc.field("status") == "ok")[label]
        if labels.null_count:
            raise ValueError(
                f"data.label: {labels.null_count} samples of {shard.url} have no {label}; curate a pool whose samples "
                "all have one"
            )
        found.update(map(str, labels.unique().to_pylist()))
    return tuple(sorted(found))


def check_piece(run: str, piece: str, records: Mapping[int, dict], *, command: str) -> Mapping[int, dict]:
    """The manifests of a piece that is there for every shard, as it is now. ValueError, with what makes it, if not."""
    made = _made(run, piece)
    if lacking := _lacking(made, records):
        raise ValueError(
            f"{len(lacking)} of {len(records)} shards of {run} lack the column {piece!r}, or have it of a former "
            f"table; make it with: python -m jobs.fit {command} RECIPE --run {run} --column {piece}"
        )
    return made


def _made(run: str, piece: str) -> Mapping[int, dict]:
    return manifest.committed(run, tables.piece_stage(piece))


def _lacking(made: Mapping[int, dict], records: Mapping[int, dict]) -> set[int]:
    """Numbers of the shards of which no piece was `made` from their table as it is now."""
    return {number for number, record in records.items() if made.get(number, {}).get("samples") != record["key"]}


def _check_comparison(recipe: TrainRecipe, num_features: int | None) -> None:
    """ValueError if the run that is compared with lacks what is read of it, or has other features."""
    run, features = recipe.comparison.run, str(recipe.data.features)
    if not storage.exists(storage.join(run, "recipe.json")):
        raise ValueError(f"comparison.run: {run} is no run of jobs.curate")
    first = offered.offered_shards(run, manifest.committed(run, EMBED_STAGE))[0].number
    available = set(tables.column_names(run, first))
    if missing := [name for name in (features, str(recipe.data.label)) if name not in available]:
        raise ValueError(f"comparison.run: {run} has no column {missing[0]!r}")
    if (width := tables.vector_width(run, first, features)) != num_features:
        raise ValueError(f"comparison.run: {features} has {width} numbers there, {num_features} in data.run")


def _check_low_resolution(recipe: TrainRecipe) -> None:
    """ValueError if the learner cannot be run at the low resolution that is asked for."""
    low = recipe.low_resolution
    if low.is_on:
        check_resolution(recipe.learner.model, image_size=low.image_size, patch_size=low.patch_size)


def _cached_reference(
    recipe: TrainRecipe, curated: dict[str, Any], embedded: Mapping[str, Any], pieces: Mapping[str, dict]
) -> tuple[float | None, float | None]:
    """Logit scale and bias of the model that made the tables' embeddings. ValueError if another one is asked for."""
    if recipe.reference.online or recipe.is_classifier or recipe.mimics:
        return None, None
    if recipe.reference.columns:
        values = pieces["reference.columns"]["run_values"]
        return values["logit_scale"], values["logit_bias"]
    made_by, weights = curated["embedded_by"], recipe.reference.weights
    if weights is not None:
        digest = weights_digest(weights.model, **weights.source())
        if digest != made_by["embed.weights"]:
            wanted = weights.checkpoint or weights.pretrained or f"seed {weights.seed}"
            raise ValueError(
                f"reference.weights: the cache in {recipe.data.run} was made by another model ({made_by['embed.model']}"
                f"), not by {weights.model} ({wanted}). Make one of this model: python -m jobs.curate RECIPE "
                f"--pool.shards 'PATTERN' --embed.model {weights.model} ... --output OTHER"
            )
    if "logit_scale" not in embedded:
        raise ValueError(f"data.run: {recipe.data.run} was made by an older version; curate it again to another output")
    return embedded["logit_scale"], embedded["logit_bias"]


def learner_digest(recipe: TrainRecipe) -> str:
    """What decides the weights that the learner begins with."""
    learner = recipe.learner
    if not is_on_features(learner.model):
        return weights_digest(learner.model, **learner.source())
    return storage.sha256_of(learner.checkpoint) if learner.checkpoint else f"seed {learner.seed}"


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
        "recipe": redacted_json(recipe.model_dump(mode="json")),
        "identity": plan.identity,
        "absent": plan.absent,
        "versions": versions.packages(),
        "code": versions.code(),
        "seeds": {"rounds_and_selection": recipe.seed, "random_weights": recipe.learner.seed},
    }
    storage.write_bytes(url, json.dumps(whole, indent=1).encode())


def pool_url(recipe: TrainRecipe) -> str:
    return storage.join(recipe.output, "train", "pool.parquet")
