"""Frozen networks that turn an image into features: open_clip, timm, torchvision, ResNet-20 of CIFAR, and TFLite files.

And two that are no networks, but as good as one: perceptual hashes, and the pixels themselves, for small generative
models that need something to generate (`models.proxies`).

The features are what the network's last linear layer would see (open_clip: the image tower's embedding, not
normalised). Resizing is the network's own transform, cut at ToTensor as in `models.clip`; a TFLite file names no
transform, so its images are made as ImageNet's are: the shorter side to 256/224 of the input, bicubic, centre crop.

n images, S_h x S_w pixels, F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from curation.models.cifar_resnet import SIDE, CifarResNet20, normalise
from curation.models.clip import Precision, build_network, resolve_device
from curation.models.perceptual_hash import BITS, grey_square, perceptual_hashes
from curation.models.registry import weights_digest
from curation.models.resize import Resize, load_resize

Library = Literal["open_clip", "timm", "torchvision", "cifar", "tflite", "phash", "pixels"]
LIBRARIES: tuple[str, ...] = get_args(Library)
IMAGENET_CROP = 224 / 256
PATCH = 4
"""Side of the patches into which pixels are cut, as many numbers of a row in sequence: 48 with three channels."""

ImageStep = Callable[[Image.Image], Any]


class Frozen(NamedTuple):
    """A network that is never trained: `resize` per image, in threads; `embed` uint8 (n, S_h, S_w, 3) -> (n, F)."""

    resize: Callable[[Image.Image], NDArray[np.uint8]]
    embed: Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def load_frozen(
    library: str,
    model: str,
    *,
    pretrained: str | None = None,
    checkpoint: str | None = None,
    seed: int = 0,
    precision: Precision = "float32",
    device: str = "cpu",
) -> Frozen:
    """The network `model` of a library. `pretrained` is a tag that the library knows; `checkpoint` a local state dict.

    For "tflite" `model` is the file and there is nothing else to give. `seed` gives random weights when neither is
    given. ValueError for an unknown library, model or tag, or a checkpoint that does not fit.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {list(LIBRARIES)}, got {library!r}")
    if pretrained is not None and checkpoint is not None:
        raise ValueError(f"give pretrained or checkpoint, got both: {pretrained!r}, {checkpoint!r}")
    if library == "tflite":
        return _tflite(model, given=pretrained or checkpoint)
    if library == "phash":
        return _phash(model, given=pretrained or checkpoint)
    if library == "pixels":
        return _pixels(model, given=pretrained or checkpoint)
    device = resolve_device(device)
    make = {"open_clip": _open_clip, "timm": _timm, "torchvision": _torchvision, "cifar": _cifar}[library]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        forward, network, resize = make(model, pretrained, checkpoint, seed)
    network.to(device).eval().requires_grad_(False)
    bfloat16 = precision == "bfloat16" and device.startswith("cuda")

    def embed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode(), torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=bfloat16):
            return forward(torch.from_numpy(pixels).to(device)).float().flatten(1).cpu().numpy()

    return Frozen(resize, embed)


def frozen_digest(
    library: str, model: str, *, pretrained: str | None = None, checkpoint: str | None = None, seed: int = 0
) -> str:
    """64 hex digits of what decides the features: library, model, and the weights' file, tag or seed."""
    identity: dict[str, Any] = {"library": library, "model": model, "torch": torch.__version__}
    if library == "open_clip":
        identity["weights"] = weights_digest(model, pretrained=pretrained, checkpoint=checkpoint, seed=seed)
    elif file := checkpoint or (model if library == "tflite" else None):
        with open(_file(file), "rb") as opened:
            identity |= {"model": None if library == "tflite" else model}
            identity["sha256"] = hashlib.file_digest(opened, "sha256").hexdigest()
    else:
        identity["weights"] = pretrained or f"seed {seed}"
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


