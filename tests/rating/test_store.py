from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from curation.rating import votes
from curation.rating.database import NAME, open_to_read
from curation.rating.store import OPEN_COUNTS_S, Answer, Conflict, Store
from curation.rating.study import open_study
from tests.rating.conftest import write_image

Make = Callable[..., Store]


def cast(store: Store, rater: int, answer: Answer = "left", *, key: str = "") -> str:
    """One vote on the rater's next pair; returns its key."""
    if not store.open_assignments(rater):
        assert store.assign(rater)
    pair = store.open_assignments(rater)[0]
    key = key or f"key-of-{pair.token}"
    store.vote(rater, pair.token, answer, key=key, seconds=1.5)
    return key


def standing(folder: Path) -> list[votes.Row]:
    return [row for row in votes.read(folder / NAME)[1] if row.undone_at is None]


def test_what_was_shown_and_voted_is_there_after_a_restart(make_store: Make, folder: Path) -> None:
    store = make_store()
    rater = store.rater(store.enter("Ann"))
    cast(store, rater)
    assert store.assign(rater) and store.assign(rater)
    before = store.open_assignments(rater)
    again = make_store(rng=Random(9))  # the first one is not closed: as after kill -9
    assert again.rater(again.enter("  ann ")) == rater
    assert again.open_assignments(rater) == before and len(before) == 2
    assert again.progress(rater).votes == 1 and len(standing(folder)) == 1


def test_a_vote_that_is_sent_twice_counts_once(make_store: Make, folder: Path) -> None:
    store = make_store()
    rater = store.rater(store.enter("Ann"))
    assert store.assign(rater)
    pair = store.open_assignments(rater)[0]
    for _ in range(3):
        store.vote(rater, pair.token, "left", key="same", seconds=None)
    with pytest.raises(Conflict, match="voted on this pair already"):
        store.vote(rater, pair.token, "right", key="another tab", seconds=None)
    assert [(row.answer, row.seconds) for row in standing(folder)] == [("left", None)]


def test_a_key_of_another_vote_and_a_pair_of_another_rater_are_refused(make_store: Make) -> None:
    store = make_store()
    ann, bob = store.rater(store.enter("Ann")), store.rater(store.enter("Bob"))
    key = cast(store, ann)
    assert store.assign(ann) and store.assign(bob)
    [pair] = store.open_assignments(ann)
    with pytest.raises(Conflict, match="this key has been used for another vote"):
        store.vote(ann, pair.token, "left", key=key, seconds=None)
    with pytest.raises(Conflict, match="this pair is not yours"):
        store.vote(bob, pair.token, "left", key="k", seconds=None)


def test_undo_takes_the_last_vote_back_shows_its_pair_again_and_a_late_copy_does_not_revive_it(
    make_store: Make, folder: Path
) -> None:
    store = make_store()
    rater = store.rater(store.enter("Ann"))
    first = cast(store, rater)
    assert store.assign(rater) and store.assign(rater)
    pair, later = store.open_assignments(rater)
    store.vote(rater, pair.token, "left", key="second", seconds=None)
    with pytest.raises(Conflict, match="this is not your last vote"):
        store.undo(rater, first)
    for _ in range(2):  # sent twice
        store.undo(rater, "second")
    assert store.open_assignments(rater) == [pair, later] and store.progress(rater).undo == first
    store.vote(rater, pair.token, "left", key="second", seconds=None)  # a copy that was under way
    assert store.open_assignments(rater) == [pair, later]
    store.vote(rater, pair.token, "right", key="third", seconds=None)
    assert [row.answer for row in standing(folder)] == ["left", "right"]
    assert len(votes.read(folder / NAME)[1]) == 3


def test_an_undo_is_the_raters_own(make_store: Make) -> None:
    store = make_store()
    ann, bob = store.rater(store.enter("Ann")), store.rater(store.enter("Bob"))
    key = cast(store, ann)
    with pytest.raises(Conflict, match="not your last vote"):
        store.undo(bob, key)
    with pytest.raises(KeyError, match="no such rater"):
        store.rater("nobody's")


def test_pairs_are_balanced_a_fifth_of_matchups_has_two_raters_and_sides_are_even(
    make_store: Make, folder: Path
) -> None:
    store = make_store(goal=10_000)
    raters = [store.rater(store.enter(name)) for name in ("Ann", "Bob", "Cyd")]
    for turn in range(360):
        cast(store, raters[turn % 3], "unsure")
    rows = standing(folder)
    by_pair = Counter((row.first, row.second) for row in rows)
    assert len(by_pair) == 3 and max(by_pair.values()) - min(by_pair.values()) <= 3
    raters_of = {
        matchup: {row.rater for row in rows if row.matchup == matchup} for matchup in {r.matchup for r in rows}
    }
    votes_of = Counter(row.matchup for row in rows)
    assert all(len(raters_of[matchup]) == count for matchup, count in votes_of.items())
    shared = sum(count == 2 for count in votes_of.values())
    assert max(votes_of.values()) == 2 and 0.17 <= shared / len(votes_of) <= 0.2
    assert 150 <= sum(row.first_is_left for row in rows) <= 210


