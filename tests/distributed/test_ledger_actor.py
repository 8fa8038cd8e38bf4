"""The ledger over actors equals one Ledger: for any number of them, through kills, retries, rollbacks and moves."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from curation.addresses import pack
from curation.distributed import ledger_actor, ledger_client
from curation.distributed.ledger_actor import LedgerActor, LedgerHandles, owner_of, start_ledger
from curation.distributed.ledger_client import LedgerClient
from curation.distributed.ledger_writes import AbandonedAttempt
from curation.ledger import Ledger, LedgerSpec, gini
from curation.numerics.sampling import uid_words
from jobs.benchmarks import ledger_actors

pytestmark = pytest.mark.usefixtures("ray_session")

SIZES = np.array([30, 0, 17, 40, 1, 25, 8, 33])
ADDRESSES = np.concatenate([pack(shard, np.arange(size)) for shard, size in enumerate(SIZES)])
SPECS = {"last": LedgerSpec(), "mean": LedgerSpec("mean"), "ema": LedgerSpec("ema", decay=0.75)}

Start = Callable[..., LedgerHandles]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(num_actors, ...): a ledger in the test's folder, ended with the test."""
    started: list[LedgerHandles] = []

    def begin(num_actors: int, *, sizes: np.ndarray = SIZES, specs: Any = None) -> LedgerHandles:
        started.append(start_ledger(str(tmp_path), sizes, specs or SPECS, num_actors=num_actors))
        return started[-1]

    yield begin
    for handles in started:
        handles.close()


@pytest.fixture(scope="module")
def shared(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LedgerHandles]:
    """Three actors for all tests here: starting one costs a second."""
    handles = start_ledger(str(tmp_path_factory.mktemp("shared")), SIZES, SPECS, num_actors=3)
    yield handles
    handles.close()


@pytest.fixture
def ledger(shared: LedgerHandles) -> LedgerHandles:
    """The shared actors, empty again, as a new attempt."""
    LedgerClient.restore(shared, None)
    return shared


def join(handles: LedgerHandles, writer: str = "w", **options: Any) -> LedgerClient:
    """A writer of the latest attempt."""
    return LedgerClient(handles, writer=writer, attempt=handles.attempt(), **options)


