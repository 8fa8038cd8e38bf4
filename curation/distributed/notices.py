"""What a worker group of Ray Train hears between two steps: that a node is going to be taken, or that it is to end.

Rank 0 looks now and then, and its word travels with a gather that every step makes anyway; so all ranks act after the
same step. To end, the run's driver leaves a note in the output. That a node is going to be taken, Ray tells when it is
being drained (by a cloud's notice, the autoscaler, `ray drain-node`). That is answered once for each set of nodes:
training goes on until they are gone.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections.abc import Iterator

import ray.train

from curation.data import storage
from curation.distributed.stopping import Stop

LOOK_EVERY_S = 1.0
STOP_POLL_S = 0.2


class Notice(enum.IntEnum):
    """What to do after a step."""

    GO_ON = 0
    LOOK = 1
    """Ask Ray, all ranks together, whether nodes are being taken."""
    SAVE = 2
    """Save a checkpoint, and go on."""
    END = 3
    """Save a checkpoint, and end."""


@contextlib.contextmanager
def passed_on(stop: Stop, output: str) -> Iterator[None]:
    """While the block runs, a thread leaves the note for a run's workers as soon as the run is asked to end."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(STOP_POLL_S):
            if stop.reason:
                with contextlib.suppress(OSError):  # tried again at the next look
                    storage.write_bytes(note_url(output), stop.reason.encode())
                    return

    thread = threading.Thread(target=look, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class EndNote:
    """The ear of a worker that shares nothing with the others: whether the note is there, looked for now and then."""

    def __init__(self, output: str):
        self._url = note_url(output)
        self._next_look, self._is_there = 0.0, False

    def __call__(self) -> bool:
        """True once the note was seen."""
        if not self._is_there and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY_S
            self._is_there = storage.exists(self._url)
        return self._is_there


class Notices:
    """One rank's ear. `rank_0_says` is for rank 0; `heard` is called by all ranks with its word."""

    def __init__(self, output: str):
        self._url = note_url(output)
        self._next_look = 0.0
        self._known: list[str] = []

    def rank_0_says(self) -> Notice:
        """What rank 0 passes on with this step."""
        if time.monotonic() < self._next_look:
            return Notice.GO_ON
        self._next_look = time.monotonic() + LOOK_EVERY_S
        return Notice.END if storage.exists(self._url) else Notice.LOOK

    def heard(self, says: Notice) -> Notice:
        """What to do, given rank 0's word. Collective when that is LOOK."""
        if says is not Notice.LOOK:
            return says
        told = ray.train.get_preemption_info()
        nodes = told.preempted_node_ids if told else []
        new, self._known = bool(set(nodes) - set(self._known)), nodes
        return Notice.SAVE if new else Notice.GO_ON


def note_url(output: str) -> str:
    """The note that asks a run's workers to end; it says why."""
    return storage.join(output, "train", "end.txt")
