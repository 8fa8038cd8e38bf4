"""Dashboard and alerts: whole, and each metric that they name is one that we, or Ray, export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from curation.distributed import metrics
from curation.distributed.metrics import METRICS, RunMetrics, exported

CLUSTER = Path(__file__).parents[2] / "cluster"
RAYS_OWN = {"ray_node_gpus_utilization"}
OURS = {exported(name): metric for name, metric in METRICS.items()}

DASHBOARD = json.loads((CLUSTER / "grafana.json").read_text())
ALERTS = yaml.safe_load((CLUSTER / "alerts.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
PROMTOOL = shutil.which("promtool")
EXPRESSIONS = [*QUERIES, *(rule["expr"] for rule in RULES)]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_and_label_of_an_expression_is_exported(expression: str) -> None:
    named = set(re.findall(r"\bray_\w+", expression))
    assert named and named <= OURS.keys() | RAYS_OWN
    assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")
    labels = {"run", "instance"}.union(*(OURS[name].labels for name in named & OURS.keys()))
    selected = set(re.findall(r"(\w+)[=!]", " ".join(re.findall(r"\{([^}]*)\}", expression))))
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"(?:by|on) \(([^)]*)\)", expression))))
    assert selected | grouped <= labels
    for name in named & OURS.keys():  # a counter is looked at by its growth only
        if OURS[name].kind == "counter":
            assert all(re.search(r"(rate|increase)\($", before) for before in expression.split(name)[:-1])


def test_every_metric_of_ours_is_in_a_panel() -> None:
    assert OURS.keys() <= set(re.findall(r"\bray_\w+", " ".join(QUERIES)))


def test_the_dashboard_is_whole() -> None:
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["uid"] and DASHBOARD["title"]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [target["refId"] for target in panel["targets"]] == ["A"]
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "run"}


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 5
    for rule in RULES:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "action"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def test_prometheus_reads_the_rules_and_finds_both_kinds_of_cluster() -> None:
    config = yaml.safe_load((CLUSTER / "prometheus.yaml").read_text())
    assert [(CLUSTER / file).is_file() for file in config["rule_files"]] == [True]
    kinds = [set(job) & {"kubernetes_sd_configs", "file_sd_configs"} for job in config["scrape_configs"]]
    assert kinds == [{"kubernetes_sd_configs"}, {"file_sd_configs"}]


WORST: dict[str, Callable[[RunMetrics], None]] = {
    "CurationManyDrops": lambda run: run.embedding({"read": 9, "embedded": 0, "dropped": {"a": 9}, "seconds": {}}),
    "CurationNoCommit": lambda run: run.actors(4),
    "CurationPendingShards": lambda run: run.embedding({"shard": 0, "pending": "OSError"}),
    "CurationTrainStalls": lambda run: run.step(
        {"step": 1, "loss": None, "not_decoded": 0, "seconds_wait": 9.0}, loaded=10, trained=2
    ),
    "CurationTrainStandsStill": lambda run: run.begins(0),
}
"""What of a run is all that is ever told when its alert has to fire."""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_at_the_worst_there_is_every_series_that_an_alert_rests_on(
    rule: dict[str, Any], told: Callable[[RunMetrics], dict[str, Any]]
) -> None:
    run = RunMetrics("runs/first", again_every_s=3600.0)
    WORST[rule["alert"]](run)
    there = {exported(name) for name, values in told(run).items() if values}
    rests_on = set(re.findall(r"\bray_\w+", rule["expr"].partition(" unless ")[0]))
    assert rests_on and rests_on <= there
    if " unless " in rule["expr"] or "== 0" in rule["expr"]:  # a counter that stands still may have no series at all
        assert {OURS[name].kind for name in rests_on} == {"gauge"}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not here")
def test_prometheus_fires_each_alert_when_it_should_and_only_then() -> None:
    assert PROMTOOL
    rules = str(Path(__file__).with_name("alerts.yaml"))
    told = subprocess.run([PROMTOOL, "test", "rules", rules], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stdout + told.stderr


class Recorded:
    """In place of Ray's metric: what it was told."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
        self.labels = tag_keys
        self.values: list[tuple[float, dict[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0 and set(tags) == set(self.labels)
        self.values.append((value, tags))

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.labels)
        self.values.append((value, tags))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunMetrics], dict[str, Any]]:
    class Counter(Recorded):
        pass

    class Gauge(Recorded):
        pass

    monkeypatch.setattr(metrics, "Counter", Counter)
    monkeypatch.setattr(metrics, "Gauge", Gauge)
    return lambda run: {name: getattr(metric, "values") for name, metric in run._made.items()}  # noqa: B009


def test_a_shard_and_a_step_are_told_in_numbers(told: Callable[[RunMetrics], dict[str, Any]]) -> None:
    run = RunMetrics("s3://bucket/runs/first/", again_every_s=3600.0)
    run.embedding({"read": 9, "embedded": 7, "dropped": {"image:corrupt": 2}, "seconds": {"wait": 0.5, "forward": 0.0}})
    run.embedding({"shard": 1, "pending": "OSError"})
    run.step(
        {"step": 3, "loss": 0.5, "not_decoded": 0, "seconds_wait": 0.25, "seconds": 9.0, "junk_share": None},
        loaded=10,
        trained=2,
    )
    of = {"run": "first"}
    assert told(run) == {
        "curation_shards": [(1, {**of, "outcome": "committed"}), (1, {**of, "outcome": "pending"})],
        "curation_samples_read": [(9, of)],
        "curation_images_embedded": [(7, of)],
        "curation_samples_dropped": [(2, {**of, "reason": "image:corrupt"})],
        "curation_actor_seconds": [(0.5, {**of, "stage": "wait"})],
        "curation_train_step": [(3.0, of)],
        "curation_train_loss": [(0.5, of)],
        "curation_train_junk_share": [],
        "curation_ledger_records": [(10, of)],
        "curation_train_samples": [(10.0, {**of, "what": "loaded"}), (2.0, {**of, "what": "trained"})],
        "curation_train_seconds": [(0.25, {**of, "phase": "wait"})],
    }
