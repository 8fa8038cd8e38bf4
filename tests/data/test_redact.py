"""No secret is said or saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curation.data import storage
from curation.data.redact import redacted, redacted_json

SIGNED = "https://h/b/a.tar?X-Amz-Date=2026&X-Amz-Credential=AKIA%2Fx&X-Amz-Signature=0a1b&v=3"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SIGNED, "https://h/b/a.tar?X-Amz-Date=2026&X-Amz-Credential=***&X-Amz-Signature=***&v=3"),
        ("abfs://c/a.tar?sv=1&sig=ab%3D::gs://b/c.tar", "abfs://c/a.tar?sv=1&sig=***::gs://b/c.tar"),
        ("error at ftp://me:pa55@host/x, again", "error at ftp://***@host/x, again"),
        ("sftp://me@host/x has no password", "sftp://me@host/x has no password"),
        ("signed in as AKIAIOSFODNN7EXAMPLE-secret!", "signed in as ***!"),
        ("out/key=3/a b?c", "out/key=3/a b?c"),
    ],
)
def test_what_is_secret_in_a_text_is_hidden_and_nothing_else(text: str, told: str) -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": "AKIAIOSFODNN7EXAMPLE-secret", "MY_TOKEN": "in", "HOME": "signed in as"}
    assert redacted(text, environment=environment) == told


def test_every_string_of_a_json_value_is_redacted() -> None:
    value = {"pool": {"shards": SIGNED}, "list": [1, None, SIGNED]}
    assert "0a1b" not in json.dumps(redacted_json(value)) and redacted_json(value)["list"][:2] == [1, None]


def test_a_url_with_a_password_is_refused_and_its_password_not_told() -> None:
    for use in (storage.absolute, storage.list_shards, storage.exists):
        with pytest.raises(ValueError, match="holds a password") as raised:
            use("ftp://me:pa55word@host/a.tar")
        assert "pa55word" not in str(raised.value)


def test_a_local_path_may_look_like_one(tmp_path: Path) -> None:
    path = tmp_path / "a:b@c.tar"
    path.touch()
    assert storage.exists(str(path))
