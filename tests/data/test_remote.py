"""A store that throttles, cuts, truncates, hangs or refuses: another attempt, then an error, never half an answer."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.data import remote, storage
from curation.data.remote import ATTEMPTS, ChangedWhileRead, StoreError, attempt

FAULTS = ("throttle", "expire", "cut", "truncate")
DATA = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


class Flaky:
    """A call that raises each of `errors` in turn, then returns 7."""

    def __init__(self, *errors: BaseException):
        self._errors, self.calls = list(errors), 0

    def __call__(self) -> int:
        self.calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return 7


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    return slept


class TestAttempt:
    def test_a_call_is_made_again_after_pauses_that_double(self, pauses: list[float]) -> None:
        call = Flaky(OSError("503"), TimeoutError(), RuntimeError("connection lost"))
        assert attempt(call) == 7
        assert call.calls == ATTEMPTS == 4
        assert all(0.5 * 2**n <= pause <= 2**n for n, pause in enumerate(pauses)) and len(pauses) == 3

    def test_the_last_error_is_raised_as_it_was(self, pauses: list[float]) -> None:
        call = Flaky(*[PermissionError("the token has expired")] * ATTEMPTS)
        with pytest.raises(PermissionError, match="the token has expired"):
            attempt(call)
        assert call.calls == ATTEMPTS

    def test_an_error_of_the_clients_own_is_an_oserror_in_the_end(self, pauses: list[float]) -> None:
        with pytest.raises(StoreError, match="RuntimeError: no credentials"):
            attempt(Flaky(*[RuntimeError("no credentials")] * ATTEMPTS))

    @pytest.mark.parametrize("error", [FileNotFoundError, ChangedWhileRead, ValueError, KeyError, KeyboardInterrupt])
    def test_what_another_attempt_cannot_change_is_raised_at_once(self, error: type, pauses: list[float]) -> None:
        call = Flaky(error("x"))
        with pytest.raises(error, match="x"):
            attempt(call)
        assert call.calls == 1 and not pauses


def first_of_each(fault: str) -> Callable[[Any], str | None]:
    """The first request of each method for each key fails."""
    return lambda request: fault if request.nth == 1 else None


def test_a_request_that_hangs_is_made_again(object_store: Any, s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/a.bin", DATA)
    object_store.heal()
    object_store.fault = first_of_each("hang")
    assert storage.read_range(f"{s3_bucket}/a.bin", 10, 200_000) == DATA[10:200_000]
    assert object_store.faults["hang"] == 1


@pytest.mark.parametrize("fault", FAULTS)
class TestFaults:
    def test_a_fault_that_passes_changes_nothing_that_is_read(
        self, object_store: Any, s3_bucket: str, fault: str
    ) -> None:
        storage.write_bytes(f"{s3_bucket}/a.bin", DATA)
        whole = storage.fingerprint(f"{s3_bucket}/a.bin")
        for read, wanted in (
            (lambda url: storage.read_bytes(url), DATA),
            (lambda url: storage.read_range(url, 10, 200_000), DATA[10:200_000]),
            (lambda url: storage.read_range(url, 10, None), DATA[10:]),
            (lambda url: storage.fingerprint(url), whole),
        ):
            object_store.heal()
            object_store.fault = first_of_each(fault)
            assert read(f"{s3_bucket}/a.bin") == wanted
            assert object_store.faults[fault]

    def test_a_fault_that_passes_changes_nothing_that_is_written(
        self, object_store: Any, s3_bucket: str, fault: str
    ) -> None:
        object_store.fault = first_of_each(fault)
        storage.write_bytes(f"{s3_bucket}/a.bin", DATA)
        assert object_store.faults[fault]
        object_store.heal()
        assert storage.read_bytes(f"{s3_bucket}/a.bin") == DATA

    @pytest.mark.parametrize("pattern", ["", "/*.tar", "/**/*.tar", "/{0..299}.tar"])
    def test_a_listing_is_whole_or_an_error(self, object_store: Any, s3_bucket: str, fault: str, pattern: str) -> None:
        fs = fsspec.filesystem("s3")
        for number in range(3):
            fs.pipe_file(f"{s3_bucket}/pool/{number}.tar", b"x")
        object_store.fault = first_of_each(fault)
        shards = storage.list_shards(f"{s3_bucket}/pool{pattern}")
        assert [shard.url for shard in shards if shard.fingerprint] == [f"{s3_bucket}/pool/{n}.tar" for n in range(3)]
        object_store.fault = lambda request: fault if request.method == "GET" else None
        with pytest.raises(OSError, match=r"\w"):
            storage.list_shards(f"{s3_bucket}/pool{pattern}")

    def test_a_fault_that_stays_is_an_oserror(self, object_store: Any, s3_bucket: str, fault: str) -> None:
        storage.write_bytes(f"{s3_bucket}/a.bin", DATA)
        object_store.fault = lambda request: fault if request.method == "GET" else None
        with pytest.raises(OSError, match=r"\w"):
            storage.read_bytes(f"{s3_bucket}/a.bin")
        assert object_store.faults[fault] >= ATTEMPTS


def test_a_write_that_is_refused_for_good_leaves_the_old_file(object_store: Any, s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/a.bin", b"old")
    object_store.fault = lambda request: "throttle" if request.method == "PUT" else None
    with pytest.raises(OSError, match=r"\w"):
        storage.write_bytes(f"{s3_bucket}/a.bin", b"the new one")
    object_store.heal()
    assert storage.read_bytes(f"{s3_bucket}/a.bin") == b"old"


def test_an_upload_that_arrives_short_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "put_file", lambda self, source, target, **_: self.pipe_file(target, b"hal"))
    with pytest.raises(StoreError, match="/short/a.bin has 3 bytes after an upload of 4"):
        storage.write_bytes("memory:///short/a.bin", b"half")


def test_a_file_that_is_replaced_between_two_attempts_is_told(object_store: Any, s3_bucket: str) -> None:
    url = f"{s3_bucket}/a.bin"
    storage.write_bytes(url, DATA)
    with storage.open_read(url) as file:
        assert file.read(10) == DATA[:10]
        fsspec.filesystem("s3").pipe_file(url, DATA[::-1])
        with pytest.raises(ChangedWhileRead, match=r"a\.bin changed while it was read"):
            file.read(100_000)


def test_a_whole_file_that_is_replaced_while_it_is_read_is_read_anew(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, open_read, opened = f"{s3_bucket}/a.bin", storage.open_read, []

    def open_and_replace(url: str) -> Any:
        opened.append(open_read(url))
        if len(opened) == 1:
            fsspec.filesystem("s3").pipe_file(url, DATA[::-1])
        return opened[-1]

    storage.write_bytes(url, DATA)
    monkeypatch.setattr(storage, "open_read", open_and_replace)
    assert storage.read_bytes(url) == DATA[::-1] and len(opened) == 2


def test_a_folder_is_no_file(s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/folder/a.bin", b"x")
    with pytest.raises(IsADirectoryError, match="folder is a folder"):
        storage.open_read(f"{s3_bucket}/folder")


def gets(object_store: Any) -> int:
    return sum(request.method == "GET" for request in object_store.requests)


def test_who_reads_on_gets_ever_larger_ranges(object_store: Any, s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/a.bin", DATA)
    object_store.requests.clear()
    with storage.open_read(f"{s3_bucket}/a.bin") as file:
        assert b"".join(iter(lambda: file.read(1000), b"")) == DATA
    assert gets(object_store) <= 10  # 1, 1, 2, 4, ... kB, not 300 requests


def test_who_jumps_gets_what_was_asked_for(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3_bucket}/a.bin", DATA)
    fetched: list[int] = []
    fetch = remote._RangedFile._range
    monkeypatch.setattr(
        remote._RangedFile, "_range", lambda self, start, stop: fetched.append(stop - start) or fetch(self, start, stop)
    )
    with storage.open_read(f"{s3_bucket}/a.bin") as file:
        for at in (299_000, 100_000, 200_000, 0):
            file.seek(at)
            assert file.read(1000) == DATA[at : at + 1000]
    assert fetched == [1000] * 4


STEPS = st.lists(
    st.tuples(st.sampled_from([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END]), st.integers(0, 4000), st.integers(-1, 3000)),
    max_size=12,
)


@given(steps=STEPS)
@settings(max_examples=60, deadline=None)
def test_reads_and_seeks_in_any_order_are_those_of_the_bytes(steps: list[tuple[int, int, int]]) -> None:
    url, data = "memory:///ranged/a.bin", DATA[:3000]
    storage.write_bytes(url, data)
    with storage.open_read(url) as file, io.BytesIO(data) as plain:
        for whence, offset, size in steps:
            offset = min(0, offset - 3000) if whence == io.SEEK_END else offset
            assert file.seek(offset, whence) == plain.seek(offset, whence)
            assert file.read(size) == plain.read(size)
            assert file.tell() == plain.tell()