def test_a_study_that_has_its_decisive_votes_ends(make_store: Make, folder: Path) -> None:
    store = make_store(goal=4)
    raters = [store.rater(store.enter(name)) for name in ("Ann", "Bob")]
    is_open = True
    while is_open:
        is_open = False
        for rater in raters:
            is_open |= store.assign(rater)
            for pair in store.open_assignments(rater):
                store.vote(rater, pair.token, "right", key=pair.token * 2, seconds=None)
    decisive = Counter((row.first, row.second) for row in standing(folder))
    assert all(count >= 4 for count in decisive.values()) and len(decisive) == 3
    progress = store.progress(raters[0])
    assert progress.gained == progress.wanted == 12


def test_an_assignment_whose_rater_has_left_holds_no_place(make_store: Make) -> None:
    now = [0.0]
    store = make_store(goal=1, overlap_percent=100, clock=lambda: now[0])
    ann, bob, cyd = (store.rater(store.enter(name)) for name in ("Ann", "Bob", "Cyd"))
    assert store.assign(ann)
    [given] = store.open_assignments(ann)
    seen_by = []
    for rater in (bob, cyd):
        now[0] += OPEN_COUNTS_S + 1
        for _ in range(20):
            assert store.assign(rater)
        seen_by.append({frozenset(pair[1:]) for pair in store.open_assignments(rater)})
    # Ann never voted, so both of the others may be asked about the shared matchup in her place.
    assert all(frozenset(given[1:]) in seen for seen in seen_by)


def test_images_that_cannot_be_shown_are_given_up_and_their_pairs_taken_back(make_store: Make) -> None:
    store = make_store()
    rater = store.rater(store.enter("Ann"))
    key = cast(store, rater)
    for _ in range(12):
        assert store.assign(rater)
    broken = store.open_assignments(rater)[0].left
    store.give_up(broken, "image:unreadable")
    for _ in range(12):
        assert store.assign(rater)
    assert all(broken not in (pair.left, pair.right) for pair in store.open_assignments(rater))
    assert store.progress(rater).undo == key
    again = make_store()
    for _ in range(40):
        assert again.assign(rater)
    assert all(broken not in (pair.left, pair.right) for pair in again.open_assignments(rater))


def test_many_raters_at_once_in_two_servers_lose_and_double_nothing(make_store: Make, folder: Path) -> None:
    stores = [make_store(goal=10_000), make_store(goal=10_000)]
    errors: list[BaseException] = []

    def rate(place: int) -> None:
        try:
            store = stores[place % 2]
            rater = store.rater(store.enter(f"rater {place}"))
            for _ in range(12):
                cast(store, rater)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rate, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = standing(folder)
    assert not errors and len(rows) == 72 and set(Counter(row.rater for row in rows).values()) == {12}
    assert len({(row.rater, row.matchup) for row in rows}) == 72
    assert max(Counter(row.matchup for row in rows).values()) <= 2


def test_images_may_be_added_but_not_taken_or_changed(make_store: Make, folder: Path) -> None:
    make_store().close()
    write_image(folder / "yellow" / "0.png", (200, 200, 30))
    assert len(make_store().items) == 19
    kept = (folder / "red" / "3.png").read_bytes()
    (folder / "red" / "3.png").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"1 images that .* knows are gone or changed, 'red/3.png' for one"):
        make_store()
    (folder / "red" / "3.png").write_bytes(kept)
    with pytest.raises(ValueError, match="these votes answer 'Which\\?'; for another question give another --votes"):
        make_store(question="What?")
    assert make_store(question=None).question == "Which?"


@pytest.mark.parametrize("name", ["", "  ", "x" * 61, "a\x00b", "a\u202eb"])
def test_what_is_no_name_is_refused(make_store: Make, name: str) -> None:
    with pytest.raises(ValueError, match="a name must be 1 to 60 characters"):
        make_store().enter(name)


def test_a_file_that_is_not_ours_or_is_of_the_future_is_refused(make_store: Make, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no votes at .*: nobody has been shown this study"):
        open_to_read(folder / NAME)
    other = tmp_path / "other.sqlite"
    other.write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match="is no file of votes"):
        open_to_read(other)
    with pytest.raises(ValueError, match="is no file of votes that can be written"):
        Store(other, open_study(str(folder)), goal=1, question="?")
    make_store().close()
    with sqlite3.connect(folder / NAME) as db:
        db.execute("UPDATE meta SET value = '999' WHERE name = 'format_version'")
    for reopen in (make_store, lambda: open_to_read(folder / NAME)):
        with pytest.raises(ValueError, match="has format_version 999; this version reads up to"):
            reopen()


def test_a_commit_waits_for_the_disk(make_store: Make) -> None:
    with make_store()._db.transaction() as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
