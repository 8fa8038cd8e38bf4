"""A training loop of one's own: python selected_worker.py RANK WORLD_SIZE STORE RECIPE OUT [STOP_AFTER [STATE]]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from curation.distributed.selected_batches import SelectedBatches
from curation.models.clip import build_network
from curation.recipe import TrainRecipe


def train(recipe: TrainRecipe, *, stop_after: int, resume: str | None) -> dict[str, Any]:
    """A plain loop with open_clip's model and its sigmoid loss written out."""
    clip = build_network("nano", seed=1).clip
    if resume:
        saved = torch.load(resume, weights_only=False)
        clip.load_state_dict(saved["model"])
    model = DistributedDataParallel(clip) if dist.is_initialized() else clip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, trained = [], []
    with SelectedBatches(recipe, model) as batches:
        if resume:
            batches.load_state_dict(saved["batches"])
        for batch in batches:
            image, text, scale, *bias = cast(Any, model)(batch.images, batch.texts)
            logits = scale * image @ text.T + (bias[0] if bias else 0.0)
            labels = 2 * torch.eye(len(logits)) - 1
            loss = (-torch.nn.functional.logsigmoid(labels * logits).sum(1) * batch.weights).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            batches.note(loss=loss.item())
            losses.append(loss.item())
            trained.append(batch.addresses.tolist())
            if batch.step + 1 == stop_after:
                return {
                    "losses": losses,
                    "trained": trained,
                    "model": clip.state_dict(),
                    "batches": batches.state_dict(),
                }
    return {"losses": losses, "trained": trained}


def main(rank: int, world_size: int, store: str, recipe: str, out: str, stop_after: int = -1, state: str = "") -> None:
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    result = train(
        TrainRecipe.model_validate_json(Path(recipe).read_text()), stop_after=stop_after, resume=state or None
    )
    torch.save(result, Path(out) / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, world_size, store, recipe, out, *rest = sys.argv[1:]
    main(int(rank), int(world_size), store, recipe, out, *([int(rest[0]), *rest[1:]] if rest else []))
