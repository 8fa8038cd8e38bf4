"""A step's result does not depend on how many ranks take it: processes with gloo against one process alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).parent / "ranks_worker.py"
WORLD_SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world size saved."""
    running, folders = [], {}
    for world_size in WORLD_SIZES:
        folders[world_size] = folder = tmp_path_factory.mktemp(f"world{world_size}")
        for rank in range(world_size):
            command = [sys.executable, str(WORKER), str(rank), str(world_size), str(folder / "store"), str(folder)]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
            running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
    return {size: [torch.load(folders[size] / f"{rank}.pt") for rank in range(size)] for size in WORLD_SIZES}


@pytest.mark.parametrize("what", ["sigmoid", "softmax", "in parts"])
@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_a_step_is_the_same_for_any_number_of_ranks(results, what: str, world_size: int) -> None:
    alone = results[1][0][what]
    for rank in results[world_size]:
        for name, value in alone.items():
            torch.testing.assert_close(rank[what][name], value, rtol=1e-4, atol=1e-5, msg=f"{what}: {name}")


def test_micro_batches_are_the_same_for_one_rank(results) -> None:
    for name, value in results[1][0]["sigmoid"].items():
        torch.testing.assert_close(results[1][0]["in parts"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_loss_that_is_not_finite_stops_every_rank(results, world_size: int) -> None:
    for rank, saved in enumerate(results[world_size]):
        assert f"on rank {rank}" in saved["not finite"] and "in 2 of all ranks" in saved["not finite"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gathered_rows_stand_in_order_of_the_ranks(results, world_size: int) -> None:
    wanted = torch.arange(world_size).repeat_interleave(2)
    for saved in results[world_size]:
        for gathered in saved["gathered"]:
            torch.testing.assert_close(gathered, wanted.to(gathered.dtype))


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_rows_are_handed_over_in_the_order_of_the_list(results, world_size: int) -> None:
    saved = results[world_size]
    assert saved[-1]["handed over"][0].tolist() == [2, 0]
    assert saved[-1]["handed over"][1].tolist() == [[2, 2], [0, 0]]
    assert saved[0]["handed over"][0].tolist() == [10 * (world_size - 1) + 1]
    for middle in saved[1:-1]:
        assert middle["handed over"][0].shape == (0,) and middle["handed over"][1].shape == (0, 2)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("what", ["choose jest", "choose clip_score", "choose uniform", "choose with broken rows"])
def test_the_selection_is_the_same_for_any_number_of_ranks(results, what: str, world_size: int) -> None:
    alone = results[1][0][what]
    assert len(set(alone["selected"])) == 12 and alone["selected"] == sorted(alone["selected"])
    for saved in results[world_size]:
        assert saved[what]["selected"] == alone["selected"]
        assert all(
            torch.equal(torch.tensor(score), torch.tensor(alone["scores"][address])) or score != score
            for address, score in saved[what]["scores"].items()
        )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("what", ["choose jest", "choose locally", "choose by quota", "choose with broken rows"])
def test_every_chosen_row_is_trained_once_and_every_rank_trains_as_many(results, what: str, world_size: int) -> None:
    ranks = [saved[what] for saved in results[world_size]]
    assert sorted(address for rank in ranks for address in rank["trained"]) == ranks[0]["selected"]
    assert {len(rank["trained"]) for rank in ranks} == {len(rank["weights"]) for rank in ranks} == {12 // world_size}
    assert sorted(address for rank in ranks for address in rank["own"]) == ranks[0]["selected"]


@pytest.mark.parametrize("what", ["choose locally", "choose by quota"])
def test_local_scope_and_quotas_take_as_many_rows_of_each_rank(results, what: str) -> None:
    for rank in results[3]:
        assert len(rank[what]["own"]) == 4
        best = sorted(rank[what]["part"], key=lambda address: -rank[what]["scores"][address])[:4]
        assert set(rank[what]["own"]) == set(best)
    assert results[3][0][what]["selected"] != results[1][0][what]["selected"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rows_that_are_not_ok_are_never_chosen(results, world_size: int) -> None:
    for saved in results[world_size]:
        broken = {address for address, score in saved["choose with broken rows"]["scores"].items() if score != score}
        assert not broken & set(saved["choose with broken rows"]["selected"])
    found = sum(
        score != score for saved in results[world_size] for score in saved["choose with broken rows"]["scores"].values()
    )
    assert found == 3


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("what", ["online uniform", "online jest", "online rho"])
def test_online_steps_are_the_same_for_any_number_of_ranks(results, what: str, world_size: int) -> None:
    alone, ranks = results[1][0][what], [saved[what] for saved in results[world_size]]
    for rank in ranks:
        assert torch.equal(rank["selected"], alone["selected"])
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rank["reference"], alone["reference"])
    assert sorted(torch.cat([rank["trained"] for rank in ranks]).tolist()) == sorted(alone["trained"].tolist())
    assert sorted(torch.cat([rank["recorded"] for rank in ranks]).tolist()) == sorted([*range(24), *range(24)])


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("what", ["mimic all", "mimic mimic", "mimic text"])
def test_mimic_scores_and_weights_are_of_the_whole_super_batch_for_any_number_of_ranks(
    results, what: str, world_size: int
) -> None:
    alone, ranks = results[1][0][what], [saved[what] for saved in results[world_size]]
    order = torch.cat([rank["address"] for rank in ranks]).argsort()
    for name, bound in (("scores", 1e-4), ("weights", 1e-3)):
        together = torch.cat([rank[name] for rank in ranks], dim=1)[:, order]
        torch.testing.assert_close(together, alone[name], rtol=bound, atol=bound, msg=lambda text: f"{what}: {text}")
    assert alone["weights"].mean().item() == pytest.approx(1.0) and alone["weights"].std() > 0.01
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rank["layer"], alone["layer"], rtol=1e-3, atol=1e-4)
