"""Deaths point at samples: by the notes of the dead, by who is decoded alone, after three of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from curation.data.attempts import MAX_DEATHS, Deaths, Doing, Step, Turns, Verdict, WorkRecord, read_work

DIES = """
import os, signal, sys
from curation.data.attempts import Step, WorkRecord
record = WorkRecord(slots=8, folder=sys.argv[1])
with record.doing(Step.FORWARD, 3), record.doing(Step.DECODE, 7, 1024):
    with record.doing(Step.DECODE, 7, 2048):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_had_in_its_hands_is_read_from_its_notes(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    assert died.returncode == -signal.SIGKILL
    [notes] = tmp_path.iterdir()
    work = read_work(str(notes))
    assert {(step.step, step.shard, step.offset) for step in work} == {(Step.FORWARD, 3, -1), (Step.DECODE, 7, 1024)}
    assert all(0 <= step.seconds < 60 for step in work)


def test_more_steps_than_slots_are_an_error_and_a_step_that_fails_gives_its_slot_back(tmp_path: Path) -> None:
    record = WorkRecord(slots=1, folder=str(tmp_path))
    with pytest.raises(OSError, match="broken"), record.doing(Step.DECODE, 0, 0):
        raise OSError("broken")
    assert read_work(record.path) == []
    with record.doing(Step.DECODE, 0, 0), pytest.raises(IndexError), record.doing(Step.DECODE, 0, 1):
        pass


def decoding(shard: int, *offsets: int) -> list[Doing]:
    return [Doing(Step.DECODE, shard, offset, 0.1) for offset in offsets]


FORWARD = Doing(Step.FORWARD, 5, -1, 0.1)


def test_three_workers_that_die_at_one_sample_set_it_aside_and_its_first_neighbours_stay() -> None:
    deaths = Deaths()
    deaths.note("a", decoding(5, 512, 1024), held=[5, 6])
    assert deaths.verdict(5) == Verdict(suspects=frozenset({512, 1024})) and deaths.verdict(6) == Verdict()
    deaths.note("b", decoding(5, 512), held=[5])
    deaths.note("b", decoding(5, 512), held=[5])  # told twice: one death
    assert not deaths.verdict(5).set_aside
    deaths.note("c", decoding(5, 512), held=[5])
    assert deaths.verdict(5) == Verdict(set_aside=frozenset({512}), suspects=frozenset({1024}))


def test_three_deaths_at_no_sample_set_the_shard_aside() -> None:
    deaths = Deaths()
    for worker in "abc":
        assert not deaths.verdict(5).whole
        deaths.note(worker, [FORWARD], held=[5, 6])
    assert deaths.verdict(5).whole and not deaths.verdict(6).whole
    for worker in "def":
        deaths.note(worker, [Doing(Step.READ, 7, 512, 0.1)], held=[7])
    assert deaths.verdict(7).whole


def test_deaths_that_samples_explain_are_not_the_shards() -> None:
    """The model runs beside the first death of each of three samples: three deaths that could be the shard's."""
    deaths = Deaths()
    for offset in (512, 1024, 1536):
        deaths.note(f"{offset} first", [FORWARD, *decoding(5, offset)], held=[5])
        for number in range(MAX_DEATHS - 1):
            deaths.note(f"{offset} {number}", decoding(5, offset), held=[5])
    assert deaths.verdict(5) == Verdict(set_aside=frozenset({512, 1024, 1536}))


def test_a_death_that_was_told_to_blame_nothing_blames_nothing_later() -> None:
    deaths = Deaths()
    for worker in "abc":
        deaths.note(worker, [], held=())
        deaths.note(worker, [FORWARD], held=[5])
    assert deaths.verdict(5) == Verdict()


def test_deaths_that_a_sample_explains_are_no_other_shards() -> None:
    deaths = Deaths()
    for number in range(MAX_DEATHS):
        deaths.note(f"{number}", [FORWARD, *decoding(6, 512)], held=[5, 6])
    assert deaths.verdict(6).set_aside and not deaths.verdict(5).whole


def test_who_is_alone_has_nobody_beside_and_waits_for_no_newcomer() -> None:
    turns, together, alone, seen = Turns(), [0], [0], []

    def work(is_alone: bool) -> None:
        mine = alone if is_alone else together
        for _ in range(50):
            with turns.alone() if is_alone else turns.together():
                mine[0] += 1
                seen.append((together[0], alone[0]))
                time.sleep(1e-4)
                mine[0] -= 1

    threads = [threading.Thread(target=work, args=(number < 2,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads) and len(seen) == 250
    assert all(one == 0 or (one == 1 and many == 0) for many, one in seen)


def test_a_note_costs_next_to_nothing(tmp_path: Path) -> None:
    """Twenty microseconds beside the milliseconds of a decode; 3 on a quiet core."""
    record, turns, count = WorkRecord(slots=8, folder=str(tmp_path)), Turns(), 20_000
    best = float("inf")
    for _ in range(3):
        begun = time.thread_time()
        for offset in range(count):
            with turns.together(), record.doing(Step.DECODE, 1, offset):
                pass
        best = min(best, (time.thread_time() - begun) / count)
    print(f"{best * 1e6:.2f} us a sample, process {os.getpid()}")
    assert best < 20e-6
