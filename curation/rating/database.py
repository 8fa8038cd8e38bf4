"""The file of votes: SQLite with a write-ahead log, whose commits are on disk before they return.

What is written stays: an undone vote keeps its row. So the file is the account of all that was shown and answered.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from curation.columns import FORMAT_VERSION

NAME = "votes.sqlite"
BUSY_S = 30.0
"""How long a write waits for another process's."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS models (model INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS images (
    image INTEGER PRIMARY KEY, model INTEGER NOT NULL REFERENCES models, name TEXT NOT NULL, mark TEXT NOT NULL,
    broken TEXT, UNIQUE (model, name));
CREATE TABLE IF NOT EXISTS raters (
    rater INTEGER PRIMARY KEY, name TEXT NOT NULL, folded TEXT NOT NULL UNIQUE, secret TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS matchups (
    matchup INTEGER PRIMARY KEY, first_model INTEGER NOT NULL REFERENCES models,
    second_model INTEGER NOT NULL REFERENCES models, first_image INTEGER NOT NULL REFERENCES images,
    second_image INTEGER NOT NULL REFERENCES images, shared INTEGER NOT NULL, CHECK (first_model < second_model));
CREATE TABLE IF NOT EXISTS assignments (
    assignment INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, matchup INTEGER NOT NULL REFERENCES matchups,
    rater INTEGER NOT NULL REFERENCES raters, first_is_left INTEGER NOT NULL, made_at REAL NOT NULL,
    void INTEGER NOT NULL DEFAULT 0, UNIQUE (matchup, rater));
CREATE INDEX IF NOT EXISTS assignments_of_rater ON assignments (rater);
CREATE TABLE IF NOT EXISTS votes (
    vote INTEGER PRIMARY KEY, assignment INTEGER NOT NULL REFERENCES assignments, key TEXT NOT NULL UNIQUE,
    answer TEXT NOT NULL CHECK (answer IN ('left', 'right', 'unsure')), seconds REAL, voted_at REAL NOT NULL,
    undone_at REAL);
CREATE UNIQUE INDEX IF NOT EXISTS one_standing_vote ON votes (assignment) WHERE undone_at IS NULL;
CREATE INDEX IF NOT EXISTS shared_matchups ON matchups (shared) WHERE shared = 1;
"""
"""UNIQUE (matchup, rater): nobody rates a matchup twice. one_standing_vote: no assignment counts twice."""


class Database:
    """One connection that threads share: a transaction at a time here, and SQLite's own lock between processes."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. ValueError if a newer version of ours made it, or it is no file of votes."""
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            # FULL: a commit waits for the disk. NORMAL would lose the last votes when the machine loses its power.
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.executescript(SCHEMA)
            with self.transaction() as db:
                db.execute("INSERT OR IGNORE INTO meta VALUES ('format_version', ?)", (str(FORMAT_VERSION),))
            check_version(self._connection, path)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no file of votes that can be written: {error}") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on disk when the block ends."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def close(self) -> None:
        """Nothing is lost without it."""
        with self._lock:
            self._connection.close()


def open_to_read(path: Path) -> sqlite3.Connection:
    """A connection that cannot write; a server may be writing meanwhile. ValueError if there is no file of votes."""
    if not path.is_file():
        raise ValueError(f"there are no votes at {path}: nobody has been shown this study")
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_S)
        check_version(connection, path)
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is no file of votes: {error}") from error
    return connection


def check_version(connection: sqlite3.Connection, path: Path) -> None:
    """ValueError if a newer version of ours made the file."""
    ((made_by,),) = connection.execute("SELECT value FROM meta WHERE name = 'format_version'")
    if int(made_by) > FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {made_by}; this version reads up to {FORMAT_VERSION}")
