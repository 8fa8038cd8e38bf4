"""The command line of jobs.curate: what it prints, what it refuses, and its exit codes. No Ray is started here."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from curation.data.lease import Lease
from jobs import curate as job


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool" / "00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return path.parent


def test_dry_run_prints_the_plan_and_touches_nothing(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = job.main(["debug", "--dry-run", "--pool.shards", str(pool), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert code == 0 and not (tmp_path / "out").exists()
    assert "1 shards; 1 to embed" in said and "00000.tar" in said and "nothing was touched" in said


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "usage: python -m jobs.curate RECIPE"),
        (["debgu"], "did you mean 'debug'?"),
        (["debug", "--output", "out"], "pool.shards is empty"),
        (["debug", "--pool.shards", "nothing-here/*.tar", "--output", "out"], "no shard matches"),
        (["debug", "--dry-run", "--pool.shards", "POOL"], "output is empty"),
        (["debug", "--pool.shards", "POOL", "--embed.model", "nanno", "--output", "OUT"], "nano"),
        (["debug", "--max-drop-fraction", "2"], "max_drop_fraction"),
        (["debug", "--selection", '[{"method": {"name": "clip_scor"}, "keep": 3}]'], "clip_score"),
    ],
)
def test_a_wrong_command_is_a_clear_error_with_exit_code_2(
    arguments: list[str], says: str, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [{"POOL": str(pool), "OUT": str(tmp_path / "out")}.get(word, word) for word in arguments]
    try:
        code = job.main(named)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    said = capsys.readouterr()
    assert says in said.err + said.out


def test_an_output_in_use_is_exit_code_3(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Lease(str(tmp_path / "out")):
        assert job.main(["debug", "--pool.shards", str(pool), "--output", str(tmp_path / "out")]) == 3
    assert "is held by process" in capsys.readouterr().err
