"""`ray job submit` against a head on loopback with token authentication: logs, exit codes, cancelling, going on.

The head runs with this interpreter and without our code: what a job imports is the working directory that it brought.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from curation.distributed.metrics import METRICS, exported

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ROOT = Path(__file__).parents[2]
SHARDS, SAMPLES, STEPS = 8, 60, 400
TIMEOUT_S = 480


def wait_for(condition: Callable[[], Any], *, what: str) -> Any:
    """What the condition gives, once it is true. A head that starves refuses its callers, or is late: not yet."""
    begun = time.monotonic()
    while time.monotonic() - begun < TIMEOUT_S:
        try:
            if value := condition():
                return value
        except urllib.error.HTTPError:
            raise
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, outside of the range from which Ray takes its workers' ports."""
    taken = [socket.socket() for _ in range(count)]
    try:
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]
    finally:
        for one in taken:
            one.close()


class Head:
    """A Ray head of our own, spoken to through its jobs API and the `ray` command."""

    def __init__(self, folder: Path):
        self._token = secrets.token_hex(32)
        port, dashboard, agent, client, self.metrics_port = free_ports(5)
        self._address = f"http://127.0.0.1:{dashboard}"
        self._env = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_JOB_STOP_WAIT_TIME_S": "120",
        }
        self._folder, self._log = folder, folder / "head.log"
        options = {
            "node-ip-address": "127.0.0.1",
            "port": port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            # Its usual port may be another head's on this machine; without its agent a head takes no job.
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
            "metrics-export-port": self.metrics_port,
            "num-cpus": 4,
            "object-store-memory": 200 << 20,
            "temp-dir": folder,
        }
        self._process = subprocess.Popen(
            [*self._ray("start"), "--head", "--block", "--disable-usage-stats"]
            + [f"--{name}={value}" for name, value in options.items()],
            stdout=self._log.open("w"),
            stderr=subprocess.STDOUT,
            env=self._env,
            cwd=folder,
            start_new_session=True,
        )
        wait_for(self._answers, what="the head")

    def _ray(self, *words: str) -> list[str]:
        return [str(Path(sys.executable).parent / "ray"), *words]

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self.ask("api/jobs/") is not None
        except urllib.error.HTTPError as error:
            assert error.code >= 500, error  # 401 would be our own mistake
            return False

    def ask(self, path: str, *, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
        """What the API answers, as JSON; with our token, unless other headers are given."""
        headers = {"Authorization": f"Bearer {self._token}"} if headers is None else headers
        request = urllib.request.Request(f"{self._address}/{path}", headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def scraped(self) -> set[str]:
        """Names of the metrics on Ray's metrics port, which asks for no token."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60) as answer:
            return set(re.findall(r"^([a-z]\w+)", answer.read().decode(), re.MULTILINE))

    def submit(self, name: str, *entrypoint: str, runtime_env: dict[str, Any] | None = None) -> None:
        """`ray job submit --working-dir . -- python -m ...`; does not wait for the end."""
        words = ["--submission-id", name, "--working-dir", ".", "--no-wait"]
        words += ["--runtime-env-json", json.dumps(runtime_env)] if runtime_env else []
        command = [*self._ray("job", "submit"), "--address", self._address, *words, "--", "python", "-m", *entrypoint]
        done = subprocess.run(command, env=self._env, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr

    def job(self, name: str) -> dict[str, Any]:
        return self.ask(f"api/jobs/{name}")

    def logs(self, name: str) -> str:
        return self.ask(f"api/jobs/{name}/logs")["logs"]

    def worker_lines(self, run: str) -> list[dict[str, Any]]:
        """The JSON lines of a run's workers, from where a node's log collector reads them."""
        files = (self._folder / "session_latest" / "logs").glob("worker-*.err")
        lines = [line for file in files for line in file.read_text().splitlines() if line.startswith('{"time"')]
        return [told for line in lines if (told := json.loads(line))["run"] == run]

    def stop(self, name: str) -> None:
        """What `ray job stop` asks."""
        assert self.ask(f"api/jobs/{name}/stop", method="POST")["stopped"]

    def ended(self, name: str) -> dict[str, Any]:
        """The job, when it is over."""
        over = {"SUCCEEDED", "FAILED", "STOPPED"}
        return wait_for(lambda: job if (job := self.job(name))["status"] in over else None, what=f"{name}'s end")

    def wait_in(self, name: str, condition: Callable[[], Any]) -> None:
        """Wait for something that the job does while it runs."""

        def came() -> bool:
            if condition():
                return True
            job = self.job(name)
            assert job["status"] in ("PENDING", "RUNNING"), f"{job['status']}: {job['message']}\n{self.logs(name)}"
            return False

        wait_for(came, what=f"what {name} should do")

    def close(self) -> None:
        """End the head with all that it started, and nothing else."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="rh"))  # a socket's path may have 107 characters, and pytest's are long
    ours = Head(folder)
    yield ours
    ours.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("submitted")
    for number in range(SHARDS):
        write_shard(root / "pool" / f"{number:05d}.tar", count=SAMPLES, seed=number)
    return root


def curate_words(root: Path) -> list[str]:
    # One row a forward pass: slow enough that a run can be stopped in the middle.
    return [
        *("jobs.curate", "debug", "--pool.shards", str(root / "pool"), "--output", str(root / "run")),
        *("--embed.batch-size", "1", "--compute.actors", "1", "--write.samples-per-shard", "40"),
    ]


def train_words(root: Path) -> list[str]:
    # No checkpoint but the last, and what a stop makes.
    return [
        *("jobs.train", "debug", "--data.run", str(root / "run"), "--output", str(root / "trained")),
        *("--train.num-steps", str(STEPS), "--train.sub-batch", "8", "--train.filter-ratio", "0.5"),
        *("--train.score-batch", "16", "--checkpoint-every", "1000"),
    ]


def committed(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (root / "run" / "manifest" / "embed").glob("*.json")}


def test_without_the_token_the_jobs_api_refuses(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        head.ask("api/jobs/", headers={})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        head.ask("api/jobs/", headers={"Authorization": f"Bearer {secrets.token_hex(32)}"})


def test_a_wrong_recipe_is_exit_code_2_and_its_error_is_in_the_logs(head: Head) -> None:
    head.submit("wrong", "jobs.curate", "debgu")
    job = head.ended("wrong")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)
    assert "did you mean 'debug'?" in head.logs("wrong")


def test_a_stopped_curation_keeps_what_it_committed_and_the_next_one_goes_on(head: Head, pool: Path) -> None:
    head.submit("curate-1", *curate_words(pool))
    head.wait_in("curate-1", lambda: committed(pool))
    head.stop("curate-1")
    assert head.ended("curate-1")["status"] == "STOPPED"
    assert "stopped: SIGTERM" in head.logs("curate-1")
    before = committed(pool)
    assert 0 < len(before) < SHARDS
    assert not (pool / "run" / "lease.json").exists() and not (pool / "run" / "selection").exists()

    # The other way to bring settings: a runtime environment. It is this run's id that the lines carry.
    runtime_env = {"env_vars": {"CURATION_RUN_ID": "night-7"}}
    head.submit("curate-2", *curate_words(pool), "--log-json", runtime_env=runtime_env)
    job = head.ended("curate-2")
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0), head.logs("curate-2")
    assert before.items() <= committed(pool).items() and len(committed(pool)) == SHARDS
    lines = [json.loads(line) for line in head.logs("curate-2").splitlines() if line.startswith("{")]
    assert {line["run"] for line in lines} == {"night-7"}
    now = {line["number"]: line for line in head.worker_lines("night-7") if line.get("stage") == "embed"}
    assert now.keys() == set(range(SHARDS)) - {int(name.removesuffix(".json")) for name in before}
    assert all(line["read"] == SAMPLES and line["node"] and line["pid"] for line in now.values())
    [plan] = [line for line in lines if "committed_before" in line]
    [summary] = [line for line in lines if line["message"] == "summary"]
    assert summary["embedded"] == SHARDS * SAMPLES
    assert len(before) <= plan["committed_before"] == SHARDS - summary["shards"]["embedded_now"]


def test_a_stopped_training_saves_a_checkpoint_and_the_next_one_goes_on_from_there(head: Head, pool: Path) -> None:
    if len(committed(pool)) < SHARDS:  # this test alone was asked for
        head.submit("curate-3", *curate_words(pool))
        assert head.ended("curate-3")["status"] == "SUCCEEDED"
    trained = pool / "trained" / "train"
    head.submit("train-1", *train_words(pool))
    head.wait_in("train-1", (trained / "progress.json").exists)
    head.stop("train-1")
    assert head.ended("train-1")["status"] == "STOPPED"
    told = json.loads((trained / "summary.json").read_text())
    [checkpoint] = (trained / "checkpoints").glob("step-*/position.json")
    done = json.loads(checkpoint.read_text())["step"]
    assert 0 < done < STEPS
    assert (told["steps"], told["stopped"], told["failures"]) == (done, "SIGTERM", [])
    assert not (pool / "trained" / "lease.json").exists() and not (trained / "learner.pt").exists()

    head.submit("train-2", *train_words(pool), "--log-json")
    job = head.ended("train-2")
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0), head.logs("train-2")
    assert f"{done} steps done before" in head.logs("train-2")
    said = [line["step"] for line in head.worker_lines("train-2") if line["message"].startswith("checkpoint")]
    assert said[-1] == STEPS
    assert pq.read_table(trained / "steps.parquet")["step"].to_pylist() == list(range(1, STEPS + 1))
    assert (trained / "learner.pt").exists()


def test_what_is_scraped_has_the_names_that_dashboards_use(head: Head, pool: Path) -> None:
    """Rank 0 of a training run lives long enough to be scraped; Ray exports about every ten seconds."""
    words = [word.replace("trained", "scraped") for word in train_words(pool)]
    words[words.index("--train.num-steps") + 1] = "100000"
    head.submit("train-3", *words)
    wanted = {exported(name) for name, metric in METRICS.items() if name.startswith(("curation_train", "curation_led"))}
    wanted -= {exported("curation_train_junk_share")}  # only where the truth is known
    head.wait_in("train-3", lambda: wanted <= head.scraped())
    head.stop("train-3")
    assert head.ended("train-3")["status"] == "STOPPED"
