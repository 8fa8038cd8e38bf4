"""What each step of a training run scored: address, step, raw score and weight of every row, in parquet parts.

A rank buffers at most ROWS_PER_PART rows and writes them as a part of its own, and whatever it holds before each
checkpoint; so memory does not grow with steps, and no part spans a checkpoint. Parts bear the attempt that wrote them:
an attempt that begins at a checkpoint takes over from there on, and what a former one logged of later steps is passed
over in reading. So a run that was killed has each step once, whatever the number of ranks before and after.

`OUTPUT/train/score_log/ATTEMPT-RANK-FIRST.parquet`; FIRST is the first step in it, counted from 1 as in the step log.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import FORMAT_VERSION
from curation.data import storage

ROWS_PER_PART = 1 << 20
SCHEMA = pa.schema(
    [("address", pa.int64()), ("step", pa.int64()), ("score", pa.float32()), ("weight", pa.float32())],
    metadata={"format_version": str(FORMAT_VERSION)},
)
_PART = re.compile(r"(\d{6})-(\d{5})-(\d{10})\.parquet")


class LoggedStep(NamedTuple):
    """All rows that one step scored: (n,) int64, float32, float32. A row that was not trained on has weight 0."""

    step: int
    addresses: np.ndarray
    scores: np.ndarray
    weights: np.ndarray


class ScoreLog:
    """One rank's way into the log."""

    def __init__(self, output: str, *, rank: int, attempt: int, rows_per_part: int = ROWS_PER_PART):
        """`attempt` is `next_attempt`, the same on all ranks."""
        self._folder, self._rank, self._attempt = folder_of(output), rank, attempt
        self._rows_per_part, self._steps, self._num_rows = rows_per_part, list[LoggedStep](), 0

    def add(self, logged: LoggedStep) -> None:
        """Note a step; steps come in order."""
        self._steps.append(logged)
        self._num_rows += len(logged.addresses)
        if self._num_rows >= self._rows_per_part:
            self.flush()

    def flush(self) -> None:
        """Write what is held. To be called before each checkpoint."""
        if not self._steps:
            return
        columns = [np.concatenate(parts) for parts in zip(*(logged[1:] for logged in self._steps), strict=True)]
        steps = np.repeat([logged.step for logged in self._steps], [len(logged.addresses) for logged in self._steps])
        arrays = [columns[0], steps, *columns[1:]]
        table = pa.table([pa.array(a, f.type) for a, f in zip(arrays, SCHEMA, strict=True)], schema=SCHEMA)
        name = f"{self._attempt:06d}-{self._rank:05d}-{self._steps[0].step:010d}.parquet"
        with storage.write_atomic(storage.join(self._folder, name)) as file:
            pq.write_table(table, file, compression="zstd")
        self._steps, self._num_rows = [], 0


def folder_of(output: str) -> str:
    """Where a run's score log lies."""
    return storage.join(output, "train", "score_log")


def next_attempt(output: str) -> int:
    """The number of an attempt that begins now."""
    return max((attempt for attempt, _, _, _ in _parts(output)), default=0) + 1


def read_steps(output: str, *, last_step: int | None = None) -> Iterator[LoggedStep]:
    """The log, step by step in order, a part per rank in memory. Later steps than `last_step` are left out."""
    by_attempt: dict[int, dict[int, list[tuple[int, str]]]] = {}
    for attempt, rank, first, url in _parts(output):
        by_attempt.setdefault(attempt, {}).setdefault(rank, []).append((first, url))
    begins = {attempt: min(min(parts)[0] for parts in of.values()) for attempt, of in by_attempt.items()}
    for attempt in sorted(by_attempt):
        later = [begins[other] for other in begins if other > attempt]
        ends = later if last_step is None else [*later, last_step + 1]
        ranks = [_of_rank(sorted(parts)) for _, parts in sorted(by_attempt[attempt].items())]
        merged = heapq.merge(*ranks, key=lambda logged: logged.step)
        for step, of_step in itertools.groupby(merged, key=lambda logged: logged.step):
            if ends and step >= min(ends):
                break
            yield LoggedStep(step, *(np.concatenate(parts) for parts in zip(*(s[1:] for s in of_step), strict=True)))


def _of_rank(parts: list[tuple[int, str]]) -> Iterator[LoggedStep]:
    for _, url in parts:
        with storage.open_read(url) as file:
            table = pq.read_table(file)
        version = int((table.schema.metadata or {}).get(b"format_version", b"0"))
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{url} has format_version {version}, this code reads up to {FORMAT_VERSION}: update curation"
            )
        addresses, steps, scores, weights = (table[name].to_numpy() for name in SCHEMA.names)
        edges = np.flatnonzero(np.diff(steps, prepend=steps[:1] - 1, append=steps[-1:] + 1))
        for first, last in itertools.pairwise(edges.tolist()):
            here = slice(first, last)
            yield LoggedStep(int(steps[first]), addresses[here], scores[here], weights[here])


def _parts(output: str) -> Iterator[tuple[int, int, int, str]]:
    """(attempt, rank, first step, URL) of each part."""
    folder = folder_of(output)
    for name in storage.names_in(folder):
        if match := _PART.fullmatch(name):
            attempt, rank, first = map(int, match.groups())
            yield attempt, rank, first, storage.join(folder, name)
