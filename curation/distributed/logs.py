"""What a run says: plain lines for people, or one JSON object a line, of the job and of the workers that Ray starts.

A JSON line holds `time`, `level`, `logger`, `run`, `message`, and the facts that the message tells in words; a worker's
line also says its `node` and `pid`. A figure that is not finite, which JSON cannot say, is null. `run` is the same in
all lines of one start of a job, on all its nodes, so that a log store can tell apart what it gathers from many pods.
The job's lines go to its stderr, a worker's to its stderr file in Ray's log folder on its node, where clusters collect
them; with JSON they are not sent to the job's stderr too, for Ray would put its prefix before each. In plain form
workers say warnings only.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import sys
import time
from typing import Any

from curation.data.redact import redacted

RUN_ID_VARIABLE = "CURATION_RUN_ID"
WORKER_VARIABLE = "CURATION_WORKER_LOG_RUN"
"""The run whose id a worker's lines carry. Not the user's variable: Ray refuses one that a submission sets as well."""
_OURS = logging.getLogger("curation")


class JsonLines(logging.Formatter):
    """One JSON object a line; `always` are fields of each."""

    def __init__(self, run: str, **always: Any):
        super().__init__()
        self.run = run
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        """The record and its facts; a traceback, if there is one, as `error`."""
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "run": self.run,
            **self._always,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(_sayable(told), default=str, allow_nan=False)


def _sayable(value: Any) -> Any:
    """The same for JSON: null for a float that is not finite, however deep; names are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _sayable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(item) for item in value]
    return value


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is now, not to what it was when the handler was made."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(redacted(self.format(record)) + "\n")  # Ray Train makes print() a logger's call
        sys.stderr.flush()


_HANDLER = _Stderr()


def configure(*, as_json: bool) -> None:
    """Choose the form of this job's lines, and of its workers' that start from here on."""
    _HANDLER.setFormatter(JsonLines(run_id()) if as_json else None)
    if _HANDLER not in _OURS.handlers:
        _OURS.addHandler(_HANDLER)
        _OURS.setLevel(logging.INFO)
        _OURS.propagate = False
        logging.getLogger("py.warnings").addHandler(_HANDLER)
    logging.captureWarnings(as_json)


def is_json() -> bool:
    """True if the lines are JSON."""
    return isinstance(_HANDLER.formatter, JsonLines)


def run_id() -> str:
    """CURATION_RUN_ID, else the submission id of `ray job submit`, else one made of the time and chance."""
    if given := os.environ.get(RUN_ID_VARIABLE):
        return given
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    made = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    return submitted.get("metadata", {}).get("job_submission_id", made)


def workers_runtime_env() -> dict[str, Any] | None:
    """What ray.init is told so that workers' lines have the form of the job's; None if that is Ray's own."""
    if not isinstance(_HANDLER.formatter, JsonLines):
        return None
    hook = f"{__name__}.{begin_in_worker.__name__}"
    return {"env_vars": {WORKER_VARIABLE: _HANDLER.formatter.run}, "worker_process_setup_hook": hook}


def begin_in_worker() -> None:
    """Called by Ray in each new worker: what is logged there, warnings too, becomes JSON lines on its stderr."""
    handler = _Stderr()
    handler.setFormatter(JsonLines(os.environ[WORKER_VARIABLE], node=socket.gethostname(), pid=os.getpid()))
    for logger in (_OURS, logging.getLogger("py.warnings")):  # Ray Train takes the root logger for itself
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger().addHandler(handler)
    _OURS.setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    for ray_handler in logging.getLogger("ray").handlers:
        ray_handler.setFormatter(handler.formatter)
