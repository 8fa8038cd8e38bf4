"""Gauges that stay at Ray's metrics port for as long as what they tell of goes on.

Ray forgets a gauge that is not set for two of its export intervals, 20 s; counters stay. A value that is told once, or
that stops changing because the run stands still, would be gone when it is looked for. So each is set again and again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from types import MappingProxyType

from ray.util.metrics import Gauge

AGAIN_EVERY_S = 5.0
"""Half of Ray's export interval: each export finds every gauge set."""
NO_TAGS: Mapping[str, str] = MappingProxyType({})


class LastingGauges:
    """Sets gauges, and each of them again until it is closed, or nobody holds it any more."""

    def __init__(self, *, every_s: float = AGAIN_EVERY_S):
        self._every_s = every_s
        self._last: dict[tuple[Gauge, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, gauge: Gauge, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Set a gauge, with these tags beside its default ones. Once closed, it is set this one time only."""
        with self._lock:
            gauge.set(value, dict(tags))
            self._last[gauge, tuple(sorted(tags.items()))] = value
            if self._thread is None and not self._closed.is_set():
                arguments = (weakref.ref(self), self._closed, self._every_s)
                self._thread = threading.Thread(target=_set_again, args=arguments, daemon=True, name="gauges")
                self._thread.start()

    def close(self) -> None:
        """Set none again: Ray forgets them."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def again(self) -> None:
        """Set each to its last value."""
        with self._lock:  # or a value from before would follow one that is set now
            for (gauge, tags), value in self._last.items():
                gauge.set(value, dict(tags))


def _set_again(held: weakref.ref[LastingGauges], closed: threading.Event, every_s: float) -> None:
    while not closed.wait(every_s):
        gauges = held()
        if gauges is None:
            return
        gauges.again()
        del gauges  # not held while it waits
