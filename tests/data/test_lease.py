import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from curation.data import lease, storage
from curation.data.lease import Lease, NotRenewed, OutputInUse

HOLD = """
import sys, time
from curation.data.lease import Lease
with Lease(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "memory", "bucket"])
def output(request, tmp_path):
    if request.param == "bucket":
        return f"{request.getfixturevalue('s3_bucket')}/out"
    return str(tmp_path / "out") if request.param == "local" else f"memory:///{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_S", 0.02)


@pytest.fixture
def other_process(tmp_path):
    """A process that holds the lease of tmp_path; it is killed in the end."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def url_of(output):
    return storage.join(output, "lease.json")


def stored(output):
    return json.loads(storage.read_bytes(url_of(output)))


def store(output, **changes):
    """The lease of a holder who has just renewed it: this process, but for `changes`."""
    holder = {
        "host": socket.gethostname(),
        "process_space": lease._process_space(),
        "pid": os.getpid(),
        "process_started": lease.process_started(os.getpid()),
        "token": "another",
        "renewed": time.time(),
    }
    storage.write_bytes(url_of(output), json.dumps({**holder, **changes}).encode())


def is_free(output):
    try:
        with Lease(output):
            return True
    except OutputInUse:
        return False


class TestTaking:
    def test_it_is_held_inside_the_block_and_gone_after_it(self, output):
        with Lease(output):
            assert stored(output)["pid"] == os.getpid()
        assert not storage.exists(url_of(output))
        assert is_free(output)

    def test_it_is_released_when_the_block_fails(self, output):
        with pytest.raises(RuntimeError, match="of the run"), Lease(output):
            raise RuntimeError("of the run")
        assert not storage.exists(url_of(output))

    def test_a_second_holder_is_refused_and_told_who_holds_it(self, output):
        expected = rf"lease.json is held by process {os.getpid()} on {socket.gethostname()}, renewed 0 s ago\. Wait"
        with Lease(output):
            with pytest.raises(OutputInUse, match=expected), Lease(output):
                pass
            assert storage.exists(url_of(output)), "the refused one took the holder's lease away"

    def test_two_outputs_have_a_lease_each(self, output):
        with Lease(output):
            assert is_free(storage.join(output, "other"))

    def test_of_many_that_start_at_once_one_holds_it(self, output, monkeypatch):
        monkeypatch.setattr(lease, "SETTLE_S", 3.0)  # longer than a busy disk or server takes to write
        start, held, refused, done = threading.Barrier(8), [], [], threading.Event()

        def run():
            start.wait()
            try:
                with Lease(output):
                    held.append(1)
                    done.wait(10)
            except OutputInUse as error:
                refused.append(str(error))
                if len(refused) == 7:
                    done.set()

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(held), len(refused)) == (1, 7), refused

    def test_the_loser_of_a_race_backs_out_and_leaves_the_winners_lease(self, output, monkeypatch):
        monkeypatch.setattr(lease.time, "sleep", lambda _: store(output))
        with pytest.raises(OutputInUse, match="was taken by another run at the same moment"), Lease(output):
            pass
        assert stored(output)["token"] == "another"


