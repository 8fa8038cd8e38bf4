"""What a GPU has used: joules between two readings of the counter that its board keeps (NVML).

The counter is the whole board's, of Volta and later; it knows nothing of the host around it, nor of who shares the
board. A CPU, an older board, a slice of one (MIG) and a machine without the driver's library have no counter: there
nothing is known, and the report calls its figure an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pynvml
import torch

MILLIJOULES = 1000


class EnergyMeter:
    """The counter of the GPU that this process computes on, and where it last stood."""

    def __init__(self, device: torch.device | str):
        self._read = _counter(torch.device(device))
        self._last = self._read()

    def used(self) -> float | None:
        """Joules since the last reading, by whoever used the board; None if nothing counts them."""
        before, self._last = self._last, self._read()
        return None if before is None or self._last is None else self._last - before


def total(joules: Iterable[float | None]) -> float | None:
    """The sum; None if one is not known."""
    found = list(joules)
    known = [each for each in found if each is not None]
    return sum(known) if len(known) == len(found) else None


def _counter(device: torch.device) -> Callable[[], float | None]:
    if device.type != "cuda":
        return lambda: None
    try:
        pynvml.nvmlInit()
        # By its uuid: NVML counts boards without regard to CUDA_VISIBLE_DEVICES.
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return lambda: None

    def read() -> float | None:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(board) / MILLIJOULES
        except pynvml.NVMLError:
            return None

    return read
