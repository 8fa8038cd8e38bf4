"""Nothing acknowledged is lost, nothing counts twice, a restore is exactly its snapshot; without Ray."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.addresses import pack
from curation.data import storage
from curation.distributed import ledger_log
from curation.distributed.durable_ledger import DurableLedger, LedgerTaken
from curation.distributed.ledger_writes import SESSION, AbandonedAttempt
from curation.ledger import Ledger, LedgerSpec

SIZES = np.array([5, 0, 7, 3])
ADDRESSES = np.concatenate([pack(shard, np.arange(size)) for shard, size in enumerate(SIZES)])
SPECS = {"last": LedgerSpec(), "mean": LedgerSpec("mean"), "ema": LedgerSpec("ema", decay=0.5, variance=True)}


def make(folder: str | Path, **options: Any) -> DurableLedger:
    return DurableLedger(str(folder), SIZES, SPECS, **options)


def columns(ledger: Ledger) -> dict[str, list[Any]]:
    """All that a ledger knows."""
    return {name: column.tolist() for name, column in ledger.export(ADDRESSES).items()}


def scores(seed: int, *, rows: int = 6) -> dict[str, Any]:
    """A write's contents: scores of `rows` addresses, repeats among them, and some uses."""
    rng = np.random.default_rng(seed)
    return {
        "name": ["last", "mean", "ema"][seed % 3],
        "addresses": rng.choice(ADDRESSES, rows),
        "values": rng.normal(size=rows).astype(np.float32),
        "used": rng.choice(ADDRESSES, 3),
    }


