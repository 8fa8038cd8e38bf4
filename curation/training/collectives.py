"""What the workers of one step tell each other: rows gathered from all, gradients sent back, rows handed over.

Every function works in a process that is alone, too: without a process group it is rank 0 of 1. Collective means that
all ranks call it, in the same order, with tensors of the same shape and dtype, on the process group's device.

n rows on each of W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """This process among those that take a step together."""

    rank: int
    world_size: int


def ranks() -> Ranks:
    """Where this process stands; rank 0 of 1 without a process group."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks(0, 1)


def gather(rows_n: Tensor) -> Tensor:
    """All ranks' rows (W * n, ...), in order of the ranks. Collective; carries no gradient."""
    if ranks().world_size == 1:
        return rows_n.detach()
    # Bytes travel, because gloo and NCCL each lack some dtype (bool, float16).
    payload = rows_n.detach().contiguous()
    flat = payload.view(torch.uint8) if payload.ndim else payload.reshape(1).view(torch.uint8)
    parts = [torch.empty_like(flat) for _ in range(ranks().world_size)]
    dist.all_gather(parts, flat)
    return torch.cat(parts).view(payload.dtype)


def gather_with_gradient(rows_n: Tensor) -> Tensor:
    """All ranks' rows (W * n, ...); what any rank's loss says about a row flows back to the rank that holds it."""
    return rows_n if ranks().world_size == 1 else _Gather.apply(rows_n)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_n: Tensor) -> Tensor:
        ctx.num_rows = len(rows_n)
        return gather(rows_n)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        [gradient_WN] = gradients
        summed = gradient_WN.contiguous().clone()
        dist.all_reduce(summed)
        first = ranks().rank * ctx.num_rows
        return summed[first : first + ctx.num_rows]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of the ranks' tensors. Collective."""
    summed = values.detach().clone()
    if ranks().world_size > 1:
        dist.all_reduce(summed)
    return summed


class Handover(NamedTuple):
    """A row that goes from rank `source`, where it stands at `row`, to rank `target`."""

    source: int
    target: int
    row: int


def hand_over(columns: Sequence[Tensor], handovers: Sequence[Handover]) -> list[Tensor]:
    """The rows that this rank receives, for each of its columns (n, ...), in order of the list. Collective.

    Every rank passes the same list. Point to point: only the rows in it travel.
    """
    me = ranks().rank
    received = []
    for column in columns:
        incoming = [h for h in handovers if h.target == me]
        buffers = {
            source: column.new_empty(sum(h.source == source for h in incoming), *column.shape[1:])
            for source in sorted({h.source for h in incoming})
        }
        operations = [dist.P2POp(dist.irecv, _as_bytes(buffer), source) for source, buffer in buffers.items()]
        for target in sorted({h.target for h in handovers if h.source == me}):
            rows = torch.tensor([h.row for h in handovers if (h.source, h.target) == (me, target)])
            outgoing = column[rows.to(column.device)].contiguous()
            operations.append(dist.P2POp(dist.isend, _as_bytes(outgoing), target))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        position = dict.fromkeys(buffers, 0)
        rows = []
        for handover in incoming:
            rows.append(buffers[handover.source][position[handover.source]])
            position[handover.source] += 1
        received.append(torch.stack(rows) if rows else column.new_empty(0, *column.shape[1:]))
    return received


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8)
