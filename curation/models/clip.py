"""open_clip models as two frozen towers (pixels and captions in, unit vectors out) or as one network to train.

A local checkpoint is a state dict; pickled code is refused. The model's own inference transform is cut at ToTensor:
`Towers.resize` does what is done per image (resize, crop, RGB) and ends in uint8, so that it can run in decode threads
and its result is small; to-float and normalise run batched on the device. On the CPU the two halves give bit for bit
what open_clip's transform gives.

n images or captions, S_h x S_w pixels, L tokens, D embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple, cast

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn
from torch.nn import functional as F

from curation.models import flexi
from curation.models.registry import (
    BUILD_LOCK,
    model_config,
    quiet_root_logger,
    registered_name,
    weights_file,
)
from curation.models.resize import Resize

Precision = Literal["float32", "bfloat16"]


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
    model_config(name)
    with quiet_root_logger():
        return open_clip.get_tokenizer(registered_name(name))


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
    model_config(name)
    if num_features is not None:
        return _build_on_features(name, num_features, pretrained=pretrained, checkpoint=checkpoint, seed=seed)
    source = weights_file(name, pretrained=pretrained, checkpoint=checkpoint)
    # fork_rng with devices=[] and the CPU generator alone: torch.manual_seed would reseed CUDA too.
    with BUILD_LOCK, torch.random.fork_rng(devices=[]), quiet_root_logger():
        torch.default_generator.manual_seed(seed)
        try:
            clip = open_clip.create_model(
                registered_name(name),
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
    clip, config = cast(Any, network.clip), model_config(name)
    with BUILD_LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        clip.visual = FeatureTower(num_features, width=4 * config["text_cfg"]["width"], embed_dim=config["embed_dim"])
    if checkpoint is not None:
        source = weights_file(name, pretrained=None, checkpoint=checkpoint)
        try:
            clip.load_state_dict(torch.load(cast(Path, source), map_location="cpu", weights_only=True))
        except (RuntimeError, AttributeError, UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{source} does not hold weights of {name} on {num_features} features: {reason}"
            ) from error
    return network


def save_checkpoint(network: ClipNetwork, path: str | Path) -> None:
    """Write the open_clip model's state dict, on the CPU: `checkpoint=path`, or open_clip itself, loads it."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    torch.save({key: value.detach().cpu() for key, value in network.clip.state_dict().items()}, partial)
    partial.rename(path)


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


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
