"""Heads on stored embeddings: a published linear or MLP checkpoint makes a score of each row, and no image is decoded.

Layouts are those of the published state dicts, read with `weights_only`:

    linear     weight (1, D), bias (1): LAION-Aesthetics V1 (sa_0_4_vit_l_14_linear.pth), or a probe of one's own
    aesthetic  layers.{0,2,4,6,7}: improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth); linear all through,
               between its layers are dropouts alone
    nsfw       norm.mean, norm.variance, linear_1 ...: CLIP-based-NSFW-Detector's torch port of the autokeras heads
               (clip_ViT-B-32_... and clip_ViT-L-14_openai_binary_nsfw_head.pth): standardised input, ReLU between, a
               sigmoid at the end
    nsfw-h14   layers.{0,3,6,9,12,15,16}: the same project's h14_nsfw.pth; ReLU after each but the last two
    mlp        layers.N or N, in order of N: an MLP of one's own, ReLU between its layers

LAION's watermark model is no head: it is an EfficientNet on pixels. A watermark head trained on embeddings is `linear`
or `mlp`. Embeddings are normalised in float32 first, as all of these were trained on unit vectors.

N rows, D embedding.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

HeadLayout = Literal["linear", "aesthetic", "nsfw", "nsfw-h14", "mlp"]
NORM = ("norm.mean", "norm.variance")
STANDARD_EPSILON = 1e-10
_LAYER = re.compile(r"(?:layers\.)?(\d+)\.(weight|bias)")
_NSFW_LAYER = re.compile(r"linear_(\d+)\.(weight|bias)")
_PREFIXES = re.compile(r"^(?:module\.|model\.)+")
AESTHETIC_LAYERS = (0, 2, 4, 6, 7)
NSFW_H14_LAYERS = (0, 3, 6, 9, 12, 15, 16)

Head = Callable[[np.ndarray], np.ndarray]


def load_head(path: str, layout: HeadLayout) -> Head:
    """Embeddings (n, D) of any float type -> scores (n,) float32. ValueError if the file does not hold such a head."""
    state = _state(path)
    pattern = _NSFW_LAYER if layout == "nsfw" else _LAYER
    if layout == "linear":
        weight, bias = state.pop("weight", None), state.pop("bias", None)
        layers = {} if weight is None or bias is None else {0: (weight.reshape(1, -1), bias.reshape(1))}
        norm = None
    else:
        norm = [state.pop(name) for name in NORM if name in state] if layout == "nsfw" else None
        layers = _layers(state, pattern)
    if state or not layers or (norm is not None and len(norm) != len(NORM)):
        raise ValueError(f"{path} is no head of layout {layout!r}: {_told(path)}")
    numbers = sorted(layers)
    wanted = {"aesthetic": AESTHETIC_LAYERS, "nsfw-h14": NSFW_H14_LAYERS}.get(layout)
    if wanted and tuple(numbers) != wanted:
        raise ValueError(f"{path} is no head of layout {layout!r}: its layers are {numbers}, not {list(wanted)}")
    _check_chain(path, [layers[number] for number in numbers])
    linear_after = {"linear": numbers, "aesthetic": numbers, "nsfw-h14": numbers[-2:]}.get(layout, numbers[-1:])

    def head(rows_ND: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = F.normalize(torch.from_numpy(np.array(rows_ND, np.float32)), dim=1)
            if x.shape[1] != layers[numbers[0]][0].shape[1]:
                raise ValueError(
                    f"{path} is a head on {layers[numbers[0]][0].shape[1]} numbers, the embeddings have {x.shape[1]}"
                )
            if norm:
                mean, variance = norm
                x = (x - mean) / (variance.sqrt() + STANDARD_EPSILON)
            for number in numbers:
                x = F.linear(x, *layers[number])
                x = x if number in linear_after else F.relu(x)
            return (torch.sigmoid(x) if layout == "nsfw" else x)[:, 0].numpy()

    return head


def head_digest(path: str, layout: HeadLayout) -> str:
    """64 hex digits that name a head: its layout and its file. ValueError if there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"{path!r} is not a file")
    return hashlib.sha256(f"{layout} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}".encode()).hexdigest()


def _state(path: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path} holds no state dict: {str(error).splitlines()[0]}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict, it holds a {type(state).__name__}")
    return {_PREFIXES.sub("", name): value.float() for name, value in state.items()}


def _layers(state: dict[str, Tensor], pattern: re.Pattern[str]) -> dict[int, tuple[Tensor, Tensor]]:
    """Number -> weight and bias of the linear layers, which are taken out of `state`; whatever is no pair stays."""
    found = {name: match for name in state if (match := pattern.fullmatch(name))}
    layers: dict[int, tuple[Tensor, Tensor]] = {}
    for number in {int(match[1]) for match in found.values()}:
        pair = {match[2]: name for name, match in found.items() if int(match[1]) == number}
        if len(pair) == 2:
            layers[number] = (state.pop(pair["weight"]), state.pop(pair["bias"]))
    return layers


def _check_chain(path: str, layers: list[tuple[Tensor, Tensor]]) -> None:
    widths = [tuple(weight.shape) for weight, _ in layers]
    fits = all(len(width) == 2 and bias.shape == width[:1] for width, (_, bias) in zip(widths, layers, strict=True))
    chained = fits and all(before[0] == after[1] for before, after in pairwise(widths))
    if not chained or widths[-1][0] != 1:
        raise ValueError(f"{path} is no head with one score: its layers have weights {widths}")


def _told(path: str) -> str:
    shapes = {name: tuple(value.shape) for name, value in _state(path).items()}
    return f"it holds {shapes}; layouts are {', '.join(get_args(HeadLayout))}"
