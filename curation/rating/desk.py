"""What a rater has before them: the next pairs, each of which is known to be showable, and their images as served."""

from __future__ import annotations

import functools
from typing import Any

from curation.data.images import ImageError
from curation.rating.render import rendered
from curation.rating.store import Assignment, Store
from curation.rating.study import Study

AHEAD = 3
"""Pairs that a rater's page holds: one is looked at, the others are loaded meanwhile."""
KEPT_IMAGES = 96
"""Rendered images in memory, at some 1 MB each if they are of 1,024 pixels."""


class Desk:
    """A study and its votes. Safe to call from threads."""

    def __init__(self, study: Study, store: Store) -> None:
        self.study, self.store = study, store
        self.image = functools.lru_cache(KEPT_IMAGES)(self._image)

    def top_up(self, rater: int) -> list[Assignment]:
        """The rater's next pairs, new ones added. An image that cannot be shown is given up, and another pair given.

        A new pair is on disk, and its images are rendered, before it is returned.
        """
        while True:
            pairs = self.store.open_assignments(rater)
            if self._give_up_broken(pairs):
                continue
            if len(pairs) >= AHEAD or not self.store.assign(rater):
                return pairs

    def state(self, rater: int, pairs: list[Assignment]) -> dict[str, Any]:
        """What the page is told: nothing that goes with a model but the images and their captions."""
        progress = self.store.progress(rater)
        return {
            **progress._asdict(),
            "queue": [
                {
                    "id": pair.token,
                    "left": f"/image/{pair.token}/left",
                    "right": f"/image/{pair.token}/right",
                    "left_caption": self.study.caption(self.store.items[pair.left]),
                    "right_caption": self.study.caption(self.store.items[pair.right]),
                }
                for pair in pairs[:AHEAD]
            ],
        }

    def _image(self, number: int) -> bytes:
        return rendered(self.study.open(self.store.items[number]))

    def _give_up_broken(self, pairs: list[Assignment]) -> bool:
        """True if an image of these pairs cannot be shown."""
        for number in dict.fromkeys(number for pair in pairs for number in (pair.left, pair.right)):
            try:
                self.image(number)
            except ImageError as error:
                self.store.give_up(number, error.reason)
                return True
        return False
