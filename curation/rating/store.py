"""Who is shown what, and the votes: each step one transaction, so that a server may be killed between any two.

An assignment (a matchup, a rater, a side) is on disk before its images are shown, a vote before its answer goes out. A
vote carries a key that the rater's page made: sent again after a broken connection it is found, not counted again. An
undone vote keeps its row and its key, and its assignment is open again.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
import unicodedata
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple, get_args

from curation.rating.database import Database
from curation.rating.schedule import OVERLAP_PERCENT, RATERS_OF_SHARED, Tally, draw_images, is_shared, next_pair
from curation.rating.study import Item, Study

Answer = Literal["left", "right", "unsure"]
ANSWERS: tuple[Answer, ...] = get_args(Answer)
OPEN_COUNTS_S = 3600.0
"""An assignment without a vote counts for the balance so long; then its rater is taken to have left."""
MAX_NAME = 60
QUESTION = "Which image looks better?"


class Conflict(Exception):
    """The vote or undo is about something that has moved on, in another tab for one: ask for the queue anew."""


class Assignment(NamedTuple):
    """Two images as one rater is to see them. The token is all that the page knows of it."""

    token: str
    left: int
    right: int


class Progress(NamedTuple):
    """What a rater has done, and how far the study is: decisive votes that count towards the goal, and the goal."""

    votes: int
    undo: str | None
    """Key of the rater's last standing vote."""
    gained: int
    wanted: int


