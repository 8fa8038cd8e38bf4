"""A ledger that outlives its process: state = a snapshot + the log of what came since, on disk or in a bucket.

Laws. What was acknowledged is in the log, so a killed process loses none of it; a write is checked, logged, applied, in
that order, so what is refused leaves no trace. Every change of state is a record (ledger_state.py), and replaying the
records does what was done the first time. A write bears its writer's number and counts once, however often it is sent
and in whatever order it comes. `restore(tag, attempt)` goes back to exactly a snapshot, and no call of an earlier
attempt counts after.

    FOLDER/HEAD.json               the snapshot that the log continues, the log's segments, the tags, the attempt
    FOLDER/snapshots/NNNNNNNN/     the columns as `Ledger.save` writes them, and state.json
    FOLDER/log/SEGMENT.log         on a local disk: one growing file, with the system before a write is acknowledged
    FOLDER/log/SEGMENT/N.rec       elsewhere: one object per record, because a bucket cannot append: a request per write

One atomic write of HEAD.json is the commit of each snapshot, restore and start; what it does not name is garbage. Each
start writes a segment of its own, so a process that is thought dead cannot write among what its successor writes.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from curation.addresses import flat_positions, prefix_sums
from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage
from curation.distributed.ledger_log import Arrays, Segment, read_segment
from curation.distributed.ledger_state import LedgerState
from curation.distributed.ledger_writes import SESSION, AbandonedAttempt, checked, is_count, specs_json
from curation.ledger import Ledger, LedgerSpec

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,199}")


class LedgerTaken(RuntimeError):
    """HEAD.json names another log than this process writes, so what it would write is lost, and it writes nothing."""


class DurableLedger:
    """A Ledger whose every change is on disk before it is acknowledged. Not for several threads.

    `ledger` is for reading. A writer opens, numbers its writes from what `open` returned, and closes.
    """

    def __init__(
        self,
        folder: str,
        shard_sizes: np.ndarray,
        specs: Mapping[str, LedgerSpec],
        *,
        max_log_bytes: int = 2 << 30,
        max_waiting_bytes: int = 256 << 20,
        fsync: bool = False,
    ):
        """Recover what `folder`, a path or fsspec URL, holds; an empty ledger if it holds nothing.

        A log above `max_log_bytes` is folded into a snapshot; `fsync` makes a local log outlast a power failure too,
        for a flush of the disk per write. ValueError if specs, sizes or format differ from those saved, or the log is
        damaged anywhere but in an unfinished last record, which was never acknowledged and is cut off.
        """
        self._folder, self._specs, self._fsync = storage.absolute(folder), dict(specs), fsync
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._offsets = prefix_sums(self._sizes)
        self._max_log_bytes, self._max_waiting_bytes = max_log_bytes, max_waiting_bytes
        self._head_url, self._is_local = storage.join(self._folder, "HEAD.json"), storage.is_local(self._folder)
        self._head_mark = self._mark_of_head()
        self._head = manifest.read(self._head_url) if self._head_mark else {**_EMPTY_HEAD, "specs": specs_json(specs)}
        if self._head["specs"] != specs_json(specs):
            raise ValueError(f"{self._head_url}: specs were {self._head['specs']}, now {specs_json(specs)}")
        self._is_moving = False
        self._state = self._read_base(self._head["base"])
        self._replayed_bytes = 0
        for segment in self._head["segments"]:
            for record in read_segment(self._segment_url(segment)):
                self._state.apply(record.meta, record.arrays)
                self._replayed_bytes += record.num_bytes
        self._log = self._begin_segment(self._head["generation"])
        self._move_head(self._log, segments=[*self._head["segments"], self._log.name])
        self._delete_retired()

    # What a writer calls.

    def open(self, writer: str, attempt: int) -> int:
        """The number of the writer's first write. Whatever the writer sent in a former life is refused from now on."""
        self._check_attempt(attempt)
        former = self._state.writers.get(writer)
        first = 0 if former is None else former.first + SESSION
        self._log_and_apply({"kind": "open", "writer": writer, "first": first})
        return first

    def close(self, writer: str, attempt: int, first: int) -> None:
        """No more writes come from the life that `open` gave `first`; nothing waits for it any longer."""
        self._check_attempt(attempt)
        known = self._state.writers.get(writer)
        if known is not None and known.is_open and known.first == first:
            self._log_and_apply({"kind": "close", "writer": writer})

    def write(
        self,
        writer: str,
        number: int,
        *,
        attempt: int,
        step: int,
        name: str | None,
        addresses: Any,
        values: Any,
        used: Any = None,
    ) -> bool:
        """Apply write `number`: scores `values` (n,) of `addresses` (n,), and one use more of each of `used` (m,).

        True if it was applied now, False if it had been. AbandonedAttempt if the attempt or the writer's life is over;
        ValueError, KeyError as `checked` has them, or if steps decrease; RuntimeError if too much waits for a writer.
        """
        self._check_attempt(attempt)
        known = self._state.writer(writer, number)
        if known.has(number):
            return False
        write = checked(self._specs, self._offsets, step=step, name=name, addresses=addresses, values=values, used=used)
        self._state.check_order(writer, number, write, max_waiting_bytes=self._max_waiting_bytes)
        if self.log_bytes > self._max_log_bytes:  # before the write: if the disk is full, it is refused, not half done
            self._save(tag=None, call="")
        meta = {"kind": "write", "writer": writer, "number": number, "step": write.step, "name": write.name}
        self._log_and_apply(meta, write.arrays)
        return True

    def skip(self, writer: str, number: int, attempt: int) -> None:
        """The write `number` was refused and will never come: it counts as an empty one, so nothing waits for it."""
        self._check_attempt(attempt)
        known = self._state.writer(writer, number)
        if not known.has(number):
            step = max(0, known.steps_around(number)[0])
            self._log_and_apply({"kind": "write", "writer": writer, "number": number, "step": step, "name": None})

    def flush(self, writer: str, number: int, attempt: int) -> None:
        """All writes below `number` are there, and of their last step no more will come: nothing waits for the writer.

        Once every open writer has flushed at a step, or gone beyond it, it is applied.
        """
        self._check_attempt(attempt)
        known = self._state.writer(writer, number)
        if known.next == number and not known.flushed:  # else it is a retry that comes late, or there are gaps
            self._log_and_apply({"kind": "flush", "writer": writer})

    # Snapshots.

    def snapshot(self, tag: str, attempt: int, *, call: str = "") -> None:
        """Save everything under `tag`, in place of a former snapshot of that name; what waits is applied first.

        `call` names the call over several ledgers, `call_of` returns it; repeated with the same one, nothing is done.
        """
        self._check_attempt(attempt)
        if not _TAG.fullmatch(tag):
            raise ValueError(f"tag must be a letter or digit, then letters, digits and . _ = -, got {tag!r}")
        if call and self._head["snapshots"].get(tag, {}).get("call") == call:
            return
        self._apply_waiting()
        self._save(tag=tag, call=call)

    def restore(self, tag: str | None, attempt: int) -> None:
        """Be exactly what `snapshot(tag)` saved, or empty for None, with no writer open; earlier attempts are refused.

        Once more with the same tag and attempt does nothing. AbandonedAttempt if a later attempt has begun, ValueError
        if there is no such tag or this attempt began elsewhere. Takes the memory of two ledgers while it lasts.
        """
        if attempt <= self.attempt:
            self._check_attempt(attempt)
            if tag != (began := self._head["restored"]):
                raise ValueError(f"attempt {attempt} began from {began!r}, it cannot begin from {tag!r} too")
            return
        base = None if tag is None else self._snapshot(tag)["generation"]
        state = self._read_base(base)
        generation = self._head["generation"] + 1
        log = self._begin_segment(generation, then=[({"kind": "restored"}, {})])
        self._move_head(log, generation=generation, base=base, attempt=attempt, restored=tag, segments=[log.name])
        self._state = state
        self._state.apply({"kind": "restored"}, {})
        self._delete_retired()

    def forget(self, tags: Sequence[str]) -> None:
        """Delete these snapshots, as far as they are there; the one that the log continues once it no longer is."""
        kept = {tag: snapshot for tag, snapshot in self._head["snapshots"].items() if tag not in set(tags)}
        if len(kept) < len(self._head["snapshots"]):
            self._move_head(self._log, snapshots=kept)
            self._delete_retired()

    def call_of(self, tag: str) -> str:
        """The call that made the snapshot `tag`. ValueError that names the tags there are."""
        return self._snapshot(tag)["call"]

    # Statistics that move to other addresses. `key` names the move: with the same key nothing is done twice.

    def check_adopt(self, key: str, addresses: np.ndarray) -> None:
        """ValueError that names the first address which has statistics; KeyError if one is not in the pool."""
        if f"adopt {key}" in self._state.moves or not len(addresses):
            return
        state = self.ledger.export(addresses)
        touched = np.zeros(len(addresses), bool)
        for column, values in state.items():
            if is_count(column):
                touched |= values > 0
        if touched.any():
            raise ValueError(f"address {int(addresses[touched][0])} has statistics of its own, none can be moved there")

    def adopt(self, key: str, attempt: int, addresses: np.ndarray, state: Arrays) -> None:
        """Take over raw columns, as `Ledger.export` gives them, at untouched addresses (n,)."""
        self._check_attempt(attempt)
        self.check_adopt(key, addresses)
        if f"adopt {key}" not in self._state.moves and len(addresses):
            wanted = {name: column.dtype for name, column in self.ledger.export(addresses[:0]).items()}
            if {name: column.dtype for name, column in state.items()} != wanted:
                raise ValueError(f"columns must be {wanted}, got { {n: c.dtype for n, c in state.items()} }")
            self._apply_waiting()  # none may wait that is of a step before the ones that come
            self._log_and_apply({"kind": "adopt", "key": key}, {"addresses": addresses, **state})

    def drop(self, key: str, attempt: int, addresses: np.ndarray) -> None:
        """Make addresses (n,) untouched: their statistics were moved, or have no place any more."""
        self._check_attempt(attempt)
        if f"drop {key}" not in self._state.moves and len(addresses):
            flat_positions(addresses, self._offsets)
            self._apply_waiting()
            self._log_and_apply({"kind": "drop", "key": key}, {"addresses": addresses})

    # What it is.

    @property
    def ledger(self) -> Ledger:
        """The statistics, for reading."""
        return self._state.ledger

    @property
    def attempt(self) -> int:
        """The attempt whose calls count; 0 before the first restore."""
        return self._head["attempt"]

    @property
    def tags(self) -> list[str]:
        """The snapshots there are, oldest first."""
        snapshots = self._head["snapshots"]
        return sorted(snapshots, key=lambda tag: snapshots[tag]["generation"])

    @property
    def log_bytes(self) -> int:
        """Bytes that a recovery would replay."""
        return self._replayed_bytes + self._log.num_bytes

    @property
    def waiting_bytes(self) -> int:
        """Bytes of ema writes that wait for a writer."""
        return self._state.waiting_bytes

    # Checks.

    def _check_attempt(self, attempt: int) -> None:
        if attempt < self.attempt:
            raise AbandonedAttempt(
                f"attempt {attempt} was given up, the ledger was restored for attempt {self.attempt}"
            )
        if attempt > self.attempt:
            raise ValueError(f"attempt {attempt} has not begun, the ledger is at {self.attempt}: call restore first")

    # Changes of state.

    def _log_and_apply(self, meta: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        if self._is_local or self._is_moving:  # elsewhere it would be a request per write
            self._check_mine()
        self._log.append(meta, arrays or {})
        self._state.apply(meta, arrays or {})

    def _apply_waiting(self) -> None:
        if self._state.waiting:
            self._log_and_apply({"kind": "apply"})

    # Snapshots on disk.

    def _read_base(self, base: int | None) -> LedgerState:
        if base is None:
            return LedgerState(Ledger(self._sizes, self._specs), self._specs)
        folder = self._snapshot_url(base)
        ledger = Ledger.load(lambda name: storage.open_read(storage.join(folder, name)), self._sizes, self._specs)
        return LedgerState(ledger, self._specs, saved=manifest.read(storage.join(folder, "state.json")))

    def _save(self, *, tag: str | None, call: str) -> None:
        """Fold the log into a snapshot; without a tag it is there only for the log to continue. Changes no state."""
        generation = self._head["generation"] + 1
        folder = self._snapshot_url(generation)  # never one that HEAD names, so a kill in the middle harms nothing
        self.ledger.save(lambda name: cast(Any, storage.write_atomic(storage.join(folder, name))))
        state = {"format_version": FORMAT_VERSION, **self._state.saved()}
        storage.write_bytes(storage.join(folder, "state.json"), json.dumps(state).encode())
        log = self._begin_segment(generation, then=self._state.waiting_records())
        snapshots = dict(self._head["snapshots"])
        if tag is not None:
            snapshots[tag] = {"generation": generation, "call": call}
        self._move_head(log, generation=generation, base=generation, segments=[log.name], snapshots=snapshots)
        self._delete_retired()

    def _snapshot(self, tag: str) -> Mapping[str, Any]:
        if tag not in self._head["snapshots"]:
            raise ValueError(f"there is no snapshot {tag!r}, the snapshots are {self.tags}")
        return self._head["snapshots"][tag]

    def _begin_segment(self, generation: int, then: Sequence[tuple[Mapping[str, Any], Arrays]] = ()) -> Segment:
        log = Segment(self._segment_url(f"{generation:08d}-{secrets.token_hex(4)}"), fsync=self._fsync)
        for meta, arrays in [({"kind": "begin"}, {}), *then]:
            log.append(meta, arrays)
        return log

    def _move_head(self, log: Segment, **changes: Any) -> None:
        """Commit these changes, and write to `log` from now on; what HEAD names no longer is for `_delete_retired`."""
        self._check_mine()
        head = {**self._head, **changes, "format_version": FORMAT_VERSION}
        head["retired"] = sorted({*self._head["retired"], *_named(self._head)} - _named(head))
        self._is_moving = True
        storage.write_bytes(self._head_url, json.dumps(head, indent=1).encode())
        self._head, self._head_mark = head, self._mark_of_head()
        self._is_moving = False
        if log is not self._log:
            self._log.close()
            self._log, self._replayed_bytes = log, 0

    def _mark_of_head(self) -> str | None:
        return storage.fingerprint(self._head_url) if storage.exists(self._head_url) else None

    def _check_mine(self) -> None:
        if self._mark_of_head() != self._head_mark:
            raise LedgerTaken(
                f"{self._head_url} is not as this process left it: another one has taken over, or a write of it failed "
                "and was done all the same. Start the ledger again"
            )

    def _delete_retired(self) -> None:
        """Delete what HEAD names no longer; what fails is left to the next time, for HEAD remembers it."""
        for path in self._head["retired"]:
            url = storage.join(self._folder, path)
            storage.delete(f"{url}.log")
            for name in storage.names_in(url):
                storage.delete(storage.join(url, name))
            if self._is_local and os.path.isdir(url):
                os.rmdir(url)
        self._head = {**self._head, "retired": []}

    def _segment_url(self, segment: str) -> str:
        return storage.join(self._folder, "log", segment)

    def _snapshot_url(self, generation: int) -> str:
        return storage.join(self._folder, "snapshots", f"{generation:08d}")


_EMPTY_HEAD = {
    "generation": 0,  # grows with each snapshot and restore
    "base": None,  # generation of the snapshot that the log continues
    "segments": [],
    "attempt": 0,
    "restored": None,  # the tag from which the attempt began
    "snapshots": {},  # tag -> generation, call
    "retired": [],  # what former HEADs named and this one does not: to be deleted
}


def _named(head: Mapping[str, Any]) -> set[str]:
    """Paths in the folder that a HEAD names."""
    generations = {snapshot["generation"] for snapshot in head["snapshots"].values()} | {head["base"]} - {None}
    return {f"snapshots/{n:08d}" for n in generations} | {f"log/{segment}" for segment in head["segments"]}
