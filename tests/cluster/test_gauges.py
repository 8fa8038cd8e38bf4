"""Gauges stay at the metrics port for as long as what they tell of goes on. The port is a stand-in here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from curation.distributed import metrics
from curation.distributed.gauges import LastingGauges
from curation.distributed.metrics import RunMetrics, run_name

EVERY_S = 0.02


class Port:
    """In place of Ray's gauge: when each value was set, and with which tags."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, dict[str, str]]] = []

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.heard.append((value, tags))


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(EVERY_S)


def test_each_gauge_is_set_again_to_its_last_value_until_it_is_closed() -> None:
    port, gauges = Port(), LastingGauges(every_s=EVERY_S)
    gauge = cast(Any, port)
    gauges.set(gauge, 1)
    gauges.set(gauge, 2)
    gauges.set(gauge, 7, {"ledger": "score"})
    said = len(port.heard)
    wait_for(lambda: port.heard[said:].count((2, {})) >= 3 and port.heard[said:].count((7, {"ledger": "score"})) >= 3)
    assert (1, {}) not in port.heard[said:]
    gauges.close()
    said = len(port.heard)
    gauges.set(gauge, 3)  # told, but not again
    time.sleep(5 * EVERY_S)
    assert port.heard[said:] == [(3, {})]


def test_gauges_that_nobody_holds_are_forgotten() -> None:
    port, gauges = Port(), LastingGauges(every_s=EVERY_S)
    before = set(threading.enumerate())
    gauges.set(cast(Any, port), 1)
    [thread] = set(threading.enumerate()) - before
    del gauges
    wait_for(lambda: not thread.is_alive())


def test_a_value_that_is_set_now_is_not_followed_by_one_from_before() -> None:
    port, gauges = Port(), LastingGauges(every_s=1e-4)
    for value in range(2000):
        gauges.set(cast(Any, port), value)
    gauges.close()
    values = [value for value, _ in port.heard]
    assert values == sorted(values)


def test_a_run_that_stands_still_goes_on_telling_its_actors_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    port = Port()

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
            self.set = port.set

    monkeypatch.setattr(metrics, "Gauge", Gauge)
    with RunMetrics("runs/first", again_every_s=EVERY_S) as run:
        run.actors(4)
        wait_for(lambda: len(port.heard) >= 4)
    assert set(map(str, port.heard)) == {str((4, {"run": "first"}))}
    said = len(port.heard)
    time.sleep(5 * EVERY_S)
    assert len(port.heard) == said


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("s3://bucket/runs/first/", "first"),
        ("first", "first"),
        ("s3://bucket/nightly/laion/run", "laion"),
        ("/data/pools/news/run/", "news"),
        ("run", "run"),
        ("/run", "run"),
    ],
)
def test_a_run_is_called_by_its_folder_and_a_nightly_by_the_folder_of_its_nights(output: str, name: str) -> None:
    assert run_name(output) == name
