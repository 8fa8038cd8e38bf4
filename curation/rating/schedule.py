"""Which two models are compared next, and which matchups a second rater sees too.

Pairs are balanced: the next matchup goes to the pair with the fewest votes, ties by lot, among those that have not got
the decisive votes that the study asks for. A fixed share of each pair's matchups is shared: a second rater is shown the
same two images, so that agreement can be measured. The images of a matchup are drawn uniformly, one of each model, and
so is the side on which each stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple, TypeVar

OVERLAP_PERCENT = 20
"""Of all matchups, those that two raters see."""
RATERS_OF_SHARED = 2
TRIES = 30
"""How often images are drawn again when this rater has had the two already."""

AnyImage = TypeVar("AnyImage")
PairKey = tuple[int, int]


class Tally(NamedTuple):
    """What a pair has: matchups made, votes cast or being thought about, votes that chose a side."""

    matchups: int = 0
    votes: int = 0
    decisive: int = 0


def next_pair(tallies: Mapping[PairKey, Tally], *, goal: int, rng: Random) -> PairKey | None:
    """The pair that is next; None if every one has `goal` decisive votes."""
    open_pairs = [pair for pair, tally in tallies.items() if tally.decisive < goal]
    if not open_pairs:
        return None
    fewest = min(tallies[pair].votes for pair in open_pairs)
    return rng.choice([pair for pair in open_pairs if tallies[pair].votes == fewest])


def is_shared(matchups_before: int, *, percent: int) -> bool:
    """True if a pair's next matchup, after so many, is to be seen by two: `percent` of them, evenly spread."""
    return (matchups_before + 1) * percent // 100 > matchups_before * percent // 100


def draw_images(
    first: Sequence[AnyImage],
    second: Sequence[AnyImage],
    *,
    was_seen: Callable[[AnyImage, AnyImage], bool],
    rng: Random,
) -> tuple[AnyImage, AnyImage]:
    """One of each; two that were not seen together if so many tries find any. ValueError if a model has none."""
    if not first or not second:
        raise ValueError("a model has no image that can be shown")
    drawn = rng.choice(first), rng.choice(second)
    for _ in range(TRIES):
        if not was_seen(*drawn):
            break
        drawn = rng.choice(first), rng.choice(second)
    return drawn
