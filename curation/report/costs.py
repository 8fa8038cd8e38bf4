"""What a run cost, part by part: seconds, device hours, money, energy; and what as much would cost on a larger pool.

Seconds are what the run itself noted, device hours are these times the GPUs (or CPU cores) that were held meanwhile.
Energy is what the boards' own counters said (NVML), if the run noted it for all of a part; otherwise it is an estimate,
hours times an assumed power, and is called one. A training step's joules are shared out by its phases' seconds. Money
needs a price file. What is not known is None, and is told as such, never as 0.

A run that embedded little because most was committed before has no clock of the whole in its account; then the shards'
own seconds are shared out among the actors that its recipe names, and the page says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
from pydantic import Field

from curation.data import storage
from curation.recipe.parts import Part, selector_of
from curation.report import charts
from curation.report.folder import CurationRun, TrainingRun

POOL_SIZES = (1_000_000, 100_000_000, 5_000_000_000)
HOUR_S = 3600.0
KWH_J = 3.6e6
SCORING = ("seconds_score", "seconds_select", "seconds_exchange", "seconds_ledger")
SCORING_ACTORS = "scoring actors"


class Prices(Part):
    """Prices and powers of one device hour, as a price file has them."""

    currency: str = Field(default="EUR", max_length=8)
    gpu_hour: float | None = Field(default=None, ge=0)
    cpu_core_hour: float | None = Field(default=None, ge=0)
    gpu_watts: float = Field(default=700.0, ge=0)
    """Assumed draw of a GPU with its share of the node; 700 W is the limit of an H100 or H200 board."""
    cpu_core_watts: float = Field(default=10.0, ge=0)
    """Assumed draw of a core of a server with its share of the node."""

    def hour(self, device: str) -> float | None:
        """Price of a device hour."""
        return self.gpu_hour if device == "cuda" else self.cpu_core_hour

    def watts(self, device: str) -> float:
        """Assumed power of a device."""
        return self.gpu_watts if device == "cuda" else self.cpu_core_watts


class Cost(NamedTuple):
    """One part of a run's cost."""

    part: str
    device: str
    """cuda or cpu: whether `device_hours` are of GPUs or of cores."""
    seconds: float | None
    """Of the clock; None where the run did not note it."""
    device_hours: float | None
    samples: float | None
    money: float | None
    kwh: float | None
    is_measured: bool = False
    """Whether `kwh` was counted by the boards, and is no estimate."""
    about: str = ""
    clock: str = ""
    """How `seconds` came about, where the run did not note them itself."""


class Estimate(NamedTuple):
    """What scoring a pool of another size would take at this run's rates."""

    samples: int
    hours: float | None
    device_hours: float
    money: float | None
    kwh: float
    gigabytes: float
    """Of sample tables."""


