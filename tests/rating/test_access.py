from __future__ import annotations

import json
from pathlib import Path

import pytest

from curation.rating.access import RATER, RESULTS, Access, cookie_name, is_loopback, kept_tokens

TOKENS = {RATER: "for-raters", RESULTS: "for-results"}


def test_tokens_are_made_once_for_their_owners_eyes(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    made = kept_tokens(file)
    assert file.stat().st_mode & 0o777 == 0o600 and kept_tokens(file) == made
    assert made[RATER] != made[RESULTS] and all(len(token) >= 32 for token in made.values())


def test_a_file_of_tokens_that_others_may_read_or_that_holds_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    kept_tokens(file)
    file.chmod(0o640)
    with pytest.raises(ValueError, match="may be read by others: chmod 600"):
        kept_tokens(file)
    file.chmod(0o600)
    for text in ("", "[]", json.dumps({RATER: "x"})):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds no tokens"):
            kept_tokens(file)


def test_a_cookie_opens_its_own_page_only() -> None:
    access = Access(TOKENS)
    assert access.may(RATER, {cookie_name(RATER): "for-raters"})
    assert not access.may(RESULTS, {cookie_name(RATER): "for-raters", cookie_name(RESULTS): "for-raters"})
    assert not access.may(RATER, {}) and not access.may(RATER, {cookie_name(RATER): "for-räters"})
    assert (access.role_of("for-results"), access.role_of("none"), Access(None).role_of("")) == (RESULTS, None, None)
    assert Access(None).may(RESULTS, {})


@pytest.mark.parametrize(
    ("tokens", "method", "host", "origin", "allowed"),
    [
        (None, "GET", "localhost:8765", None, True),
        (None, "GET", "127.0.0.1:8765", None, True),
        (None, "GET", "[::1]:8765", None, True),
        (None, "GET", "evil.example:8765", None, False),
        (None, "GET", "", None, False),
        (None, "GET", "[", None, False),
        (None, "POST", "localhost:8765", "http://localhost:8765", True),
        (None, "POST", "localhost:8765", "http://evil.example", False),
        (None, "POST", "localhost:8765", "null", False),
        (TOKENS, "GET", "ratings.example", None, True),
        (TOKENS, "POST", "ratings.example", "https://evil.example", False),
    ],
)
def test_pages_of_others_cannot_reach_the_server(
    tokens: dict[str, str] | None, method: str, host: str, origin: str | None, allowed: bool
) -> None:
    assert (Access(tokens).refusal(method, host=host, origin=origin) is None) == allowed


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("box", False)],
)
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected
