"""`python -m jobs.benchmark plan --samples 5.85e9 --rates FILE --prices FILE`: what a run needs, from measured rates.

No figure here is a guess of ours: `--rates` holds what was measured (a run's own summary.json has the rates of its
hardware), `--prices` what you pay. docs/capacity.md has the formula in words; this module is it, in order.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from curation.recipe import Part

DRIVER_SHARDS_PER_S = 100.0
"""Blocks that Ray Data's driver handles a second, measured at about 113 to 137 (one shard is one block)."""
STAGED_PARTS_PER_ACTOR = 4
"""Parts of decoded pixels in the object store for each actor: two in its hands, two ready."""
STAGED_PART_BYTES = 128 << 20
AnyPart = TypeVar("AnyPart", bound=Part)
GB, TB = 1e9, 1e12
HOURS_PER_MONTH = 730.0


class Rates(Part):
    """What was measured, and where."""

    source: str = Field(min_length=1)
    """Hardware, date and command of the measurement."""
    forward_per_actor: float = Field(gt=0)
    """Images a second of one actor whose model never waits (`forward` in summary.json, over its actors)."""
    efficiency: float = Field(gt=0, le=1)
    """Share of that which a whole run comes to: `embed` over `forward`, when decoding keeps up."""
    decode_per_core: float = Field(gt=0)
    """Images a second that one core decodes and resizes."""
    image_bytes: float = Field(gt=0)
    """Mean size of a sample in its shard."""
    embedding_dim: int = Field(gt=0)
    row_bytes: float = Field(ge=0)
    """A row of the sample tables beside its two embeddings."""
    ledger_bytes: float = Field(default=12.04, gt=0)
    """A sample's, in the ledger."""
    ledger_actor_gb: float = Field(default=1.1, gt=0)
    """Memory that one ledger actor may take."""


class Prices(Part):
    """What is paid, and what one gets for it."""

    source: str = Field(min_length=1)
    currency: str = "USD"
    gpu_node_hour: float = Field(ge=0)
    actors_per_gpu_node: int = Field(gt=0)
    cores_per_gpu_node: int = Field(gt=0)
    cpu_node_hour: float = Field(ge=0)
    cores_per_cpu_node: int = Field(gt=0)
    head_hour: float = Field(ge=0)
    storage_gb_month: float = Field(ge=0)


@dataclass(frozen=True)
class Capacity:
    """What a run needs. Nodes are whole, hours follow from them."""

    shards: int
    actors: int
    gpu_nodes: int
    cpu_nodes: int
    staged: bool
    hours: float
    """Of embedding; with `driver_bound` the driver decides, not the nodes."""
    driver_bound: bool
    possible: bool
    """False if the driver alone takes longer than was wanted; the nodes are then counted for its hours."""
    least_samples_per_shard: int
    """With shards as large, it is possible."""
    object_store_gb: float
    """Of one GPU node."""
    ledger_actors: int
    ledger_gb: float
    tables_tb: float
    kept_tb: float
    compute_cost: float
    storage_cost_month: float


def capacity(
    rates: Rates, prices: Prices, *, samples: float, hours: float, samples_per_shard: int, keep_fraction: float
) -> Capacity:
    """The nodes that embed `samples` within `hours`, or as soon as the driver can; what they cost.

    ValueError if a number is absurd.
    """
    for name, value in (("samples", samples), ("hours", hours), ("samples_per_shard", samples_per_shard)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and more than 0, got {value}")
    if not 0 <= keep_fraction <= 1:
        raise ValueError(f"keep_fraction must be in [0, 1], got {keep_fraction}")
    per_actor = rates.efficiency * rates.forward_per_actor
    images_per_s = min(samples / (3600 * hours), DRIVER_SHARDS_PER_S * samples_per_shard)
    wanted = math.ceil(images_per_s / per_actor)
    gpu_nodes = math.ceil(wanted / prices.actors_per_gpu_node)
    actors = gpu_nodes * prices.actors_per_gpu_node
    missing_cores = actors * per_actor / rates.decode_per_core - gpu_nodes * prices.cores_per_gpu_node
    cpu_nodes = max(0, math.ceil(missing_cores / prices.cores_per_cpu_node))
    nodes_hours = samples / (3600 * actors * per_actor)
    driver_hours = samples / samples_per_shard / (3600 * DRIVER_SHARDS_PER_S)
    needed = max(nodes_hours, driver_hours)
    least_samples_per_shard = math.ceil(samples / (3600 * hours * DRIVER_SHARDS_PER_S))
    ledger_gb = rates.ledger_bytes * samples / GB
    tables = samples * (2 * 2 * rates.embedding_dim + rates.row_bytes)
    kept = samples * keep_fraction * rates.image_bytes
    parts = STAGED_PARTS_PER_ACTOR * prices.actors_per_gpu_node if cpu_nodes else 0
    hourly = gpu_nodes * prices.gpu_node_hour + cpu_nodes * prices.cpu_node_hour + prices.head_hour
    return Capacity(
        shards=math.ceil(samples / samples_per_shard),
        actors=actors,
        gpu_nodes=gpu_nodes,
        cpu_nodes=cpu_nodes,
        staged=cpu_nodes > 0,
        hours=needed,
        driver_bound=driver_hours >= nodes_hours,
        possible=samples_per_shard >= least_samples_per_shard,
        least_samples_per_shard=least_samples_per_shard,
        object_store_gb=parts * STAGED_PART_BYTES / GB,
        ledger_actors=math.ceil(ledger_gb / rates.ledger_actor_gb),
        ledger_gb=ledger_gb,
        tables_tb=tables / TB,
        kept_tb=kept / TB,
        compute_cost=needed * hourly,
        storage_cost_month=(tables + kept) / GB * prices.storage_gb_month,
    )


def priced(
    rates: Path, prices: Path, *, samples: float, hours: float, samples_per_shard: int, keep_fraction: float
) -> dict[str, Any]:
    """A plan from two files, printed; `failed` if it is not possible. ValueError if a file or a number does not fit."""
    measured, paid = _of_file(Rates, rates, flag="--rates"), _of_file(Prices, prices, flag="--prices")
    plan = capacity(
        measured, paid, samples=samples, hours=hours, samples_per_shard=samples_per_shard, keep_fraction=keep_fraction
    )
    print(f"{samples:,.0f} samples within {hours:g} h, {keep_fraction:.0%} kept")
    if not plan.possible:
        print(
            f"not possible within {hours:g} h: Ray Data's driver handles {DRIVER_SHARDS_PER_S:g} shards a second, so "
            f"{plan.shards:,} shards take {plan.hours:,.2f} h, for which the nodes are counted; possible with "
            f"samples_per_shard >= {plan.least_samples_per_shard:,}"
        )
    print(f"rates: {measured.source}\nprices: {paid.source}\n")
    for name, value in asdict(plan).items():
        print(f"  {name.replace('_', ' '):<24} {_told(value):>18}")
    print(f"  {'currency':<24} {paid.currency:>18}")
    told = {"rates": measured.model_dump(), "prices": paid.model_dump(), "plan": asdict(plan)}
    return {**told, "failed": int(not plan.possible)}


def _of_file(kind: type[AnyPart], path: Path, *, flag: str) -> AnyPart:
    if not path.is_file():
        raise ValueError(f"{flag}: there is no file {path}; the image has none, cluster/ of the repository an example")
    try:
        return kind.model_validate_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from error


def _told(value: float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
