"""Curation from end to end: list, plan, embed, account, select, write. Doing it again does only what is not done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from typing import NamedTuple

import pyarrow as pa
from ray.exceptions import ActorDiedError

from curation.columns import FORMAT_VERSION
from curation.data import card, manifest, metadata, parquet_shards, shard_list, storage
from curation.data.lease import Lease
from curation.data.open_shard import content_digest
from curation.data.pieces import Pieces, Record
from curation.data.redact import redacted, redacted_json
from curation.data.shard_list import Shard
from curation.data.storage import ListedShard
from curation.distributed import select as selection
from curation.distributed import versions
from curation.distributed.account import Embedded, Summary, account, faults, write_drops
from curation.distributed.audit import write_waterfall_and_audit
from curation.distributed.cached import CachedEmbed, CachedSpec, with_embeddings
from curation.distributed.embed import CALLS_AT_A_TIME, EmbedSpec, ShardEmbed
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.distributed.guards import digest_of_lists, guards, lists_at_read
from curation.distributed.made_columns import make_columns
from curation.distributed.metrics import RunMetrics
from curation.distributed.resources import Placement, cluster, cpus_wanted, place, wait_for_progress
from curation.distributed.roster import enrolled
from curation.distributed.shard_pool import records_of
from curation.distributed.staged import staged_shards
from curation.distributed.stall_watch import StallWatch
from curation.distributed.stopping import Stop
from curation.distributed.write import write_selection
from curation.models.registry import weights_digest
from curation.models.resize import load_fast_resize
from curation.recipe import CurateRecipe

SHARDS_PER_WAVE = 10_000
SEEN_WITHIN_S = 90.0
STALLS_UNTIL_THE_END = 7
"""Times `stall_s` without progress after which Ray ends the run: three wedged workers in a row take up to 4.5."""


class Plan(NamedTuple):
    """What a run will do. `shards` is the whole append-only list, `pool` its part that this run sees."""

    listed: list[ListedShard]
    shards: list[Shard]
    pool: list[Shard]
    committed: Pieces

    @property
    def todo(self) -> list[Shard]:
        """Shards of the pool that are not committed."""
        return [shard for shard in self.pool if shard.number not in self.committed]

    @property
    def absent(self) -> list[str]:
        """URLs that the pattern names and the store does not hold."""
        return [url for url, fingerprint in self.listed if not fingerprint]


class Watch:
    """Hears how a run gets on. This one is silent; jobs print."""

    def planned(self, plan: Plan) -> None:
        """The plan is made; the work begins."""

    def committed(self, record: Record) -> None:
        """A shard is committed, or was left pending."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def stalled(self, lines: list[str]) -> None:
        """Nothing is committed for a while, or a worker was replaced: on whom the run waits, a line each."""


class ActorsFailed(RuntimeError):
    """The embedding actors could not start, or died in a way that a retry does not mend."""


def make_plan(recipe: CurateRecipe) -> Plan:
    """List the pool and hold it against what is committed. Touches nothing.

    ValueError if the recipe names no pool or no output, the pool is empty, or shard list and manifests do not fit.
    """
    recipe = _resolved(recipe)
    listed = storage.list_shards(recipe.pool.shards)
    committed = manifest.committed(recipe.output, EMBED_STAGE)
    known = shard_list.load(recipe.output)
    for number, record in committed.items():
        if number >= len(known) or known[number].url != record["url"]:
            raise ValueError(
                f"shard {number} is committed as {record['url']}, but {recipe.output}/shards.parquet does not say so: "
                "it was lost or replaced. Restore it, or choose another output."
            )
    rules = recipe.pool.read_rules()
    is_metadata = recipe.embed.cached and not recipe.pool.metadata
    if recipe.embed.cached and is_metadata:
        listed = with_embeddings(listed, recipe.embed.cached)
    listed = parquet_shards.cut(listed, known, rules=None if is_metadata else rules)
    content_of = (lambda url: content_digest(url, rules)) if recipe.pool.verify == "content" else None
    shards = shard_list.extend([_with_content(shard, committed) for shard in known], listed, content_of=content_of)
    return Plan(listed, shards, shard_list.present(shards, listed), committed)


