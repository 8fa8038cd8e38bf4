"""What a job says: plain lines, or JSON that carries the run's id and the facts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from curation.distributed import logs
from jobs import curate, log


@pytest.fixture(autouse=True)
def plain_again() -> Iterator[None]:
    yield
    logs.configure(as_json=False)


def test_plain_lines_are_the_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=False)
    log.say("10 shards", shards=10)
    assert capsys.readouterr().err == "10 shards\n" and not logs.is_json()


def test_json_lines_carry_the_run_the_facts_and_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(logs.RUN_ID_VARIABLE, "night-7")
    logs.configure(as_json=True)
    log.say("10 shards", shards=10, output="s3://ü")
    try:
        raise OSError("no route")
    except OSError:
        logging.getLogger("curation.data.remote").exception("asked\nagain")
    said = capsys.readouterr().err.splitlines()
    first, second = (json.loads(line) for line in said)
    assert (first["run"], first["message"], first["shards"], first["output"]) == ("night-7", "10 shards", 10, "s3://ü")
    assert (first["level"], first["logger"]) == ("info", "curation.job") and first["time"].endswith("Z")
    assert (second["level"], second["logger"]) == ("error", "curation.data.remote")
    assert second["message"] == "asked\nagain" and "OSError: no route" in second["error"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_a_json_line_is_json_even_where_a_figure_is_not_finite(
    capsys: pytest.CaptureFixture[str], value: float
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    logs.configure(as_json=True)
    log.say("loss", loss=value, steps=[{"loss": value, 3: (1.5, value)}], learning_rate=1e-3, output=Path("a"))
    told = json.loads(capsys.readouterr().err, parse_constant=refuse)
    assert told["loss"] is None and told["steps"] == [{"loss": None, "3": [1.5, None]}]
    assert (told["learning_rate"], told["output"]) == (1e-3, "a")


def test_a_runs_id_is_what_is_given_else_the_submissions_else_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(logs.RUN_ID_VARIABLE, raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert logs.run_id() != logs.run_id()
    submitted = {"runtime_env": {}, "metadata": {"job_submission_id": "first"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    assert logs.run_id() == "first"
    monkeypatch.setenv(logs.RUN_ID_VARIABLE, "given")
    assert logs.run_id() == "given"


def test_a_jobs_errors_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert curate.main(["debgu", "--log-json"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert told["exit_code"] == 2 and "did you mean 'debug'?" in told["message"]


def test_a_limit_that_is_none_is_a_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert curate.main(["debug", "--max-hours", "0", "--pool.shards", "x", "--output", "y"]) == 2
    assert "--max-hours must be more than 0" in capsys.readouterr().err


def test_no_line_tells_a_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    for as_json in (False, True):
        logs.configure(as_json=as_json)
        log.say("asked with 0123456789abcdef", url="https://h/a.tar?sig=5ecret", token="0123456789abcdef")
        said = capsys.readouterr().err
        assert "0123456789abcdef" not in said and "5ecret" not in said and "***" in said