Made = tuple[Callable[[Tensor], Tensor], nn.Module, Callable[[Image.Image], NDArray[np.uint8]]]


def _open_clip(model: str, pretrained: str | None, checkpoint: str | None, seed: int) -> Made:
    network = build_network(model, pretrained=pretrained, checkpoint=checkpoint, seed=seed)
    clip = cast(Any, network.clip)
    resize: Resize = load_resize(model, pretrained=pretrained)
    return lambda pixels: clip.encode_image(network.normalise(pixels)), network, resize


def _timm(model: str, pretrained: str | None, checkpoint: str | None, seed: int) -> Made:
    import timm  # an open_clip dependency; it takes a second to import, which most runs need not wait for
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    name = model if pretrained is None else f"{model}.{pretrained}"
    if not timm.is_model(model):
        raise ValueError(f"timm has no model {model!r}; timm.list_models() names them")
    network = timm.create_model(name, pretrained=pretrained is not None, num_classes=0)
    if checkpoint is not None:
        _load(network, checkpoint, ignored=("head.", "fc.", "classifier."))
    steps = cast(Any, create_transform(**resolve_model_data_config(network), is_training=False)).transforms
    return (*_normalised(network, steps), _until_tensor(steps))


def _torchvision(model: str, pretrained: str | None, checkpoint: str | None, seed: int) -> Made:
    from torchvision import models
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    if model not in models.list_models(module=models):
        raise ValueError(f"torchvision has no model {model!r}; torchvision.models.list_models() names them")
    try:
        preset = cast(Any, models.get_model_weights(model))[pretrained or "DEFAULT"].transforms()
        network = models.get_model(model, weights=pretrained)
    except (KeyError, ValueError) as error:
        raise ValueError(f"torchvision's {model} has no weights {pretrained!r}: {error}") from error
    if checkpoint is not None:
        _load(network, checkpoint, ignored=())
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    steps = Compose(
        [
            Resize(preset.resize_size, interpolation=InterpolationMode(preset.interpolation)),
            CenterCrop(preset.crop_size),
            ToTensor(),
            Normalize(preset.mean, preset.std),
        ]
    ).transforms
    forward, network = _normalised(network, steps)
    return _input_of(linear, forward), network, _until_tensor(steps)


def _cifar(model: str, pretrained: str | None, checkpoint: str | None, seed: int) -> Made:
    if model != "resnet20" or pretrained is not None:
        raise ValueError(f"library cifar has the model resnet20 and no tags, got {model!r}, pretrained {pretrained!r}")
    network = CifarResNet20()
    if checkpoint is not None:
        _load(network, checkpoint, ignored=("linear.",))

    def resize(image: Image.Image) -> NDArray[np.uint8]:
        return np.array(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.uint8)

    return lambda pixels: network(normalise(pixels)), network, resize


def _input_of(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `layer` is given during a forward pass: its input, instead of the network's output."""
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def features(pixels: Tensor) -> Tensor:
        seen.clear()
        forward(pixels)
        return seen[-1]

    return features


def _normalised(network: nn.Module, steps: Iterable[Any]) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """A forward pass from uint8 (n, S_h, S_w, 3): the transform's ToTensor and Normalize, batched, then the network."""
    normalise = next(step for step in steps if type(step).__name__ == "Normalize")
    mean, std = (torch.as_tensor(value).reshape(3, 1, 1) for value in (normalise.mean, normalise.std))

    def forward(pixels: Tensor) -> Tensor:
        images = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)
        return network(images.sub_(mean.to(images.device)).div_(std.to(images.device)))

    return forward, network


def _until_tensor(steps: Iterable[Any]) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """The transform's steps before the image becomes a tensor; images of any mode are made RGB first."""
    before: list[ImageStep] = []
    for step in steps:
        if type(step).__name__ in ("ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor"):
            break
        before.append(step)

    def resize(image: Image.Image) -> NDArray[np.uint8]:
        image = image.convert("RGB")
        for step in before:
            image = step(image)
        return np.array(image, dtype=np.uint8)

    return resize