def batch(seed: int, *, rows: int = 60) -> dict[str, Any]:
    """What one `record` takes: repeats among the addresses, a few uses."""
    rng = np.random.default_rng(seed)
    addresses = rng.choice(ADDRESSES, rows)
    return {
        "name": ["last", "mean", "ema"][seed % 3],
        "addresses": addresses,
        "values": rng.normal(size=rows).astype(np.float32),
        "step": seed // 3,
        "used": addresses[: rows // 4],
    }


def feed(ledger: Ledger, seed: int) -> None:
    """The same batch, into one Ledger."""
    sent = batch(seed)
    order = np.lexsort((sent["values"], sent["addresses"]))
    ledger.update(sent["name"], sent["addresses"][order], sent["values"][order], step=sent["step"])
    ledger.add_usage(sent["used"])


def everything(client: LedgerClient) -> dict[str, Any]:
    return {name: {k: v.tobytes() for k, v in client.read(name, ADDRESSES).items()} for name in SPECS}


def of_one(ledger: Ledger) -> dict[str, Any]:
    return {name: {k: v.tobytes() for k, v in ledger.read(name, ADDRESSES).items()} for name in SPECS}


# One ledger, however many actors.


def test_any_number_of_actors_is_one_ledger(ledger: LedgerHandles, tmp_path: Path) -> None:
    plain = Ledger(SIZES, SPECS)
    for seed in range(9):
        feed(plain, seed)
    # Repeats, and no order of the actors' own.
    wanted = np.random.default_rng(1).choice(ADDRESSES, 500)
    others = [start_ledger(str(tmp_path / str(n)), SIZES, SPECS, num_actors=n) for n in (1, 2)]
    for handles in (*others, ledger):
        client = join(handles)
        for seed in range(9):
            client.record(**batch(seed))
        client.flush()
        assert everything(client) == of_one(plain)
        for name in SPECS:
            for column, values in client.read(name, wanted).items():
                np.testing.assert_array_equal(values, plain.read(name, wanted)[column])
                assert values.dtype == plain.read(name, wanted)[column].dtype
            assert client.known(name) == plain.known(name)
            edges = [-1.0, 0.0, 0.5, 3.0]
            assert client.histogram(name, edges).tolist() == plain.histogram(name, edges).tolist()
            q = [0.0, 0.1, 0.5, 1.0]
            assert client.quantiles(name, q).tolist() == plain.quantiles(name, q).tolist()
        assert client.saturated() == plain.saturated() == dict.fromkeys(["usage", *SPECS], 0)
        assert client.usage_histogram().tolist() == plain.usage_histogram().tolist()
        assert client.gini() == gini(plain.usage_histogram()) > 0
        assert {name: len(column) for name, column in client.read("last", []).items()} == dict.fromkeys(
            plain.read("last", ADDRESSES[:0]), 0
        )
    for handles in others:
        handles.close()


def test_the_owner_of_a_shard_is_the_same_for_ever_and_each_actor_has_its_share() -> None:
    assert owner_of(np.arange(12), 3).tolist() == [0, 1, 1, 2, 1, 1, 0, 1, 1, 0, 1, 1]
    assert owner_of(np.arange(12), 1).tolist() == [0] * 12
    shares = np.bincount(owner_of(np.arange(60_000), 6))
    assert shares.min() > 9_700
    assert shares.max() < 10_300


def test_a_ledger_started_again_goes_on_a_pool_may_grow_and_nothing_else_may_change(start: Start) -> None:
    handles = start(2)
    client = join(handles)
    for seed in range(6):
        client.record(**batch(seed))
    client.flush()
    before = everything(client)
    handles.close()
    with pytest.raises(ValueError, match=r"num_actors of a ledger cannot change: .*ledger has 2, now 3"):
        start(3)
    with pytest.raises(ValueError, match=r"specs of a ledger cannot change: .*'last'.*, now .*'other'"):
        start(2, specs={"other": LedgerSpec()})
    with pytest.raises(ValueError, match="shard_sizes: .* has 8 shards, now 7"):
        start(2, sizes=SIZES[:-1])
    with pytest.raises(ValueError, match="shard_sizes: shard 3 had 40 rows, now 41"):
        start(2, sizes=SIZES + (np.arange(8) == 3))
    for wrong in (0, 1 << 16):
        with pytest.raises(ValueError, match=rf"num_actors must be in \[1, 65536\), got {wrong}"):
            start(wrong)
    grown = np.append(SIZES, [5, 9])
    handles = start(2, sizes=grown)
    client = join(handles)
    assert everything(client) == before
    client.record("last", pack(9, np.arange(9)), np.arange(9.0), step=9)
    client.flush()
    assert client.read("last", pack(9, np.arange(9)))["ledger_value"].tolist() == list(range(9))
    assert sum(state["num_samples"] for state in handles.states()) == grown.sum()


def test_a_node_that_does_not_see_the_folder_begins_no_empty_ledger(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ledger.json"):
        LedgerActor(str(tmp_path), 0, {})


# Kills.


def test_killed_actors_in_the_middle_of_the_writes_of_four_writers_change_nothing(
    ledger: LedgerHandles, tmp_path: Path
) -> None:
    num_writers, num_batches, attempt = 4, 50, ledger.attempt()
    kill_at = {10: 0, 25: 1, 40: 0}  # batch -> actor; no writer goes beyond the batch before the kill is let go

    def contents(rank: int, at: int) -> dict[str, Any]:
        rng = np.random.default_rng([rank, at])
        addresses = rng.choice(ADDRESSES, 300)
        values = rng.integers(-8, 8, 300).astype(np.float32)
        return {"name": "last", "addresses": addresses, "values": values, "step": at, "used": addresses[:50]}

    @ray.remote(num_cpus=0)
    def write(handles: LedgerHandles, rank: int) -> None:
        client = LedgerClient(handles, writer=f"rank-{rank}", attempt=attempt, max_in_flight=3)
        for at in range(num_batches):
            while at in kill_at and not (tmp_path / f"kill-{at}").exists():
                time.sleep(0.005)
            client.record(**contents(rank, at))
        client.close()

    running = [write.remote(ledger, rank) for rank in range(num_writers)]
    reader, killed = join(ledger), set()
    for at, victim in kill_at.items():
        # Writers run ahead of what is acknowledged, so nearly all of what they may send by now is on its way or there.
        while reader.usage_histogram() @ np.arange(1 << 16) < (at - 5) * num_writers * 50:
            time.sleep(0.01)
        pid = ledger.states()[victim]["pid"]
        assert not ray.wait(running, timeout=0)[0]
        (tmp_path / f"kill-{at}").touch()
        time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    ray.get(running)
    assert len(killed) == 3
    assert not killed & {state["pid"] for state in ledger.states()}
    plain = Ledger(SIZES, SPECS)
    for rank in range(num_writers):
        for at in range(num_batches):
            sent = contents(rank, at)
            plain.update("last", sent["addresses"], sent["values"], step=at)
            plain.add_usage(sent["used"])
    assert everything(reader) == of_one(plain)
    assert int(reader.read("last", ADDRESSES)["usage_count"].sum()) == num_writers * num_batches * 50


def test_an_ema_of_two_writers_through_a_kill_is_that_of_one_loop(ledger: LedgerHandles) -> None:
    clients = [join(ledger, f"rank-{rank}") for rank in range(2)]
    for client in clients:
        client.open()
    plain = Ledger(SIZES, SPECS)
    for step in range(6):
        sent = [batch(3 * (2 * step + rank) + 2) for rank in range(2)]
        assert {part["name"] for part in sent} == {"ema"}
        turn = clients if step % 2 else clients[::-1]
        for client, part in zip(turn, sent, strict=True):
            client.record("ema", part["addresses"], part["values"], step=step)
            if step % 2:  # whoever flushes first
                client.flush()
        addresses = np.concatenate([part["addresses"] for part in sent])
        values = np.concatenate([part["values"] for part in sent])
        order = np.lexsort((values, addresses))
        plain.update("ema", addresses[order], values[order], step=step)
        if step == 3:
            os.kill(ledger.states()[0]["pid"], signal.SIGKILL)
        if step % 2:
            assert everything(client) == of_one(plain)
    for client in clients:
        client.close()
    assert everything(clients[0]) == of_one(plain)


def test_an_actor_without_rows_in_a_step_hears_that_the_writer_has_gone_beyond_it(ledger: LedgerHandles) -> None:
    of_one_actor = pack(0, np.arange(3))
    clients = [join(ledger, writer) for writer in "ab"]
    for client in clients:
        client.open()
    clients[0].record("ema", ADDRESSES, np.ones(len(ADDRESSES)), step=1)
    clients[1].record("ema", of_one_actor, np.ones(3), step=1)
    for client in clients:
        client.record("ema", of_one_actor, np.ones(3), step=2)
        client.read("ema", ADDRESSES)  # so its writes have arrived
    assert set(clients[0].read("ema", ADDRESSES[-8:])["ledger_count"].tolist()) == {1}
    assert clients[0].read("ema", of_one_actor)["ledger_count"].tolist() == [2, 2, 2]  # step 2 waits


# Back-pressure.


def with_actors(handles: LedgerHandles, actor: type) -> LedgerHandles:
    """The handles with one other actor in place of all three, and no ema."""
    made = ray.remote(num_cpus=0)(actor).remote()  # pyright: ignore[reportAttributeAccessIssue]
    return LedgerHandles(handles.folder, (made, made, made), {"last": LedgerSpec()})


def test_a_slow_actor_holds_the_writer_and_never_has_more_than_the_bound_on_its_way(shared: LedgerHandles) -> None:
    class Slow:
        """Takes 50 ms for a write."""

        def call(self, *_: Any) -> int:
            return 0

        def write(self, *_: Any) -> bool:
            time.sleep(0.05)
            return True

    handles = with_actors(shared, Slow)
    client = LedgerClient(handles, writer="w", attempt=0, max_in_flight=3)
    client.open()
    begun, most = time.monotonic(), 0
    for sent in range(1, 11):
        client.record("last", ADDRESSES, np.zeros(len(ADDRESSES)), step=sent)
        most = max(most, *client.in_flight)
        # A record is three writes of 50 ms here: whoever has sent n has waited for n - 3 at least.
        assert time.monotonic() - begun >= (sent - 3) * 0.15
    assert most == 3
    client.flush()
    assert client.in_flight == [0, 0, 0]
    ray.kill(handles.actors[0])


def test_a_silent_actor_is_an_error_after_the_time_that_was_given(shared: LedgerHandles) -> None:
    class Silent:
        """Answers nothing."""

        def call(self, *_: Any) -> int:
            return 0

        def write(self, *_: Any) -> bool:
            time.sleep(60)
            return True

    handles = with_actors(shared, Silent)
    client = LedgerClient(handles, writer="w", attempt=0, max_in_flight=1, timeout_s=0.2)
    client.record("last", ADDRESSES[:1], [0.0], step=0)
    for act in (lambda: client.record("last", ADDRESSES[:1], [0.0], step=0), client.flush):
        with pytest.raises(TimeoutError, match="ledger actor 0 acknowledged 0 of 1 writes in 0.2 s"):
            act()
    ray.kill(handles.actors[0])
    with pytest.raises(ValueError, match="max_in_flight must be at least 1, got 0"):
        LedgerClient(handles, writer="w", attempt=0, max_in_flight=0)


# What is refused.


def test_a_bad_batch_is_applied_nowhere(ledger: LedgerHandles) -> None:
    client = join(ledger)
    client.record(**batch(2))
    client.flush()
    before = everything(client)
    good = batch(5)
    bad_values = good["values"].copy()
    bad_values[[7, 9]] = np.nan, np.inf
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"values": bad_values}, ValueError, rf"{good['addresses'][7]}:nan, {good['addresses'][9]}:inf"),
        ({"addresses": np.append(good["addresses"][1:], 1 << 20)}, KeyError, f"address {1 << 20} is not in the pool"),
        ({"used": np.array([pack(4, np.array([0]))[0] + 1])}, KeyError, "is not in the pool"),
        ({"values": good["values"][1:]}, ValueError, "values must be of shape"),
        ({"name": "em"}, ValueError, r"no ledger is named 'em', did you mean \['ema'\]"),
        ({"step": 0}, ValueError, "a writer's steps never decrease: 'w' was at step 1, now 0"),
        ({"step": -1}, ValueError, "step must be in"),
    ]
    client.record(None, [], [], step=1, used=ADDRESSES[:0])
    for changed, error, match in wrong:
        with pytest.raises(error, match=match):
            client.record(**{**good, **changed})
        assert client.in_flight == [0, 0, 0] or changed
    client.flush()
    assert everything(client) == before
    client.record(**good)
    client.flush()
    assert everything(client) != before
    for read in (client.read, client.prefetch):
        with pytest.raises(KeyError, match="address -1 is not in the pool"):
            read("last", [-1])
        with pytest.raises(ValueError, match="no ledger is named 'lost'"):
            read("lost", ADDRESSES)