def curate(recipe: CurateRecipe, *, watch: Watch | None = None, stop: Stop | None = None) -> Summary:
    """Run a recipe. ValueError or OtherRun if it cannot run as it is, OutputInUse if another run holds the output.

    Asked to stop, it ends after its next commit; by SIGTERM at once, with Interrupted.
    """
    begun, watch, stop = time.time(), watch or Watch(), stop or Stop()
    recipe = _resolved(recipe)
    with stop.on_sigterm(interrupts=True), Lease(recipe.output):
        plan = make_plan(recipe)  # what is wrong with the pool is told before Ray starts
        with cluster(num_cpus=cpus_wanted(recipe.compute)), stop.on_sigterm(interrupts=True):
            embedded = _embed(recipe, plan, watch, stop)
            summary = account(
                embedded,
                listed=len(plan.listed),
                absent=len(plan.absent),
                retired=sum(shard.retired for shard in plan.shards),
            )
            write_drops(recipe.output, embedded)
            wrong = faults(summary, embedded.pending, max_drop_fraction=recipe.max_drop_fraction)
            stopped = stop.reason if len(embedded.now) + len(embedded.pending) < len(plan.todo) else None
            if not wrong and not stopped:
                summary = _select_and_write(recipe, embedded, summary, watch)
        summary = dataclasses.replace(summary, seconds=round(time.time() - begun, 3), failures=wrong, stopped=stopped)
        storage.write_bytes(storage.join(recipe.output, "summary.json"), json.dumps(asdict(summary), indent=1).encode())
    return summary


def _resolved(recipe: CurateRecipe) -> CurateRecipe:
    """The recipe with a URL of its output that every node may open. ValueError if it names no pool or no output."""
    if not recipe.pool.shards:
        raise ValueError("pool.shards is empty: name the shards, as in --pool.shards 'folder/{00000..00041}.tar'")
    if not recipe.output:
        raise ValueError("output is empty: name a folder or URL for the run, as in --output DIR")
    return recipe.model_copy(update={"output": storage.absolute(recipe.output)})


def _embed(recipe: CurateRecipe, plan: Plan, watch: Watch, stop: Stop) -> Embedded:
    compute = recipe.compute.model_copy(update={"device": "cpu"}) if recipe.embed.cached else recipe.compute
    placement = place(compute, precision=recipe.embed.precision)
    spec = _embed_spec(recipe, placement)
    manifest.check_same_run(plan.committed.one_of_each_run(), spec.made_by)
    shard_list.save(recipe.output, plan.shards)
    _save_recipe(recipe, spec)
    watch.planned(plan)
    if spec.rules.metadata and plan.todo:
        watch.stage("sort metadata")
        metadata.build(spec.rules.metadata, metadata.listed(recipe.pool.metadata or ""))
    begun = time.time()
    pieces = Pieces(plan.committed)
    manifest.index(recipe.output, EMBED_STAGE, pieces)
    now: list[int] = []
    pending: dict[str, str] = {}
    key = manifest.digest(spec.made_by)
    with (
        RunMetrics(recipe.output) as metrics,
        contextlib.closing(_watched(plan.todo, spec, placement, recipe.compute.stall_s, watch)) as records,
    ):
        metrics.actors(placement.actors)
        for record in records:
            watch.committed(record)
            metrics.embedding(record)
            if "pending" in record:
                pending[record["url"]] = record["pending"]
            else:
                if not now:
                    _check_shared(recipe.output, record["shard"])
                now.append(record["shard"])
                told = {name: value for name, value in record.items() if name != "batch_ends"}
                pieces.add(record["shard"], {**told, "key": key, "made_by": dict(spec.made_by)})
                if len(now) % SHARDS_PER_WAVE == 0:
                    manifest.index(recipe.output, EMBED_STAGE, pieces)
            if stop.reason:
                break
    seconds = time.time() - begun
    manifest.index(recipe.output, EMBED_STAGE, pieces)
    shard_list.save(recipe.output, [_with_content(shard, pieces) for shard in plan.shards])
    pool = [shard.number for shard in plan.pool if shard.number in pieces]
    return Embedded(pieces, pool, now, pending, seconds, spec, placement)


