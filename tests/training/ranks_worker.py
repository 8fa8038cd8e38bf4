"""One rank of test_ranks.py: python ranks_worker.py RANK WORLD_SIZE STORE OUT; world size 1 has no group.

The whole batch is the same whatever the world size; each rank holds its part of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from curation.models.clip import TowerOutput
from curation.numerics.contrastive import sigmoid_loss, softmax_loss
from curation.training.collectives import Handover, gather, hand_over, ranks
from curation.training.step import NotFinite, PairBatch, contrastive_step

WHOLE = 12


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(12, 4, generator=generator))
        self.text = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.log_scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, pixels: Tensor, tokens: Tensor) -> TowerOutput:
        image = nn.functional.normalize(pixels.flatten(1).float() / 255 @ self.image, dim=1)
        text = nn.functional.normalize(tokens.float() @ self.text, dim=1)
        return TowerOutput(image, text, self.log_scale.exp(), self.bias)


def train(objective, *, micro_batches: int) -> dict[str, Tensor]:
    rank, world_size = ranks()
    size = WHOLE // world_size
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (WHOLE, 2, 2, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 50, (WHOLE, 3), generator=generator)
    weights = torch.linspace(0, 2, WHOLE)
    own = slice(rank * size, (rank + 1) * size)
    towers = Towers()
    model = towers if world_size == 1 else DistributedDataParallel(towers)
    optimizer = torch.optim.SGD(towers.parameters(), lr=1.0)
    seen = [
        contrastive_step(
            model,
            PairBatch(pixels[own], tokens[own]),
            weights=weights[own],
            optimizer=optimizer,
            objective=objective,
            max_grad_norm=1e9,
            micro_batches=micro_batches,
        )
        for _ in range(2)
    ]
    told = {"loss": [s.loss for s in seen], "accuracy": [s.accuracy for s in seen], "norm": [s.grad_norm for s in seen]}
    return {**towers.state_dict(), **{name: torch.tensor(value) for name, value in told.items()}}


def not_finite_on_one_rank() -> str:
    """Every rank hears of it, none goes on alone."""
    rank, _ = ranks()

    def broken(image_ND: Tensor, text_ND: Tensor, **_: object) -> Tensor:
        return image_ND.sum(dim=1) / (0.0 if rank == 0 else 1.0)

    towers = Towers()
    optimizer = torch.optim.SGD(towers.parameters(), lr=1.0)
    batch = PairBatch(torch.ones(2, 2, 2, 3, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.int64))
    try:
        contrastive_step(towers, batch, weights=torch.ones(2), optimizer=optimizer, objective=broken)
    except NotFinite as error:
        return str(error)
    return ""


def main(rank: int, world_size: int, store: str, out: str) -> None:
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    results: dict[str, object] = {
        "sigmoid": train(sigmoid_loss, micro_batches=1),
        "softmax": train(softmax_loss, micro_batches=1),
        "in parts": train(sigmoid_loss, micro_batches=2),
        "not finite": not_finite_on_one_rank(),
        "gathered": [gather(torch.full((2,), rank, dtype=dtype)) for dtype in (torch.int64, torch.float16, torch.bool)],
    }
    rows = torch.arange(3) + 10 * rank
    # The last rank gets rows 2 and 0 of rank 0, and rank 0 gets row 1 of the last.
    last = world_size - 1
    handovers = [Handover(0, last, 2), Handover(last, 0, 1), Handover(0, last, 0)] if world_size > 1 else []
    results["handed over"] = hand_over([rows, rows.half()[:, None].expand(-1, 2)], handovers)
    torch.save(results, Path(out) / f"{rank}.pt")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