def test_a_write_that_an_actor_refused_is_raised_later_and_the_writer_goes_on(ledger: LedgerHandles) -> None:
    early, late = join(ledger, "early"), join(ledger, "late")
    late.open()
    early.record("ema", ADDRESSES, np.ones(len(ADDRESSES)), step=7)
    early.snapshot("tag")  # which waits for nobody
    late.record("ema", ADDRESSES, np.ones(len(ADDRESSES)), step=6)
    with pytest.raises(ValueError, match="'ema' is an ema: step 6 came after step 7 had been applied") as raised:
        late.flush()
    assert len(raised.value.__notes__) == 2  # the other actors' refusals
    late.record("ema", ADDRESSES, np.ones(len(ADDRESSES)), step=6)
    late.read("ema", ADDRESSES)  # answered after the write
    with pytest.raises(ValueError, match="step 6 came after step 7 had been applied"):
        late.record("ema", ADDRESSES, np.ones(len(ADDRESSES)), step=8)  # which is not sent
    late.flush()
    for client in (late, early):
        client.record("ema", ADDRESSES, np.ones(len(ADDRESSES)), step=8)
    late.record("ema", [], [], step=9)
    early.record("ema", [], [], step=9)
    early.flush()
    late.flush()
    assert set(early.read("ema", ADDRESSES)["ledger_count"].tolist()) == {3}
    assert [state["waiting_bytes"] for state in ledger.states()] == [0, 0, 0]