def _check_shared(output: str, number: int) -> None:
    """OSError if what a worker committed is not to be seen here. Some network file systems show it late."""
    url, until = manifest.url_of(output, EMBED_STAGE, number), time.monotonic() + SEEN_WITHIN_S
    while not storage.exists(url):
        if time.monotonic() > until:
            raise OSError(
                f"a worker committed shard {number}, and {url} is not there: the output must be on storage that all "
                "nodes share, under the same path"
            )
        time.sleep(0.5)


def _watched(
    todo: Sequence[Shard], spec: EmbedSpec | CachedSpec, placement: Placement, stall_s: float, watch: Watch
) -> Generator[Record, None, None]:
    """The records of `embed_shards`; workers' deaths are held against what they did, and stalls are told."""
    if isinstance(spec, CachedSpec) or not todo:
        yield from embed_shards(todo, spec, placement)
        return
    wait_for_progress(STALLS_UNTIL_THE_END * stall_s)
    urls = {shard.number: shard.url for shard in todo}
    with (
        enrolled() as name,
        StallWatch(name, stall_s=stall_s, urls=urls, say=watch.stalled) as stall_watch,
        contextlib.closing(embed_shards(todo, dataclasses.replace(spec, run=name), placement)) as records,
    ):
        for record in records:
            stall_watch.committed()
            yield record


def embed_shards(
    todo: Sequence[Shard], spec: EmbedSpec | CachedSpec, placement: Placement
) -> Generator[Record, None, None]:
    """Embed and commit the shards on a pool of actors; their records, as they are done. ActorsFailed if they cannot."""
    for at in range(0, len(todo), SHARDS_PER_WAVE):
        wave = todo[at : at + SHARDS_PER_WAVE]
        try:
            if isinstance(spec, EmbedSpec) and spec.staged:
                yield from staged_shards(wave, spec, placement)
            else:
                yield from _fused_shards(wave, spec, placement)
        except ActorDiedError as error:
            # Ray tells the cause as the text of a traceback; the error in it is the last line that names one.
            causes = re.findall(r"^\w+Error: .*$", str(error), re.MULTILINE)
            raise ActorsFailed(f"the embedding actors could not go on: {causes[-1] if causes else error}") from error


def _fused_shards(shards: Sequence[Shard], spec: EmbedSpec | CachedSpec, placement: Placement) -> Iterator[Record]:
    rows = [pa.table({"number": [s.number], "url": [s.url], "fingerprint": [s.fingerprint]}) for s in shards]
    actor = CachedEmbed if isinstance(spec, CachedSpec) else ShardEmbed
    return records_of(actor, spec, rows, placement, calls_at_a_time=CALLS_AT_A_TIME)