def send(ledger: DurableLedger, numbers: Sequence[int], *, attempt: int = 0, writer: str = "w") -> None:
    """Writes number n of step n // 3, for each n."""
    for n in numbers:
        ledger.write(writer, n, attempt=attempt, step=n // 3, **scores(n))


def settle(ledger: DurableLedger, *, attempt: int = 0) -> None:
    """Apply what waits, whoever it waits for."""
    ledger.snapshot("settled", attempt)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on a disk, and one in a store that cannot append."""
    return str(tmp_path / "ledger") if request.param == "disk" else f"memory://{uuid4().hex}/ledger"


# What was acknowledged is there after a kill.


def test_a_kill_at_any_byte_of_the_log_loses_only_what_was_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # a thousand recoveries, none of which loses power
    ledger = make(tmp_path / "whole")
    ledger.open("w", 0)
    send(ledger, range(4))
    (log,) = (tmp_path / "whole" / "log").iterdir()
    ends, states = [log.stat().st_size], [columns(ledger.ledger)]
    for n in range(4, 6):
        send(ledger, [n])
        ends.append(log.stat().st_size)
        states.append(columns(ledger.ledger))
    for cut in range(ends[0], ends[-1] + 1):
        killed = tmp_path / "killed"
        shutil.copytree(tmp_path / "whole", killed)
        with open(killed / "log" / log.name, "r+b") as file:
            file.truncate(cut)
        acknowledged = sum(end <= cut for end in ends) - 1
        recovered = make(killed)
        assert columns(recovered.ledger) == states[acknowledged]
        send(recovered, range(6))  # the writer sends all again
        assert columns(recovered.ledger) == states[-1]
        shutil.rmtree(killed)


def test_zeros_in_place_of_the_last_record_are_cut_off_and_it_can_be_sent_again(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    ledger.open("w", 0)
    send(ledger, range(3))
    (log,) = (tmp_path / "log").iterdir()
    before, end = columns(ledger.ledger), log.stat().st_size
    send(ledger, [3])
    after, size = columns(ledger.ledger), log.stat().st_size
    for start in (end, end + 30):  # from the frame on, or from within the body
        data = log.read_bytes()
        log.write_bytes(data[:start] + bytes(size - start))
        recovered = make(tmp_path)
        assert columns(recovered.ledger) == before
    send(recovered, [3])
    assert columns(recovered.ledger) == after


def test_damage_anywhere_but_at_the_end_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    ledger = make(tmp_path / "whole")
    ledger.open("w", 0)
    send(ledger, range(3))
    (log,) = (tmp_path / "whole" / "log").iterdir()
    start, data = log.stat().st_size, bytearray(log.read_bytes())
    send(ledger, [3, 4])
    data = log.read_bytes()
    for at in random.Random(0).sample(range(start), 60):
        damaged = tmp_path / f"damaged-{at}"
        shutil.copytree(tmp_path / "whole", damaged)
        (damaged / "log" / log.name).write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"\.log is damaged: .* at byte \d+"):
            make(damaged)
    log.unlink()
    with pytest.raises(FileNotFoundError, match=log.name):
        make(tmp_path / "whole")


def test_a_record_object_that_is_missing_or_damaged_is_an_error() -> None:
    url = f"memory://{uuid4().hex}"
    ledger = make(url)
    ledger.open("w", 0)
    send(ledger, range(3))
    segment = storage.join(url, "log", ledger._log.name)
    name = storage.join(segment, "00000002.rec")
    data = storage.read_bytes(name)
    for wrong in (data[:-1], data + b"\0", bytes(len(data)), b""):
        storage.write_bytes(name, wrong)
        with pytest.raises(ValueError, match=r"00000002.rec is damaged"):
            make(url)
    storage.delete(name)
    with pytest.raises(ValueError, match="is damaged: of its records 0 to 4 not all are there"):
        make(url)
    for left in storage.names_in(segment):
        storage.delete(storage.join(segment, left))
    with pytest.raises(ValueError, match="is damaged: of its records 0 to 0 not all are there"):
        make(url)


def test_a_ledger_made_anew_is_what_it_was_however_often(folder: str) -> None:
    ledger = make(folder)
    ledger.open("w", 0)
    plain = make(f"memory://{uuid4().hex}")
    plain.open("w", 0)
    for n in range(12):
        send(ledger, [n])
        send(plain, [n])
        ledger = make(folder)
        assert columns(ledger.ledger) == columns(plain.ledger)
        assert ledger.waiting_bytes == plain.waiting_bytes
        assert ledger.log_bytes > plain.log_bytes  # that, and the beginning of each segment
    settle(ledger)
    settle(plain)
    assert columns(make(folder).ledger) == columns(plain.ledger)


class FullDisk:
    """A file that takes `room` bytes and no more, or whose fsync or truncate fails."""

    def __init__(self, file: Any, *, room: int, may_truncate: bool = True):
        self.file, self.room, self.may_truncate = file, room, may_truncate

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def truncate(self) -> int:
        if not self.may_truncate:
            raise OSError(5, "Input/output error")
        return self.file.truncate()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("may_truncate", [True, False])
def test_a_write_that_the_disk_did_not_take_was_never_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_truncate: bool
) -> None:
    ledger = make(tmp_path / "one", fsync=True)
    ledger.open("w", 0)
    send(ledger, range(3))
    before = columns(ledger.ledger)
    whole = ledger._log._file
    for room in (0, 1, 25, 200, 1 << 20):  # with room for all of it, fsync fails
        with monkeypatch.context() as patched:
            patched.setattr(ledger._log, "_file", FullDisk(whole, room=room, may_truncate=may_truncate))
            if room == 1 << 20:
                patched.setattr(ledger_log.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(OSError, match="No space left" if may_truncate else "Input/output error"):
                send(ledger, [3])
        assert columns(ledger.ledger) == before
        if may_truncate:  # killed now, it knows nothing of the write
            shutil.copytree(tmp_path / "one", tmp_path / f"killed-{room}")
            assert columns(make(tmp_path / f"killed-{room}").ledger) == before
    # A shorter record than the one that failed, so a rest of that one would show.
    ledger.write("w", 3, attempt=0, step=1, name="last", addresses=ADDRESSES[:1], values=[1.0])
    assert columns(make(tmp_path / "one").ledger) == columns(ledger.ledger) != before


def test_fsync_reaches_the_disk_before_the_acknowledgement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    ledger = make(tmp_path, fsync=True)
    ledger.open("w", 0)
    (log,) = (tmp_path / "log").iterdir()
    monkeypatch.setattr(ledger_log.os, "fsync", lambda _: synced.append(log.stat().st_size))
    send(ledger, [0])
    assert synced == [log.stat().st_size]


# Numbers.


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_retried_and_reordered_writes_count_once(rng: random.Random) -> None:
    once = make(f"memory://{uuid4().hex}")
    url = f"memory://{uuid4().hex}"
    often = make(url)
    numbers = [n for n in range(24) if n % 3 == 0]  # `last`, whose value no order changes
    for ledger in (once, often):
        ledger.open("w", 0)
    for at, n in enumerate(numbers):
        once.write("w", at, attempt=0, step=at, **scores(n))
    sent = list(enumerate(numbers)) * 2
    rng.shuffle(sent)
    applied = 0
    for at, n in sent:
        applied += often.write("w", at, attempt=0, step=at, **scores(n))
        if rng.random() < 0.2:
            often = make(url)
    assert applied == len(numbers)
    assert columns(often.ledger) == columns(once.ledger)


def test_a_writer_that_opens_again_begins_anew_and_its_former_life_is_refused(folder: str) -> None:
    ledger = make(folder)
    assert ledger.open("w", 0) == 0
    send(ledger, [0, 1])
    ledger = make(folder)
    first = ledger.open("w", 0)
    assert first == SESSION
    before = columns(ledger.ledger)
    for late in (1, 2):
        with pytest.raises(AbandonedAttempt, match=f"write {late} of 'w' is from before the writer opened again"):
            send(ledger, [late])
    assert columns(ledger.ledger) == before
    assert ledger.write("w", first, attempt=0, step=9, **scores(0))
    ledger.close("w", 0, 0)  # the former life's close, late
    assert ledger.write("w", first + 1, attempt=0, step=9, **scores(0))
    ledger.close("w", 0, first)
    with pytest.raises(ValueError, match="writer 'w' is not open"):
        ledger.write("w", first + 2, attempt=0, step=9, **scores(0))
    with pytest.raises(ValueError, match="writer 'other' is not open"):
        ledger.write("other", 0, attempt=0, step=9, **scores(0))
    with pytest.raises(ValueError, match="is beyond what it opened"):
        ledger.write("w", ledger.open("w", 0) + SESSION, attempt=0, step=9, **scores(0))


def test_what_is_refused_leaves_no_trace(folder: str) -> None:
    ledger = make(folder)
    ledger.open("w", 0)
    send(ledger, range(6))
    before, size = columns(ledger.ledger), ledger.log_bytes
    good = scores(6)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"values": np.array([1, 2, np.nan, np.inf, -1e39, 0])}, ValueError, r":nan, \d+:inf, \d+:-inf$"),
        ({"values": np.zeros(5)}, ValueError, r"values must be of shape \(6,\) as the addresses are, got \(5,\)"),
        ({"addresses": np.array([0, 1, 2, 3, 4, 5])}, KeyError, "address 5 is not in the pool"),
        ({"used": np.array([-1])}, KeyError, "address -1 is not in the pool"),
        ({"addresses": np.zeros(6)}, ValueError, "addresses must be integers of shape"),
        ({"used": np.zeros((1, 1), int)}, ValueError, "used must be integers of shape"),
        ({"name": "lest"}, ValueError, r"no ledger is named 'lest', did you mean \['last'\]"),
        ({"name": None}, ValueError, "scores without a ledger's name"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"step": 1 << 32}, ValueError, "step must be in"),
        ({"step": 0}, ValueError, "a writer's steps never decrease: write 6 of 'w' is of step 0, .* steps 1 and"),
    ]
    for changed, error, match in wrong:
        with pytest.raises(error, match=match):
            ledger.write("w", 6, **{"attempt": 0, "step": 2, **good, **changed})
    assert (columns(ledger.ledger), ledger.log_bytes) == (before, size)
    send(ledger, [6])
    assert columns(make(folder).ledger) == columns(ledger.ledger) != before


def test_a_write_that_was_overtaken_must_lie_between_the_steps_around_it(folder: str) -> None:
    ledger = make(folder)
    ledger.open("w", 0)
    for number, step in ((0, 3), (2, 5)):
        ledger.write("w", number, attempt=0, step=step, **scores(0))
    for step in (2, 6):
        with pytest.raises(ValueError, match=f"write 1 of 'w' is of step {step}, those around it are of steps 3 and 5"):
            ledger.write("w", 1, attempt=0, step=step, **scores(0))
    assert ledger.write("w", 1, attempt=0, step=4, **scores(0))


def test_a_write_may_carry_scores_alone_uses_alone_or_nothing(folder: str) -> None:
    ledger = make(folder)
    ledger.open("w", 0)
    one, none = ADDRESSES[:1], np.zeros(0, np.int64)
    ledger.write("w", 0, attempt=0, step=0, name="last", addresses=one, values=[2.5])
    ledger.write("w", 1, attempt=0, step=0, name=None, addresses=none, values=[], used=ADDRESSES[[0, 0, 1]])
    ledger.write("w", 2, attempt=0, step=0, name="last", addresses=[], values=[])
    for each in (ledger, make(folder)):
        state = columns(each.ledger)
        assert (state["last.value"][0], state["last.count"][0], sum(state["last.count"])) == (2.5, 1, 1)
        assert state["usage"][:3] == [2, 1, 0]


# Going back.


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.randoms(use_true_random=False))
def test_a_rollback_equals_never_having_gone_on(before: int, lost: int, after: int, rng: random.Random) -> None:
    def maybe_killed(ledger: DurableLedger, url: str) -> DurableLedger:
        return make(url) if rng.random() < 0.5 else ledger

    here, there = (f"memory://{uuid4().hex}" for _ in range(2))
    straight, rolled = make(there), make(here)
    for ledger in (straight, rolled):
        ledger.open("w", 0)
        send(ledger, range(before))
        ledger.snapshot("tag", 0)
    saved = columns(rolled.ledger)
    rolled = maybe_killed(rolled, here)
    send(rolled, range(before, before + lost))
    rolled.open("other", 0)
    rolled = maybe_killed(rolled, here)
    rolled.restore("tag", 1)
    assert columns(rolled.ledger) == saved
    rolled = maybe_killed(rolled, here)
    assert straight.open("w", 0) == SESSION
    first = rolled.open("w", 1)
    for n in range(after):
        straight.write("w", SESSION + n, attempt=0, step=before + n, **scores(100 + n))
        rolled.write("w", first + n, attempt=1, step=before + n, **scores(100 + n))
        rolled = maybe_killed(rolled, here)
        with pytest.raises(AbandonedAttempt, match="attempt 0 was given up, the ledger was restored for attempt 1"):
            rolled.write("w", before + lost + n, attempt=0, step=99, **scores(0))
        rolled.restore("tag", 1)  # a retry that comes late does nothing
    settle(straight)
    settle(rolled, attempt=1)
    assert columns(rolled.ledger) == columns(straight.ledger) == columns(make(here).ledger)


def test_every_call_of_an_abandoned_attempt_is_refused_and_one_that_has_not_begun_too(folder: str) -> None:
    ledger = make(folder)
    ledger.open("w", 0)
    send(ledger, range(3))
    ledger.restore(None, 3)
    assert columns(ledger.ledger) == columns(Ledger(SIZES, SPECS))
    state = ledger.ledger.export(ADDRESSES[:1])
    for attempt, error, match in [
        (2, AbandonedAttempt, "attempt 2 was given up, the ledger was restored for attempt 3"),
        (4, ValueError, "attempt 4 has not begun, the ledger is at 3: call restore first"),
    ]:
        calls: list[Callable[[int], Any]] = [
            lambda a: ledger.open("w", a),
            lambda a: ledger.close("w", a, 0),
            lambda a: send(ledger, [0], attempt=a),
            lambda a: ledger.skip("w", 0, a),
            lambda a: ledger.flush("w", 0, a),
            lambda a: ledger.snapshot("tag", a),
            lambda a: ledger.adopt("key", a, ADDRESSES[:1], state),
            lambda a: ledger.drop("key", a, ADDRESSES[:1]),
        ]
        for call in calls:
            with pytest.raises(error, match=match):
                call(attempt)
    with pytest.raises(AbandonedAttempt, match="attempt 2 was given up"):
        ledger.restore(None, 2)
    with pytest.raises(ValueError, match="attempt 3 began from None, it cannot begin from 'tag' too"):
        ledger.restore("tag", 3)
    with pytest.raises(ValueError, match=r"there is no snapshot 'tag', the snapshots are \[\]"):
        ledger.restore("tag", 4)
    with pytest.raises(ValueError, match="writer 'w' is not open"):  # it was of attempt 0
        send(ledger, [3], attempt=3)
    with pytest.raises(ValueError, match="tag must be a letter or digit, then"):
        ledger.snapshot("../tag", 3)


def test_writers_of_the_abandoned_attempt_are_waited_for_no_more(folder: str) -> None:
    ledger = make(folder)
    for writer in ("gone", "w"):
        ledger.open(writer, 0)
    ledger.snapshot("tag", 0)
    for attempt, again in ((1, False), (2, True)):
        ledger.restore("tag", attempt)
        if again:
            ledger = make(folder)
        for writer in ("gone", "w"):
            with pytest.raises(ValueError, match=f"writer {writer!r} is not open"):
                send(ledger, [0], attempt=attempt, writer=writer)
        first = ledger.open("w", attempt)
        ledger.write("w", first, attempt=attempt, step=3, **scores(2))
        ledger.flush("w", first + 1, attempt)
        assert ledger.waiting_bytes == 0
        assert ledger.ledger.known("ema") > 0


def test_a_tag_taken_again_replaces_the_former_and_only_what_is_named_stays_on_disk(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    ledger.open("w", 0)
    send(ledger, range(2))
    ledger.snapshot("a", 0, call="one")
    first = columns(ledger.ledger)
    send(ledger, range(2, 4))
    ledger.snapshot("a", 0, call="one")  # a retry of the call
    assert ledger.call_of("a") == "one"
    send(ledger, range(4, 6))
    ledger.snapshot("b", 0)
    second = columns(ledger.ledger)
    send(ledger, range(6, 9))
    ledger = make(tmp_path)
    assert ledger.log_bytes > 900
    ledger.restore("a", 1)
    assert columns(ledger.ledger) == first
    assert ledger.log_bytes < 200
    ledger.snapshot("b", 1)
    ledger.restore("b", 2)
    assert columns(ledger.ledger) == first != second
    ledger.snapshot("a", 2, call="two")
    assert ledger.call_of("a") == "two"
    assert ledger.tags == ["b", "a"]
    ledger.forget(["a", "never"])  # the base of the log, whose name alone goes
    ledger.forget(["a"])
    assert ledger.tags == ["b"]
    assert columns(make(tmp_path).ledger) == first
    ledger = make(tmp_path)
    ledger.restore("b", 3)
    ledger.forget(["b"])
    ledger.snapshot("c", 3)
    folders = {name.split("/")[0] + "/" + name.split("/")[1] for name in files(tmp_path) if "/" in name}
    assert len([name for name in folders if name.startswith("snapshots/")]) == 1
    assert len([name for name in folders if name.startswith("log/")]) == 1
    assert len(list((tmp_path / "snapshots").iterdir())) == 1


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """kill_at(n): the n-th change of a file from now on does not happen, nor anything after it."""
    left = [1 << 30]

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(*arguments, **named)

        return changed

    for name in ("write_atomic", "write_bytes", "delete"):
        monkeypatch.setattr(storage, name, counted(getattr(storage, name)))
    monkeypatch.setattr(ledger_log.Segment, "append", counted(ledger_log.Segment.append))

    def arm(n: int) -> None:
        left[0] = n

    yield arm


@pytest.mark.parametrize("call", ["snapshot", "same tag", "restore", "compaction", "start"])
def test_a_kill_between_any_two_changes_of_files_leaves_before_or_after(
    folder: str, kill_at: Callable[[int], None], call: str
) -> None:
    reached = {"before": 0, "after": 0}
    for n in range(60):
        url = storage.join(folder, str(n))
        kill_at(1 << 30)
        ledger = make(url)
        ledger.open("w", 0)
        send(ledger, range(4))
        ledger.snapshot("a", 0)
        saved = columns(ledger.ledger)
        send(ledger, range(4, 6))
        send(ledger, [7, 8])  # write 6 is on its way, so an ema waits
        before = columns(ledger.ledger)
        assert ledger.waiting_bytes
        kill_at(n)
        killed = False
        try:
            if call in ("snapshot", "same tag"):
                ledger.snapshot("b" if call == "snapshot" else "a", 0)
            elif call == "restore":
                ledger.restore("a", 1)
            elif call == "compaction":
                ledger._save(tag=None, call="")
            else:
                make(url)
        except Killed:
            killed = True
        kill_at(1 << 30)
        recovered = make(url)
        state = columns(recovered.ledger)
        if recovered.attempt == 1:
            assert state == saved
        elif call == "start" or call == "compaction":
            assert state == before
            assert recovered.waiting_bytes == ledger.waiting_bytes
        else:  # a snapshot applies what waits, and that is in the log before anything else
            settle(recovered)
            flushed = columns(recovered.ledger)
            ledger.ledger.export(ADDRESSES)
            assert state in (before, flushed)
            recovered.restore("a", 1)
            assert columns(recovered.ledger) in ((saved, flushed) if call == "same tag" else (saved,))
        reached["before" if killed else "after"] += 1
        if not killed:
            break
    assert reached["before"] >= 4
    assert reached["after"] == 1


@pytest.mark.parametrize("call", ["snapshot", "restore"])
def test_garbage_that_cannot_be_deleted_costs_no_write_and_is_deleted_later(
    folder: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fails(_: str) -> None:
        raise PermissionError("no")

    ledger = make(folder)
    ledger.open("w", 0)
    send(ledger, range(6))
    ledger.snapshot("tag", 0)
    former = ledger._log.name
    send(ledger, range(6, 9))
    with monkeypatch.context() as patched:
        patched.setattr(storage, "delete", fails)
        with pytest.raises(PermissionError):
            ledger.snapshot("tag", 0) if call == "snapshot" else ledger.restore("tag", 1)
    assert storage.exists(storage.join(folder, "log", f"{former}.log")) or storage.names_in(f"{folder}/log/{former}")
    ledger.write("w", ledger.open("w", ledger.attempt), attempt=ledger.attempt, step=9, **scores(1))
    again = make(folder)
    assert columns(again.ledger) == columns(ledger.ledger)
    again.snapshot("later", ledger.attempt)
    assert not storage.exists(storage.join(folder, "log", f"{former}.log"))
    assert not storage.names_in(storage.join(folder, "log", former))


def test_after_a_commit_of_which_nobody_knows_whether_it_was_made_nothing_is_acknowledged(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = storage.write_bytes

    def unanswered(url: str, data: bytes) -> None:
        if not url.endswith("HEAD.json") or was_made:
            write_bytes(url, data)
        if url.endswith("HEAD.json"):
            raise TimeoutError("no answer")

    for was_made in (False, True):
        ledger = make(folder)
        first = ledger.open("w", 0)
        send(ledger, range(first, first + 3))
        with monkeypatch.context() as patched:
            patched.setattr(storage, "write_bytes", unanswered)
            with pytest.raises(TimeoutError):
                ledger.snapshot("tag", 0)
        if was_made:
            with pytest.raises(LedgerTaken, match="HEAD.json is not as this process left it"):
                send(ledger, [first + 3])
        else:
            send(ledger, [first + 3])
        assert columns(make(folder).ledger) == columns(ledger.ledger)


# Compaction.


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2)), max_size=25), st.integers(0, 3))
def test_compaction_changes_nothing(writes: list[tuple[str, int]], kills: int) -> None:
    here, there = (f"memory://{uuid4().hex}" for _ in range(2))
    plain, compacted = make(there), make(here, max_log_bytes=0)
    for ledger in (plain, compacted):
        for writer in "ab":
            ledger.open(writer, 0)
    numbers, steps = dict.fromkeys("ab", 0), dict.fromkeys("ab", 0)
    for at, (writer, ahead) in enumerate(writes):
        steps[writer] += ahead
        for ledger in (plain, compacted):
            ledger.write(writer, numbers[writer], attempt=0, step=steps[writer], **scores(at))
        numbers[writer] += 1
        if at < kills:
            compacted = make(here, max_log_bytes=0)
        assert columns(compacted.ledger) == columns(plain.ledger)
        assert compacted.waiting_bytes == plain.waiting_bytes
    for writer, number in numbers.items():  # the numbers are known still
        if number:
            assert not compacted.write(writer, number - 1, attempt=0, step=steps[writer], **scores(0))
    for ledger in (plain, compacted):
        settle(ledger)
    assert columns(make(here).ledger) == columns(plain.ledger)


def test_the_log_stays_below_its_bound(tmp_path: Path) -> None:
    ledger = make(tmp_path, max_log_bytes=5_000)
    ledger.open("w", 0)
    sizes = []
    for n in range(60):
        send(ledger, [n])
        sizes.append(ledger.log_bytes)
    assert max(sizes) < 6_000
    assert sum(b < a for a, b in pairwise(sizes)) >= 2
    assert ledger.tags == []
    assert len(list((tmp_path / "snapshots").iterdir())) == 1


# ema.


@st.composite
def streams(draw: st.DrawFn) -> dict[str, list[tuple[int, list[tuple[int, float]]]]]:
    """For each of three writers: its writes in order, (step, [(row, value)])."""
    # So far apart that the order in which they are added shows.
    values = st.sampled_from([2.0**60, -(2.0**60), 1.0, -0.0, 0.1, 3.0])
    pairs = st.lists(st.tuples(st.integers(0, 4), values), max_size=4)
    return {
        writer: [(step, draw(pairs)) for step in sorted(draw(st.lists(st.integers(0, 4), max_size=5)))]
        for writer in "abc"
    }


@settings(max_examples=60, deadline=None)
@given(streams(), st.randoms(use_true_random=False))
def test_an_ema_is_a_plain_loop_over_steps_whatever_the_writers_interleave(
    writes: dict[str, list[tuple[int, list[tuple[int, float]]]]], rng: random.Random
) -> None:
    url = f"memory://{uuid4().hex}"
    ledger = make(url)
    first = {writer: ledger.open(writer, 0) for writer in writes}
    waiting = {writer: list(enumerate(sent)) for writer, sent in writes.items()}
    while any(waiting.values()):
        writer = rng.choice([writer for writer, left in waiting.items() if left])
        # The next or, as if overtaken on the way, the one after it.
        number, (step, pairs) = waiting[writer].pop(rng.randrange(min(2, len(waiting[writer]))))
        rows, values = [row for row, _ in pairs], [value for _, value in pairs]
        contents = {"step": step, "name": "ema", "addresses": ADDRESSES[rows], "values": values}
        ledger.write(writer, first[writer] + number, attempt=0, **contents)
        sent = len(writes[writer]) - len(waiting[writer])
        last_step = writes[writer][sent - 1][0]
        if all(left >= sent and later > last_step for left, (later, _) in waiting[writer]) and rng.random() < 0.5:
            ledger.flush(writer, first[writer] + sent, 0)
        if rng.random() < 0.1:
            ledger = make(url)
    for writer in rng.sample(sorted(writes), 3):
        ledger.close(writer, 0, first[writer])
    assert ledger.waiting_bytes == 0

    plain = Ledger(SIZES, SPECS)
    for step in range(5):
        pairs = sorted(pair for sent in writes.values() for of, pairs in sent if of == step for pair in pairs)
        rows, values = [row for row, _ in pairs], np.array([value for _, value in pairs], np.float32)
        plain.update("ema", ADDRESSES[np.array(rows, int)], values, step=step)
    assert columns(ledger.ledger) == columns(plain)


def ema(ledger: DurableLedger, writer: str, number: int, step: int, value: float, *, row: int = 0) -> None:
    contents = {"name": "ema", "addresses": ADDRESSES[[row]], "values": [value]}
    ledger.write(writer, number, attempt=0, step=step, **contents)


def test_the_order_of_arrival_does_not_show_in_the_last_bit() -> None:
    values = (2.0**60, -(2.0**60), 1.0)  # 1 if the 1 is added last, else 0
    results = set()
    for order in permutations(values):
        ledger = make(f"memory://{uuid4().hex}")
        for writer in "abc":
            ledger.open(writer, 0)
        for writer, value in zip("abc", order, strict=True):
            ema(ledger, writer, 0, 1, value)
        settle(ledger)
        results.add(columns(ledger.ledger)["ema.value"][0])
    assert len(results) == 1


def test_a_step_waits_for_each_open_writer_and_is_applied_once(folder: str) -> None:
    ledger = make(folder)
    for writer in "ab":
        ledger.open(writer, 0)

    def state() -> tuple[float, int]:
        known = columns(ledger.ledger)
        return known["ema.value"][0], known["ema.count"][0]

    ema(ledger, "a", 0, 1, 8.0)
    ema(ledger, "a", 1, 2, 16.0)
    assert state() == (0, 0)
    ema(ledger, "b", 0, 1, 4.0)
    assert state() == (0, 0)  # b may write of step 1 once more
    ledger.write("b", 1, attempt=0, step=2, name="ema", addresses=[], values=[])  # nothing, but it is beyond step 1
    assert state() == (6, 2)  # the mean of both, whole
    ledger.close("b", 0, 0)
    assert state() == (6, 2)  # a may write of step 2 once more
    ledger.close("a", 0, 0)
    assert state() == (11, 3)  # 0.5 * 6 + 0.5 * 16


def test_a_step_is_applied_once_all_writers_have_flushed_at_it_whoever_was_first(folder: str) -> None:
    ledger = make(folder)
    for writer in "ab":
        ledger.open(writer, 0)

    def state() -> tuple[float, int]:
        known = columns(ledger.ledger)
        return known["ema.value"][0], known["ema.count"][0]

    ema(ledger, "a", 0, 5, 8.0)
    ledger.flush("a", 1, 0)
    assert state() == (0, 0)  # b may write of step 5
    ema(ledger, "b", 1, 5, 4.0)
    ledger.flush("b", 2, 0)
    assert state() == (0, 0)  # its write 0 is on its way still
    ema(ledger, "b", 0, 5, 6.0)
    ledger = make(folder)
    ledger.flush("b", 2, 0)
    assert state() == (6, 3)
    ema(ledger, "a", 1, 6, 2.0)
    ledger.flush("a", 1, 0)  # a retry that comes late
    ledger.flush("b", 2, 0)
    assert state() == (6, 3)
    ema(ledger, "b", 2, 6, 6.0)
    ema(ledger, "b", 3, 7, 1.0)
    assert state() == (6, 3)  # a may write of step 6 once more, and does
    ema(ledger, "a", 2, 6, 4.0)
    ledger.flush("a", 3, 0)
    assert state() == (5, 6)  # 0.5 * 6 + 0.5 * (2 + 6 + 4) / 3
    assert columns(make(folder).ledger) == columns(ledger.ledger)


def test_a_step_below_one_already_applied_is_refused(folder: str) -> None:
    ledger = make(folder)
    for writer in "ab":
        ledger.open(writer, 0)
    ema(ledger, "a", 0, 7, 1.0)
    settle(ledger)
    ledger = make(folder)
    with pytest.raises(ValueError, match="'ema' is an ema: step 6 came after step 7 had been applied"):
        ema(ledger, "b", 0, 6, 1.0)
    ledger.skip("b", 0, 0)
    ledger.skip("b", 0, 0)
    ema(ledger, "b", 1, 7, 1.0)  # the same step is welcome
    ema(ledger, "b", 2, 8, 1.0)
    ema(ledger, "a", 1, 8, 1.0)
    assert columns(ledger.ledger)["ema.count"][0] == 2  # nothing waits for the write that was skipped
    assert columns(make(folder).ledger) == columns(ledger.ledger)


def test_too_much_waiting_is_an_error_that_names_the_writer_and_that_writer_may_go_on(folder: str) -> None:
    ledger = make(folder, max_waiting_bytes=30)
    for writer in "ab":
        ledger.open(writer, 0)
    ema(ledger, "b", 0, 0, 1.0)
    for number in range(2):
        ema(ledger, "a", number, number + 3, 1.0)
    with pytest.raises(RuntimeError, match="36 bytes of ema writes wait for writer 'b', which is at step 0, 'a' at 5"):
        ema(ledger, "a", 2, 5, 1.0)
    ema(ledger, "b", 1, 5, 1.0)
    ema(ledger, "a", 2, 5, 1.0)
    assert columns(ledger.ledger)["ema.count"][0] == 3


def test_a_snapshot_holds_what_waited(folder: str) -> None:
    ledger = make(folder)
    ledger.open("a", 0)
    ema(ledger, "a", 0, 7, 1.5)
    ledger.snapshot("tag", 0)
    ledger.restore("tag", 1)
    assert columns(ledger.ledger)["ema.value"][0] == 1.5
    assert ledger.waiting_bytes == 0


# Statistics that move.


def test_moved_statistics_are_adopted_and_dropped_once_whatever_is_repeated(folder: str) -> None:
    ledger = make(folder)
    ledger.open("w", 0)
    for number, name in enumerate(SPECS):
        contents = {"name": name, "addresses": ADDRESSES[:2], "values": [1.0, -2.0], "used": ADDRESSES[:1]}
        ledger.write("w", number, attempt=0, step=4, **contents)
    settle(ledger)
    old, new = ADDRESSES[:3], ADDRESSES[5:8]
    state = ledger.ledger.export(old)
    for _ in range(2):
        ledger.adopt("key", 0, new, state)
        ledger = make(folder)
    ledger.snapshot("between", 0)
    ledger = make(folder)
    for _ in range(2):
        ledger.adopt("key", 0, new, state)
        ledger.drop("key", 0, old)
        ledger = make(folder)
    moved, gone = ledger.ledger.export(new), ledger.ledger.export(old)
    assert {name: column.tolist() for name, column in moved.items()} == {n: c.tolist() for n, c in state.items()}
    assert not any(column.any() for column in gone.values())
    with pytest.raises(ValueError, match=f"address {ADDRESSES[5]} has statistics of its own"):
        ledger.adopt("other", 0, new, state)
    with pytest.raises(ValueError, match="columns must be"):
        ledger.adopt("other", 0, old, {"usage": state["usage"]})
    with pytest.raises(KeyError, match="address -1 is not in the pool"):
        ledger.drop("other", 0, np.array([-1]))
    ledger.adopt("none", 0, new[:0], {name: column[:0] for name, column in state.items()})
    ledger.drop("none", 0, old[:0])
    assert columns(make(folder).ledger) == columns(ledger.ledger)


def test_an_adopted_step_bounds_the_steps_that_follow(folder: str) -> None:
    from_elsewhere = Ledger(SIZES, SPECS)
    from_elsewhere.update("ema", ADDRESSES[:1], np.ones(1, np.float32), step=50)
    ledger = make(folder)
    for writer in ("w", "slow"):
        ledger.open(writer, 0)
    ema(ledger, "w", 0, 10, 7.0, row=2)
    ledger.adopt("key", 0, ADDRESSES[3:4], from_elsewhere.export(ADDRESSES[:1]))
    assert columns(ledger.ledger)["ema.value"][2:4] == [7, 1]  # what waited was of a step before, and came first
    with pytest.raises(ValueError, match="step 49 came after step 50 had been applied"):
        ema(ledger, "w", 1, 49, 1.0, row=3)
    ema(ledger, "w", 1, 50, 1.0, row=3)
    ledger.drop("key", 0, ADDRESSES[3:4])  # and what waits for it goes with it
    assert (columns(ledger.ledger)["ema.count"][3], ledger.waiting_bytes) == (0, 0)
    assert columns(make(folder).ledger) == columns(ledger.ledger)


# Others in the same folder.


def test_a_folder_taken_over_by_another_process_is_written_no_more(folder: str) -> None:
    mine = make(folder)
    mine.open("w", 0)
    theirs = make(folder)
    if storage.is_local(folder):
        with pytest.raises(LedgerTaken, match="HEAD.json is not as this process left it"):
            send(mine, [0])
    with pytest.raises(LedgerTaken, match="HEAD.json is not as this process left it"):
        mine._save(tag=None, call="")
    send(theirs, [0])
    assert columns(make(folder).ledger) == columns(theirs.ledger)


def test_other_specs_are_refused_and_a_pool_may_grow(folder: str) -> None:
    ledger = make(folder)
    ledger.open("w", 0)
    send(ledger, range(5))
    settle(ledger)
    before = columns(ledger.ledger)
    with pytest.raises(ValueError, match=r"HEAD.json: specs were .*'decay': 0.5.*, now "):
        DurableLedger(folder, SIZES, {**SPECS, "ema": LedgerSpec("ema", decay=0.25, variance=True)})
    for grown in (SIZES, np.append(SIZES, 4)):
        larger = DurableLedger(folder, grown, SPECS)
        assert columns(larger.ledger) == before
        larger.snapshot("tag", 0)
    larger.write(
        "w", larger.open("w", 0), attempt=0, step=9, name="last", addresses=pack(4, np.arange(4)), values=[1] * 4
    )