def test_a_writer_of_the_same_name_takes_over_and_the_former_is_refused(ledger: LedgerHandles) -> None:
    former, later = join(ledger), join(ledger)
    former.record(**batch(0))
    former.flush()
    later.record(**batch(3))
    later.flush()
    former.record(**batch(6))
    with pytest.raises(AbandonedAttempt, match="is from before the writer opened again"):
        former.flush()
    later.close()
    later.record(**batch(9))  # opens again
    later.flush()
    assert int(later.read("last", ADDRESSES)["ledger_count"].sum()) == 3 * 60


# Going back.


def test_a_rollback_takes_all_actors_back_and_the_abandoned_attempt_is_refused(ledger: LedgerHandles) -> None:
    began = ledger.attempt()
    old = join(ledger)
    for seed in range(6):
        old.record(**batch(seed))
    old.snapshot("rollback")
    saved = everything(old)
    for seed in range(6, 12):
        old.record(**batch(seed))
    old.flush()
    assert everything(old) != saved

    with pytest.raises(ValueError, match=f"attempt {began + 1} has not begun, the ledger is at {began}: call restore"):
        LedgerClient(ledger, writer="w", attempt=began + 1).record(**batch(6))
    assert LedgerClient.restore(ledger, "rollback") == began + 1 == ledger.attempt()
    new = join(ledger)
    assert everything(new) == saved
    assert LedgerClient.restore(ledger, "rollback", began + 1) == began + 1
    old.record(**batch(12))
    with pytest.raises(AbandonedAttempt, match=f"attempt {began} was given up, the ledger was restored for attempt"):
        old.flush()
    with pytest.raises(AbandonedAttempt, match=f"attempt {began} was given up"):
        old.snapshot("rollback")
    with pytest.raises(AbandonedAttempt, match=f"attempt {began} was given up"):
        LedgerClient.restore(ledger, "rollback", began)
    os.kill(ledger.states()[1]["pid"], signal.SIGKILL)
    assert everything(new) == saved

    for seed in range(20, 26):
        new.record(**batch(seed))
    new.flush()
    after = everything(new)
    LedgerClient.restore(ledger, None)
    straight = join(ledger)
    assert [straight.known(name) for name in SPECS] == [0, 0, 0]
    for seed in (*range(6), *range(20, 26)):
        straight.record(**batch(seed))
        if seed == 5:
            straight.flush()
    straight.flush()
    assert everything(straight) == after
    straight.forget(["rollback"])
    with pytest.raises(ValueError, match="there is no snapshot 'rollback', the snapshots are"):
        LedgerClient.restore(ledger, "rollback")


