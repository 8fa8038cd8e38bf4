"""One run per output: a lease that its holder renews, and that lapses when the holder is dead.

`lease.json` names the holder (host, process, a random token) and when it last renewed. A second run is refused while the
lease is alive. It is dead when its process is gone from this host, or when another host has not renewed it for TTL_S.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from curation.data import storage

RENEW_S = 10.0
TTL_S = 60.0


class OutputInUse(RuntimeError):
    """Another run holds the output."""


class Lease:
    """Held from entering to leaving the `with` block. OutputInUse on entering if another run holds the output."""

    def __init__(self, output: str):
        self._url = storage.join(output, "lease.json")
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "token": secrets.token_hex(8),
        }
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        holder = _read(self._url)
        if holder is not None and _is_alive(holder, now=time.time()):
            raise OutputInUse(
                f"{self._url} is held by process {holder['pid']} on {holder['host']}, renewed "
                f"{time.time() - holder['renewed']:.0f} s ago. Wait for that run to end; "
                f"if its machine is gone, the lease lapses {TTL_S:.0f} s after its last renewal."
            )
        self._write()
        # Two runs that saw the same dead lease both wrote: the later write stands, and the other one backs out here.
        if (_read(self._url) or {}).get("token") != self._mine["token"]:
            raise OutputInUse(f"{self._url} was taken by another run at the same moment")
        self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._renewer.join()
        if (_read(self._url) or {}).get("token") == self._mine["token"]:
            storage.delete(self._url)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            self._write()

    def _write(self) -> None:
        storage.write_bytes(self._url, json.dumps({**self._mine, "renewed": time.time()}).encode())


def _read(url: str) -> dict[str, Any] | None:
    try:
        return json.loads(storage.read_bytes(url))
    except FileNotFoundError:
        return None


def _is_alive(holder: dict[str, Any], *, now: float) -> bool:
    if holder["host"] == socket.gethostname():
        return _process_started(holder["pid"]) == holder["process_started"]
    return now - holder["renewed"] < TTL_S


def _process_started(pid: int) -> str | None:
    """The kernel's start time of a process, so that a reused process number is not taken for the holder; else None."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return _signalable(pid)
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]  # a zombie was killed already: it only waits for its parent


def _signalable(pid: int) -> str | None:
    """On systems without /proc: "alive" if the process exists."""
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