class Store:
    """The votes of one study. Safe to call from threads, and beside another process on the same file."""

    def __init__(
        self,
        path: Path,
        study: Study,
        *,
        goal: int,
        question: str | None = None,
        overlap_percent: int = OVERLAP_PERCENT,
        rng: Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or make the file, and write down what the study shows. Without a question it is the one asked so far.

        ValueError if people were shown other images or asked another question.
        """
        self._rng, self._clock = rng or secrets.SystemRandom(), clock
        self._goal, self._overlap = goal, overlap_percent
        self._db = Database(path)
        self.items: dict[int, Item] = {}
        self._images: dict[int, list[int]] = {}
        with self._db.transaction() as db:
            self.question = _same_question(db, question)
            _adopt(db, study, path)
            names = dict(db.execute("SELECT model, name FROM models"))
            for image, model, name, mark, broken in db.execute("SELECT * FROM images ORDER BY image"):
                self.items[image] = Item(names[model], name, mark)
                if broken is None:
                    self._images.setdefault(model, []).append(image)

    def enter(self, name: str) -> str:
        """The secret of the rater of this name, a new one if there is none. ValueError if it is no name."""
        shown = " ".join(unicodedata.normalize("NFC", name).split())
        if not shown or len(shown) > MAX_NAME or not shown.isprintable():
            raise ValueError(f"a name must be 1 to {MAX_NAME} characters that can be printed")
        with self._db.transaction() as db:
            row = (shown, shown.casefold(), secrets.token_urlsafe(16))
            db.execute("INSERT OR IGNORE INTO raters (name, folded, secret) VALUES (?, ?, ?)", row)
            return db.execute("SELECT secret FROM raters WHERE folded = ?", (shown.casefold(),)).fetchone()[0]

    def rater(self, secret: str) -> int:
        """The rater's number. KeyError if nobody has this secret."""
        with self._db.transaction() as db:
            found = db.execute("SELECT rater FROM raters WHERE secret = ?", (secret,)).fetchone()
        if found is None:
            raise KeyError("no such rater")
        return found[0]

    def open_assignments(self, rater: int) -> list[Assignment]:
        """What this rater was given and has not answered, the oldest first."""
        with self._db.transaction() as db:
            rows = db.execute(
                "SELECT a.token, a.first_is_left, m.first_image, m.second_image FROM assignments a JOIN matchups m "
                "USING (matchup) WHERE a.rater = ? AND a.void = 0 AND NOT EXISTS (SELECT 1 FROM votes v "
                "WHERE v.assignment = a.assignment AND v.undone_at IS NULL) ORDER BY a.assignment",
                (rater,),
            ).fetchall()
        return [Assignment(token, *((one, two) if is_left else (two, one))) for token, is_left, one, two in rows]

    def assign(self, rater: int) -> bool:
        """Give the rater one more matchup; False if the study needs no more of this rater."""
        with self._db.transaction() as db:
            since = self._clock() - OPEN_COUNTS_S
            waiting = _waiting(db, rater, since)
            pair, tallies = None, self._tallies(db, since)
            # Half and half, so that a second rater is not shown the shared ones all in one row.
            if waiting is None or self._rng.random() < 0.5:
                pair = next_pair(tallies, goal=self._goal, rng=self._rng)
            if pair is not None:
                matchup = self._new_matchup(db, rater, pair, tallies[pair])
            elif waiting is not None:
                matchup = waiting
            else:
                return False
            db.execute(
                "INSERT INTO assignments (token, matchup, rater, first_is_left, made_at) VALUES (?, ?, ?, ?, ?)",
                (secrets.token_urlsafe(12), matchup, rater, self._rng.getrandbits(1), self._clock()),
            )
        return True

    def image_of(self, token: str, side: str) -> int:
        """The image on this side of an assignment. KeyError if there is none."""
        with self._db.transaction() as db:
            found = db.execute(
                "SELECT CASE WHEN (a.first_is_left = 1) = (? = 'left') THEN m.first_image ELSE m.second_image END "
                "FROM assignments a JOIN matchups m USING (matchup) WHERE a.token = ?",
                (side, token),
            ).fetchone()
        if found is None or side not in ("left", "right"):
            raise KeyError("no such image")
        return found[0]

    def give_up(self, image: int, reason: str) -> None:
        """An image that cannot be shown: it is not drawn again, and what is open with it is taken back."""
        with self._db.transaction() as db:
            db.execute("UPDATE images SET broken = ? WHERE image = ?", (reason, image))
            db.execute(
                "UPDATE assignments SET void = 1 WHERE matchup IN (SELECT matchup FROM matchups "
                "WHERE ? IN (first_image, second_image)) AND NOT EXISTS (SELECT 1 FROM votes v "
                "WHERE v.assignment = assignments.assignment AND v.undone_at IS NULL)",
                (image,),
            )
            for images in self._images.values():
                if image in images:
                    images.remove(image)

    def vote(self, rater: int, token: str, answer: Answer, *, key: str, seconds: float | None) -> None:
        """Write a vote down, or find it written. Conflict if the assignment is another's, void, or has a vote."""
        with self._db.transaction() as db:
            known = db.execute(
                "SELECT a.token, a.rater FROM votes v JOIN assignments a USING (assignment) WHERE v.key = ?", (key,)
            ).fetchone()
            if known is not None:
                if known != (token, rater):
                    raise Conflict("this key has been used for another vote")
                return
            given = db.execute(
                "SELECT assignment FROM assignments WHERE token = ? AND rater = ? AND void = 0", (token, rater)
            ).fetchone()
            if given is None:
                raise Conflict("this pair is not yours to vote on")
            try:
                db.execute(
                    "INSERT INTO votes (assignment, key, answer, seconds, voted_at) VALUES (?, ?, ?, ?, ?)",
                    (given[0], key, answer, seconds, self._clock()),
                )
            except sqlite3.IntegrityError as error:
                raise Conflict("you have voted on this pair already") from error

    def undo(self, rater: int, key: str) -> None:
        """Take this rater's last vote back, which has this key; nothing if it is undone. Conflict if it is not last."""
        with self._db.transaction() as db:
            is_undone = db.execute(
                "SELECT 1 FROM votes v JOIN assignments a USING (assignment) "
                "WHERE v.key = ? AND a.rater = ? AND v.undone_at IS NOT NULL",
                (key, rater),
            ).fetchone()
            if is_undone:
                return
            if _last_vote(db, rater) != key:
                raise Conflict("this is not your last vote")
            db.execute("UPDATE votes SET undone_at = ? WHERE key = ?", (self._clock(), key))

    def progress(self, rater: int) -> Progress:
        """How far this rater and the study are."""
        with self._db.transaction() as db:
            votes = db.execute(
                "SELECT count(*) FROM votes v JOIN assignments a USING (assignment) "
                "WHERE a.rater = ? AND v.undone_at IS NULL",
                (rater,),
            ).fetchone()[0]
            tallies = self._tallies(db, self._clock())
            gained = sum(min(tally.decisive, self._goal) for tally in tallies.values())
            return Progress(votes, _last_vote(db, rater), gained, self._goal * len(tallies))

    def close(self) -> None:
        """Nothing is lost without it."""
        self._db.close()

    def _tallies(self, db: sqlite3.Connection, since: float) -> dict[tuple[int, int], Tally]:
        """What each pair of models has that can still be shown."""
        rows = db.execute(
            "SELECT m.first_model, m.second_model, count(DISTINCT m.matchup), count(CASE WHEN v.vote IS NOT NULL "
            "OR (a.made_at > ? AND a.void = 0) THEN 1 END), count(CASE WHEN v.answer != 'unsure' THEN 1 END) "
            "FROM matchups m JOIN assignments a USING (matchup) "
            "LEFT JOIN votes v ON v.assignment = a.assignment AND v.undone_at IS NULL GROUP BY 1, 2",
            (since,),
        )
        found = {(first, second): Tally(*counts) for first, second, *counts in rows}
        models = sorted(model for model, images in self._images.items() if images)
        return {pair: found.get(pair, Tally()) for pair in combinations(models, 2)}

    def _new_matchup(self, db: sqlite3.Connection, rater: int, pair: tuple[int, int], tally: Tally) -> int:
        seen = set(
            db.execute(
                "SELECT m.first_image, m.second_image FROM assignments a JOIN matchups m USING (matchup) "
                "WHERE a.rater = ? AND m.first_model = ? AND m.second_model = ?",
                (rater, *pair),
            )
        )
        first, second = pair
        images = draw_images(
            self._images[first], self._images[second], was_seen=lambda *two: two in seen, rng=self._rng
        )
        shared = is_shared(tally.matchups, percent=self._overlap)
        made = db.execute(
            "INSERT INTO matchups (first_model, second_model, first_image, second_image, shared) "
            "VALUES (?, ?, ?, ?, ?)",
            (*pair, *images, shared),
        )
        return made.lastrowid or 0


def _waiting(db: sqlite3.Connection, rater: int, since: float) -> int | None:
    """A shared matchup that wants another rater and that this one has not had."""
    found = db.execute(
        "SELECT m.matchup FROM matchups m JOIN images i ON i.image = m.first_image "
        "JOIN images j ON j.image = m.second_image WHERE m.shared = 1 AND i.broken IS NULL AND j.broken IS NULL "
        "AND NOT EXISTS (SELECT 1 FROM assignments a WHERE a.matchup = m.matchup AND a.rater = ?) "
        "AND (SELECT count(*) FROM assignments a LEFT JOIN votes v ON v.assignment = a.assignment "
        "AND v.undone_at IS NULL WHERE a.matchup = m.matchup AND (v.vote IS NOT NULL OR a.made_at > ?)) < ? "
        "ORDER BY m.matchup LIMIT 1",
        (rater, since, RATERS_OF_SHARED),
    ).fetchone()
    return found and found[0]


def _last_vote(db: sqlite3.Connection, rater: int) -> str | None:
    found = db.execute(
        "SELECT v.key FROM votes v JOIN assignments a USING (assignment) "
        "WHERE a.rater = ? AND v.undone_at IS NULL ORDER BY v.vote DESC LIMIT 1",
        (rater,),
    ).fetchone()
    return found and found[0]


def _same_question(db: sqlite3.Connection, question: str | None) -> str:
    """The question of the study. ValueError if people have been asked another one."""
    db.execute("INSERT OR IGNORE INTO meta VALUES ('question', ?)", (question or QUESTION,))
    asked = db.execute("SELECT value FROM meta WHERE name = 'question'").fetchone()[0]
    if question and question != asked:
        raise ValueError(f"question: these votes answer {asked!r}; for another question give another --votes FILE")
    return asked


def _adopt(db: sqlite3.Connection, study: Study, path: Path) -> None:
    """Write down images that are new. ValueError if one that was there is gone or another."""
    here = {(item.model, item.name): item.mark for items in study.models.values() for item in items}
    known = {
        (model, name): mark
        for model, name, mark in db.execute("SELECT m.name, i.name, i.mark FROM images i JOIN models m USING (model)")
    }
    if changed := [key for key, mark in known.items() if here.get(key) != mark]:
        raise ValueError(
            f"{len(changed)} images that {path} knows are gone or changed, {'/'.join(changed[0])!r} for one: "
            "put them back, or begin anew with another --votes FILE"
        )
    db.executemany("INSERT OR IGNORE INTO models (name) VALUES (?)", [(name,) for name in study.models])
    db.executemany(
        "INSERT INTO images (model, name, mark) SELECT model, ?, ? FROM models WHERE name = ?",
        [(name, mark, model) for (model, name), mark in here.items() if (model, name) not in known],
    )
