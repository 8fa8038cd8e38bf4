from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from curation.rating.schedule import Tally, draw_images, is_shared, next_pair


def test_the_pair_with_the_fewest_votes_is_next_and_lots_decide_between_equals() -> None:
    tallies = {(1, 2): Tally(votes=4), (1, 3): Tally(votes=3), (2, 3): Tally(votes=3)}
    drawn = Counter(next_pair(tallies, goal=9, rng=Random(seed)) for seed in range(200))
    assert set(drawn) == {(1, 3), (2, 3)} and min(drawn.values()) > 70


def test_a_pair_that_has_its_decisive_votes_is_not_asked_about() -> None:
    tallies = {(1, 2): Tally(votes=2, decisive=2), (1, 3): Tally(votes=9, decisive=1)}
    assert next_pair(tallies, goal=2, rng=Random(0)) == (1, 3)
    assert next_pair({(1, 2): Tally(votes=2, decisive=2)}, goal=2, rng=Random(0)) is None


@pytest.mark.parametrize(("percent", "shared"), [(20, 20), (0, 0), (100, 100), (33, 33)])
def test_a_share_of_matchups_is_shared_evenly_spread(percent: int, shared: int) -> None:
    marks = [is_shared(before, percent=percent) for before in range(100)]
    assert sum(marks) == shared
    assert percent != 20 or all(sum(marks[at : at + 5]) == 1 for at in range(0, 100, 5))


def test_images_are_drawn_uniformly_and_the_same_two_not_twice_while_others_are_left() -> None:
    rng, seen = Random(0), set()
    for _ in range(9):
        drawn = draw_images([1, 2, 3], [4, 5, 6], was_seen=lambda *two: two in seen, rng=rng)
        seen.add(drawn)
    assert len(seen) == 9
    assert draw_images([1], [2], was_seen=lambda *two: True, rng=rng) == (1, 2)
    counts = Counter(draw_images([1, 2], [3], was_seen=lambda *two: False, rng=rng) for _ in range(1000))
    assert 400 < counts[1, 3] < 600


def test_a_model_without_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="a model has no image that can be shown"):
        draw_images([], [1], was_seen=lambda *two: False, rng=Random(0))
