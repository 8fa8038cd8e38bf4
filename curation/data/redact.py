"""Secrets out of what is said or saved: signatures and tokens in URLs, passwords in them, values of secret variables.

A pattern knows a URL's usual secrets; what an exception quotes of the environment is found by its value. Neither finds
a secret that looks like nothing known: credentials belong into the store's own configuration, not into a recipe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
MIN_SECRET = 8
"""A shorter value of a variable is not looked for: it would be found in half of all words."""
PASSWORD = re.compile(r"(?<=://)[^/@\s'\"]*:[^/@\s'\"]*(?=@)")
"""user:password of a URL."""
_PARAMETER = re.compile(
    r"([?&;][\w.%-]*(?:signature|token|secret|passw|credential|sig|key|auth)[\w.%-]*=)(?:(?!::)[^&;#\s'\"])+",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|ACCOUNT_KEY)$", re.IGNORECASE)


def redacted(text: str, *, environment: Mapping[str, str] | None = None) -> str:
    """The text with *** for what is secret in it."""
    environment = os.environ if environment is None else environment
    text = _PARAMETER.sub(rf"\1{HIDDEN}", PASSWORD.sub(HIDDEN, text))
    for name, value in environment.items():
        if len(value) >= MIN_SECRET and _VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    return text


def redacted_json(value: Any) -> Any:
    """A JSON value, each of its strings redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, list):
        return [redacted_json(item) for item in value]
    if isinstance(value, dict):
        return {name: redacted_json(item) for name, item in value.items()}
    return value
