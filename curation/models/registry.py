"""open_clip's models and ours, by name: the architecture, the weights' file, the transform, and a digest of all three.

A model is named by its open_clip name, or `nano`, a model of ours that two CPU cores train in about a minute. Its
weights come from one of three places: a pretrained tag, a local checkpoint, or a seed. No model is built here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import open_clip
import timm
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

CONFIGS = Path(__file__).parent / "configs"
BUILD_LOCK = threading.RLock()
"""open_clip's registry of configs and torch's default generator are shared by every thread of the process."""


def weights_digest(name: str, *, pretrained: str | None = None, checkpoint: str | None = None, seed: int = 0) -> str:
    """64 hex digits of the weights' file (or seed and versions), the architecture and the transform.

    It changes whenever an embedding could. Builds no model; costs one pass over the weights' file, which is
    downloaded if a tag names it and it is not there yet.
    """
    source = weights_file(name, pretrained=pretrained, checkpoint=checkpoint)
    if source is None:
        weights = {"seed": seed, "torch": torch.__version__, "open_clip": open_clip.__version__}
    else:
        with open(source, "rb") as file:
            weights = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    preprocess = vars(preprocess_of(name, pretrained=pretrained))
    identity = {"name": name, "config": model_config(name), "preprocess": preprocess, "weights": weights}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def check_resolution(name: str, *, image_size: int | None, patch_size: int | None) -> None:
    """ValueError if a model cannot see square images of this size in patches of this size; None is its own size."""
    vision = model_config(name)["vision_cfg"]
    own = vision.get("patch_size") if isinstance(vision.get("layers"), int) else _timms_patch_size(vision)
    if own is None:
        raise ValueError(f"low_resolution is for open_clip's and timm's vision transformers, which {name!r} has not")
    side, patch = image_size or height_width(vision.get("image_size", 224))[0], patch_size or own
    if side % patch:
        raise ValueError(f"low_resolution: patches of {patch} pixels do not tile images of {side} pixels ({name})")


def _timms_patch_size(vision: dict[str, Any]) -> int | None:
    """Of a tower that is timm's VisionTransformer, from its name; None of any other."""
    name = str(vision.get("timm_model_name", "")).partition(".")[0]
    size = re.search(r"_patch(\d+)(_|$)", name)
    is_plain = timm.is_model(name) and timm.model_entrypoint(name).__module__ == "timm.models.vision_transformer"
    return int(size[1]) if size and is_plain else None


def model_config(name: str) -> dict[str, Any]:
    """The architecture of `name`. ValueError, with the nearest known name, for an unknown one."""
    with BUILD_LOCK:
        known = open_clip.list_models()
        if not {path.stem for path in CONFIGS.glob("*.json")} <= set(known):
            open_clip.add_model_config(CONFIGS)
            known = open_clip.list_models()
        if registered_name(name) not in known:
            raise ValueError(f"model {name!r} is neither open_clip's nor ours{_nearest(name, known)}")
        return cast(dict[str, Any], open_clip.get_model_config(registered_name(name)))


def weights_file(name: str, *, pretrained: str | None, checkpoint: str | None) -> Path | None:
    """The file that holds the weights, downloaded if a tag asks for it; None for random weights."""
    model_config(name)
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
    config = open_clip.get_pretrained_cfg(registered_name(name), pretrained)
    if not config:
        tags = open_clip.list_pretrained_tags_by_model(registered_name(name))
        raise ValueError(f"model {name!r} has no pretrained tag {pretrained!r}{_nearest(pretrained, tags)}")
    return config


def preprocess_of(name: str, *, pretrained: str | None, image_size: int | None = None) -> PreprocessCfg:
    """The inference transform's description: the tag's, at the architecture's image size or another."""
    tag = {} if pretrained is None else _tag_config(name, pretrained)
    size = height_width(image_size or model_config(name)["vision_cfg"].get("image_size", 224))
    return PreprocessCfg(**merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), tag), {"size": size}))


def registered_name(name: str) -> str:
    return name.replace("/", "-")


def _nearest(word: str, known: list[str]) -> str:
    """How to end an error: the known word nearest to `word`, or all of them when none is near and they are few."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {sorted(known)}" if len(known) <= 12 else ""


def height_width(size: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Keep open_clip from installing a root handler: it calls logging.info(), which does that when there is none."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