def test_a_tag_that_not_every_actor_has_of_one_moment_takes_none_back(ledger: LedgerHandles) -> None:
    client, attempt = join(ledger), ledger.attempt()
    client.record(**batch(0))
    client.snapshot("whole")
    ray.get(ledger.actors[0].snapshot.remote("half", attempt, "call"))
    client.record(**batch(3))
    ray.get(ledger.actors[0].snapshot.remote("whole", attempt, "another call"))
    client.flush()
    before = everything(client)
    with pytest.raises(ValueError, match=r"there is no snapshot 'half', the snapshots are \[.*'whole'\]"):
        LedgerClient.restore(ledger, "half")
    with pytest.raises(ValueError, match="snapshot 'whole' is of different moments in the actors"):
        LedgerClient.restore(ledger, "whole")
    assert everything(client) == before
    assert ledger.attempt() == attempt


# Asking ahead.


def test_what_was_prefetched_is_read_once_for_the_same_addresses(ledger: LedgerHandles) -> None:
    client = join(ledger, max_in_flight=2)
    wanted = ADDRESSES[[5, 3, 3, 90]].copy()
    client.record("last", wanted, np.ones(4), step=0)
    client.prefetch("last", wanted)  # after the write, so it sees it
    client.record("last", wanted, np.full(4, 2.0), step=1)
    client.flush()
    assert client.read("last", wanted[:2])["ledger_value"].tolist() == [2, 2]  # other addresses: asked anew
    assert client.read("last", wanted)["ledger_value"].tolist() == [1] * 4  # as it was asked
    assert client.read("last", wanted)["ledger_value"].tolist() == [2] * 4
    kept = wanted.copy()
    client.prefetch("last", wanted)
    wanted[:] = ADDRESSES[0]
    assert np.isnan(client.read("last", wanted)["ledger_value"]).all()
    client.record("last", kept, np.full(4, 3.0), step=2)
    client.prefetch("mean", kept)
    client.prefetch("mean", kept)
    client.flush()
    assert client.read("last", kept)["ledger_value"].tolist() == [3] * 4  # two are kept at most, so it was let go


