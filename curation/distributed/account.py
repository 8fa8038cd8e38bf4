"""The account of a curation: what was read, embedded and dropped, at what rates, and what of it is a failure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.columns import DROPS_SCHEMA, FORMAT_VERSION
from curation.data import storage, tables
from curation.data.pieces import Pieces
from curation.distributed.cached import CachedSpec
from curation.distributed.embed import EmbedSpec
from curation.distributed.resources import Placement
from curation.distributed.tasks import in_groups, ordered


@dataclass(frozen=True)
class Summary:
    """The account of a run, as summary.json holds it. `failures` is empty if and only if all is well."""

    read: int
    embedded: int
    dropped: dict[str, int]
    selected: int | None
    seconds: float
    images_per_second: dict[str, float]
    bottleneck: str | None
    warnings: dict[str, int]
    waterfall: list[tuple[str, int, int]] = field(default_factory=list)
    shards: dict[str, int] = field(default_factory=dict)
    decoded_now: int = 0
    """Images that this run decoded: 0 when all was committed before."""
    failures: list[str] = field(default_factory=list)
    stopped: str | None = None
    """Why the run ended before its work was done, without fault; nothing was selected then."""
    format_version: int = FORMAT_VERSION


class Embedded(NamedTuple):
    """What the embedding stage leaves: the run's pieces, the pool's shards among them, and why a shard is pending."""

    pieces: Pieces
    pool: list[int]
    now: list[int]
    pending: dict[str, str]
    seconds: float
    spec: EmbedSpec | CachedSpec
    placement: Placement


def account(embedded: Embedded, *, listed: int, absent: int, retired: int) -> Summary:
    """The pool's account, and the rates of what was embedded now."""
    dropped: Counter[str] = Counter()
    warnings: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for number in embedded.pool:
        record = embedded.pieces[number]
        dropped.update(record["dropped"])
        warnings.update(record["warnings"])
        totals.update(read=record["read"], embedded=record["embedded"])
    if absent:
        warnings["shard:absent"] = absent
    rates, bottleneck = _rates(embedded)
    return Summary(
        read=totals["read"],
        embedded=totals["embedded"],
        dropped=dict(sorted(dropped.items())),
        selected=None,
        seconds=0.0,
        images_per_second=rates,
        bottleneck=bottleneck,
        warnings=dict(sorted(warnings.items())),
        shards={
            "listed": listed,
            "committed": len(embedded.pool),
            "embedded_now": len(embedded.now),
            "absent": absent,
            "retired": retired,
        },
        decoded_now=sum(embedded.pieces[number]["decoded"] for number in embedded.now),
    )


def _rates(embedded: Embedded) -> tuple[dict[str, float], str | None]:
    """Images/s by stage (`embed` in all, the others if they alone held the actors), and where the actors' time went."""
    seconds: Counter[str] = Counter()
    images = 0
    for number in embedded.now:
        record = embedded.pieces[number]
        seconds.update(record["seconds"])
        images += record["embedded"]
    actors = embedded.placement.actors
    rates = {
        "embed": _rate(images, embedded.seconds, 1),
        "decode": _rate(images, seconds["decode"], actors * embedded.spec.decode_threads),
        "forward": _rate(images, seconds["forward"], actors),
        "commit": _rate(images, seconds["write"], actors),
    }
    spent = {"decode": seconds["wait"], "forward": seconds["forward"], "commit": seconds["write"]}
    busiest, total = max(spent, key=lambda stage: spent[stage]), sum(spent.values())
    bottleneck = f"{busiest} ({spent[busiest] / total:.0%} of the actors' time)" if total else None
    return {stage: round(rate, 1) for stage, rate in rates.items() if rate}, bottleneck


def _rate(images: int, seconds: float, workers: int) -> float:
    return images * workers / seconds if seconds else 0.0


def faults(summary: Summary, pending: dict[str, str], *, max_drop_fraction: float) -> list[str]:
    """What is wrong with a run: shards that are pending, an account that does not balance, too many drops."""
    told = [f"shard {url} is pending, run again to read it: {why}" for url, why in sorted(pending.items())]
    num_dropped = sum(summary.dropped.values())
    if summary.read != summary.embedded + num_dropped:
        told.append(f"read {summary.read} is not embedded {summary.embedded} + dropped {num_dropped}")
    if num_dropped > max_drop_fraction * summary.read:
        told.append(
            f"{num_dropped} of {summary.read} samples were dropped ({num_dropped / summary.read:.1%}), more than "
            f"max_drop_fraction {max_drop_fraction:.1%}. What was embedded is committed; raise it and run again, "
            f"or look at drops.parquet. Reasons: {summary.dropped}"
        )
    return told


def write_drops(output: str, embedded: Embedded) -> None:
    """drops.parquet: every dropped sample of the pool with its reason, in order of address."""
    numbers = [number for number in sorted(embedded.pool) if embedded.pieces[number]["dropped"]]
    with (
        storage.write_atomic(storage.join(output, "drops.parquet")) as file,
        pq.ParquetWriter(file, DROPS_SCHEMA) as out,
    ):
        for table in ordered(_drops_of, ((output, group) for group in in_groups(numbers))):
            out.write_table(table)


def _drops_of(output: str, numbers: list[int]) -> pa.Table:
    """The dropped samples of a group of shards; runs in a task."""
    columns = ["uid", "shard", "offset", "reason", "status"]
    table = pa.concat_tables(tables.read(output, number, columns) for number in numbers)
    return table.filter(pc.field("status") == "dropped").select(DROPS_SCHEMA.names).cast(DROPS_SCHEMA)
