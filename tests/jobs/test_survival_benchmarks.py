"""What doctor, scale and chaos make of figures; without Ray."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.benchmarks import chaos, doctor, nodes, scale
from jobs.benchmarks.chaos_runs import Case, Round

HERE = {"ray": "2.60.0", "torch": "2.11.0"}
GOOD = {"versions": HERE, "write_mb_s": 300.0, "read_mb_s": 900.0, "decoded_per_s": 120.0, "cores": 16}


def verdict(gpu: float | None = None, **changes: Any) -> dict[str, bool | None]:
    checks = doctor.verdicts("node", {**GOOD, **changes}, gpu, here=HERE)
    return {check.name.removeprefix("node: "): check.passed for check in checks}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"versions": {"ray": "2.59.0", "torch": "2.11.0"}}, ["versions"]),
        ({"write_mb_s": doctor.WRITE_MB_S - 1}, ["storage"]),
        ({"read_mb_s": doctor.READ_MB_S - 1}, ["storage"]),
        ({"decoded_per_s": doctor.DECODED_PER_S - 1}, ["decoding"]),
        ({"gpu": doctor.GPU_TFLOPS - 1}, ["GPU"]),
    ],
)
def test_a_figure_below_its_floor_fails_its_check_and_no_other(changes: dict[str, Any], failed: list[str]) -> None:
    told = verdict(**changes)
    assert [name for name, passed in told.items() if passed is False] == failed
    assert told["GPU"] is (None if "gpu" not in changes else False)


def test_every_check_that_fails_says_what_to_do() -> None:
    bad = {"versions": {}, "write_mb_s": 0.0, "read_mb_s": 0.0, "decoded_per_s": 0.0, "cores": 1}
    assert all(check.fix and not check.passed for check in doctor.verdicts("node", bad, 0.0, here=HERE))


def test_the_steady_rate_leaves_out_how_a_run_begins_and_ends() -> None:
    ends = [0.0, *(100 + 0.5 * at for at in range(98)), 900.0]
    assert scale.steady_rate(ends) == pytest.approx(2.0)


def test_sleepers_do_not_import_torch() -> None:
    told = "import sys, jobs.benchmarks.sleepers; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout == "False\n"


def round_of(
    tmp_path: Path, *, code: int, fault: str, monkeypatch: pytest.MonkeyPatch, harm: str = ""
) -> dict[str, Any]:
    """A round whose runs are made up: each writes one table, and ends with `code`."""
    run = Round(Case("curate", "pool", 3, tmp_path), tmp_path / "out", cast(Any, None), random.Random(0))

    def start() -> Any:
        (run.output / "samples").mkdir(parents=True, exist_ok=True)
        (run.output / "samples" / "a.parquet").write_bytes(b"whole" + harm.encode())
        (run.output / "summary.json").write_text('{"read": 3, "embedded": 2, "dropped": {"tar:sparse": 1}}')
        run.process = cast(Any, SimpleNamespace(poll=lambda: 0))
        return run.process

    monkeypatch.setattr(run, "start", start)
    monkeypatch.setattr(run, "ended", lambda process=None: code)
    monkeypatch.setitem(chaos.FAULTS, fault, lambda run: None)
    wanted = {"samples/a.parquet": hashlib.sha256(b"whole").hexdigest()}
    return chaos.judged(fault, run, wanted)


def test_a_round_passes_if_all_is_as_it_was_without_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = round_of(tmp_path, code=0, fault="nothing", monkeypatch=monkeypatch)
    assert told["passed"] and told["identical"] and told["balanced"]


@pytest.mark.parametrize(("code", "harm"), [(1, ""), (0, "another")])
def test_a_round_fails_if_a_run_does_or_a_byte_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, harm: str
) -> None:
    assert not round_of(tmp_path, code=code, fault="nothing", monkeypatch=monkeypatch, harm=harm)["passed"]


def test_only_what_we_started_is_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert nodes.is_below(child.pid, os.getpid()) and not nodes.is_below(os.getppid(), os.getpid())
    finally:
        child.kill()
        child.communicate()