# A retired shard.


def test_statistics_of_a_retired_shard_go_to_their_uids_new_addresses_once(ledger: LedgerHandles) -> None:
    client = join(ledger)
    uids = uid_words([f"{n:032x}" for n in range(40)])
    old, new = pack(3, np.arange(40)), pack(0, np.arange(30))
    written = old[5:]  # the first five have no statistics
    for name in SPECS:
        client.record(name, written, np.arange(35, dtype=np.float32), step=3, used=written[::2])
    client.record("last", ADDRESSES[-5:], np.ones(5), step=3)
    client.flush()
    before = {name: client.read(name, old) for name in SPECS}
    others = {name: client.read(name, ADDRESSES[-5:]) for name in SPECS}
    assert len({*owner_of(np.array([0, 3]), 3)}) == 2, "the move must be from one actor to another"
    # Rows 10 to 39 live on, in reverse order; 0 to 9 are gone.
    for _ in range(3):
        assert client.carry_over(uids, old, uids[10:][::-1], new) == (30, 10)
    for name in SPECS:
        moved, gone = client.read(name, new), client.read(name, old)
        for column, values in moved.items():
            np.testing.assert_array_equal(values, before[name][column][10:][::-1])
        assert not gone["ledger_count"].any()
        assert not gone["usage_count"].any()
        for column, values in client.read(name, ADDRESSES[-5:]).items():
            np.testing.assert_array_equal(values, others[name][column])
    # Among others that were carried before: they are no obstacle.
    other = pack(5, np.arange(3))
    client.record("last", other, np.ones(3), step=4)
    client.flush()
    more = uid_words([f"{n:032x}" for n in range(100, 103)])
    all_old, all_uids = np.concatenate([old, other]), np.concatenate([uids, more])
    new_places = np.concatenate([new, pack(6, np.arange(3))])
    assert client.carry_over(all_uids, all_old, np.concatenate([uids[10:][::-1], more]), new_places) == (33, 10)
    assert client.read("last", pack(6, np.arange(3)))["ledger_count"].tolist() == [1, 1, 1]
    assert client.read("last", new)["ledger_count"].sum() == before["last"]["ledger_count"][10:].sum()


