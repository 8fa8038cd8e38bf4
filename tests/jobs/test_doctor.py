"""How the doctor ends: with what exit code, without a worker node, and with none of the jobs that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs import benchmark
from jobs.benchmarks import doctor, doctor_runs
from jobs.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USAGE


@pytest.mark.parametrize(("failed", "code"), [(0, EXIT_OK), (2, EXIT_FAILED)])
def test_a_check_that_fails_fails_the_command_and_its_figures_are_written(
    failed: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(*, output: str, tiny: bool) -> dict[str, Any]:
        return {"checks": [], "failed": failed}

    monkeypatch.setitem(benchmark.BENCHMARKS, "doctor", checked)
    assert benchmark.main(["doctor", "--tiny", "--json", str(tmp_path / "told.json")]) == code
    assert f'"failed": {failed}' in (tmp_path / "told.json").read_text()


HEAD = {"Alive": True, "Resources": {"memory": 1e9}}
WORKER = {"Alive": True, "Resources": {"CPU": 2.0}}


@pytest.fixture
def grows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, float], int, float]]:
    """A cluster that is a head alone until it was asked for nodes and waited for; what it was asked for."""
    asked: list[tuple[dict[str, float], int, float]] = []
    monkeypatch.setattr(doctor, "cluster", lambda num_cpus: contextlib.nullcontext())
    monkeypatch.setattr(doctor, "grown", lambda bundle, count, *, wait_s: asked.append((bundle, count, wait_s)))
    monkeypatch.setattr(ray, "nodes", lambda: [HEAD, WORKER] if asked[-1][-1] else [HEAD])
    for name in ("of_nodes", "all_gather"):
        monkeypatch.setattr(
            doctor, name, lambda nodes, *rest, mib: iter([doctor.Check("there", True, f"{len(nodes)}")])
        )
    return asked


def test_a_head_without_workers_is_one_check_that_fails_and_nothing_else_is_begun(
    grows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "killed_and_resumed", lambda *_, **__: pytest.fail("a job would be started"))
    assert benchmark.main(["doctor", "--output", str(tmp_path)]) == EXIT_FAILED
    said = capsys.readouterr().out
    assert said.count("FAIL") == 1 and "no worker node is there" in said and "--wait-for-nodes-s" in said


def test_a_cluster_that_grows_is_asked_for_nodes_and_so_do_the_jobs(
    grows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def job(command: list[str], *, killed_when: Any, limit_s: float) -> tuple[bool, str]:
        given.append([*command, f"{limit_s:g}"])
        output = Path(command[command.index("--output") + 1])
        output.mkdir(parents=True)
        (output / "summary.json").write_text('{"read": 2000, "embedded": 1999, "dropped": {"tar:sparse": 1}}')
        return True, "killed"

    monkeypatch.setattr(doctor, "resumed", job)
    monkeypatch.setattr(doctor, "make_pool", lambda folder, **_: None)
    code = benchmark.main(["doctor", "--output", str(tmp_path), "--wait-for-nodes-s", "900"])
    assert grows == [({"CPU": 1.0}, 2, 900.0)]
    assert [command[0] for command in given] == ["jobs.curate", "jobs.train"]
    for command in given:
        assert command[command.index("--compute.wait-for-nodes-s") + 1] == "900" and command[-1] == "1500"
    assert code == EXIT_FAILED  # no step was made


@pytest.mark.parametrize("seconds", ["-1", "inf", "nan"])
def test_a_wait_that_is_none_is_a_wrong_command(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["doctor", "--wait-for-nodes-s", seconds])
    assert ended.value.code == EXIT_USAGE and "must be seconds, 0 or more" in capsys.readouterr().err


SLEEPER = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], f"{os.getpid()}.pid").touch()
time.sleep(600)
"""


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A job that says its process in `tmp_path`, and does not end."""
    (tmp_path / "sleeps_for_long.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor_runs, "RAY_ENDS_S", 0.0)
    return ["sleeps_for_long", str(tmp_path)]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def jobs_of(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def test_the_doctor_leaves_no_job_behind_when_it_fails(sleeper: list[str], tmp_path: Path) -> None:
    def lost() -> bool:
        if jobs_of(tmp_path):
            raise OSError("the store is gone")
        return False

    with pytest.raises(OSError, match="the store is gone"):
        doctor_runs.resumed(sleeper, killed_when=lost, limit_s=60)
    [job] = jobs_of(tmp_path)
    assert not is_alive(job)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.usefixtures("grows")
def test_the_doctor_leaves_no_job_behind_when_it_is_stopped(
    jobs: int, sleeper: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SIGTERM, while it waits for the first job's moment, and while it waits for the second job's end."""

    def stop() -> None:
        while len(jobs_of(tmp_path)) < jobs:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    def checks(folder: str, *, wait_for_nodes_s: float) -> Iterator[doctor.Check]:
        threading.Thread(target=stop, daemon=True).start()
        doctor_runs.resumed(sleeper, killed_when=lambda: len(jobs_of(tmp_path)) == 1 < jobs, limit_s=120)
        yield from ()

    monkeypatch.setattr(doctor, "killed_and_resumed", checks)
    assert benchmark.main(["doctor", "--output", str(tmp_path), "--wait-for-nodes-s", "1"]) == EXIT_STOPPED
    assert len(jobs_of(tmp_path)) == jobs and not any(map(is_alive, jobs_of(tmp_path)))


def test_a_job_that_does_not_end_in_its_time_is_told_and_ended(sleeper: list[str], tmp_path: Path) -> None:
    ok, told = doctor_runs.resumed(sleeper, killed_when=lambda: bool(jobs_of(tmp_path)), limit_s=5)
    assert (ok, told) == (False, "no end within 5 s")
    assert not any(map(is_alive, jobs_of(tmp_path)))
