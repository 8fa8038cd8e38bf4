"""How many actors of what size a recipe gets on a cluster, and what is refused before anything starts."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import ray

from curation.distributed import resources
from curation.distributed.resources import Placement, cluster, cpus_wanted, place
from curation.recipe import Compute


@pytest.fixture
def gpu_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 4.0})


@pytest.fixture
def cpu_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0})


@pytest.mark.usefixtures("gpu_cluster")
def test_auto_takes_all_gpus_in_bfloat16_and_no_cpu() -> None:
    assert place(Compute(), precision="auto") == Placement("cuda", "bfloat16", 4, 0.0, 1.0)
    assert place(Compute(gpus_per_actor=0.5), precision="float32") == Placement("cuda", "float32", 8, 0.0, 0.5)


@pytest.mark.usefixtures("gpu_cluster")
def test_a_cpu_is_used_where_one_is_asked_for_though_there_are_gpus() -> None:
    assert place(Compute(device="cpu", torch_threads=4), precision="auto") == Placement("cpu", "float32", 4, 4.0, 0.0)


@pytest.mark.usefixtures("cpu_cluster")
def test_auto_takes_all_cpus_where_there_is_no_gpu() -> None:
    assert place(Compute(torch_threads=3), precision="auto") == Placement("cpu", "float32", 5, 3.0, 0.0)


@pytest.mark.usefixtures("cpu_cluster")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute\.device is 'cuda', but the cluster has no GPU"):
        place(Compute(device="cuda"), precision="auto")


@pytest.mark.usefixtures("gpu_cluster")
def test_more_than_the_cluster_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute\.actors=5 with 1 GPUs each need 5 GPUs, the cluster has 4"):
        place(Compute(actors=5), precision="auto")
    with pytest.raises(ValueError, match=r"compute\.actors=1 with 17 CPUs each need 17 CPUs, the cluster has 16"):
        place(Compute(device="cpu", torch_threads=17), precision="auto")


@pytest.mark.usefixtures("cpu_cluster")
def test_in_staged_mode_a_cpu_stays_free_for_the_decode_tasks() -> None:
    assert place(Compute(mode="staged"), precision="auto").actors == 15
    assert cpus_wanted(Compute(device="cpu", mode="staged", actors=2)) == 3
    with pytest.raises(ValueError, match=r"need 16 CPUs beside the one that decodes, the cluster has 15"):
        place(Compute(mode="staged", actors=16), precision="auto")


@pytest.mark.usefixtures("gpu_cluster")
def test_in_staged_mode_gpu_actors_leave_all_cpus_to_the_decode_tasks() -> None:
    assert place(Compute(mode="staged"), precision="auto") == Placement("cuda", "bfloat16", 4, 0.0, 1.0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, float]]]:
    """A cluster that has nothing, gets 2 GPUs after it was asked, and 4 at the next look; what it was asked for."""
    asked: list[list[dict[str, float]]] = []
    sizes = iter([0.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": next(sizes)})
    monkeypatch.setattr(resources, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(resources, "GROWTH_POLL_S", 0.0)
    return asked


def test_a_cluster_that_grows_is_asked_and_waited_for_and_the_request_is_taken_back(
    asked: list[list[dict[str, float]]],
) -> None:
    placed = place(Compute(device="cuda", actors=4, wait_for_nodes_s=60), precision="auto")
    assert placed.actors == 4
    assert asked == [[{"GPU": 1.0}] * 4, []]


def test_a_cluster_that_has_enough_is_not_asked(asked: list[list[dict[str, float]]]) -> None:
    assert place(Compute(device="cpu", actors=2, wait_for_nodes_s=60), precision="auto").actors == 2
    assert asked == []


def test_when_the_time_is_over_what_is_there_decides(asked: list[list[dict[str, float]]]) -> None:
    with pytest.raises(ValueError, match="the cluster has no GPU"):
        place(Compute(device="cuda", actors=4, wait_for_nodes_s=1e-9), precision="auto")
    assert asked == [[{"GPU": 1.0}] * 4, []]


@pytest.mark.parametrize(("late", "started"), [(2, True), (3, False)])
def test_a_ray_that_is_late_to_start_is_started_again_and_given_up_in_the_end(
    late: int, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        asked.append(options)
        if len(asked) <= late:
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # other tests' Ray may be in this process
    refused = pytest.raises(Exception, match="timed out during startup")
    with contextlib.nullcontext() if started else refused, cluster(num_cpus=1):
        pass
    assert len(asked) == 3 and {options["address"] for options in asked} == {"local"}
