"""Tasks that tell specialists from generalists: captions that differ in one thing, and the choice among them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from curation.models.clip import Towers
from jobs import demo_tasks
from jobs.demo_scenes import COLOURS, SHAPES, make_pairs


class Chooser:
    """In place of a model: gives each of a question's captions a cosine by its place."""

    def __init__(self, cosine_of_place: list[float]):
        self._cosines = cosine_of_place

    def resize(self, image: object) -> np.ndarray:
        return np.zeros(1, np.uint8)

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(pixels), 1)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        return torch.arange(len(captions))

    def embed_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self._cosines)[tokens.clamp(max=len(self._cosines) - 1)][:, None]


@pytest.mark.parametrize(("cosines", "accuracy"), [([1.0, 0.5], 1.0), ([0.5, 1.0], 0.0), ([1.0, 1.0], 0.0)])
def test_a_question_is_answered_by_the_nearest_caption_and_a_tie_is_no_answer(
    cosines: list[float], accuracy: float
) -> None:
    found = demo_tasks.score(cast(Towers, cast(Any, Chooser(cosines))), "colour", num_scenes=4)
    assert found == (accuracy, pytest.approx(1 / len(COLOURS)))


@pytest.mark.parametrize("task", ["colour", "shape", "count", "background"])
def test_captions_of_a_question_differ_in_what_is_asked_and_nothing_else(task: str) -> None:
    asked = list(demo_tasks.questions(task, num_scenes=20))
    others = {"colour": COLOURS, "shape": SHAPES, "count": demo_tasks.COUNTS, "background": demo_tasks.BACKGROUNDS}
    assert asked and max(len(question.captions) for question in asked) <= len(others[task])
    for question in asked:
        assert len(set(question.captions)) == len(question.captions)
        own, *rest = (caption.lower().split() for caption in question.captions)
        # A count changes its noun too, and "a" before a vowel is "an"; a background may be of two words.
        assert all(len(set(own) ^ set(other)) <= 6 for other in rest), question.captions


def test_the_images_are_those_of_the_held_out_pairs() -> None:
    pairs = [pair.image for pair in make_pairs(5, stream="held_out")]
    assert [question.image for question in demo_tasks.questions("colour", num_scenes=5)] == pairs
