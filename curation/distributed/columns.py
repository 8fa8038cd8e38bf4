"""Later columns of a curated run: one committed shard in, one committed piece beside its sample table out.

Rows that were embedded get values, all others are null; so does an image that can no longer be decoded, which is
counted. Nothing that `jobs.curate` committed is touched or embedded again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from curation.data import manifest, open_shard, shard_list, storage, tables
from curation.data.images import ImageError, pixels
from curation.data.lease import Lease
from curation.data.read_rules import ReadRules
from curation.data.rows import ReadRow, StaleTable, read_rows
from curation.data.shard_list import Shard
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.distributed.resources import Placement, cluster, cpus_wanted, place
from curation.distributed.shard_pool import records_of
from curation.distributed.stopping import Stop
from curation.models.clip import Precision, load_towers
from curation.models.frozen import frozen_digest, load_frozen
from curation.models.registry import weights_digest
from curation.numerics.contrastive import cosine
from curation.numerics.picture import laplacian_variance, plainness
from curation.recipe.columns import ColumnsRecipe, EmbeddingsRecipe, FeaturesRecipe, QualityRecipe
from curation.recipe.curate import Embed
from curation.recipe.parts import Pool

QUALITY = ("sharpness", "plainness")
ROWS_AT_A_TIME = 512
"""Rows whose images are read as one byte range and decoded ahead of the network."""


class Maker(NamedTuple):
    """What makes the columns, from batches of inputs (n, ...) and captions."""

    resize: Callable[[Image.Image], np.ndarray] | None
    """What is done per image; None for a model that takes features."""
    blank: np.ndarray
    """An input that means nothing: batches are filled up with it."""
    make: Callable[[np.ndarray, list[str]], dict[str, np.ndarray]]
    run_values: dict[str, float]


@dataclass(frozen=True)
class ColumnsSpec:
    """What an actor is told: small values only."""

    recipe: ColumnsRecipe
    rules: ReadRules
    precision: Precision
    device: str
    num_features: int | None
    made_by: Mapping[str, Any]


class ShardColumns:
    """Makes and commits one shard's columns a call. Called by Ray Data; needs no Ray itself."""

    def __init__(self, spec: ColumnsSpec):
        compute = spec.recipe.compute
        torch.set_num_threads(compute.torch_threads)
        self._spec = spec
        self._maker = load_maker(spec)
        self._pool = ThreadPoolExecutor(compute.decode_threads, "decode")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """One row (number, url, samples) in, one row (record) out: the piece's account as JSON.

        A shard that the store does not give is not committed: its record says "pending" and why.
        """
        number, url, samples = int(batch["number"][0]), str(batch["url"][0]), str(batch["samples"][0])
        try:
            record = self.commit(number, url, samples)
        except (OSError, StaleTable) as error:
            record = {"shard": number, "url": url, "pending": f"{type(error).__name__}: {error}"}
        return {"record": [json.dumps(record)]}

    def commit(self, number: int, url: str, samples: str) -> dict[str, Any]:
        """Make one shard's columns of the rows that were embedded. `samples` is the key of their table's manifest."""
        recipe, begun = self._spec.recipe, time.perf_counter()
        status = tables.read(recipe.run, number, ["status"])["status"].to_numpy()
        wanted = np.flatnonzero(status == "ok")
        parts, has_value = [self._made(self._maker.blank[None][:0], [])], np.zeros(len(status), bool)
        for at in range(0, len(wanted), ROWS_AT_A_TIME):
            rows = wanted[at : at + ROWS_AT_A_TIME]
            made, ok = self._rows(number, url, rows)
            has_value[rows[ok]] = True
            parts.append(made)
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        columns = {column_name(recipe, name): tables.spread(value, has_value) for name, value in whole.items()}
        tables.write_piece(recipe.run, recipe.column, number, columns)
        record = {
            "shard": number,
            "url": url,
            "samples": samples,
            "rows": len(status),
            "made": int(has_value.sum()),
            "missing": len(wanted) - int(has_value.sum()),
            "run_values": self._maker.run_values,
            "seconds": round(time.perf_counter() - begun, 4),
        }
        stage = tables.piece_stage(recipe.column)
        manifest.commit(recipe.run, stage, number, record, made_by={**self._spec.made_by, "samples": samples})
        return record

    def _rows(self, number: int, url: str, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The columns of those of the rows (n,) that have a value, and which have (n,) bool."""
        recipe = self._spec.recipe
        if features := features_of(recipe):
            first, last = int(rows[0]), int(rows[-1])
            table = tables.read(recipe.run, number, ["caption", features], rows=range(first, last + 1))
            table = table.take(pa.array(rows - first))
            ok = table[features].is_valid().to_numpy()
            table = table.filter(pa.array(ok))
            inputs, captions = tables.as_array(table[features], name=features), table["caption"].to_pylist()
        else:
            read = read_rows(recipe.run, number, url, rows, ["caption"], rules=self._spec.rules)
            decoded = list(self._pool.map(self._decode, read.images))
            ok = np.array([image is not None for image in decoded])
            inputs = np.array([image for image in decoded if image is not None] or self._maker.blank[None][:0])
            captions = [
                caption for caption, is_ok in zip(read.columns["caption"].to_pylist(), ok, strict=True) if is_ok
            ]
        return self._made(inputs, captions), ok

    def _made(self, inputs: np.ndarray, captions: list[str]) -> dict[str, np.ndarray]:
        """The columns of n rows, n = 0 too, made in batches of one size so that a value does not depend on n."""
        size, parts = self._spec.recipe.batch_size, []
        for at in range(0, max(1, len(inputs)), size):
            here = inputs[at : at + size]
            fill = size - len(here)
            padded = np.concatenate([here, np.broadcast_to(self._maker.blank, (fill, *self._maker.blank.shape))])
            made = self._maker.make(padded, captions[at : at + size] + [""] * fill)
            parts.append({name: value[: len(here)] for name, value in made.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _decode(self, row: ReadRow) -> np.ndarray | None:
        assert self._maker.resize is not None
        try:
            return pixels(row.image, max_pixels=self._spec.recipe.max_pixels, resize=self._maker.resize).pixels
        except ImageError:
            return None


def load_maker(spec: ColumnsSpec) -> Maker:
    """The network of a recipe, loaded."""
    if isinstance(spec.recipe, FeaturesRecipe):
        network = spec.recipe.network
        frozen = load_frozen(
            network.library,
            network.model,
            **network.source(),
            precision=spec.precision,
            device=spec.device,
        )
        blank = frozen.resize(Image.new("RGB", (64, 64)))
        return Maker(frozen.resize, blank, lambda inputs, _: {"": frozen.embed(inputs).astype(np.float16)}, {})
    if isinstance(spec.recipe, QualityRecipe):
        measure = partial(quality, max_side=spec.recipe.max_side)
        return Maker(measure, np.zeros(2, np.float32), lambda told, _: dict(zip(QUALITY, told.T, strict=True)), {})
    assert isinstance(spec.recipe, EmbeddingsRecipe)
    weights = spec.recipe.weights
    towers = load_towers(
        weights.model,
        **weights.source(),
        precision=spec.precision,
        device=spec.device,
        num_features=spec.num_features,
    )

    def make(inputs: np.ndarray, captions: list[str]) -> dict[str, np.ndarray]:
        image_ND = towers.embed_images(torch.from_numpy(inputs)).float().cpu()
        text_ND = towers.embed_texts(towers.tokenize(captions)).float().cpu()
        return {
            "image_embedding": image_ND.half().numpy(),
            "text_embedding": text_ND.half().numpy(),
            "clip_score": cosine(image_ND, text_ND).numpy(),
        }

    run_values = {"logit_scale": towers.logit_scale, "logit_bias": towers.logit_bias}
    if spec.num_features is not None:
        return Maker(None, np.zeros(spec.num_features, np.float16), make, run_values)
    return Maker(towers.resize, np.zeros((*towers.image_size, 3), np.uint8), make, run_values)


def quality(image: Image.Image, *, max_side: int) -> np.ndarray:
    """Sharpness and plainness of an image, (2,) float32."""
    grey = image.convert("L")
    scale = max_side / max(grey.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in grey.size)
        grey = grey.resize((width, height), Image.Resampling.BOX)
    grey_HW = np.asarray(grey)
    return np.array([laplacian_variance(grey_HW), plainness(grey_HW)], np.float32)


def column_name(recipe: ColumnsRecipe, part: str) -> str:
    """The full name of a column that a maker calls `part`."""
    return f"{recipe.column}.{part}" if part else recipe.column


class ColumnsSummary(NamedTuple):
    """The account of a run: rows that have a value, embedded rows that have none, and what could not be read."""

    shards: int
    absent: list[str]
    """URLs of shards that left the pool, with their rows, before they had a value."""
    made_now: int
    rows: int
    missing: int
    seconds: float
    failures: list[str]
    stopped: str | None
    """Why the run ended before its work was done."""


def add_columns(
    recipe: ColumnsRecipe, *, watch: Callable[[dict[str, Any]], None] = lambda _: None, stop: Stop | None = None
) -> ColumnsSummary:
    """Make what is not made yet. ValueError or OtherRun if the recipe cannot run, OutputInUse if the run is held."""
    begun, stop = time.time(), stop or Stop()
    recipe = checked(recipe)
    with Lease(recipe.run):
        embedded = manifest.committed(recipe.run, EMBED_STAGE)
        shards = [shard for shard in shard_list.load(recipe.run) if shard.number in embedded and not shard.retired]
        with cluster(num_cpus=cpus_wanted(recipe.compute)), stop.on_sigterm(interrupts=True):
            placement = place(recipe.compute, precision="auto")
            spec = _spec(recipe, placement)
            made = manifest.committed(recipe.run, tables.piece_stage(recipe.column))
            for number, record in made.items():
                as_now = {**spec.made_by, "samples": embedded[number]["key"]}
                manifest.check_same(record["made_by"], as_now, what=f"the column {recipe.column!r} of shard {number}")
            todo = [(shard, embedded[shard.number]["key"]) for shard in shards if shard.number not in made]
            absent = [] if features_of(recipe) else open_shard.absent([shard.url for shard, _ in todo])
            if absent and len(absent) == len(todo) and not made:
                raise ValueError(
                    f"run: of the {len(absent)} shards of {recipe.run} none is there any more, such as {absent[0]}: "
                    "bring the pool back to where it was curated"
                )
            todo = [(shard, key) for shard, key in todo if shard.url not in absent]
            failures, now = [], 0
            with contextlib.closing(_pool(todo, spec, placement)) as records:
                for record in records:
                    watch(record)
                    if "pending" in record:
                        failures.append(f"shard {record['url']} is pending, run again to read it: {record['pending']}")
                    else:
                        made.add(record["shard"], record)
                        now += 1
                    if stop.reason:
                        break
    return ColumnsSummary(
        shards=len(shards),
        absent=absent,
        made_now=now,
        rows=sum(record["made"] for record in made.values()),
        missing=sum(record["missing"] for record in made.values()),
        seconds=round(time.time() - begun, 3),
        failures=failures,
        stopped=stop.reason if now + len(failures) < len(todo) else None,
    )


def checked(recipe: ColumnsRecipe) -> ColumnsRecipe:
    """The recipe with a URL of its run that every node may open. ValueError if it cannot run; nothing is touched."""
    run = checked_run(recipe.run, recipe.column)
    curated = manifest.read(storage.join(run, "recipe.json"))["recipe"]
    cached = Embed.model_validate(curated["embed"]).cached
    if cached and not Pool.model_validate(curated["pool"]).metadata and not features_of(recipe):
        raise ValueError(
            f"run: {run} was curated from metadata and the embeddings beside them (embed.cached {cached}): its pool "
            "has no images to make columns of"
        )
    return recipe.model_copy(update={"run": run})


def checked_run(named: str, column: str) -> str:
    """The URL of a curated run that may get this column. ValueError if it is none, or may not."""
    run = storage.absolute(named) if named else ""
    if not run or not storage.exists(storage.join(run, "recipe.json")):
        raise ValueError(f"run: {named!r} is no run of jobs.curate; name one, as in --run runs/first")
    embedded = manifest.committed(run, EMBED_STAGE)
    if not embedded:
        raise ValueError(f"run: {run} holds no committed shard yet; finish it with the command that began it")
    tables.check_piece_name(column, known=tables.own_column_names(run, min(embedded)))
    return run


def _spec(recipe: ColumnsRecipe, placement: Placement) -> ColumnsSpec:
    curated = manifest.read(storage.join(recipe.run, "recipe.json"))
    features, num_features = features_of(recipe), None
    if features:
        first = min(manifest.committed(recipe.run, EMBED_STAGE))
        num_features = tables.vector_width(recipe.run, first, features)
    return ColumnsSpec(
        recipe=recipe,
        rules=Pool.model_validate(curated["recipe"]["pool"]).read_rules(),
        precision=placement.precision,
        device=placement.device,
        num_features=num_features,
        made_by={
            "weights": _weights_digest(recipe),
            "features": features,
            "precision": placement.precision,
            "batch_size": recipe.batch_size,
            "max_pixels": recipe.max_pixels,
            "compute.device": placement.device,
            "compute.torch_threads": recipe.compute.torch_threads if placement.device == "cpu" else None,
        },
    )


def features_of(recipe: ColumnsRecipe) -> str | None:
    """The column that is taken in place of pixels."""
    return recipe.features if isinstance(recipe, EmbeddingsRecipe) else None


def _weights_digest(recipe: ColumnsRecipe) -> str:
    if isinstance(recipe, FeaturesRecipe):
        return frozen_digest(recipe.network.library, recipe.network.model, **recipe.network.source())
    if isinstance(recipe, QualityRecipe):
        return f"quality, longer side at most {recipe.max_side}"
    assert isinstance(recipe, EmbeddingsRecipe)
    return weights_digest(recipe.weights.model, **recipe.weights.source())


def _pool(
    todo: list[tuple[Shard, str]], spec: ColumnsSpec, placement: Placement
) -> Generator[dict[str, Any], None, None]:
    rows = [pa.table({"number": [shard.number], "url": [shard.url], "samples": [key]}) for shard, key in todo]
    return records_of(ShardColumns, spec, rows, placement, calls_at_a_time=1)
