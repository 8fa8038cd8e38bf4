"""A study of small images, whose colour says which model they are of; and a store of its votes that forgets nothing."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.rating.store import Store
from curation.rating.study import open_study

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 200)}


def write_image(path: Path, colour: tuple[int, int, int], *, side: int = 24) -> None:
    """A plain image that differs a little from others of its colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 20, (side, side, 3))
    Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(path)


def colour_of(png: bytes) -> str:
    """The model that a served image is of."""
    mean = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3).mean(0)
    return min(COLOURS, key=lambda name: float(np.abs(mean - np.array(COLOURS[name]) - 10).sum()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """STUDY: three models of six images each."""
    root = tmp_path / "study"
    for model, colour in COLOURS.items():
        for place in range(6):
            write_image(root / model / f"{place}.png", colour)
    return root


@pytest.fixture
def make_store(folder: Path) -> Callable[..., Store]:
    """Opens the study's votes; a second call is what a restart of the server does."""

    def make(**options: Any) -> Store:
        settled = {"goal": 50, "question": "Which?", "rng": Random(0), **options}
        return Store(folder / "votes.sqlite", open_study(str(folder)), **settled)

    return make