def _phash(model: str, *, given: str | None) -> Frozen:
    """No network, but as good as one: 64 bits of each image as a vector."""
    if model != str(BITS) or given is not None:
        raise ValueError(f"library phash has the model {str(BITS)!r}, got {given or model!r}")
    return Frozen(grey_square, perceptual_hashes)


def _pixels(model: str, *, given: str | None) -> Frozen:
    """The image itself in `model` x `model` pixels, patch after patch, row by row: (n, 3 S S) in [0, 1]."""
    side = int(model) if model.isdecimal() else 0
    if side < PATCH or side % PATCH or given is not None:
        raise ValueError(f"library pixels has models such as '32', a multiple of {PATCH}, got {given or model!r}")

    def resize(image: Image.Image) -> NDArray[np.uint8]:
        return np.array(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), dtype=np.uint8)

    def embed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        cut = pixels.reshape(len(pixels), side // PATCH, PATCH, side // PATCH, PATCH, 3).swapaxes(2, 3)
        return cut.reshape(len(pixels), side * side * 3).astype(np.float32) / np.float32(255)

    return Frozen(resize, embed)


def _tflite(model: str, *, given: str | None) -> Frozen:
    """A TFLite file that takes one uint8 image and gives one row, quantised or not."""
    if given is not None:
        raise ValueError(f"a tflite file holds its weights: give neither pretrained nor checkpoint, got {given!r}")
    try:
        from ai_edge_litert.interpreter import Interpreter  # an extra: few runs need it
    except ImportError as error:
        raise ValueError("tflite files need the package ai-edge-litert: pip install 'curation[tflite]'") from error
    interpreter = Interpreter(str(_file(model)), num_threads=1)
    interpreter.allocate_tensors()
    [taken], [given_out] = interpreter.get_input_details(), interpreter.get_output_details()
    if taken["dtype"] is not np.uint8 or len(taken["shape"]) != 4 or taken["shape"][3] != 3:
        raise ValueError(f"{model} must take uint8 (1, H, W, 3), it takes {taken['dtype']} {tuple(taken['shape'])}")
    scale, zero = given_out["quantization"] if given_out["dtype"] is np.uint8 else (1.0, 0)
    size = int(taken["shape"][1]), int(taken["shape"][2])

    def embed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        rows = []
        for image in pixels:
            interpreter.set_tensor(taken["index"], image[None])
            interpreter.invoke()
            rows.append(interpreter.get_tensor(given_out["index"]).reshape(-1))
        return (np.stack(rows).astype(np.float32) - zero) * np.float32(scale)

    return Frozen(_imagenet_resize(size), embed)


def _imagenet_resize(size: tuple[int, int]) -> Callable[[Image.Image], NDArray[np.uint8]]:
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    resize, crop = Resize(round(min(size) / IMAGENET_CROP), InterpolationMode.BICUBIC), CenterCrop(size)
    return lambda image: np.array(crop(resize(image.convert("RGB"))), dtype=np.uint8)


def _load(network: nn.Module, checkpoint: str, *, ignored: tuple[str, ...]) -> None:
    """Load a state dict. ValueError if it does not fit; weights of the head, which is not there, are left out."""
    try:
        state = torch.load(_file(checkpoint), map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        # DataParallel prefixes every name.
        state = {name.removeprefix("module."): value for name, value in state.items()}
        network.load_state_dict({name: value for name, value in state.items() if not name.startswith(ignored)})
    except (RuntimeError, AttributeError, OSError, EOFError, ValueError, UnpicklingError) as error:
        raise ValueError(f"{checkpoint} does not hold weights of this network: {str(error).splitlines()[0]}") from error


def _file(name: str) -> Path:
    if not Path(name).is_file():
        raise ValueError(f"{name!r} is not a file")
    return Path(name)