def test_nothing_moves_onto_statistics_and_a_move_that_a_crash_cut_is_completed(ledger: LedgerHandles) -> None:
    client = join(ledger)
    uids = uid_words([f"{n:032x}" for n in range(3)])
    old, new = pack(3, np.arange(3)), np.array([pack(shard, np.array([0]))[0] for shard in (0, 2, 5)])
    client.record("last", old, [1.0, 2.0, 3.0], step=0)
    client.record("last", new[2:], [9.0], step=0)
    client.flush()
    before = everything(client)
    with pytest.raises(ValueError, match=f"address {new[2]} has statistics of its own"):
        client.carry_over(uids, old, uids, new)
    assert everything(client) == before
    new[2] = pack(7, np.array([1]))[0]

    calls: list[tuple[str, int]] = []
    by_owner = client._by_owner

    def cut(method: str, addresses: np.ndarray, arguments: Any) -> None:
        """Only the rows of the first actor that is concerned, and then no more."""
        owners = owner_of(addresses >> 20, 3)
        first = int(owners.min())
        by_owner(method, addresses[owners == first], lambda rows: arguments(np.flatnonzero(owners == first)[rows]))
        calls.append((method, first))
        raise ConnectionError("cut")

    for at in ("adopt", "drop"):
        client._by_owner = lambda method, *rest, at=at: (cut if method == at else by_owner)(method, *rest)  # pyright: ignore
        with pytest.raises(ConnectionError):
            client.carry_over(uids, old, uids, new)
    client._by_owner = by_owner
    assert client.carry_over(uids, old, uids, new) == (3, 0)
    assert [method for method, _ in calls] == ["adopt", "drop"]
    assert client.read("last", new)["ledger_value"].tolist() == [1, 2, 3]
    assert client.read("last", new)["ledger_count"].tolist() == [1, 1, 1]
    assert not client.read("last", old)["ledger_count"].any()


# Metrics.


def test_metrics_tell_updates_samples_bytes_and_the_stall(
    ledger: LedgerHandles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, float] = {}

    class Told:
        """Counter and Gauge alike."""

        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
            assert description
            self.name = name

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert all(isinstance(tag, str) for tag in tags.values())

        def inc(self, value: float) -> None:
            told[self.name] = told.get(self.name, 0) + value

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            told[self.name + (f" {tags['ledger']}" if tags else "")] = value

    monkeypatch.setattr(ledger_actor, "Counter", Told)
    monkeypatch.setattr(ledger_actor, "Gauge", Told)
    monkeypatch.setattr(ledger_client, "Gauge", Told)
    for name in ("ledger.json", "shards.npy"):
        shutil.copy(Path(ledger.folder) / name, tmp_path / name)
    actor = LedgerActor(str(tmp_path), 0, {})
    mine = np.flatnonzero(owner_of(np.arange(len(SIZES)), 3) == 0)
    held = ADDRESSES[np.isin(ADDRESSES >> 20, mine)]
    write = {"attempt": 0, "step": 3, "name": "last", "addresses": held, "values": np.ones(len(held)), "used": []}
    first = actor.call("open", "w", 0)
    for _ in range(2):  # the retry is not counted
        actor.write("w", first, write)
    actor.snapshot("tag", 0, "call")
    assert told["curation_ledger_updates"] == len(held) == told["curation_ledger_known last"]
    assert told["curation_ledger_known ema"] == told["curation_ledger_waiting_bytes"] == 0
    assert told["curation_ledger_bytes"] == actor.state()["num_bytes"] > 0
    assert told["curation_ledger_log_bytes"] == actor.state()["log_bytes"] > 0
    assert 0 < told["curation_ledger_snapshot_stall_s"] < math.inf
    client = join(ledger)
    client.record(**batch(0))
    assert told["curation_ledger_unacknowledged_writes"] == 3


def test_the_benchmark_counts_what_both_sides_were_sent(capsys: pytest.CaptureFixture[str]) -> None:
    figures = ledger_actors.through_actors(pairs=1, tiny=True)
    assert len(figures["updates_per_s"]["ours"]) == len(figures["updates_per_s"]["rival"]) == 1
    assert figures["updates_ratio"]["median"] > 0
    assert figures["snapshot"]["bytes"] == 12 * 8 * ledger_actors.ROWS_PER_SHARD
    assert min(figures["read"]["median_s"], figures["snapshot"]["snapshot_s"], figures["snapshot"]["restore_s"]) > 0
    assert "one actor that holds a dict" in capsys.readouterr().out
