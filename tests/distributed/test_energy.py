"""The energy meter, with an NVML of our own: joules between two readings, or None where nothing counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from curation.distributed import energy
from curation.distributed.energy import EnergyMeter, total
from curation.distributed.notices import Notice
from curation.distributed.staged import _record
from curation.distributed.train_loop import _Worker


class Board:
    """An NVML that knows one board, whose counter says what it is told to, in millijoules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, readings: list[int | Exception], *, uuid: str = "GPU-1-2"):
        self._readings, self._uuid = iter(readings), uuid
        for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"):
            monkeypatch.setattr(energy.pynvml, name, getattr(self, name))
        monkeypatch.setattr(energy.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))

    def nvmlInit(self) -> None:
        """The driver's library is there."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        """The board, if it is asked for by its name."""
        if uuid != self._uuid:
            raise energy.pynvml.NVMLError(energy.pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, board: str) -> int:
        """The next reading."""
        assert board == self._uuid
        reading = next(self._readings)
        if isinstance(reading, Exception):
            raise reading
        return reading


def test_joules_are_what_the_counter_went_on_by(monkeypatch: pytest.MonkeyPatch) -> None:
    Board(monkeypatch, [5_000_000, 5_001_500, 5_001_500, 5_101_500])
    meter = EnergyMeter("cuda")
    assert [meter.used() for _ in range(3)] == [1.5, 0.0, 100.0]


def test_a_cpu_counts_nothing() -> None:
    assert EnergyMeter("cpu").used() is None


def test_a_machine_without_the_drivers_library_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise energy.pynvml.NVMLError(energy.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    Board(monkeypatch, [])
    monkeypatch.setattr(energy.pynvml, "nvmlInit", missing)
    assert EnergyMeter("cuda").used() is None


def test_a_slice_of_a_board_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Board(monkeypatch, [], uuid="MIG-1-2")
    assert EnergyMeter("cuda").used() is None


def test_a_reading_that_fails_costs_its_two_stretches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = energy.pynvml.NVMLError(energy.pynvml.NVML_ERROR_GPU_IS_LOST)
    Board(monkeypatch, [1000, lost, 2000, 5000])
    meter = EnergyMeter("cuda")
    assert [meter.used() for _ in range(3)] == [None, None, 3.0]


def test_a_sum_with_an_unknown_part_is_not_known() -> None:
    assert total([1.0, 2.5]) == 3.5 and total([]) == 0.0 and total([1.0, None]) is None


@pytest.mark.parametrize("used", [1.25, None])
def test_a_steps_joules_come_with_what_the_ranks_agree_on(used: float | None) -> None:
    worker: Any = SimpleNamespace(
        _rank=0,
        _notices=SimpleNamespace(rank_0_says=lambda: Notice.GO_ON),
        _meter=SimpleNamespace(used=lambda: used),
        _trainer=SimpleNamespace(device="cpu"),
    )
    assert _Worker._agreed(worker, torch.tensor([True, False, False])) == (Notice.GO_ON, 2, used)


@pytest.mark.parametrize("joules", [[3.0, 4.5], [3.0, None]])
def test_a_staged_shards_joules_are_its_parts(joules: list[float | None]) -> None:
    part = {"shard": 0, "url": "a.tar", "read": 1, "embedded": 1, "dropped": {}, "decoded": 1, "warnings": {}}
    part |= {"batch_size": 1, "logit_scale": 1.0, "logit_bias": 0.0, "seconds": {"write": 0.0}}
    part |= {"end": {"fingerprint": "", "sha256": "", "bytes": 1, "warnings": {}}}
    assert _record([{**part, "joules": each} for each in joules], [], seconds=0.0)["joules"] == total(joules)
