"""What a pairwise study shows: models, each with images. It comes from one of two kinds of folder.

A folder of image folders: STUDY/MODEL/any/where/image.png; a text file of the same name, image.txt, is its caption.
The output of `jobs.evaluate diffusion`: each arm is a model, its images are the samples of all its finished seeds.

Nothing outside the study is ever read: a link that leads out of it is refused where it stands for a model, and left
out and counted where it is one of many images.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from curation.data import images
from curation.data.images import ImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff")
MAX_PIXELS = 90_000_000
MAX_FILE_BYTES = 200 << 20
MAX_CAPTION = 1000
"""Characters of a caption that are shown."""
LINK_OUT = "a link that leads out of the study"
NO_SAMPLES = "a model that is not finished"


class Item(NamedTuple):
    """One image of a study: its model, its name there, and a mark that changes when the image does."""

    model: str
    name: str
    mark: str


class Study(Protocol):
    """What is shown."""

    @property
    def models(self) -> Mapping[str, list[Item]]:
        """Each model's images, by its name."""
        ...

    @property
    def left_out(self) -> Mapping[str, int]:
        """Why images or models were left out, and how many."""
        ...

    def open(self, item: Item) -> Image.Image:
        """The image, loaded. ImageError if it cannot be."""
        ...

    def caption(self, item: Item) -> str:
        """Text to show below it; "" if there is none."""
        ...


def open_study(url: str) -> Study:
    """The study in a local folder. ValueError, saying what to do, if there is none with two models."""
    if "://" in url:
        raise ValueError(f"STUDY must be a folder on this machine, got {url}: copy it here first")
    root = Path(url)
    if not root.is_dir():
        raise ValueError(f"STUDY: there is no folder {url}")
    is_diffusion = (root / "study.json").is_file() and (root / "units").is_dir()
    study: Study = DiffusionSamples.of(root) if is_diffusion else ImageFolders.of(root)
    if len(study.models) < 2:
        found = f"one model only, {next(iter(study.models))!r}" if study.models else "no model"
        wanted = "finished models of two arms" if is_diffusion else "a folder of images for each of two models"
        why = "".join(f"; left out: {count} x {reason}" for reason, count in study.left_out.items())
        raise ValueError(f"STUDY: {url} holds {found}; a study needs {wanted} or more{why}")
    return study


@dataclass(frozen=True)
class ImageFolders:
    """STUDY/MODEL/**/image.png; hidden names are passed over, and folders without an image are no models."""

    root: Path
    models: Mapping[str, list[Item]]
    left_out: Mapping[str, int]

    @classmethod
    def of(cls, folder: Path) -> ImageFolders:
        """The study in a folder. ValueError if a model's folder is a link that leads out of it."""
        root, models, left_out = folder.resolve(), {}, defaultdict[str, int](int)
        for model in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
            if not model.resolve().is_relative_to(root):
                raise ValueError(f"STUDY: {model.name!r} is {LINK_OUT}, which is never served: copy the images into it")
            items = []
            # Links to folders are not followed, so there is no way out and no circle.
            for here, folders, files in os.walk(model):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in sorted(files):
                    path = Path(here, name)
                    if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                        continue
                    if not path.resolve().is_relative_to(root) or not path.is_file():
                        left_out[LINK_OUT] += 1
                        continue
                    items.append(Item(model.name, path.relative_to(model).as_posix(), str(path.stat().st_size)))
            if items:
                models[model.name] = items
        return cls(root, models, dict(left_out))

    def open(self, item: Item) -> Image.Image:
        """The image, loaded. ImageError if it cannot be, is too large, or has come to lead out of the study."""
        return images.open_image(self._read(item.model, item.name, MAX_FILE_BYTES), max_pixels=MAX_PIXELS)

    def caption(self, item: Item) -> str:
        """The first thousand characters of the text file beside it."""
        try:
            name = Path(item.name).with_suffix(".txt").as_posix()
            return self._read(item.model, name, 64 << 10).decode(errors="replace").strip()[:MAX_CAPTION]
        except ImageError:
            return ""

    def _read(self, model: str, name: str, max_bytes: int) -> bytes:
        """A file of the study, resolved anew: it may have become a link since it was listed."""
        path = (self.root / model / name).resolve()
        if not path.is_relative_to(self.root) or not path.is_file() or path.stat().st_size > max_bytes:
            raise ImageError("image:unreadable")
        try:
            return path.read_bytes()
        except OSError as error:
            raise ImageError("image:unreadable") from error


@dataclass(frozen=True)
class DiffusionSamples:
    """units/ARM-SEED/samples.npy (n, S, S, 3) uint8 of the units that have a done.json; an image is SEED/PLACE."""

    root: Path
    models: Mapping[str, list[Item]]
    left_out: Mapping[str, int]
    folders: Mapping[tuple[str, str], Path]
    """(arm, seed) -> the unit's folder."""
    arrays: dict[Path, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> DiffusionSamples:
        """The study that `jobs.evaluate diffusion` left. ValueError if samples are not what it writes."""
        root, models, left_out, folders = folder.resolve(), defaultdict[str, list[Item]](list), {}, {}
        for unit in sorted(path for path in (root / "units").iterdir() if path.is_dir()):
            if not all((unit / name).resolve().is_relative_to(root) for name in ("done.json", "samples.npy")):
                raise ValueError(f"STUDY: {unit.name!r} is {LINK_OUT}, which is never served: copy it into it")
            if not (unit / "done.json").is_file():
                left_out[NO_SAMPLES] = left_out.get(NO_SAMPLES, 0) + 1
                continue
            done = (unit / "done.json").read_bytes()
            arm, seed = (str(json.loads(done)[name]) for name in ("arm", "seed"))
            shape = _mapped(unit / "samples.npy").shape
            mark = sha256(done).hexdigest()[:16]  # its losses are another's in no other training
            models[arm] += [Item(arm, f"{seed}/{place}", mark) for place in range(shape[0])]
            folders[arm, seed] = unit
        return cls(root, {arm: items for arm, items in models.items() if items}, left_out, folders)

    def open(self, item: Item) -> Image.Image:
        """The sample as an image."""
        seed, _, place = item.name.partition("/")
        path = self.folders[item.model, seed] / "samples.npy"
        if path not in self.arrays:
            self.arrays[path] = _mapped(path)
        return Image.fromarray(np.asarray(self.arrays[path][int(place)]))

    def caption(self, item: Item) -> str:
        """Samples have none."""
        return ""


def _mapped(path: Path) -> np.ndarray:
    samples = np.load(path, allow_pickle=False, mmap_mode="r")
    if samples.ndim != 4 or samples.shape[-1] != 3 or samples.dtype != np.uint8:
        raise ValueError(f"{path} must be (n, S, S, 3) uint8, is {samples.shape} {samples.dtype}")
    return samples
