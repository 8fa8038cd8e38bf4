"""A job that is killed once and given again, for `doctor`. No job outlives the doctor that started it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

RAY_ENDS_S = 5.0
"""After its driver was killed, a Ray of its own is given so long to end."""
TOLD_CHARACTERS = 400


def resumed(command: list[str], *, killed_when: Callable[[], bool], limit_s: float) -> tuple[bool, str]:
    """Start a job, kill its driver when something is there, give the command again; whether it ended well, in words."""
    begun = time.monotonic()
    with _started(command, stderr=subprocess.DEVNULL) as first:
        while first.poll() is None and time.monotonic() - begun < limit_s and not killed_when():
            time.sleep(0.1)
        how = "killed" if first.poll() is None else "ended before it could be killed"
    time.sleep(RAY_ENDS_S)
    with _started(command, stderr=subprocess.PIPE) as again:
        try:
            _, said = again.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return False, f"no end within {limit_s:g} s"
    told = f"{how}, then exit {again.returncode} after {time.monotonic() - begun:,.0f} s"
    return again.returncode == 0, told if again.returncode == 0 else f"{told}: {said[-TOLD_CHARACTERS:]}"


@contextlib.contextmanager
def _started(command: list[str], *, stderr: int) -> Iterator[subprocess.Popen[str]]:
    """A job that is killed when the block ends, also by an error or a signal: nobody else would end its session."""
    words = [sys.executable, "-m", *command]
    job = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stderr, text=True, start_new_session=True)
    with job:
        try:
            yield job
        finally:
            job.kill()
