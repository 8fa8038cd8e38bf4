"""A function over many inputs as Ray tasks: results in order, and only so many in flight that memory stays flat."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import RayTaskError

T = TypeVar("T")
SHARDS_PER_TASK = 16


def ordered(function: Callable[..., T], inputs: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """function(*input) for each input, in the order of the inputs; at most two per CPU run or wait.

    An error in a task is raised here as it was raised there.
    """
    task = ray.remote(function)
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: deque[ray.ObjectRef] = deque()
    for arguments in inputs:
        if len(running) == limit:
            yield _result(running.popleft())
        running.append(task.remote(*arguments))
    while running:
        yield _result(running.popleft())


def _result(reference: ray.ObjectRef) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise cast(BaseException, error.cause) from None


def in_groups(numbers: Sequence[int]) -> list[list[int]]:
    """Shard numbers in runs of SHARDS_PER_TASK: a task for each shard would cost more than the shard."""
    return [list(numbers[at : at + SHARDS_PER_TASK]) for at in range(0, len(numbers), SHARDS_PER_TASK)]
