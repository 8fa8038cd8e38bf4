"""Who may open the pages: on loopback whoever is on this machine, elsewhere whoever has a token.

There are two tokens, because raters must not see results while they vote: one for the study, one for its results. They
are made once and lie beside the votes in a file that its owner alone may read; no command line holds them. A link
carries a token behind its #, which browsers send to nobody; the page trades it for a cookie that scripts cannot read.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

RATER, RESULTS = "rater", "results"
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}


class Access(NamedTuple):
    """The tokens by what they open; None where none is wanted."""

    tokens: Mapping[str, str] | None

    def may(self, role: str, cookies: Mapping[str, str]) -> bool:
        """True if these cookies open this."""
        return self.tokens is None or same(self.tokens[role], cookies.get(cookie_name(role), ""))

    def role_of(self, token: str) -> str | None:
        """What a token opens, if anything."""
        roles = (role for role, known in (self.tokens or {}).items() if same(known, token))
        return next(roles, None)

    def refusal(self, method: str, *, host: str, origin: str | None) -> str | None:
        """Why a request is not even looked at; None if it is.

        Without tokens a page of somebody else's, open in the same browser, could reach loopback: under a name of its
        own that it lets point here (so the name must be loopback's), or by a form (so the origin must be ours).
        """
        if self.tokens is None and _name_in(host) not in LOOPBACK_NAMES:
            return "this server is open to this machine only"
        if method != "GET" and origin is not None and origin.partition("://")[2] != host:
            return "a page of another place may not write here"
        return None


def same(known: str, given: str) -> bool:
    """True if two tokens are equal; the time it takes does not tell how nearly."""
    return secrets.compare_digest(known.encode(), given.encode())


def _name_in(host: str) -> str:
    """The name in a Host header; "" if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def cookie_name(role: str) -> str:
    """What the cookie is called that opens this."""
    return f"curation-{role}"


def is_loopback(host: str) -> bool:
    """True if only this machine can reach a server that listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def kept_tokens(path: Path) -> dict[str, str]:
    """The tokens in this file, which is made, for its owner's eyes alone, if it is not there.

    ValueError if others may read it, or it holds no tokens.
    """
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            raise ValueError(f"{path} may be read by others: chmod 600, or delete it for new tokens") from None
    else:
        with os.fdopen(made, "w") as file:
            json.dump({role: secrets.token_urlsafe(24) for role in (RATER, RESULTS)}, file)
    try:
        tokens = json.loads(path.read_text())
        return {role: str(tokens[role]) for role in (RATER, RESULTS)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no tokens; delete it for new ones") from error