class TestDeadOrAlive:
    def test_a_living_process_is_honoured_however_long_ago_it_renewed(self, output):
        store(output, renewed=time.time() - 10 * lease.TTL_S)
        assert not is_free(output)

    def test_another_process_is_honoured_and_once_killed_its_lease_is_free_at_once(self, tmp_path, other_process):
        with pytest.raises(OutputInUse, match=f"held by process {other_process.pid} "), Lease(str(tmp_path)):
            pass
        other_process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while lease.process_started(other_process.pid) != "dead" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_free(str(tmp_path)), "a zombie, whose parent has not waited for it yet, still holds the lease"

    def test_a_process_that_is_gone_is_dead(self, tmp_path, other_process):
        other_process.kill()
        other_process.wait()
        assert storage.exists(url_of(str(tmp_path)))
        assert is_free(str(tmp_path))

    def test_a_reused_process_number_is_not_taken_for_the_holder(self, output):
        store(output, process_started="1")
        assert is_free(output)

    def test_a_process_that_we_may_not_look_at_is_alive(self, output, monkeypatch):
        # With /proc mounted hidepid=2, another user's process is there and shows nothing of itself.
        def forbidden(pid, signal_number):
            raise PermissionError

        monkeypatch.setattr(os, "kill", forbidden)
        monkeypatch.setattr(lease, "process_started", lambda pid: "")
        store(output, pid=4_000_000)
        assert not is_free(output)

    @pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"process_space": "another container"}])
    def test_a_holder_elsewhere_is_honoured_until_it_has_not_renewed_for_ttl(self, output, elsewhere):
        # Its process number says nothing here, although it is the number of a living process, or of none.
        for pid in (os.getpid(), 4_000_000):
            store(output, pid=pid, renewed=time.time() - lease.TTL_S + 5, **elsewhere)
            assert not is_free(output)
            store(output, pid=pid, renewed=time.time() - lease.TTL_S - 5, **elsewhere)
            assert is_free(output)

    def test_without_proc_a_process_is_alive_while_it_exists(self, monkeypatch):
        def absent(*_, **__):
            raise FileNotFoundError

        monkeypatch.setattr(Path, "read_text", absent)
        assert lease._process_space() == ""
        assert lease.process_started(os.getpid()) == ""
        assert lease.is_running(os.getpid(), "whatever")

    @pytest.mark.parametrize(
        "text", ["", "{half", "[]", "null", "{}", '{"pid": 1}', '{"host": "a", "pid": "x"}', "\xff"]
    )
    def test_a_damaged_lease_says_what_to_do(self, output, text):
        storage.write_bytes(url_of(output), text.encode("latin-1"))
        with pytest.raises(OutputInUse, match="lease.json is damaged, .*: delete it if none does"), Lease(output):
            pass
        assert storage.read_bytes(url_of(output)) == text.encode("latin-1")


class TestRenewing:
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch):
        monkeypatch.setattr(lease, "RENEW_S", 0.02)

    def wait_until(self, condition):
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "nothing happened for 10 s"
            time.sleep(0.005)

    def test_it_is_renewed_again_and_again(self, output):
        with Lease(output):
            first = stored(output)
            self.wait_until(lambda: stored(output)["renewed"] > first["renewed"] + 0.05)
            assert stored(output)["token"] == first["token"]

    def test_a_holder_whose_lease_was_taken_over_is_interrupted_and_leaves_it(self, output):
        uninterrupted = []
        with pytest.raises(OutputInUse, match="was taken over by another run; this run stopped"), Lease(output):
            for _ in range(600):  # one that is written while it is being renewed is lost, as if both had begun at once
                store(output)
                time.sleep(0.1)
            uninterrupted.append("the whole minute")
        assert not uninterrupted
        assert stored(output)["token"] == "another"

    def test_a_background_job_of_a_shell_is_interrupted_too(self, output):
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with pytest.raises(OutputInUse, match="was taken over by another run"), Lease(output):
                for _ in range(600):
                    store(output)
                    time.sleep(0.1)
                pytest.fail("the run went on")
        finally:
            signal.signal(signal.SIGINT, former)
        assert signal.getsignal(lease.LOST_SIGNAL) == signal.SIG_DFL

    def test_a_store_that_refuses_renewals_for_ttl_interrupts_the_run(self, output, monkeypatch):
        uninterrupted = []
        monkeypatch.setattr(lease, "TTL_S", 0.1)
        failure = r"could not be renewed for 0 s: OSError: no space left"
        with pytest.raises(NotRenewed, match=failure), Lease(output):
            monkeypatch.setattr(storage, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
            time.sleep(60)
            uninterrupted.append("the whole minute")
        assert not uninterrupted

    def test_a_store_that_fails_for_a_moment_loses_nothing(self, output, monkeypatch):
        whole, failures = storage.write_bytes, []

        def flaky(url, data):
            if len(failures) < 3:
                failures.append(1)
                raise OSError("try again")
            whole(url, data)

        with Lease(output):
            first = stored(output)
            monkeypatch.setattr(storage, "write_bytes", flaky)
            self.wait_until(lambda: len(failures) == 3 and stored(output)["renewed"] > first["renewed"])

    def test_a_lease_that_was_deleted_is_written_again(self, output):
        with Lease(output):
            storage.delete(url_of(output))
            self.wait_until(lambda: storage.exists(url_of(output)))
