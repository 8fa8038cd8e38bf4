"""A run that is asked to end before its work is done: by a limit on its hours, or by SIGTERM.

SIGTERM is what `ray job stop`, a pod's end and Slurm send. What a run does about it depends on what it would lose. One
that commits piece by piece loses nothing that is not committed anyway, so it ends at once (`interrupts=True`), or, at a
limit, after its next commit. A training run first saves a checkpoint; a second SIGTERM ends it at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """SIGTERM came, or the run was asked to end: it ends where it stands. As for Ctrl-C, no `except Exception` holds it
    up."""


class Stop:
    """Whether a run is to end before its work is done. ValueError if max_hours is not positive."""

    def __init__(self, *, max_hours: float | None = None):
        if max_hours is not None and not max_hours > 0:
            raise ValueError(f"--max-hours must be more than 0, got {max_hours}")
        self._max_hours = max_hours
        self._begun = time.monotonic()
        self._asked: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the run is to end; None if it is to go on."""
        if self._max_hours is not None and time.monotonic() - self._begun >= self._max_hours * 3600:
            self.ask(f"--max-hours {self._max_hours:g} are over")
        return self._asked

    def check(self) -> None:
        """Where nothing is under way that could be lost: Interrupted if the run is to end."""
        if reason := self.reason:
            raise Interrupted(reason)

    def ask(self, reason: str) -> None:
        """Ask the run to end."""
        self._asked = self._asked or reason

    @contextlib.contextmanager
    def on_sigterm(self, *, interrupts: bool) -> Iterator[None]:
        """Hear SIGTERM while the block runs, in the main thread; in any other thread it is not heard.

        `ray.init` takes SIGTERM for itself, so enter a block after it. With `interrupts` the first SIGTERM ends the
        block with Interrupted, without it the second.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def heard(number: int, frame: FrameType | None) -> None:
            again = self._asked is not None
            self.ask("SIGTERM")
            if interrupts or again:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ending takes a moment, in which nothing may interfere
                raise Interrupted("SIGTERM")

        former = signal.signal(signal.SIGTERM, heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, former)