def read_prices(path: str) -> Prices:
    """A price file. ValueError that names what does not fit."""
    try:
        return Prices.model_validate_json(storage.read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is no price file: {error}") from error


def curation_costs(run: CurationRun, prices: Prices) -> list[Cost]:
    """Scoring (the pass over the pool, which also fills a reference's cache), selecting, and writing."""
    embedded_by, compute = run.whole_recipe.get("embedded_by", {}), run.recipe.get("compute", {})
    device = embedded_by.get("compute.device", "cpu")
    rates = run.summary.get("images_per_second", {})
    held = compute.get("gpus_per_actor", 1.0) if device == "cuda" else compute.get("torch_threads", 1)
    spent = _spent(run)
    embedded, costs = spent.embedded, []
    if embedded:
        clock, how = _clock(run, spent)
        about = "reading, decoding, embedding and scoring the pool; as a reference's cache, the same pass"
        # Of a board that several actors share each has counted the whole.
        joules = None if spent.joules is None else held * spent.joules
        hours = spent.actor_seconds * held / HOUR_S
        scoring = _cost("scoring", device, clock, hours, embedded, prices, about=about, joules=joules)
        costs.append(scoring._replace(clock=how))
    for part, samples in (("select", embedded), ("write", run.summary.get("selected"))):
        if samples and rates.get(part):
            seconds = samples / rates[part]
            costs.append(
                _cost(part, "cpu", seconds, seconds / HOUR_S, samples, prices, about="on one core of the driver's node")
            )
    return costs


class _Spent(NamedTuple):
    embedded: int
    actor_seconds: float
    joules: float | None


def _spent(run: CurationRun) -> _Spent:
    """What the pieces of a run note, added up. One record at a time: a large pool has some hundred thousand."""
    embedded, seconds, joules = 0, 0.0, 0.0
    for number in run.numbers:
        record = run.records[number]
        embedded += record["embedded"]
        seconds += sum(record.get("seconds", {}).get(name, 0.0) for name in ("wait", "forward", "write"))
        if record["embedded"]:
            used = record.get("joules")
            joules += math.nan if used is None else used
    return _Spent(embedded, seconds, None if math.isnan(joules) else joules)


def _clock(run: CurationRun, spent: _Spent) -> tuple[float | None, str]:
    """Seconds that embedding all that is committed took, and how they are known if not by the account of it all."""
    rate = run.summary.get("images_per_second", {}).get("embed")
    shards, actors = run.summary.get("shards", {}), run.recipe.get("compute", {}).get("actors")
    if rate and shards.get("embedded_now", 0) >= shards.get("committed", 0):
        return spent.embedded / rate, ""
    if not spent.actor_seconds:
        return None, ""
    if actors:
        return spent.actor_seconds / actors, f"time from the shards' own records, shared out evenly among {actors}"
    if rate:
        return spent.embedded / rate, "time at the rate of what was embedded last"
    one = f"{charts.number(spent.embedded / spent.actor_seconds)} samples/s of one actor by the shards' own records"
    return None, f"{one}; how many there were was not noted"


def training_costs(
    run: TrainingRun, pool: CurationRun | None, reference: TrainingRun | None, prices: Prices
) -> list[Cost]:
    """Reference, cache, waiting, scoring, training, apart; the first two, if the method needs them, are other runs'."""
    device, held = device_of(run), run.recipe.get("compute", {}).get("workers", 1)
    if device == "cpu":
        held *= run.recipe.get("compute", {}).get("torch_threads", 1)
    costs = []
    if needs_reference(run):
        if reference is not None:
            costs.append(_total(reference, prices))
        else:
            costs.append(_unknown("reference", device, "came with its weights: what it cost is not known here"))
        if pool is None:
            costs.append(_unknown("cache", device, "the curated run was not found"))
        else:
            costs += [
                cost._replace(part="cache", about="embedding the pool with the reference")
                for cost in curation_costs(pool, prices)[:1]
            ]
    loaded, trained = (_total_of(run, name) for name in ("samples_loaded", "samples_trained"))
    if scores_in_a_pool(run):
        costs.append(_scoring_actors(run, device, loaded, prices))
        parts = (
            ("waiting for rows", ("seconds_wait",), loaded),
            ("training", ("seconds_step", "seconds_ledger"), trained),
        )
    else:
        parts = (
            ("waiting for rows", ("seconds_wait",), loaded),
            ("scoring and selecting", SCORING, loaded),
            ("training", ("seconds_step",), trained),
        )
    spent = [(part, _sum(run.steps, columns), samples) for part, columns, samples in parts]
    whole, joules = sum(seconds or 0.0 for _, seconds, _ in spent), _joules(run)
    for part, seconds, samples in spent:
        if seconds is not None:
            used = joules * seconds / whole if joules is not None and whole else None
            costs.append(_cost(part, device, seconds, seconds * held / HOUR_S, samples, prices, joules=used))
    return costs


def scores_in_a_pool(run: TrainingRun) -> bool:
    """True if actors of their own scored for the workers."""
    return run.recipe.get("train", {}).get("scoring") == "pool"


def _scoring_actors(run: TrainingRun, device: str, loaded: float | None, prices: Prices) -> Cost:
    """What the scoring actors held: a GPU each, or a core, beside the workers and for as long as these trained."""
    actors = run.recipe.get("compute", {}).get("scoring_actors", 1)
    seconds = _total_of(run, "seconds")
    hours = None if seconds is None else seconds * actors / HOUR_S
    about = f"{actors} held for the whole run, beside the workers"
    return _cost(SCORING_ACTORS, device, seconds, hours, loaded, prices, about=about)


def device_of(run: TrainingRun) -> str:
    """cuda or cpu, by the recipe; `auto` is what the steps of a run do not tell, and is taken for a GPU."""
    return "cpu" if run.recipe.get("compute", {}).get("device") == "cpu" else "cuda"


def needs_reference(run: TrainingRun) -> bool:
    """True if the run's method looks at a reference."""
    return any(
        name.startswith("reference_") for name in selector_of(run.recipe.get("method", {"name": "uniform"})).needs
    )


def estimates(run: CurationRun, prices: Prices, *, table_bytes_per_row: float) -> list[Estimate]:
    """POOL_SIZES at the rates of this run's scoring; empty if it scored nothing."""
    scoring = next((cost for cost in curation_costs(run, prices) if cost.part == "scoring"), None)
    if scoring is None or not scoring.samples or not scoring.device_hours:
        return []
    found = []
    for samples in POOL_SIZES:
        times = samples / scoring.samples
        found.append(
            Estimate(
                samples=samples,
                hours=None if scoring.seconds is None else scoring.seconds * times / HOUR_S,
                device_hours=scoring.device_hours * times,
                money=None if scoring.money is None else scoring.money * times,
                kwh=(scoring.kwh or 0.0) * times,
                gigabytes=table_bytes_per_row * samples / 1e9,
            )
        )
    return found


def _total(reference: TrainingRun, prices: Prices) -> Cost:
    whole = training_costs(reference, None, None, prices)
    seconds = sum(cost.seconds or 0.0 for cost in whole if cost.part != SCORING_ACTORS)  # at the same time as the rest
    hours = sum(cost.device_hours or 0.0 for cost in whole)
    samples = _total_of(reference, "samples_trained")
    return _cost(
        "reference",
        device_of(reference),
        seconds,
        hours,
        samples,
        prices,
        about="training it",
        joules=_joules(reference),
    )


def _unknown(part: str, device: str, about: str) -> Cost:
    return Cost(part, device, None, None, None, None, None, about=about)


def _cost(
    part: str,
    device: str,
    seconds: float | None,
    hours: float | None,
    samples: float | None,
    prices: Prices,
    *,
    about: str = "",
    joules: float | None = None,
) -> Cost:
    price = prices.hour(device)
    money = None if hours is None or price is None else hours * price
    estimate = None if hours is None else hours * prices.watts(device) / 1000
    kwh = estimate if joules is None else joules / KWH_J
    return Cost(part, device, seconds, hours, samples, money, kwh, joules is not None, about)


def _joules(run: TrainingRun) -> float | None:
    """What all steps used; None if of one it is not known, or others scored for the workers, whom no step counts."""
    if "joules" not in run.steps.column_names or scores_in_a_pool(run):
        return None
    used = run.steps["joules"].to_pylist()
    return None if None in used else float(sum(used))


def _total_of(run: TrainingRun, column: str) -> float | None:
    """What a run had come to at its last step, also if it did not come to its account; None if it noted no step."""
    there = len(run.steps) and column in run.steps.column_names
    return float(run.steps[column][-1].as_py()) if there else None


def _sum(steps: pa.Table, columns: Sequence[str]) -> float | None:
    """The sum of the columns that a log has; None if it has none of them."""
    there = [name for name in columns if name in steps.column_names]
    return float(sum(sum(value or 0.0 for value in steps[name].to_pylist()) for name in there)) if there else None
