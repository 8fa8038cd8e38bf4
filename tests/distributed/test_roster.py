"""What the roster blames for a death, without Ray: the looks of nodes are given."""

from __future__ import annotations

import threading

import pytest

from curation.data.attempts import MAX_DEATHS, Doing, Step, Verdict
from curation.distributed import roster
from curation.distributed.roster import Roster, Seen, Worker

SLOW_MODEL = Doing(Step.FORWARD, 0, -1, seconds=20.0)


def worker(name: str) -> Worker:
    return Worker("run", name, node="node", host="host", pid=1, started="1", notes="notes")


def test_a_slow_model_costs_no_shard_whoever_hears_first_of_the_workers_that_a_look_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A look kills a worker and waits for another node's answer; before it comes, Ray gives the shard to the next."""
    asked, elsewhere = threading.Event(), threading.Event()

    def answer(question: tuple[Worker, float | None], *, timeout_s: float) -> Seen:
        about, wedged_after_s = question
        if about.name == "elsewhere":
            asked.set()
            assert elsewhere.wait(30)
            return Seen(alive=True, doing=[])
        return Seen(alive=wedged_after_s is not None, doing=[SLOW_MODEL], killed=wedged_after_s is not None)

    monkeypatch.setattr(roster, "_ask", lambda worker, wedged_after_s: (worker, wedged_after_s))
    monkeypatch.setattr(roster, "_answer", answer)
    kept = Roster()
    kept.begin(worker("0"), "shard", 0)
    kept.begin(worker("elsewhere"), "shard", 1)
    for number in range(MAX_DEATHS):
        asked.clear()
        elsewhere.clear()
        look = threading.Thread(target=kept.look, args=("run",), kwargs={"wedged_after_s": 8.0})
        look.start()
        assert asked.wait(30)
        begin = threading.Thread(target=kept.begin, args=(worker(str(number + 1)), "shard", 0))
        begin.start()
        begin.join(0.2)
        elsewhere.set()
        look.join(30)
        begin.join(30)
        assert not look.is_alive() and not begin.is_alive()
    assert kept.verdict("run", 0) == Verdict()
