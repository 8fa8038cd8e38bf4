"""What a job says while it runs, on stderr (curation/distributed/logs.py has the form of its lines)."""

from __future__ import annotations

import logging
from typing import Any

from curation.distributed import logs

_LOG = logging.getLogger("curation.job")
logs.configure(as_json=False)


def say(message: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Say a line; the facts are fields of its JSON."""
    _LOG.log(level, message, extra={"facts": facts})
