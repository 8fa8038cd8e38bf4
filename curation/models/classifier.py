"""Classifiers on labels: a linear head or a small MLP on frozen features, or an image tower with a fresh head.

n rows, F features, C classes.
"""

from __future__ import annotations

import re
from pickle import UnpicklingError
from typing import cast

import torch
from torch import Tensor, nn

from curation.models.clip import ClipNetwork, build_network

MLP_NAME = re.compile(r"mlp-([1-9]\d*)")


class Classifier(nn.Module):
    """Inputs -> logits (n, C): the tower turns them into what the head sees."""

    def __init__(self, tower: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.tower = tower
        self.head = head

    def forward(self, inputs: Tensor, *, with_seen: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Features (n, F) of any float dtype, or uint8 pixels (n, S_h, S_w, 3), -> logits (n, C) float32.

        With `with_seen` what the head is given comes beside them.
        """
        seen = self.seen_by_head(inputs)
        logits = self.head(seen).float()
        return (logits, seen) if with_seen else logits

    def seen_by_head(self, inputs: Tensor) -> Tensor:
        """What the head is given, (n, F)."""
        return self.tower(inputs.float() if inputs.is_floating_point() else inputs)


class ImageTower(nn.Module):
    """The image side of an open_clip model, from uint8 pixels to its embedding, not normalised."""

    def __init__(self, network: ClipNetwork) -> None:
        super().__init__()
        self.visual = cast(nn.Module, network.clip.visual)
        self.register_buffer("mean", network.mean, persistent=False)
        self.register_buffer("std", network.std, persistent=False)

    normalise = ClipNetwork.normalise

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (n, S_h, S_w, 3) -> (n, D)."""
        return self.visual(self.normalise(pixels))


def is_on_features(name: str) -> bool:
    """True if `name` is a classifier of feature columns, False if it is a model that sees pixels."""
    return name == "linear" or MLP_NAME.fullmatch(name) is not None


def build_classifier(
    name: str,
    *,
    num_classes: int,
    num_features: int | None = None,
    pretrained: str | None = None,
    checkpoint: str | None = None,
    seed: int = 0,
) -> Classifier:
    """A classifier in float32 on the CPU, in training mode.

    `name` is "linear", "mlp-WIDTH" (one hidden layer), both on (n, num_features), or an open_clip model, whose image
    tower gets a linear head; `pretrained` is the tower's. `checkpoint` is a state dict of the whole classifier.
    ValueError if the name is unknown, there are no classes, features are missing, or a checkpoint does not fit.
    """
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least two classes, got {num_classes}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = _build(name, num_classes=num_classes, num_features=num_features, pretrained=pretrained, seed=seed)
    if checkpoint is not None:
        try:
            network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, AttributeError, UnpicklingError) as error:
            raise ValueError(
                f"{checkpoint} does not hold weights of {name!r} with {num_classes} classes: "
                f"{str(error).splitlines()[0]}"
            ) from error
    return network


def _build(name: str, *, num_classes: int, num_features: int | None, pretrained: str | None, seed: int) -> Classifier:
    if not is_on_features(name):
        clip = build_network(name, pretrained=pretrained, seed=seed)
        size = clip.preprocess.size
        side = (size, size) if isinstance(size, int) else tuple(size)
        with torch.no_grad():
            width = clip.embed_images(torch.zeros(1, *side, 3, dtype=torch.uint8)).shape[1]
        return Classifier(ImageTower(clip), nn.Linear(width, num_classes))
    if num_features is None:
        raise ValueError(f"{name!r} classifies features: name their column")
    if name == "linear":
        return Classifier(nn.Identity(), nn.Linear(num_features, num_classes))
    match = MLP_NAME.fullmatch(name)
    assert match is not None
    width = int(match.group(1))
    return Classifier(nn.Sequential(nn.Linear(num_features, width), nn.GELU()), nn.Linear(width, num_classes))
