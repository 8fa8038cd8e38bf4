"""One rank of test_ranks.py: python ranks_worker.py RANK WORLD_SIZE STORE OUT; world size 1 has no group.

The whole batch is the same whatever the world size; each rank holds its part of it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from curation.methods import load_selector
from curation.models.clip import TowerOutput, build_network
from curation.numerics.contrastive import sigmoid_loss, softmax_loss
from curation.training.collectives import Handover, gather, hand_over, ranks
from curation.training.contrastive import make_optimizer
from curation.training.contrastive_learner import ContrastiveLearner, Reference
from curation.training.learner import WeightScope
from curation.training.mimic import layer_of
from curation.training.online import Scope, choose
from curation.training.online_step import OnlineSettings, OnlineTrainer
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


def super_batch(*, size: int = 48, broken: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """This rank's part of a super-batch of reference and learner embeddings, addresses in no order."""
    rank, world_size = ranks()
    generator = torch.Generator().manual_seed(9)
    unit = [nn.functional.normalize(torch.randn(size, 8, generator=generator), dim=1) for _ in range(4)]
    ok = torch.ones(size, dtype=torch.bool)
    ok[list(broken)] = False
    columns = {
        "address": torch.randperm(size, generator=generator) + 1000,
        "uid": torch.randint(-(2**62), 2**62, (size, 2), generator=generator),
        "ok": ok,
        "clip_score": torch.randn(size, generator=generator),
        **dict(zip(("image_embedding", "text_embedding"), unit[:2], strict=True)),
        **dict(
            zip(("reference_image_embedding", "reference_text_embedding"), [u.half() for u in unit[2:]], strict=True)
        ),
    }
    values = {"logit_scale": 12.0, "logit_bias": -3.0, "reference_logit_scale": 30.0, "reference_logit_bias": -9.0}
    part = size // world_size
    own = {name: column[rank * part : (rank + 1) * part] for name, column in columns.items()}
    return {**own, **{name: torch.tensor(value) for name, value in values.items()}}


def chosen(method: str, *, scope: Scope = "global", quota: bool = False, broken: tuple[int, ...] = ()) -> dict:
    rows = super_batch(broken=broken)
    made = choose(load_selector(method), rows, keep=12, progress=0.5, seed=3, step=7, scope=scope, quota=quota)
    [received] = hand_over([rows["address"]], made.handovers)
    return {
        "selected": made.selected["address"].tolist(),
        "trained": rows["address"][made.own].tolist() + received.tolist(),
        "weights": made.weights.tolist(),
        "scores": dict(zip(rows["address"].tolist(), made.scores.tolist(), strict=True)),
        "own": rows["address"][made.is_own_selected].tolist(),
        "part": rows["address"].tolist(),
    }


def online_step(method: str) -> dict[str, Tensor | float]:
    """Two steps of the nano model on a super-batch of 24."""
    rank, world_size = ranks()
    network = build_network("nano", seed=0)
    generator = torch.Generator().manual_seed(4)
    part = 24 // world_size
    own = slice(rank * part, (rank + 1) * part)
    block = {
        "pixels": torch.randint(0, 256, (24, 48, 48, 3), dtype=torch.uint8, generator=generator)[own],
        "tokens": torch.randint(1, 400, (24, 28), generator=generator)[own],
        "address": torch.arange(24)[own],
        "uid": torch.randint(-(2**62), 2**62, (24, 2), generator=generator)[own],
        "ok": torch.ones(24, dtype=torch.bool)[own],
        **{
            f"reference_{side}_embedding": nn.functional.normalize(torch.randn(24, 8, generator=generator), dim=1)[own]
            for side in ("image", "text")
        },
    }
    settings = OnlineSettings(keep=12, num_steps=4, seed=1)
    learner = ContrastiveLearner(network=network, reference=Reference(20.0, -5.0, None))
    optimizer = make_optimizer(network, learning_rate=1e-3)
    trainer = OnlineTrainer(learner, optimizer, load_selector(method), settings)
    outcomes = [trainer.step(number, block) for number in range(2)]
    return {
        "losses": torch.tensor([outcome.report.loss for outcome in outcomes]),
        "reference": torch.tensor([outcome.picked.reference_loss or 0.0 for outcome in outcomes]),
        "selected": torch.stack([outcome.picked.chosen.selected["address"] for outcome in outcomes]),
        "trained": torch.cat([outcome.picked.trained for outcome in outcomes]),
        "recorded": torch.cat([outcome.picked.recorded[0] for outcome in outcomes]),
    }


def mimic_steps(scope: WeightScope, layer: str) -> dict[str, Tensor]:
    """Two steps of the nano model that go towards another one, on the whole super-batch of 12."""
    rank, world_size = ranks()
    network, reference = (build_network("nano", seed=seed) for seed in (0, 1))
    generator = torch.Generator().manual_seed(6)
    part = WHOLE // world_size
    own = slice(rank * part, (rank + 1) * part)
    block = {
        "pixels": torch.randint(0, 256, (WHOLE, 48, 48, 3), dtype=torch.uint8, generator=generator)[own],
        "tokens": torch.randint(1, 400, (WHOLE, 28), generator=generator)[own],
        "address": torch.randperm(WHOLE, generator=generator)[own],
        "uid": torch.randint(-(2**62), 2**62, (WHOLE, 2), generator=generator)[own],
        "ok": torch.ones(WHOLE, dtype=torch.bool)[own],
    }
    learner = ContrastiveLearner(
        network=network, mimicked=reference, mimic_layer=layer, weight_scope=scope, score_batch=3
    )
    settings = OnlineSettings(keep=WHOLE, num_steps=4, seed=1)
    optimizer = make_optimizer(network, learning_rate=1e-3)
    trainer = OnlineTrainer(learner, optimizer, load_selector("grad_mimic", temperature=0.3), settings)
    outcomes = [trainer.step(number, block) for number in range(2)]
    places = block["address"].argsort()
    return {
        "address": block["address"][places],
        "scores": torch.stack([outcome.picked.chosen.scores[places] for outcome in outcomes]),
        "weights": torch.stack([outcome.picked.chosen.row_weights[places] for outcome in outcomes]),
        "losses": torch.tensor([outcome.report.loss for outcome in outcomes]),
        "layer": torch.cat([value.flatten() for value in layer_of(network.clip, layer).values()]).detach(),
    }


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
    for method in ("jest", "clip_score", "uniform"):
        results[f"choose {method}"] = chosen(method)
    results["choose with broken rows"] = chosen("jest", broken=(0, 5, 40))
    results["choose locally"] = chosen("clip_score", scope="local")
    results["choose by quota"] = chosen("clip_score", quota=True)
    results["online uniform"] = online_step("uniform")
    results["online jest"] = online_step("jest")
    results["online rho"] = online_step("rho")
    for scope in get_args(WeightScope):
        results[f"mimic {scope}"] = mimic_steps(scope, "visual.transformer.resblocks.3")
    results["mimic text"] = mimic_steps("mimic", "text_projection")
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
