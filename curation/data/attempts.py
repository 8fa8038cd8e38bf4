"""What a worker has in its hands, so that its death points at a sample; and what three deaths at one place mean.

A worker notes each step before it takes it in a small mapped file: which shard, which sample by its offset. The kernel
keeps what was written when the process is gone, so nothing is flushed and a note costs microseconds. Who finds the
worker dead reads the file. The first death may point at several samples, since threads decode side by side; whoever
takes the shard next decodes those one at a time with nothing beside them, so the next death points at one.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

CRASHES_WORKER = "sample:crashes_worker"
MAX_DEATHS = 3
"""Distinct workers that must die at a sample before it is set aside: one may die of anything."""
NOWHERE = -1
"""The offset of a step that is not at one sample."""
_ENTRY = struct.Struct("<qqqd")  # step, shard, offset, since


class Step(enum.IntEnum):
    """What a worker does; 0 is nothing."""

    READ = 1
    DECODE = 2
    FORWARD = 3
    WRITE = 4


class Doing(NamedTuple):
    """A step that was begun and not ended. READ has the offset of the sample before."""

    step: Step
    shard: int
    offset: int
    seconds: float
    """For how long, at the time of reading."""


class WorkRecord:
    """The notes of this process. `slots`: steps that may be under way at a time."""

    def __init__(self, *, slots: int, folder: str | None = None):
        file, self.path = tempfile.mkstemp(prefix="curation-work-", dir=folder)
        os.ftruncate(file, slots * _ENTRY.size)
        self._map = mmap.mmap(file, slots * _ENTRY.size)
        os.close(file)
        self._free = deque(range(0, slots * _ENTRY.size, _ENTRY.size))  # pop and append are atomic

    @contextmanager
    def doing(self, step: Step, shard: int, offset: int = NOWHERE) -> Iterator[None]:
        """Note a step while the block runs. IndexError if all slots are taken."""
        place = self._free.pop()
        _ENTRY.pack_into(self._map, place, step, shard, offset, time.time())
        try:
            yield
        finally:
            _ENTRY.pack_into(self._map, place, 0, 0, 0, 0.0)
            self._free.append(place)


def read_work(path: str) -> list[Doing]:
    """The steps under way in the process that keeps, or kept, the record. FileNotFoundError if there is none."""
    with open(path, "rb") as file:
        data = file.read()
    now = time.time()
    entries = (_ENTRY.unpack_from(data, place) for place in range(0, len(data) - _ENTRY.size + 1, _ENTRY.size))
    return [Doing(Step(step), shard, offset, now - since) for step, shard, offset, since in entries if step]


class Verdict(NamedTuple):
    """What is known of a shard when a worker takes it."""

    set_aside: frozenset[int] = frozenset()
    """Offsets of samples that are not touched again."""
    suspects: frozenset[int] = frozenset()
    """Offsets at which workers died: each is decoded with nothing beside it."""
    whole: bool = False
    """The shard itself is set aside: workers died in it, and at none of its samples."""


class Deaths:
    """Workers' deaths by place. A death blames what was decoded or embedded then; else all that the worker held."""

    def __init__(self) -> None:
        self._noted: set[str] = set()
        self._at: defaultdict[int, defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._nowhere: defaultdict[int, set[str]] = defaultdict(set)

    def note(self, worker: str, work: Sequence[Doing], *, held: Iterable[int]) -> None:
        """A worker died with these steps under way and these shards in its hands; the second telling is ignored."""
        if worker in self._noted:
            return
        self._noted.add(worker)
        blamed = [step for step in work if step.step in (Step.DECODE, Step.FORWARD)]
        for step in blamed:
            if step.step is Step.DECODE:
                self._at[step.shard][step.offset].add(worker)
            else:
                self._nowhere[step.shard].add(worker)
        for shard in held if not blamed else ():
            self._nowhere[shard].add(worker)
        # Deaths that a sample explains are no shard's: three such samples would else take a shard along.
        dead = {
            w
            for offsets in self._at.values()
            for workers in offsets.values()
            if len(workers) >= MAX_DEATHS
            for w in workers
        }
        for workers in self._nowhere.values():
            workers -= dead

    def verdict(self, shard: int) -> Verdict:
        """What the next worker is told."""
        offsets = self._at.get(shard, {})
        dead = frozenset(offset for offset, workers in offsets.items() if len(workers) >= MAX_DEATHS)
        whole = len(self._nowhere.get(shard, ())) >= MAX_DEATHS
        return Verdict(dead, frozenset(offsets) - dead, whole)


class Turns:
    """Many may work side by side, or one alone. Who waits to be alone goes before who comes later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = self._waiting = 0
        self._alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Beside others; not beside one that is alone."""
        with self._changed:
            while self._alone or self._waiting:
                self._changed.wait()
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With nobody beside."""
        with self._changed:
            self._waiting += 1
            while self._alone or self._together:
                self._changed.wait()
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()
