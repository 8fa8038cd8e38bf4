"""A training run's checkpoint: model, optimiser, position, the ledger's tag and random state, as one folder.

The position is a number of steps: with the pool's list and the seed it says which rows every later step gets. The tag
names the folder and the ledger's snapshot, which is made first; so a checkpoint that exists has its ledger.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from curation.columns import FORMAT_VERSION


class Position(NamedTuple):
    """Where a run stands: steps done, and by which attempt's ledger tag."""

    step: int
    tag: str | None


START = Position(0, None)


def tag_of(step: int) -> str:
    """The name of the checkpoint after `step` steps, and of the ledger's snapshot that belongs to it."""
    return f"step-{step:010d}"


def save(folder: Path, network: nn.Module, optimizer: Optimizer, position: Position, counts: dict[str, Any]) -> None:
    """Write the checkpoint into an empty folder. `counts` are the run's running totals."""
    torch.save(
        {
            "network": {name: value.detach().cpu() for name, value in network.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        },
        folder / "state.pt",
    )
    about = {"format_version": FORMAT_VERSION, **position._asdict(), "counts": counts}
    (folder / "position.json").write_text(json.dumps(about, indent=1))


def load(folder: Path, network: nn.Module, optimizer: Optimizer) -> tuple[Position, dict[str, Any]]:
    """Restore what `save` wrote, in place; the position and the totals. ValueError if it is newer, or does not fit."""
    about = json.loads((folder / "position.json").read_text())
    if about["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version {about['format_version']}, this code reads up to {FORMAT_VERSION}: "
            "update curation"
        )
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    try:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the checkpoint {folder} does not fit the recipe's learner: {error}") from error
    torch.set_rng_state(state["random"])
    return Position(about["step"], about["tag"]), about["counts"]
