from __future__ import annotations

import builtins
import json
import socket
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.rating.database import NAME
from curation.rating.store import Store
from curation.rating.study import open_study
from jobs.rate import main


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two models of two images each."""
    for model in ("a", "b"):
        for place in range(2):
            path = tmp_path / "study" / model / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    return tmp_path / "study"


@pytest.fixture
def voted(study: Path) -> Path:
    """The same, with a vote of each of two raters."""
    store = Store(study / NAME, open_study(str(study)), goal=5)
    for name in ("Ann", "Bob"):
        rater = store.rater(store.enter(name))
        assert store.assign(rater)
        store.vote(rater, store.open_assignments(rater)[0].token, "left", key=f"of {name}", seconds=1.0)
    return study


@pytest.mark.parametrize("command", [[], ["results"], ["export"]])
def test_no_study_is_exit_code_2(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in (told := capsys.readouterr().err) or "there are no votes at" in told


def test_an_empty_study_one_model_and_wrong_options_are_exit_code_2(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (study / "a").rename(tmp_path / "one" / "a")
    for arguments, complaint in (
        ([str(tmp_path / "empty")], "holds no model"),
        ([str(tmp_path / "one")], "one model only, 'a'"),
        ([str(study), "--overlap", "101"], "--overlap must be a percentage, got 101"),
        ([str(study), "--goal", "0"], "--goal must be at least 1, got 0"),
        ([str(study), "--detect", "0.4"], "win_rate must be above 0.5 and below 1, got 0.4"),
    ):
        assert main(arguments) == 2
        assert complaint in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "uvicorn":
            raise ImportError("No module named 'uvicorn'")
        return known(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([str(study)]) == 2
    assert "pip install 'curation[rate]'" in capsys.readouterr().err
    assert not (study / NAME).exists()


def test_an_address_that_is_taken_is_exit_code_1(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([str(study), "--port", str(taken.getsockname()[1])]) == 1
    assert "OSError" in capsys.readouterr().err


def test_results_are_printed_and_written(voted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(voted), "--json", str(tmp_path / "r.json")]) == 0
    told = capsys.readouterr().out
    for part in (
        "2 votes of 2 raters",
        "WARNING: 2 raters",
        "a against b",
        "ties excluded",
        "192 decisive votes",
        "alpha",
    ):
        assert part in told
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["num_votes"] == 2 and found["pairs"][0]["still_needed"] == 192
    assert found["pairs"][0]["rate_decisive"]["wilson"] and {model["name"] for model in found["models"]} == {"a", "b"}


def test_votes_are_exported_beside_the_study_and_names_only_when_asked(
    voted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(voted)]) == 0
    assert capsys.readouterr().out.startswith("2 votes: ")
    assert pq.read_table(voted / "votes.parquet")["rater_name"].to_pylist() == [None, None]
    assert main(["export", str(voted), "--with-names"]) == 0
    assert pq.read_table(voted / "votes.parquet")["rater_name"].to_pylist() == ["Ann", "Bob"]
