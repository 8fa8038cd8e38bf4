"""One run per output: a lease that its holder renews, and that lapses when the holder is dead.

`lease.json` names the holder (host, process, a random token) and when it last renewed. A second run is refused while
the lease is alive. It is dead when its process is gone from this machine, or when a holder elsewhere has not renewed it
for TTL_S, by clocks that agree within that. A holder that finds that it lost the lease is interrupted. Not every store
can compare and swap, so of runs that start at once the last to write wins, and the others see it SETTLE_S later.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from curation.data import storage

RENEW_S = 10.0
TTL_S = 60.0
SETTLE_S = 0.3
STOPPED = "this run stopped, what it committed stays"
LOST_SIGNAL = signal.SIGUSR2
"""Interrupts the main thread. Not SIGINT, which a shell has its background jobs ignore: such a run would go on."""


class OutputInUse(RuntimeError):
    """Another run holds the output."""


class NotRenewed(OSError):
    """The store took no renewal for so long that another run may take the output."""


class Lease:
    """Held from entering to leaving the `with` block. OutputInUse on entering if another run holds the output.

    If the lease is lost while it is held, the main thread is interrupted and the block ends: with OutputInUse if it was
    taken over, with NotRenewed if it could not be renewed for TTL_S.
    """

    def __init__(self, output: str):
        self._url = storage.join(output, "lease.json")
        self._mine = {
            "host": socket.gethostname(),
            "process_space": _process_space(),
            "pid": os.getpid(),
            "process_started": process_started(os.getpid()),
            "token": secrets.token_hex(8),
        }
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._lost: OutputInUse | NotRenewed | None = None
        self._former_handler: Any = None

    def __enter__(self) -> Lease:
        holder = _read(self._url)
        if holder is not None and _is_alive(holder, now=time.time()):
            raise OutputInUse(
                f"{self._url} is held by process {holder['pid']} on {holder['host']}, renewed "
                f"{time.time() - holder['renewed']:.0f} s ago. Wait for that run to end; "
                f"if its machine is gone, the lease lapses {TTL_S:.0f} s after its last renewal."
            )
        self._write()
        time.sleep(SETTLE_S)
        if not self._is_mine():
            raise OutputInUse(f"{self._url} was taken by another run at the same moment")
        # Only the main thread may set a handler, and only it is interrupted.
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.signal(LOST_SIGNAL, signal.default_int_handler)
        self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            self._renewer.join()
        except KeyboardInterrupt:  # the lease was lost at the very end; what it means is told below
            if not self._lost:
                raise
        if self._former_handler is not None:
            signal.signal(LOST_SIGNAL, self._former_handler)
        if self._lost:
            raise self._lost from error
        if self._is_mine():
            storage.delete(self._url)

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._stop.wait(RENEW_S):
            try:
                if not self._is_mine(or_gone=True):
                    self._lost = OutputInUse(f"{self._url} was taken over by another run; {STOPPED}")
                    break
                self._write()
                renewed = time.monotonic()
            except Exception as error:  # a store may fail for a moment; the lease holds until TTL_S
                if time.monotonic() - renewed > TTL_S:
                    told = f"{self._url} could not be renewed for {TTL_S:.0f} s: {type(error).__name__}: {error}"
                    self._lost = NotRenewed(f"{told}; {STOPPED}")
                    break
        if self._lost and not self._stop.is_set():
            # As Ctrl-C does; _thread.interrupt_main() would not end a wait.
            os.kill(os.getpid(), LOST_SIGNAL if self._former_handler is not None else signal.SIGINT)

    def _is_mine(self, *, or_gone: bool = False) -> bool:
        holder = _read(self._url)
        return or_gone if holder is None else holder["token"] == self._mine["token"]

    def _write(self) -> None:
        storage.write_bytes(self._url, json.dumps({**self._mine, "renewed": time.time()}).encode())


def _read(url: str) -> dict[str, Any] | None:
    """The lease, None if there is none. OutputInUse if there is a file that says nothing."""
    try:
        holder = json.loads(storage.read_bytes(url))
        return {name: kind(holder[name]) for name, kind in _FIELDS.items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise OutputInUse(
            f"{url} is damaged, so nobody knows whether a run holds the output: delete it if none does"
        ) from error


_FIELDS = {"host": str, "process_space": str, "pid": int, "process_started": str, "token": str, "renewed": float}


def _is_alive(holder: dict[str, Any], *, now: float) -> bool:
    if (holder["host"], holder["process_space"]) == (socket.gethostname(), _process_space()):
        return is_running(holder["pid"], holder["process_started"])
    return now - holder["renewed"] < TTL_S


def _process_space() -> str:
    """Where a process number means what it means here: this boot of this machine, and this container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux, no containers
        return ""


def is_running(pid: int, started: str) -> bool:
    """True if the process that began at that time is there, on this machine and in this container."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        pass
    return process_started(pid) in (started, "")


def process_started(pid: int) -> str:
    """The kernel's start time of a process, so that a reused number is not taken for the holder; "" if it is untold."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if state in "ZX" else rest[18]  # a zombie was killed already: it only waits for its parent
