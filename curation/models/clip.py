"""open_clip models as two frozen towers (pixels and captions in, unit vectors out) or as one network to train.

A model is named by its open_clip name, or `nano`, a model of ours that two CPU cores train in about a minute. Its
weights come from one of three places: a pretrained tag, a local checkpoint (a state dict; pickled code is refused), or
a seed.

The model's own inference transform is cut at ToTensor: `Towers.resize` does what is done per image (resize, crop, RGB)
and ends in uint8, so that it can run in decode threads and its result is small; to-float and normalise run batched on
the device. On the CPU the two halves give bit for bit what open_clip's transform gives.

n images or captions, S_h x S_w pixels, L tokens, D embedding.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.transform import MaybeToTensor, PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Compose

from curation.models import flexi

Precision = Literal["float32", "bfloat16"]

_CONFIGS = Path(__file__).parent / "configs"
# open_clip's registry of configs and torch's default generator are shared by every thread of the process.
_BUILD_LOCK = threading.RLock()


class Resize:
    """A model's inference transform up to, but without, ToTensor: PIL image of any mode -> uint8 (S_h, S_w, 3), RGB.

    Picklable, holds no weights, safe to call from many threads.
    """

    def __init__(self, preprocess: PreprocessCfg) -> None:
        steps = cast(Compose, image_transform_v2(preprocess, is_train=False)).transforms
        cut = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        self.preprocess = preprocess
        self.image_size: tuple[int, int] = _height_width(preprocess.size)
        self._steps: list[Callable[[Image.Image], Image.Image]] = steps[:cut]

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        for step in self._steps:
            image = step(image)
        return np.array(image, dtype=np.uint8)


class FastResize:
    """The same transform for a JPEG that was decoded at a part of its size: uint8 (h, w, 3) -> uint8 (S_h, S_w, 3).

    The DCT scaling was the area filter; what is left of it, a ratio of 1 to 2, is resampled with the transform's own
    filter by torch's uint8 kernel. Next to open_clip's pixels that gives 43 dB where a box filter gives 31 dB, in a
    quarter of Pillow's time. Geometry is the exact transform's: same size, same crop.

    ValueError for a transform that pads (`resize_mode` longest) or keeps the ratio for a model that is not square.
    """

    def __init__(self, preprocess: PreprocessCfg) -> None:
        self._size = _height_width(preprocess.size)
        self._squash = preprocess.resize_mode == "squash"
        if not self._squash and (preprocess.resize_mode != "shortest" or self._size[0] != self._size[1]):
            raise ValueError(
                "resize 'fast' knows transforms that squash, or crop to a square; this model's has resize_mode "
                f"{preprocess.resize_mode!r} and size {self._size}: use 'exact'"
            )
        self._mode = "bilinear" if preprocess.interpolation == "bilinear" else "bicubic"
        self.min_size: tuple[int, int] = self._size

    def __call__(self, pixels: NDArray[np.uint8], *, height: int, width: int) -> NDArray[np.uint8]:
        # In this order of axes torch sees that the channels come last, and takes its fast path.
        image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        resized = F.interpolate(image, self._whole_size(height, width), mode=self._mode, antialias=True)
        return self._cropped(resized[0].permute(1, 2, 0).numpy())

    def _whole_size(self, height: int, width: int) -> tuple[int, int]:
        """What the whole image is resized to: torchvision's rule for the shortest side, by the size as stored."""
        if self._squash:
            return self._size
        side = self._size[0]
        return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)

    def _cropped(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The centre, as torchvision's CenterCrop cuts it."""
        top, left = (round((have - want) / 2.0) for have, want in zip(pixels.shape[:2], self._size, strict=True))
        return pixels[top : top + self._size[0], left : left + self._size[1]]


class TowerOutput(NamedTuple):
    """What one forward pass of both towers gives: logit = logit_scale * cosine + logit_bias."""

    image: Tensor  # (n, D) unit norm
    text: Tensor  # (n, D) unit norm
    logit_scale: Tensor  # scalar, already exponentiated
    logit_bias: Tensor  # scalar; 0 for a model without one


class ClipNetwork(nn.Module):
    """An open_clip model that takes uint8 pixels; everything a training step needs, in one forward pass.

    With `num_features` its image tower is a FeatureTower: it takes float (n, F) wherever pixels are said.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: nn.Module, preprocess: PreprocessCfg) -> None:
        super().__init__()
        self.clip = clip
        self.preprocess = preprocess
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std)[:, None, None], persistent=False)

    @property
    def log_scale(self) -> Tensor:
        """The logarithm of the logit scale, the trained parameter itself."""
        return cast(Any, self.clip).logit_scale

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (n, S_h, S_w, 3) -> float32 (n, 3, S_h, S_w): the transform's ToTensor and Normalize, batched.

        Features are made float32.
        """
        if pixels.is_floating_point():
            return pixels.to(self.mean.dtype)
        return pixels.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255).sub_(self.mean).div_(self.std)

    def embed_images(self, pixels: Tensor, *, patch_size: int | None = None) -> Tensor:
        """uint8 (n, S_h, S_w, 3) -> (n, D) float32, unit norm; a vision transformer also at another resolution.

        That is in patches of `patch_size` pixels, on images of any size that these tile; see `flexi`.
        """
        clip, images = cast(Any, self.clip), self.normalise(pixels)
        if patch_size is None:
            return F.normalize(clip.encode_image(images).float(), dim=-1)
        return F.normalize(flexi.encode_image(clip.visual, images, patch_size=patch_size).float(), dim=-1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """int64 (n, L) -> (n, D) float32, unit norm."""
        return F.normalize(cast(Any, self.clip).encode_text(tokens).float(), dim=-1)

    def forward(
        self, pixels: Tensor, tokens: Tensor, low_pixels: Tensor | None = None, *, low_patch_size: int | None = None
    ) -> TowerOutput:
        """uint8 (n, S_h, S_w, 3) and int64 (n, L) -> both embeddings, scale and bias.

        With `low_pixels` (m, s_h, s_w, 3), the images of the last m captions, the first n - m are in `pixels`.
        """
        images = [self.embed_images(pixels)] if len(pixels) or low_pixels is None else []
        if low_pixels is not None and len(low_pixels):
            images.append(self.embed_images(low_pixels, patch_size=low_patch_size))
        return TowerOutput(torch.cat(images), self.embed_texts(tokens), *self.scale_and_bias())

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """Scalars: the logit scale, already exponentiated, and the bias, 0 for a model without one."""
        scale, bias = self.log_scale.exp(), cast(Any, self.clip).logit_bias
        bias = torch.zeros_like(scale) if bias is None else bias
        return scale.squeeze(), bias.squeeze()


class FeatureTower(nn.Module):
    """An image tower that begins where a frozen network ends: features (n, F) -> (n, D)."""

    def __init__(self, num_features: int, *, width: int, embed_dim: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.layers = nn.Sequential(
            nn.LayerNorm(num_features), nn.Linear(num_features, width), nn.GELU(), nn.Linear(width, embed_dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Float (n, F) -> (n, D), not normalised."""
        return self.layers(features)


class Towers:
    """A model with fixed weights, on its device, in eval mode."""

    def __init__(
        self, network: ClipNetwork, *, tokenizer: Callable[..., Tensor], precision: Precision, device: str
    ) -> None:
        self.device = torch.device(device)
        self.precision: Precision = precision if self.device.type == "cuda" else "float32"
        """What is computed in: autocast to bfloat16 is for CUDA alone, a CPU always computes in float32."""
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.resize = Resize(network.preprocess)
        self.image_size = self.resize.image_size
        self._tokenizer = tokenizer
        clip = cast(Any, network.clip)
        self.num_features: int | None = getattr(clip.visual, "num_features", None)
        """Width of the features that the image tower begins at; None if it begins at pixels."""
        self.context_length: int = self._tokenizer([""]).shape[1]
        self.logit_scale: float = network.log_scale.exp().item()
        self.logit_bias: float = 0.0 if clip.logit_bias is None else clip.logit_bias.item()
        self.embedding_dim: int = self.embed_texts(self.tokenize([""])).shape[1]

    def tokenize(self, captions: list[str]) -> Tensor:
        """int64 (n, L), on the CPU; what is longer than L tokens is cut."""
        return self._tokenizer(captions) if captions else torch.zeros(0, self.context_length, dtype=torch.int64)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """uint8 (n, S_h, S_w, 3), from any device -> (n, D) float32, unit norm, on the towers' device.

        Towers on features take float (n, F).
        """
        if self.num_features is not None:
            if not pixels.is_floating_point() or pixels.shape[1:] != (self.num_features,):
                raise ValueError(f"features must be float (n, {self.num_features}), got {_shape(pixels)}")
        elif pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != (*self.image_size, 3):
            raise ValueError(
                f"pixels must be uint8 (n, {self.image_size[0]}, {self.image_size[1]}, 3), got {_shape(pixels)}"
            )
        return self._embed(self.network.embed_images, pixels)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """int64 (n, L), from any device -> (n, D) float32, unit norm, on the towers' device."""
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[1] != self.context_length:
            raise ValueError(f"tokens must be int64 (n, {self.context_length}), got {_shape(tokens)}")
        return self._embed(self.network.embed_texts, tokens)

    @torch.inference_mode()
    def _embed(self, tower: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        if not len(inputs):
            return torch.zeros(0, self.embedding_dim, device=self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            return tower(inputs.to(self.device, non_blocking=True))


def load_towers(
    name: str,
    *,
    pretrained: str | None = None,
    checkpoint: str | None = None,
    seed: int = 0,
    precision: Precision = "float32",
    device: str = "cpu",
    num_features: int | None = None,
) -> Towers:
    """The towers of a model, ready to embed. `device` is "cpu", "cuda", "cuda:N", or "auto" for what is there.

    With `num_features` the image tower begins at features. `seed` gives random weights when neither `pretrained` nor
    `checkpoint` names any.
    ValueError for an unknown name or tag, a checkpoint that is missing or does not fit, CUDA where there is none.
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")
    device = resolve_device(device)
    network = build_network(name, pretrained=pretrained, checkpoint=checkpoint, seed=seed, num_features=num_features)
    return Towers(network, tokenizer=load_tokenizer(name), precision=precision, device=device)


def load_tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    """The model's own tokenizer: captions -> int64 (n, L). ValueError for an unknown name."""
    _model_config(name)
    with _quiet_root_logger():
        return open_clip.get_tokenizer(_registered_name(name))


def build_network(
    name: str,
    *,
    pretrained: str | None = None,
    checkpoint: str | None = None,
    seed: int = 0,
    num_features: int | None = None,
) -> ClipNetwork:
    """A model in float32 on the CPU, in training mode. Arguments and errors as in `load_towers`.

    Position embeddings of a checkpoint made for another image size or context length are interpolated, as open_clip
    does.
    Neither torch's global random state nor any other is touched.
    """
    _model_config(name)
    if num_features is not None:
        return _build_on_features(name, num_features, pretrained=pretrained, checkpoint=checkpoint, seed=seed)
    source = _weights_file(name, pretrained=pretrained, checkpoint=checkpoint)
    # fork_rng with devices=[] and the CPU generator alone: torch.manual_seed would reseed CUDA too.
    with _BUILD_LOCK, torch.random.fork_rng(devices=[]), _quiet_root_logger():
        torch.default_generator.manual_seed(seed)
        try:
            clip = open_clip.create_model(
                _registered_name(name),
                pretrained=pretrained or (None if source is None else str(source)),
                precision="fp32",
                device="cpu",
                weights_only=True,
                pretrained_image=False,
                pretrained_text=False,
            )
        except UnpicklingError as error:  # torch's own text advises to run the pickled code
            raise ValueError(f"{source} does not hold weights of {name}: it is no state dict") from error
        except Exception as error:
            if source is None:
                raise
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"{source} does not hold weights of {name}: {' '.join(reason[:3]) or repr(error)}"
            ) from error
    return ClipNetwork(clip.train(), PreprocessCfg(**cast(Any, clip.visual).preprocess_cfg))


def _build_on_features(
    name: str, num_features: int, *, pretrained: str | None, checkpoint: str | None, seed: int
) -> ClipNetwork:
    """The model's text tower beside a FeatureTower of four times its width."""
    if pretrained is not None:
        raise ValueError(f"pretrained {pretrained!r} is of a {name} that sees pixels, not features")
    network = build_network(name, seed=seed)
    clip, config = cast(Any, network.clip), _model_config(name)
    with _BUILD_LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        clip.visual = FeatureTower(num_features, width=4 * config["text_cfg"]["width"], embed_dim=config["embed_dim"])
    if checkpoint is not None:
        source = _weights_file(name, pretrained=None, checkpoint=checkpoint)
        try:
            clip.load_state_dict(torch.load(cast(Path, source), map_location="cpu", weights_only=True))
        except (RuntimeError, AttributeError, UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{source} does not hold weights of {name} on {num_features} features: {reason}"
            ) from error
    return network


def load_resize(name: str, *, pretrained: str | None = None, image_size: int | None = None) -> Resize:
    """The same `resize` as the towers', without building the model: for tasks that only decode.

    With `image_size` its result has that side, whatever the model's own.
    """
    return Resize(_preprocess(name, pretrained=pretrained, image_size=image_size))


def load_fast_resize(name: str, *, pretrained: str | None = None, image_size: int | None = None) -> FastResize:
    """The resize for JPEGs that were decoded at a part of their size. ValueError for a model whose transform pads."""
    return FastResize(_preprocess(name, pretrained=pretrained, image_size=image_size))


def check_resolution(name: str, *, image_size: int | None, patch_size: int | None) -> None:
    """ValueError if a model cannot see square images of this size in patches of this size; None is its own size."""
    vision = _model_config(name)["vision_cfg"]
    if not isinstance(vision.get("layers"), int) or "timm_model_name" in vision:
        raise ValueError(f"low_resolution is for open_clip's own vision transformers, which {name!r} does not have")
    side, patch = image_size or _height_width(vision.get("image_size", 224))[0], patch_size or vision["patch_size"]
    if side % patch:
        raise ValueError(f"low_resolution: patches of {patch} pixels do not tile images of {side} pixels ({name})")


def save_checkpoint(network: ClipNetwork, path: str | Path) -> None:
    """Write the open_clip model's state dict, on the CPU: `checkpoint=path`, or open_clip itself, loads it."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    torch.save({key: value.detach().cpu() for key, value in network.clip.state_dict().items()}, partial)
    partial.rename(path)


def weights_digest(name: str, *, pretrained: str | None = None, checkpoint: str | None = None, seed: int = 0) -> str:
    """64 hex digits of the weights' file (or seed and versions), the architecture and the transform.

    It changes whenever an embedding could. Builds no model; costs one pass over the weights' file, which is
    downloaded if a tag names it and it is not there yet.
    """
    source = _weights_file(name, pretrained=pretrained, checkpoint=checkpoint)
    if source is None:
        weights = {"seed": seed, "torch": torch.__version__, "open_clip": open_clip.__version__}
    else:
        with open(source, "rb") as file:
            weights = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    preprocess = vars(_preprocess(name, pretrained=pretrained))
    identity = {"name": name, "config": _model_config(name), "preprocess": preprocess, "weights": weights}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def resolve_device(device: str) -> str:
    """The device that `device` means: "auto" is CUDA if there is any, else the CPU. ValueError if it is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} was asked for, this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _model_config(name: str) -> dict[str, Any]:
    """The architecture of `name`. ValueError, with the nearest known name, for an unknown one."""
    with _BUILD_LOCK:
        known = open_clip.list_models()
        if not {path.stem for path in _CONFIGS.glob("*.json")} <= set(known):
            open_clip.add_model_config(_CONFIGS)
            known = open_clip.list_models()
        if _registered_name(name) not in known:
            raise ValueError(f"model {name!r} is neither open_clip's nor ours{_nearest(name, known)}")
        return cast(dict[str, Any], open_clip.get_model_config(_registered_name(name)))


def _weights_file(name: str, *, pretrained: str | None, checkpoint: str | None) -> Path | None:
    """The file that holds the weights, downloaded if a tag asks for it; None for random weights."""
    _model_config(name)
    if pretrained is not None and checkpoint is not None:
        raise ValueError(
            f"give a pretrained tag or a checkpoint, got pretrained={pretrained!r}, checkpoint={checkpoint!r}"
        )
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise ValueError(f"checkpoint {checkpoint!r} is not a file")
        return Path(checkpoint).resolve()
    if pretrained is not None:
        return Path(open_clip.download_pretrained(_tag_config(name, pretrained)))
    return None


def _tag_config(name: str, pretrained: str) -> dict[str, Any]:
    """open_clip's record of a pretrained tag. ValueError, with the nearest known tag, for an unknown one."""
    config = open_clip.get_pretrained_cfg(_registered_name(name), pretrained)
    if not config:
        tags = open_clip.list_pretrained_tags_by_model(_registered_name(name))
        raise ValueError(f"model {name!r} has no pretrained tag {pretrained!r}{_nearest(pretrained, tags)}")
    return config


def _preprocess(name: str, *, pretrained: str | None, image_size: int | None = None) -> PreprocessCfg:
    """The inference transform's description: the tag's, at the architecture's image size or another."""
    tag = {} if pretrained is None else _tag_config(name, pretrained)
    size = _height_width(image_size or _model_config(name)["vision_cfg"].get("image_size", 224))
    return PreprocessCfg(**merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), tag), {"size": size}))


def _registered_name(name: str) -> str:
    return name.replace("/", "-")


def _nearest(word: str, known: list[str]) -> str:
    """How to end an error: the known word nearest to `word`, or all of them when none is near and they are few."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {sorted(known)}" if len(known) <= 12 else ""


def _height_width(size: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Keep open_clip from installing a root handler: it calls logging.info(), which does that when there is none."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
