"""What one worker of a diffusion study does: model after model, each trained, sampled from, and committed.

A unit is an arm at a seed. Its folder holds `state.pt` while it trains, then `samples.npy` and `features.npy`, and
`done.json`, written last, is its commit: a unit that has it is not begun again, and one that has a state goes on from
there; so does one that was asked to end. Workers share nothing, so any number of them makes the same models, for equal
device type and threads.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray.train.torch
import torch
from PIL import Image

from curation.data import storage
from curation.distributed.notices import EndNote
from curation.models.frozen import Frozen, load_frozen
from curation.recipe.evaluate import DiffusionRecipe
from curation.training.diffusion import Diffusion

POOL = "pool"
EMBED_BATCH = 128


@dataclass(frozen=True)
class Unit:
    """One model: the arm, the seed, and gradient steps."""

    arm: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.arm}-{self.seed}"


def unit_url(output: str, unit: Unit, file: str) -> str:
    """Where a file of a unit lies."""
    return storage.join(output, "units", unit.name, file)


def is_done(output: str, unit: Unit) -> bool:
    """True if the unit is committed."""
    return storage.exists(unit_url(output, unit, "done.json"))


def diffusion_loop(config: dict[str, Any]) -> None:
    """The units of one Ray Train worker: every so many-th of those that are left."""
    recipe, units = config["recipe"], config["units"]
    context = ray.train.get_context()
    device = str(ray.train.torch.get_device())
    if device == "cpu":
        torch.set_num_threads(1)
    network = recipe.network
    judge = load_frozen(network.library, network.model, **network.source(), device=device)
    images = torch.from_numpy(load_array(storage.join(recipe.output, "images.npy")))
    if context.get_world_rank() == 0 and not storage.exists(storage.join(recipe.output, "features.npy")):
        save_array(storage.join(recipe.output, "features.npy"), embedded(judge, images.numpy()))
    is_to_end = EndNote(recipe.output)
    for unit in units[context.get_world_rank() :: context.get_world_size()]:
        run_unit(recipe, unit, images, judge, device=device, is_to_end=is_to_end)
        if is_to_end():
            return


def run_unit(
    recipe: DiffusionRecipe,
    unit: Unit,
    images: torch.Tensor,
    judge: Frozen,
    *,
    device: str,
    is_to_end: Callable[[], bool] = lambda: False,
) -> None:
    """Train what is left of a unit, sample, embed the samples, commit; nothing if it is committed.

    Where `is_to_end` while it trains, it is left with its state, to be gone on with.
    """
    if is_done(recipe.output, unit):
        return
    rows = torch.from_numpy(load_array(unit_url(recipe.output, unit, "rows.npy")))
    model = Diffusion(recipe.generator.spec(), seed=unit.seed, device=device)
    state = unit_url(recipe.output, unit, "state.pt")
    if storage.exists(state):
        model.load_state_dict(torch.load(io.BytesIO(storage.read_bytes(state)), weights_only=True, map_location="cpu"))
    losses = []
    while model.step < unit.steps:
        losses.append(model.train_step(images[rows]))
        ends = is_to_end()
        if ends or model.step % recipe.checkpoint_every == 0 or model.step == unit.steps:
            with storage.write_atomic(state) as file:
                torch.save(model.state_dict(), file)
        if ends:
            return
    samples = model.sample(recipe.samples, seed=unit.seed, batch_size=recipe.sample_batch).numpy()
    save_array(unit_url(recipe.output, unit, "samples.npy"), samples)
    save_array(unit_url(recipe.output, unit, "features.npy"), embedded(judge, samples))
    account = {**asdict(unit), "rows": len(rows), "last_losses": losses[-100:]}
    storage.write_bytes(unit_url(recipe.output, unit, "done.json"), json.dumps(account).encode())


def embedded(judge: Frozen, images: np.ndarray) -> np.ndarray:
    """Features (n, F) float32 of images (n, S, S, 3) uint8, by the network's own transform."""
    parts = []
    for at in range(0, len(images), EMBED_BATCH):
        resized = [judge.resize(Image.fromarray(image)) for image in images[at : at + EMBED_BATCH]]
        parts.append(judge.embed(np.stack(resized)))
    return np.concatenate(parts)


def load_array(url: str) -> np.ndarray:
    """An array that `save_array` wrote."""
    return np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)


def save_array(url: str, array: np.ndarray) -> None:
    """Write an array, whole."""
    with storage.write_atomic(url) as file:
        np.save(file, array, allow_pickle=False)