def _embed_spec(recipe: CurateRecipe, placement: Placement) -> EmbedSpec | CachedSpec:
    embed, compute = recipe.embed, recipe.compute
    rules, metadata_digest = recipe.pool.read_rules(), None
    if recipe.pool.metadata:
        files = metadata.listed(recipe.pool.metadata)
        metadata_digest = metadata.digest_of(with_embeddings(files, embed.cached) if embed.cached else files)
        rules = dataclasses.replace(rules, metadata=metadata.url_of(recipe.output, metadata_digest))
    if embed.cached:
        made_by = recipe.embedded_by(
            weights_digest="",
            device=placement.device,
            precision=placement.precision,
            metadata_digest=metadata_digest,
        )
        return CachedSpec(recipe.output, embed.cached, rules, made_by)
    if embed.resize == "fast":  # a model whose transform it does not know is refused here, not by every actor
        load_fast_resize(embed.model, pretrained=embed.pretrained)
    rules = dataclasses.replace(rules, exclude=tuple(lists_at_read(recipe)))
    weights = weights_digest(embed.model, pretrained=embed.pretrained, checkpoint=embed.checkpoint, seed=embed.seed)
    return EmbedSpec(
        output=recipe.output,
        model=embed.model,
        pretrained=embed.pretrained,
        checkpoint=embed.checkpoint,
        seed=embed.seed,
        precision=placement.precision,
        device=placement.device,
        resize=embed.resize,
        batch_size=embed.batch_size,
        decode_threads=compute.decode_threads,
        torch_threads=compute.torch_threads,
        max_pixels=recipe.pool.max_pixels,
        staged=compute.mode == "staged",
        rules=rules,
        made_by=recipe.embedded_by(
            weights_digest=weights,
            device=placement.device,
            precision=placement.precision,
            metadata_digest=metadata_digest,
            exclude_digest=digest_of_lists(rules.exclude),
        ),
    )


def _save_recipe(recipe: CurateRecipe, spec: EmbedSpec | CachedSpec) -> None:
    whole = {
        "format_version": FORMAT_VERSION,
        "recipe": redacted_json(recipe.model_dump(mode="json")),
        "embedded_by": dict(spec.made_by),
        "versions": versions.packages(),
        "code": versions.code(),
        "seeds": {"selection": recipe.seed, "random_weights": recipe.embed.seed},
    }
    storage.write_bytes(storage.join(recipe.output, "recipe.json"), json.dumps(whole, indent=1).encode())


def _with_content(shard: Shard, pieces: Pieces) -> Shard:
    if shard.number not in pieces:
        return shard
    record = pieces[shard.number]
    return shard._replace(sha256=record["sha256"], rows=record["read"])


def _select_and_write(recipe: CurateRecipe, embedded: Embedded, summary: Summary, watch: Watch) -> Summary:
    numbers = sorted(embedded.pool)
    watch.stage("select")
    begun = time.time()
    make_columns(recipe, embedded.pieces, numbers)
    selected = selection.select(
        recipe.output,
        numbers,
        embedded=summary.embedded,
        steps=recipe.selection,
        seed=recipe.seed,
        guards=guards(recipe, embedded.pieces, numbers),
        audited=[group.column for group in recipe.audit.groups],
    )
    warnings = {**summary.warnings, **selected.warnings, **write_waterfall_and_audit(recipe, numbers, selected)}
    select_seconds = time.time() - begun
    watch.stage("write")
    begun = time.time()
    written = write_selection(recipe, numbers, selected, num_read=summary.read)
    write_seconds = time.time() - begun
    waterfall = [(count.name, count.rows_in, count.rows_out) for count in selected.counts]
    facts = card.CardFacts(
        recipe_name=recipe.name,
        shards=redacted(recipe.pool.shards),
        read=summary.read,
        embedded=summary.embedded,
        dropped=summary.dropped,
        warnings=warnings,
        waterfall=waterfall,
        selected=selected.rows,
        licences=written.licences,
        embedded_by=embedded.spec.made_by,
        versions=versions.packages(),
    )
    for folder in ("", "shards") if recipe.write.tars else ("",):
        storage.write_bytes(
            storage.join(recipe.output, *filter(None, [folder]), "README.md"), card.card(facts).encode()
        )
    rates = {
        **summary.images_per_second,
        "select": round(summary.embedded / select_seconds, 1),
        "write": round(selected.rows / write_seconds, 1),
    }
    return dataclasses.replace(
        summary, selected=selected.rows, waterfall=waterfall, warnings=warnings, images_per_second=rates
    )
