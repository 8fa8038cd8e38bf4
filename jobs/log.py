"""What a job says while it runs, on stderr: plain lines for people, or with --log-json one JSON object a line.

A JSON line holds `time`, `level`, `logger`, `run`, `message`, and the facts that the message tells in words. `run` is
the same in all lines of one start of a job, so that a log store can tell apart what it gathers from many pods.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import time
from typing import Any

from curation.data.redact import redacted

RUN_ID_VARIABLE = "CURATION_RUN_ID"
_ROOT = logging.getLogger("curation")
_LOG = logging.getLogger("curation.job")


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is now, not to what it was when the handler was made."""

    def emit(self, record: logging.LogRecord) -> None:
        print(redacted(self.format(record)), file=sys.stderr, flush=True)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, run: str):
        super().__init__()
        self._run = run

    def format(self, record: logging.LogRecord) -> str:
        """The record and its facts; a traceback, if there is one, as `error`."""
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "run": self._run,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


_HANDLER = _Stderr()
_ROOT.addHandler(_HANDLER)
_ROOT.setLevel(logging.INFO)
_ROOT.propagate = False


def configure(*, as_json: bool) -> None:
    """Choose the form of the lines from here on."""
    _HANDLER.setFormatter(JsonLines(run_id()) if as_json else None)


def is_json() -> bool:
    """True if the lines are JSON."""
    return isinstance(_HANDLER.formatter, JsonLines)


def say(message: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Say a line; the facts are fields of its JSON."""
    _LOG.log(level, message, extra={"facts": facts})


def run_id() -> str:
    """CURATION_RUN_ID, else the submission id of `ray job submit`, else one made of the time and chance."""
    if given := os.environ.get(RUN_ID_VARIABLE):
        return given
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    made = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    return submitted.get("metadata", {}).get("job_submission_id", made)
