"""A training that stands still: each rank says what it does, and one that hangs ends, so that Ray Train starts anew.

A rank that hangs leaves the others in a collective, where none of them can tell who is late. So a thread in each rank
looks at the rank's stack when no step was taken for `stall_s`, and leaves a note of it in the output: the rank waits
for the others, or for something else, and where in our code. The driver reads the notes and tells. A rank that waits
for something else as long again is the one that hangs, and ends itself; those that wait for others end when that did
not help, for a rank that is stopped, or holds the interpreter's lock, cannot look. The worker group then begins again
from its newest checkpoint, which counts as one of `compute.max_failures`.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import ray.train
import torch.distributed

import curation
from curation.data import storage
from curation.recipe.train_parts import Workers

HANGS, HANGS_WITH_OTHERS = 2, 3
"""In stall_s: after so long without a step a rank ends itself, if it waits for no other; if it does."""
LOOKS_PER_STALL = 4
BEGINS_S = 600.0
"""Before its first step a rank may take so long at least: models are compiled, the feed starts."""
GRACE_S = 10.0
"""Rank 0 tells of a step every few seconds, and the driver looks every few."""
_OURS = str(Path(curation.__file__).parent)
_MEETINGS = (str(Path(torch.distributed.__file__).parent), str(Path(ray.train.__file__).parent))
"""Where ranks wait for one another: collectives, and Ray Train's reports."""
_LOG = logging.getLogger(__name__)


class StallGuard:
    """One rank's thread that looks whether the calling thread still takes steps. It tells `moved` when one is done."""

    def __init__(self, output: str, rank: int, *, stall_s: float):
        self._url, self._rank, self._stall_s = _note_url(output, rank), rank, stall_s
        self._watched = threading.get_ident()
        self._moved, self._patience_s = time.monotonic(), max(stall_s, BEGINS_S / HANGS)
        self._over = threading.Event()

    def __enter__(self) -> StallGuard:
        threading.Thread(target=self._watch, name="stall guard", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def moved(self) -> None:
        """A step, an evaluation or a checkpoint is done."""
        self._moved, self._patience_s = time.monotonic(), self._stall_s

    def _watch(self) -> None:
        while not self._over.wait(self._stall_s / LOOKS_PER_STALL):
            silent_s = time.monotonic() - self._moved
            frame = sys._current_frames().get(self._watched)
            if silent_s < self._stall_s or frame is None:
                continue
            places = our_places(frame)
            waits = waits_for_others(frame)
            ends = silent_s > self._patience_s * (HANGS_WITH_OTHERS if waits else HANGS)
            note = {
                "rank": self._rank,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": time.time(),
                "silent_s": silent_s,
                "waits_for_others": waits,
                "places": places,
                "ends": ends,
            }
            _LOG.warning("rank %d has taken no step for %.0f s", self._rank, silent_s, extra={"facts": note})
            try:
                storage.write_bytes(self._url, json.dumps(note).encode())
            except OSError:  # perhaps the store is what hangs
                _LOG.exception("rank %d cannot leave its note", self._rank)
            if ends:
                os.kill(os.getpid(), signal.SIGKILL)  # what hangs in C code hears nothing else


def our_places(frame: FrameType) -> list[str]:
    """Where in our package a thread is, the innermost last: `distributed/feed.py:88 next`."""
    stack = traceback.extract_stack(frame)
    return [
        f"{call.filename.removeprefix(_OURS).lstrip('/')}:{call.lineno} {call.name}"
        for call in stack
        if call.filename.startswith(_OURS)
    ]


def waits_for_others(frame: FrameType) -> bool:
    """True if the thread is, below our code, where ranks meet."""
    files = [call.filename for call in traceback.extract_stack(frame)]
    below = itertools.dropwhile(lambda name: not name.startswith(_OURS), files)
    return any(name.startswith(_MEETINGS) for name in below)


class Stall:
    """The driver's side: what the ranks noted, told once for each `stall_s` in which rank 0 told of no step."""

    def __init__(self, output: str, compute: Workers):
        self._output, self._world_size, self._stall_s = output, compute.workers, compute.stall_s
        self.moved()

    def moved(self) -> None:
        """Rank 0 told of a step."""
        self._moved, self._clock = time.time(), time.monotonic()
        self._next_s = self._stall_s + GRACE_S

    def lines(self) -> list[str]:
        """On whom the run waits, if it is time to tell."""
        silent_s = time.monotonic() - self._clock
        if silent_s < self._next_s:
            return []
        self._next_s += self._stall_s
        lines = [self._line(rank) for rank in range(self._world_size)]
        return [f"no step was told of for {silent_s:,.0f} s; the run waits for:", *lines]

    def _line(self, rank: int) -> str:
        note = _note(self._output, rank)
        if note is None or note["time"] < self._moved:
            return f"rank {rank}: has noted nothing since; it begins, is at work, is stopped, or is gone"
        what = "waits for the other ranks" if note["waits_for_others"] else "does not come back"
        line = f"rank {rank}, process {note['pid']} on {note['host']}: {what}, for {note['silent_s']:,.0f} s, in "
        line += " > ".join(note["places"][-2:]) or "code that is not ours"
        return line + ("; it was ended, and all ranks begin again" if note["ends"] else "")


def _note_url(output: str, rank: int) -> str:
    return storage.join(output, "train", "stalls", f"rank-{rank}.json")


def _note(output: str, rank: int) -> dict[str, Any] | None:
    try:
        return json.loads(storage.read_bytes(_note_url(output, rank)))
    except (OSError, ValueError):  # none, or the store does not answer
        return None
