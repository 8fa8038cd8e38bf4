"""A function over many inputs as tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from curation.distributed.tasks import in_groups, ordered

pytestmark = pytest.mark.usefixtures("ray_session")


def test_results_come_in_the_order_of_the_inputs() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.3 if number == 0 else 0.0)
        return number

    assert list(ordered(slow_first, ((number,) for number in range(20)))) == list(range(20))


def test_an_error_in_a_task_is_raised_as_it_was() -> None:
    def fails(number: int) -> int:
        raise FileNotFoundError(f"no shard {number}")

    with pytest.raises(FileNotFoundError, match=r"^no shard 3$"):
        list(ordered(fails, [(3,)]))


def test_inputs_are_only_taken_as_results_are() -> None:
    taken = 0

    def inputs() -> Iterator[tuple[int]]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield (number,)

    def same(number: int) -> int:
        return number

    results = ordered(same, inputs())
    assert next(results) == 0
    assert taken <= 2 * 64  # two per CPU of the test's Ray, with room
    results.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_groups_hold_every_shard_once_in_order() -> None:
    numbers = list(range(0, 111, 3))
    groups = in_groups(numbers)
    assert [number for group in groups for number in group] == numbers and max(map(len, groups)) == 16
    assert in_groups([]) == []
