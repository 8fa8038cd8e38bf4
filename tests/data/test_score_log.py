"""The score log: what goes in comes out once, whatever was killed, and a newer format is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.data import score_log
from curation.data.score_log import LoggedStep, ScoreLog, next_attempt, read_steps


def logged(step: int, first: int, count: int = 4, *, score: float = 0.0) -> LoggedStep:
    addresses = np.arange(first, first + count)
    return LoggedStep(step, addresses, np.full(count, score, np.float32), np.linspace(0, 2, count, dtype=np.float32))


def write(output: Path, steps: list[int], *, rank: int = 0, attempt: int, score: float = 0.0, every: int = 1) -> None:
    log = ScoreLog(str(output), rank=rank, attempt=attempt)
    for place, step in enumerate(steps, start=1):
        log.add(logged(step, 10 * step + 5 * rank, score=score))
        if place % every == 0:
            log.flush()
    log.flush()


def test_steps_come_back_in_order_with_all_ranks_rows(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, [1, 2, 3, 4, 5], rank=rank, attempt=1, every=2)
    steps = list(read_steps(str(tmp_path)))
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    assert steps[2].addresses.tolist() == [30, 31, 32, 33, 35, 36, 37, 38]
    assert steps[2].weights.tolist() == pytest.approx([0, 2 / 3, 4 / 3, 2] * 2)


def test_memory_is_a_part_at_most_and_parts_end_with_a_step(tmp_path: Path) -> None:
    log = ScoreLog(str(tmp_path), rank=0, attempt=1, rows_per_part=10)
    for step in range(1, 9):
        log.add(logged(step, step))
        assert log._num_rows < 10
    parts = sorted((tmp_path / "train" / "score_log").iterdir())
    assert [pq.read_table(part)["step"].unique().to_pylist() for part in parts] == [[1, 2, 3], [4, 5, 6]]


def test_an_attempt_takes_over_from_its_first_step_on(tmp_path: Path) -> None:
    assert next_attempt(str(tmp_path)) == 1
    for rank in (0, 1, 2):  # killed after step 5, rank 2 already in step 6, checkpoint at 3
        write(tmp_path, [1, 2, 3, 4, 5] + [6] * (rank == 2), rank=rank, attempt=1, score=1.0, every=3)
    assert next_attempt(str(tmp_path)) == 2
    write(tmp_path, [4], attempt=2, score=2.0)  # killed again before the next checkpoint
    write(tmp_path, [4, 5, 6, 7], attempt=3, score=3.0)  # one rank alone
    steps = list(read_steps(str(tmp_path)))
    assert [(step.step, len(step.addresses), set(step.scores.tolist())) for step in steps] == [
        *((step, 12, {1.0}) for step in (1, 2, 3)),
        *((step, 4, {3.0}) for step in (4, 5, 6, 7)),
    ]
    assert [step.step for step in read_steps(str(tmp_path), last_step=5)] == [1, 2, 3, 4, 5]


def test_there_may_be_no_log_and_a_step_without_rows(tmp_path: Path) -> None:
    assert list(read_steps(str(tmp_path))) == []
    log = ScoreLog(str(tmp_path), rank=0, attempt=1)
    log.add(logged(1, 7, count=0))
    log.flush()
    assert list(read_steps(str(tmp_path))) == []


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [1], attempt=1)
    [part] = (tmp_path / "train" / "score_log").iterdir()
    table = pq.read_table(part).replace_schema_metadata({"format_version": "99"})
    pq.write_table(pa.table(table), part)
    with pytest.raises(ValueError, match="has format_version 99"):
        list(read_steps(str(tmp_path)))
    assert score_log.SCHEMA.names == ["address", "step", "score", "weight"]
