"""Where the work runs: a cluster to join or a Ray of our own on this machine, and how many actors of what size."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple

import ray
from ray.autoscaler.sdk import request_resources
from ray.data import DataContext

from curation.distributed import logs
from curation.distributed.stopping import Interrupted
from curation.models.clip import Precision
from curation.recipe import Compute

NO_PROGRESS_TIMEOUT_S = 600
GROWTH_POLL_S = 2.0
STARTS = 3
"""How often a Ray of our own is started: on a busy machine it may take longer than the 30 s that it gives itself."""
LATE = "timed out during startup"
_LOG = logging.getLogger(__name__)


class Placement(NamedTuple):
    """The embedding actors: how many, and what each takes."""

    device: str
    precision: Precision
    actors: int
    num_cpus: float
    num_gpus: float


@contextlib.contextmanager
def cluster(*, num_cpus: int) -> Iterator[None]:
    """A connection to Ray: the one there is, the cluster that RAY_ADDRESS or a submitted job names, or one of our own.

    A Ray of our own has at least `num_cpus` logical CPUs, listens with a token made for this run, has no dashboard, and
    ends with the block. Interrupted if SIGTERM comes while Ray hears it: from its start to where a run listens itself.
    """
    _quieten()
    if ray.is_initialized():
        yield
        return
    try:
        with _quiet_start():
            if os.environ.get("RAY_ADDRESS"):
                _join()
            else:
                _start_local(num_cpus)
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM:  # how Ray's own handler ends a process
            raise Interrupted("SIGTERM") from None
        raise
    finally:
        ray.shutdown()


def _join() -> None:
    workers = logs.workers_runtime_env()
    ray.init(logging_level=logging.ERROR, runtime_env=workers, log_to_driver=workers is None)


def _start_local(num_cpus: int) -> None:
    # With a token at hand and no mode set, ray.init turns token authentication on; without one it would leave a token
    # of its own in the home folder. Setting the mode here would come too late: Ray reads it when it is imported.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for left in reversed(range(STARTS)):
        try:
            ray.init(
                address="local",
                num_cpus=max(len(os.sched_getaffinity(0)), num_cpus),
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env=logs.workers_runtime_env(),
            )
            return
        except Exception as error:  # Ray has no type for it
            if LATE not in str(error) or not left:
                raise
            _LOG.warning("Ray did not start within its 30 s; once more")
            ray.shutdown()


def cpus_wanted(compute: Compute) -> int:
    """CPUs that the embedding actors take, and one for the decode tasks of the staged mode."""
    actors = (compute.actors or 1) * compute.torch_threads if compute.device != "cuda" else 1
    return actors + (compute.mode == "staged")


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Ray's C++ logs off but for fatal errors, without the line by which they say so; on an error all of it is shown.

    At its usual level each pool of actors begins with an error line about a restart that our actors survive.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(screen, said.read())
            raise
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def _quieten() -> None:
    """Ray's own chatter, off; errors still show. Our progress line says what matters."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S


def wait_for_progress(seconds: float) -> None:
    """End executions only after so long without progress, and not before NO_PROGRESS_TIMEOUT_S."""
    DataContext.get_current().execution_no_progress_timeout_s = int(max(NO_PROGRESS_TIMEOUT_S, seconds))


def _resources() -> dict[str, float]:
    """What the cluster has, in all its nodes."""
    return {name: float(value) for name, value in ray.cluster_resources().items()}


def grown(bundle: dict[str, float], count: int, *, wait_s: float) -> dict[str, float]:
    """The cluster's resources; with `wait_s`, once they hold `count` bundles, or that time is over.

    The autoscaler is asked for the bundles beside what the cluster does already. What it adds stays for its idle time
    at least, so the request is taken back as soon as it is met.
    """
    resources, until = _resources(), time.monotonic() + wait_s
    wanted = {name: value * count for name, value in bundle.items()}

    def lacks() -> bool:
        return any(resources.get(name, 0.0) < value for name, value in wanted.items())

    if not wait_s or not lacks():
        return resources
    request_resources(bundles=[bundle] * count)
    try:
        while lacks() and time.monotonic() < until:
            time.sleep(GROWTH_POLL_S)
            resources = _resources()
    finally:
        request_resources(bundles=[])
    return resources


def place(compute: Compute, *, precision: Precision | Literal["auto"]) -> Placement:
    """Actors for the connected cluster. ValueError if it lacks a GPU that is asked for, or enough for all."""
    staged = float(compute.mode == "staged")
    if compute.device == "cuda":
        bundle = {"GPU": compute.gpus_per_actor, "CPU": staged}
    else:
        bundle = {"CPU": compute.torch_threads + staged}
    bundle = {name: value for name, value in bundle.items() if value}
    resources = grown(bundle, compute.actors or 1, wait_s=compute.wait_for_nodes_s)
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    device = compute.device if compute.device != "auto" else ("cuda" if gpus else "cpu")
    if device == "cuda":
        if not gpus:
            raise ValueError("compute.device is 'cuda', but the cluster has no GPU; use 'cpu' or 'auto'")
        per_actor, have, name = compute.gpus_per_actor, gpus, "GPUs"
    else:
        per_actor, have, name = float(compute.torch_threads), cpus, "CPUs"
        if compute.mode == "staged":  # one stays free: actors would wait forever for decode tasks that cannot start
            have, name = cpus - 1, "CPUs beside the one that decodes"
    actors = compute.actors or max(1, int(have / per_actor))
    if actors * per_actor > have:
        raise ValueError(
            f"compute.actors={actors} with {per_actor:g} {name} each need {actors * per_actor:g} {name}, "
            f"the cluster has {have:g}"
        )
    if precision == "auto":
        precision = "bfloat16" if device == "cuda" else "float32"
    # No CPU beside a GPU: an actor that holds a fraction of a node's CPUs can starve the tasks that feed it.
    num_cpus, num_gpus = (0.0, compute.gpus_per_actor) if device == "cuda" else (per_actor, 0.0)
    return Placement(device, precision, actors, num_cpus, num_gpus)
