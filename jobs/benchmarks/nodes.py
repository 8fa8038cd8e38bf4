"""A Ray cluster of several nodes on this machine that may be harmed: nodes killed, cut off and replaced.

Where the machine lets us, each worker node lives in a network namespace of its own, on a bridge, with a folder of its
own at Ray's place: a cut is a link that is down, as between machines, and workers live on behind it. Elsewhere it is
`ray.cluster_utils.Cluster`, on one network: there a cut is a raylet that is stopped, while its workers still reach the
store and one another. Both have a head without CPUs, whose network the driver shares.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ray.cluster_utils import Cluster

CPUS_PER_NODE = 2
STORE_BYTES = 200 << 20
START_LIMIT_S = 180
RAY = str(Path(sys.executable).parent / "ray")
HEARTBEAT = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
"""Environment of a cluster that gives a silent node up after some six seconds."""


class Nodes(Protocol):
    """A head and some worker nodes."""

    kind: str
    environment: dict[str, str]
    """What a process is told to join: the address, and a token if the nodes ask for one."""

    def kill_one(self, rng: random.Random) -> None:
        """SIGKILL one worker node, raylet, workers and all; another joins."""
        ...

    def cut_one(self, rng: random.Random, seconds: float) -> None:
        """Cut one worker node off for so long, then let it be heard again."""
        ...

    def replace_cut(self) -> None:
        """End what is left of the node that was cut off; another joins."""
        ...

    def kill_head(self) -> None:
        """SIGKILL the head with the control store; the cluster is of no use after."""
        ...

    def close(self) -> None:
        """End all nodes."""
        ...


def start_nodes(count: int) -> Nodes:
    """A head and `count` worker nodes, in namespaces if this machine allows it."""
    os.environ.update(HEARTBEAT)
    return Namespaces(count) if has_namespaces() else Raylets(count)


def has_namespaces() -> bool:
    """True if this process may do what Namespaces does: root, `ip`, a kernel that has namespaces, bridges and links."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"cp{os.getpid() % 100_000}"
    folder = tempfile.gettempdir()
    try:
        _ip("link", "add", name, "type", "bridge")
        _ip("netns", "add", name)
        _ip("link", "add", f"{name}h", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", f"{name}h", "master", name)
        _ip("netns", "exec", name, "mount", "--bind", folder, folder)
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        for words in (("netns", "del", name), ("link", "del", name)):
            subprocess.run(["ip", *words], capture_output=True)
    return True


class Namespaces:
    """The head in this process's network, each worker node in one of its own."""

    kind = "network namespaces"

    def __init__(self, count: int):
        self._name, self._net = (
            f"cu{os.getpid() % 100_000}",
            f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(256)}",
        )
        self._folder = Path(tempfile.mkdtemp(prefix="rn"))  # a socket's path may have 107 characters
        self._next = 2
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._cut: str | None = None
        _ip("link", "add", self._name, "type", "bridge")
        _ip("addr", "add", f"{self._net}.1/24", "dev", self._name)
        _ip("link", "set", self._name, "up")
        self._port = 6000 + secrets.randbelow(3000)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**token, "RAY_ADDRESS": f"{self._net}.1:{self._port}"}
        (self._folder / "ray").mkdir()
        head = [RAY, "start", "--head", f"--port={self._port}", "--include-dashboard=false"]
        head += [f"--node-ip-address={self._net}.1", "--num-cpus=0", f"--temp-dir={self._folder}/ray"]
        self._head = self._spawn(head, "head", interface=self._name)
        try:
            self._wait_for_nodes(1)
            for _ in range(count):
                self._add()
        except BaseException:
            self.close()
            raise

    def kill_one(self, rng: random.Random) -> None:
        """SIGKILL one worker node, raylet, workers and all; another joins."""
        self._end(rng.choice(sorted(self._workers)))
        self._add()

    def cut_one(self, rng: random.Random, seconds: float) -> None:
        """Take one node's link down for so long."""
        self._cut = rng.choice(sorted(self._workers))
        _ip("link", "set", f"{self._cut}h", "down")
        time.sleep(seconds)
        _ip("link", "set", f"{self._cut}h", "up")

    def replace_cut(self) -> None:
        """End what is left of the node that was cut off; another joins."""
        assert self._cut is not None
        self._end(self._cut)
        self._add()

    def kill_head(self) -> None:
        """SIGKILL the head and all that it started."""
        _kill_session(self._head)

    def close(self) -> None:
        """End all nodes, and take their networks away."""
        for name in list(self._workers):
            self._end(name)
        _kill_session(self._head)
        _ip("link", "del", self._name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _add(self) -> None:
        name, address, own = f"{self._name}n{self._next}", f"{self._net}.{self._next}", self._folder / str(self._next)
        self._next += 1
        own.mkdir()
        _ip("netns", "add", name)
        _ip("link", "add", f"{name}h", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", f"{name}h", "master", self._name)
        _ip("link", "set", f"{name}h", "up")
        for words in (
            ("addr", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", name, *words)
        start = [
            RAY,
            "start",
            f"--address={self.environment['RAY_ADDRESS']}",
            f"--node-ip-address={address}",
            f"--num-cpus={CPUS_PER_NODE}",
        ]
        # Its own folder where the head has Ray's: two nodes of one machine would share files that two machines do not.
        inner = f'mount --bind {own} {self._folder}/ray && exec "$@"'
        command = ["ip", "netns", "exec", name, "sh", "-c", inner, "sh", *start]
        self._workers[name] = self._spawn(command, name, interface="eth0")
        self._wait_for_nodes(1 + len(self._workers))

    def _spawn(self, command: list[str], name: str, *, interface: str) -> subprocess.Popen[bytes]:
        # This machine's name means 127.0.0.1 in all namespaces: gloo must be told where it is to be found.
        environment = {**self._environment(), "GLOO_SOCKET_IFNAME": interface}
        command = [*command, "--block", "--disable-usage-stats", f"--object-store-memory={STORE_BYTES}"]
        with (self._folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def _wait_for_nodes(self, count: int) -> None:
        """Until so many nodes are alive, asked in a process of its own: no Ray is begun here."""
        ask = f"""
import ray, time
ray.init(logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < {count}:
    time.sleep(0.2)
"""
        until = time.monotonic() + START_LIMIT_S
        told = "no answer"
        while time.monotonic() < until:
            try:
                asked = subprocess.run(
                    [sys.executable, "-c", ask],
                    env=self._environment(),
                    capture_output=True,
                    text=True,
                    timeout=until - time.monotonic(),
                )
            except subprocess.TimeoutExpired:
                break
            if asked.returncode == 0:
                return
            told = asked.stderr
        raise RuntimeError(f"of {count} nodes not all started: {told}")

    def _end(self, name: str) -> None:
        _kill_session(self._workers.pop(name))
        _ip("netns", "del", name)  # with it goes the link


class Raylets:
    """All nodes on this machine's own network."""

    kind = "ray.cluster_utils.Cluster"

    def __init__(self, count: int):
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.environment = {"RAY_ADDRESS": str(self._cluster.address)}
        for _ in range(count):
            self._add()
        self._cluster.wait_for_nodes()

    def kill_one(self, rng: random.Random) -> None:
        """SIGKILL one worker node, raylet, workers and all; another joins."""
        self._cluster.remove_node(self._one(rng), allow_graceful=False)
        self._add()

    def cut_one(self, rng: random.Random, seconds: float) -> None:
        """Stop one node's raylet for so long."""
        self._cut = self._one(rng)
        raylet = self._cut.all_processes["raylet"][0].process
        raylet.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        raylet.send_signal(signal.SIGCONT)

    def replace_cut(self) -> None:
        """End what is left of the node that was cut off; another joins."""
        self._cluster.remove_node(self._cut, allow_graceful=False)
        self._add()

    def kill_head(self) -> None:
        """SIGKILL the head and all that it started."""
        assert self._cluster.head_node is not None
        self._cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    def close(self) -> None:
        """End all nodes."""
        with contextlib.suppress(Exception):  # of a cluster without its head most is dead already
            self._cluster.shutdown()

    def _one(self, rng: random.Random):
        return rng.choice(sorted(self._cluster.worker_nodes, key=lambda node: node.unique_id))

    def _add(self) -> None:
        self._cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=STORE_BYTES)


def commands() -> Iterator[tuple[int, bytes]]:
    """Process numbers and command lines of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), path.read_bytes()


def is_below(pid: int, ancestor: int) -> bool:
    """True if a process was started, at any remove, by another: only our own are ever killed."""
    while pid > 1 and pid != ancestor:
        try:
            pid = int(_stat(pid)[1])
        except OSError:
            return False
    return pid == ancestor


def _kill_session(leader: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all that are of its session."""
    for pid, _ in commands():
        with contextlib.suppress(OSError):
            if int(_stat(pid)[3]) == leader.pid:
                os.kill(pid, signal.SIGKILL)
    leader.wait()


def _stat(pid: int) -> list[str]:
    """Of a process: state, parent, process group, session, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
