"""Where the real data is, a clear word on what was not run without it, and an object store that fails on demand."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec.config
import hypothesis
import pytest
import s3fs
from werkzeug.serving import make_server
from werkzeug.test import run_wsgi_app

from curation.data import remote

hypothesis.settings.register_profile("patient", deadline=None)  # a busy machine is no fault of an example
hypothesis.settings.load_profile("patient")

NO_REAL_DATA = "the real data is absent"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails on purpose is asked again at once, in this process."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)


@pytest.fixture(scope="session")
def real_data(pytestconfig: pytest.Config) -> Path:
    """The folder of real pools: CURATION_TEST_DATA, else ../shared/data beside the repository.

    Where it is absent the test is skipped and listed at the end of the run; under CI it fails.
    """
    named = os.environ.get("CURATION_TEST_DATA")
    folder = Path(named) if named else pytestconfig.rootpath.parent / "shared" / "data"
    if folder.is_dir():
        return folder.resolve()
    message = f"{NO_REAL_DATA}: no folder {folder} (set CURATION_TEST_DATA)"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


HANG_S = 10
"""How long a request hangs, two seconds beyond the client's patience; on a busy machine an honest one takes seconds."""


class Request(NamedTuple):
    """A request that the object store got: method, key (empty for a listing), the how manieth with these two it is."""

    method: str
    key: str
    nth: int


class ObjectStore:
    """moto's S3 server on loopback. `fault(request)` names what is to go wrong with a request, if anything is.

    throttle: 503 SlowDown. expire: 400 ExpiredToken. cut: the connection ends in the middle of the body. truncate: half
    the body, as if it were all. hang: no answer before the client's time-out.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import create_backend_app  # costs a second, which few tests need

        self._moto = create_backend_app("s3")
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, str]] = Counter()
        self.fault: Callable[[Request], str | None] = lambda request: None
        self.faults: Counter[str] = Counter()
        """How often each fault was made."""
        self.requests: list[Request] = []
        self.options: dict[str, Any] = {
            "endpoint_url": f"http://127.0.0.1:{self._server.server_port}",
            "key": "nobody",
            "secret": "nothing",
            # The client's own patience, which is tested elsewhere, would only make the tests slow.
            "config_kwargs": {"read_timeout": HANG_S - 2, "retries": {"max_attempts": 0}},
        }
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def new_bucket(self) -> str:
        """URL of an empty bucket; faults and counts are forgotten."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.heal()
        fsspec.filesystem("s3").mkdir(name)
        self.requests.clear()
        return f"s3://{name}"

    def heal(self) -> None:
        """No more faults."""
        self.fault = lambda request: None
        self.faults.clear()
        self._seen.clear()

    def close(self) -> None:
        self._server.shutdown()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].strip("/").partition("/")[2]
        with self._lock:
            self._seen[method, key] += 1
            request = Request(method, key, self._seen[method, key])
            self.requests.append(request)
            fault = self.fault(request)
            self.faults.update([fault] if fault else [])
        if fault in ("throttle", "expire"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = {"throttle": ("503 x", "SlowDown"), "expire": ("400 x", "ExpiredToken")}[fault]
            body = b"" if method == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
            start_response(status, [("Content-Length", str(len(body))), ("Content-Type", "application/xml")])
            return [body]
        if fault == "hang":
            time.sleep(HANG_S)
        with self._lock:  # moto loses its way where two write the same key at once
            answer, status, header = run_wsgi_app(self._moto, environ)
            body, headers = b"".join(answer), list(header)
        if fault == "truncate" and method != "HEAD":
            body = body[: len(body) // 2]
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
        start_response(status, headers)
        return self._half(environ, body) if fault == "cut" else [body]

    def _half(self, environ: dict[str, Any], body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        environ["werkzeug.socket"].shutdown(2)


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server that fsspec's own settings lead to, here and in processes that are begun later."""
    store = ObjectStore()
    fsspec.config.conf["s3"] = store.options
    os.environ["FSSPEC_S3"] = json.dumps(store.options)
    patience, s3fs.S3FileSystem.retries = s3fs.S3FileSystem.retries, 1
    yield store
    s3fs.S3FileSystem.retries = patience
    del fsspec.config.conf["s3"], os.environ["FSSPEC_S3"]
    store.close()


@pytest.fixture
def s3_bucket(object_store: ObjectStore) -> str:
    """URL of an empty bucket of a store that works."""
    return object_store.new_bucket()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's Browser, a Chromium; skipped where there is none and none can be installed."""
    from tests import chromium  # few tests need it

    yield from chromium.started()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the tests that were not run for want of the real data."""
    not_run = [
        report.nodeid for report in terminalreporter.getreports("skipped") if NO_REAL_DATA in str(report.longrepr)
    ]
    if not_run:
        terminalreporter.section(f"NOT RUN: {NO_REAL_DATA}", yellow=True)
        for nodeid in not_run:
            terminalreporter.write_line(nodeid)
        terminalreporter.write_line("Set CURATION_TEST_DATA to the folder of real pools to run them.")
