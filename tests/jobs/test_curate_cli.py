"""The command line of jobs.curate: what it prints, what it refuses, and its exit codes. No Ray is started here."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from curation.data.lease import Lease
from curation.data.pieces import Pieces
from curation.data.shard_list import Shard
from curation.distributed.pipeline import Plan
from curation.recipe import CurateRecipe
from curation.recipe.guards import Exclude
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


def test_dry_run_tells_what_is_always_left_out_and_which_columns_are_made(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {
        "exclude": '[{"name": "opt-out", "files": "lists/*.txt", "by": "url"}]',
        "holdout": '{"parts": {"reference": [0, 0.1], "test": [0.1, 0.2]}, "keep": "test"}',
        "decontaminate": '{"sets": {"flickr": "runs/flickr"}}',
        "columns": '[{"make": "language", "model": "lid.176.ftz"}]',
        "selection": '[{"column": "language.label", "one_of": ["en"]}, {"balance": "url_domain", "cap": 3}]',
    }
    flags = [word for name, text in fields.items() for word in (f"--{name}", text)]
    assert job.main(["debug", "--dry-run", "--pool.shards", str(pool), "--output", str(tmp_path / "o"), *flags]) == 0
    said = capsys.readouterr().out
    for line in (
        "leave out opt-out: by url, lists/*.txt",
        "hold out reference, test; choose from test",
        "leave out copies in flickr: runs/flickr",
        "make column language: language",
        "select language.label in en",
        "select balance url_domain: cap 3",
    ):
        assert line in said


def test_no_line_of_a_plan_tells_a_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_SECRET", "0123456789abcdef")
    recipe = CurateRecipe(
        exclude=(Exclude(name="opt-out", files="https://h/list.txt?sig=5ecret", by="url"),),
        output="s3://0123456789abcdef",
    )
    todo = [
        Shard(0, "https://h/a.tar?X-Amz-Date=20261122&X-Amz-Signature=5ecret", ""),
        Shard(1, "s3://a:5ecret@h", ""),
    ]
    job.print_plan(recipe, Plan([], todo, todo, Pieces()))
    said = capsys.readouterr().out
    assert "5ecret" not in said and "0123456789abcdef" not in said
    assert "https://h/a.tar?X-Amz-Date=20261122&X-Amz-Signature=***\n" in said and "https://h/list.txt?sig=***" in said


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
        (["debug", "--holdout", '{"parts": {"a": [0, 0.2], "b": [0.1, 0.3]}}'], "overlaps"),
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
