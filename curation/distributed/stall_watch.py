"""A curation that stands still: on whom it waits, told from what the roster's workers noted, and who is replaced."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from curation.data.attempts import NOWHERE, Doing, Step
from curation.distributed.roster import ASK_TIMEOUT_S, NAME, Held

_SAYS = {
    Step.READ: "reading",
    Step.DECODE: "decoding",
    Step.FORWARD: "in the model's forward pass",
    Step.WRITE: "writing its table",
}
REPLACED = "too long: its process was killed, another takes the shard"


class StallWatch:
    """Says on whom the run waits when nothing was committed for `stall_s`, and has workers replaced that are wedged.

    A thread beside the driver, which tells it each commit.
    """

    def __init__(self, run: str, *, stall_s: float, urls: Mapping[int, str], say: Callable[[list[str]], None]):
        self._actor: Any = ray.get_actor(NAME)
        self._run = run
        self._stall_s, self._urls, self._say = stall_s, urls, say
        self._committed = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)

    def __enter__(self) -> StallWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=1.0)

    def committed(self) -> None:
        """Something was committed."""
        self._committed = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(self._stall_s / 2):
            try:
                held = ray.get(
                    self._actor.look.remote(self._run, wedged_after_s=self._stall_s), timeout=2 * ASK_TIMEOUT_S
                )
            except RayError as error:
                held, lines = [], [f"the roster does not answer: {type(error).__name__}"]
            else:
                lines = told(held, self._urls)
            silent_s = time.monotonic() - self._committed
            replaced = [line for line in lines if line.endswith(REPLACED)]
            if silent_s >= self._stall_s and not self._ended.is_set():
                lines = lines or [no_worker()]
                self._say([f"nothing was committed for {silent_s:,.0f} s; the run waits for:", *lines])
            elif replaced and not self._ended.is_set():
                self._say(replaced)


def told(held: Iterable[Held], urls: Mapping[int, str]) -> list[str]:
    """What each shard that a worker holds waits for, in words."""
    lines = []
    for worker, shards, seen in held:
        where = f"process {worker.pid} on {worker.host}"
        for shard, seconds in sorted(shards.items()):
            line = f"shard {shard} ({urls.get(shard, 'of another wave')}), begun {seconds:,.0f} s ago in {where}: "
            if seen is None:
                line += "its node does not answer, or is being taken"
            elif not seen.alive:
                line += "the process is dead; Ray has not given the shard to another yet"
            else:
                line += ", ".join(_step(step) for step in seen.doing if step.shard == shard) or "waits for its turn"
                line += f"; {REPLACED}" if seen.killed else ""
            lines.append(line)
    return lines


def _step(step: Doing) -> str:
    after = "after the sample at offset" if step.step is Step.READ else "the sample at offset"
    place = f" {after} {step.offset}" if step.offset != NOWHERE else ""
    return f"{_SAYS[step.step]}{place} for {step.seconds:,.0f} s"


def no_worker() -> str:
    """Why nobody may hold a shard: what the cluster has, and what of it is free."""
    have, free = ray.cluster_resources(), ray.available_resources()
    counts = [f"{free.get(name, 0.0):g} of {have[name]:g} {name}s free" for name in ("CPU", "GPU") if name in have]
    return f"a worker to begin ({', '.join(counts)}): models are loading, or other work holds what they need"
