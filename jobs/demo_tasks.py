"""Small tasks on the demo's held-out scenes: which caption is the image's, when all differ in one thing only.

For each scene as many captions are written as its colour (or shape, count, background, order of the two groups) could
have been; a model chooses the caption whose embedding is nearest to the image's. All else is told word for word the
same, but where the order is asked: which synonym a group gets there goes with its place. So a specialist is told from a
generalist: a learner may know colours and not read counts.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from curation.models.clip import Towers
from jobs.demo_scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, describe, draw_scene, encode, render, stream_rng

NUM_SCENES = 300
COUNTS = (1, 2, 3, 4)


class Question(NamedTuple):
    """An image, and captions of which the first is its own."""

    image: bytes
    captions: list[str]


class Score(NamedTuple):
    """Share of the images in [0, 1] whose own caption is chosen; what choosing at random would give."""

    accuracy: float
    chance: float


def _first_group(scene: Scene, **changes: object) -> Scene:
    group = dataclasses.replace(scene.groups[0], **changes)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(scene, groups=(group, *scene.groups[1:]))


TASKS: dict[str, Callable[[Scene], list[Scene]]] = {
    "colour": lambda scene: [_first_group(scene, colour=colour) for colour in COLOURS],
    "shape": lambda scene: [_first_group(scene, shape=shape) for shape in SHAPES],
    "count": lambda scene: [_first_group(scene, count=count) for count in COUNTS],
    "background": lambda scene: [dataclasses.replace(scene, background=name) for name in BACKGROUNDS],
    "order": lambda scene: [dataclasses.replace(scene, groups=scene.groups[::-1])],
}
"""What else a scene could have been, the scene itself among it or not."""


def questions(task: str, *, num_scenes: int = NUM_SCENES, seed: int = 0) -> Iterator[Question]:
    """One for each of the first `num_scenes` held-out scenes whose caption tells what the task asks for."""
    for index in range(num_scenes):
        rng = stream_rng("held_out", seed, index)
        scene = draw_scene(rng)
        describe(scene, rng)  # the held-out pair's own caption: the image is drawn after it
        image = encode(render(scene, rng), rng)
        own, *others = (_worded(each, index) for each in (scene, *TASKS[task](scene)))
        if captions := [caption for caption in dict.fromkeys(others) if caption != own]:
            yield Question(image, [own, *captions])


def _worded(scene: Scene, index: int) -> str:
    """The scene in words that hang on the index: scenes that differ in one thing are told alike but for it."""
    return describe(scene, np.random.default_rng(index))


def score(towers: Towers, task: str, *, num_scenes: int = NUM_SCENES) -> Score:
    """How a model does on a task. A tie is no choice, and counts against it."""
    asked = list(questions(task, num_scenes=num_scenes))
    pixels = np.stack([towers.resize(Image.open(io.BytesIO(question.image))) for question in asked])
    images_ND = towers.embed_images(torch.from_numpy(pixels))
    right = 0
    for image_D, question in zip(images_ND, asked, strict=True):
        own, *others = (towers.embed_texts(towers.tokenize(question.captions)) @ image_D).tolist()
        right += own > max(others)
    chance = float(np.mean([1 / len(question.captions) for question in asked]))
    return Score(right / len(asked), chance)
