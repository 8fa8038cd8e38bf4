"""What a run tells Prometheus through Ray's metrics port: every metric that dashboards and alerts may name.

Ray puts `ray_` before a name and `_total` behind a counter's. Each has the label `run`, the last part of the output's
URL; for a nightly run, which is OUTPUT/run, that of OUTPUT. Metrics come from the driver of a curation and from rank 0
of a training, about ten seconds late; a run that is shorter may never be seen. A gauge is there while a curation embeds
or a training runs, whether it gets on or not; a counter, from its first count on. Shares are left to the query:
counters add up over runs and restarts, shares do not.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

from ray.util.metrics import Counter, Gauge

from curation.data import nights
from curation.data.pieces import Record
from curation.data.step_log import Row
from curation.distributed.gauges import AGAIN_EVERY_S, LastingGauges


class Metric(NamedTuple):
    """One metric: its kind, what it says, and its labels beside `run`."""

    kind: Literal["counter", "gauge"]
    says: str
    labels: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    "curation_shards": Metric("counter", "Shards committed, or left pending", ("outcome",)),
    "curation_images_embedded": Metric("counter", "Images embedded and committed"),
    "curation_samples_read": Metric("counter", "Samples of committed shards, embedded or dropped"),
    "curation_samples_dropped": Metric("counter", "Samples dropped in committed shards, by reason", ("reason",)),
    "curation_actor_seconds": Metric("counter", "Actors' seconds in committed shards, by stage", ("stage",)),
    "curation_actors": Metric("gauge", "Embedding actors of the run"),
    "curation_train_step": Metric("gauge", "Steps done"),
    "curation_train_loss": Metric("gauge", "Loss of the last step"),
    "curation_train_samples": Metric("counter", "Samples loaded, trained, or no longer decodable", ("what",)),
    "curation_train_seconds": Metric("counter", "Rank 0's seconds by phase; wait is the feed's stall", ("phase",)),
    "curation_ledger_records": Metric("counter", "Scores handed to the ledger"),
    "curation_train_junk_share": Metric("gauge", "Known junk in the last step's selection"),
}
"""Name -> metric, without Ray's prefix and suffix."""


def exported(name: str) -> str:
    """The name under which Prometheus finds a metric."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


def run_name(output: str) -> str:
    """The label `run` of an output."""
    output = output.rstrip("/")
    above, _, last = output.rpartition("/")
    return run_name(above) if above and nights.run_url(above) == output else last


class RunMetrics:
    """The metrics of one run, made when they are first set. Needs a connected Ray, and is closed when the run ends."""

    def __init__(self, output: str, *, again_every_s: float = AGAIN_EVERY_S):
        self._run = run_name(output)
        self._made: dict[str, Counter | Gauge] = {}
        self._gauges = LastingGauges(every_s=again_every_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The run has ended: its gauges vanish."""
        self._gauges.close()

    def embedding(self, record: Record) -> None:
        """A shard was committed, or left pending."""
        self._add("curation_shards", 1, outcome="pending" if "pending" in record else "committed")
        if "pending" in record:
            return
        self._add("curation_samples_read", record["read"])
        self._add("curation_images_embedded", record["embedded"])
        for reason, count in record["dropped"].items():
            self._add("curation_samples_dropped", count, reason=reason)
        for stage, seconds in record["seconds"].items():
            self._add("curation_actor_seconds", seconds, stage=stage)

    def actors(self, count: int) -> None:
        """How many actors the run has."""
        self._set("curation_actors", count)

    def begins(self, step: int) -> None:
        """A training begins, or goes on, after so many steps."""
        self._set("curation_train_step", step)

    def step(self, noted: Row, *, loaded: int, trained: int) -> None:
        """A training step, as the log has it."""
        self._set("curation_train_step", float(noted["step"] or 0))
        self._set("curation_train_loss", noted["loss"])
        self._set("curation_train_junk_share", noted.get("junk_share"))
        self._add("curation_ledger_records", loaded)
        for what, count in (("loaded", loaded), ("trained", trained), ("not_decoded", noted["not_decoded"])):
            self._add("curation_train_samples", float(count or 0), what=what)
        for name, seconds in noted.items():
            if name.startswith("seconds_") and isinstance(seconds, float):
                self._add("curation_train_seconds", seconds, phase=name.removeprefix("seconds_"))

    def _add(self, name: str, value: float, **labels: str) -> None:
        metric = self._metric(name)
        assert isinstance(metric, Counter)
        if value > 0:  # Ray's counters refuse 0
            metric.inc(value, tags={"run": self._run, **labels})

    def _set(self, name: str, value: float | str | None) -> None:
        metric = self._metric(name)
        assert isinstance(metric, Gauge)
        if isinstance(value, int | float):
            self._gauges.set(metric, value, {"run": self._run})

    def _metric(self, name: str) -> Counter | Gauge:
        if name not in self._made:
            known = METRICS[name]
            kind = Counter if known.kind == "counter" else Gauge
            self._made[name] = kind(name, description=known.says, tag_keys=("run", *known.labels))
        return self._made[name]
