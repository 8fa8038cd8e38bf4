"""What a round trains on, chosen once a round from the whole pool by stored columns and the ledger.

A pool selector's round is the exact top of its sort key: each rank computes the keys of its own shards, one shard at a
time, and leaves them on its disk; histograms of 0.5 MB are added up over the ranks until the cut is known. So memory
does not grow with the pool. A method that must see all rows at once (InfoBatch's exact draw, RCAP's classes, a
permutation) is asked by rank 0 with its columns in memory, some 40 bytes a row.

A round is a whole number of batches. It is stored (OUTPUT/train/rounds/NNNNNN) before its first step: which rows of
each shard, their weights, and last of all an account, round.json. A run that begins again inside a round takes it from
there; one that begins again at its first step chooses anew, by the same seed and the ledger as it was then, so the
same. Where a method promises how evenly it uses rows, the promise is checked here, before the round begins.

n rows of a shard, S shards, W ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import reduce
from operator import add
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from curation import addresses
from curation.columns import FORMAT_VERSION, LEDGER_COLUMNS, RUN_VALUES
from curation.data import manifest, storage, tables
from curation.data.offered import OfferedShard, Rounds
from curation.distributed.bucket_select import columns_of
from curation.distributed.feed import Block, FeedSpec, Share, blocks
from curation.ledger import gini
from curation.numerics import sampling
from curation.numerics.quantiles import NUM_BINS
from curation.numerics.sampling import CutSearch, PassCount, count_pass, kept
from curation.recipe import TrainRecipe
from curation.selector import EvenSelector, PoolSelector, Rows
from curation.training.collectives import ranks, sum_over_ranks

ROUND_HEAD = "round.json"
CHECKPOINTS_BEHIND = 3
"""Rounds that ended so many checkpoints ago are needed by none that is kept."""


class UsageBroken(RuntimeError):
    """A method's promise of even usage does not hold: a fault of ours, or the ledger lost what was used."""


class Round(NamedTuple):
    """The account of a round, as round.json holds it. Usage is that after the round, over rows that can be chosen."""

    round: int
    first_step: int
    steps: int
    rows: int
    left_over: int
    """Rows that were chosen and do not fill a batch; they are not trained on."""
    usage_min: int
    usage_max: int
    usage_gini: float
    usage_gap: int | None
    """What the method promises usage_max - usage_min to be at most."""
    seconds: float
    format_version: int = FORMAT_VERSION


class ChosenShard(NamedTuple):
    """The rows of a shard that a round chose, as the feed takes an OfferedShard."""

    number: int
    url: str
    file: str
    offered: int

    def row_numbers(self, first: int, count: int) -> np.ndarray:
        """Rows (count,) int64 of the shard's table that are the chosen ones [first, first + count)."""
        return _stored_rows(self.file)[first : first + count].astype(np.int64)


class RoundFeed:
    """A run's rounds, one after the other. All ranks use it together."""

    def __init__(
        self,
        recipe: TrainRecipe,
        shards: list[OfferedShard],
        feed: FeedSpec,
        *,
        settle: Callable[[], None],
        recall: Callable[[Tensor], Rows],
        device: torch.device,
    ):
        """`settle` waits until the ledger holds what all ranks wrote, `recall` gives its columns (n,) of addresses."""
        self._recipe, self._shards, self._feed, self._device = recipe, shards, feed, device
        self._settle, self._recall = settle, recall
        self._rank, self._world_size = ranks()
        self._selector = recipe.selector()
        self._num_rows = sum(shard.offered for shard in shards)

    def blocks(self, share: Share, *, from_step: int) -> Iterator[Block]:
        """The share's block of each step from `from_step` on, with a column `round_weight`. Collective at the beginning
        of each round. ValueError if a round chooses less than a batch, UsageBroken if a promise does not hold."""
        train, compute = self._recipe.train, self._recipe.compute
        number, first_step, inside = self._position(from_step)
        last = 0 if number == 0 else self._head(number - 1).first_step
        step = from_step
        while step < train.num_steps:
            if not inside:
                self._choose(number, first_step, last_round_step=last)
            head, inside = self._head(number), False
            stop = min(first_step + head.steps, train.num_steps)
            chosen = self._chosen(number)
            order = Rounds(
                np.array([shard.offered for shard in chosen]),
                segment_rows=self._recipe.data.segment_rows,
                seed=self._seed(number),
            )
            local = range(step - first_step, stop - first_step)
            read = blocks(
                self._feed,
                chosen,
                order,
                share,
                steps=local,
                actors=compute.feed_actors,
                prefetch=compute.prefetch,
            )
            for block in read:
                yield {**block, "round_weight": self._weights(number, block["address"])}
            last, first_step, step, number = first_step, stop, stop, number + 1

    def _position(self, step: int) -> tuple[int, int, bool]:
        """The round of a step, the round's first step, and whether the step is a later one."""
        number, first = 0, 0
        while first < step:
            steps = self._head(number).steps
            if first + steps > step:
                return number, first, True
            number, first = number + 1, first + steps
        return number, first, False

    def _choose(self, number: int, first_step: int, *, last_round_step: int) -> None:
        """Choose a round and store it. Collective."""
        begun, train = time.perf_counter(), self._recipe.train
        progress = first_step / train.num_steps
        values: Rows = {
            "round": torch.tensor(number),
            "run_seed": torch.tensor(self._recipe.seed),
            "planned_uses": torch.tensor(train.num_steps * train.sub_batch / self._num_rows),
            "mean_usage": torch.tensor(first_step * train.sub_batch / self._num_rows),
            "last_round_step": torch.tensor(last_round_step),
        }
        seed, keep = self._seed(number), self._keep()
        self._settle()
        with tempfile.TemporaryDirectory(prefix="curation-round-") as folder:
            if isinstance(self._selector, PoolSelector):
                by_shard = self._by_cut(_Spill(Path(folder)), values, keep=keep, progress=progress, seed=seed)
            else:
                by_shard = self._in_memory(values, keep=keep, progress=progress, seed=seed)
            rows_S, usage = np.zeros(len(self._shards), np.int64), np.zeros(NUM_BINS, np.int64)
            for place, rows, weights, usage_after in by_shard:
                rows_S[place] = len(rows)
                usage += np.bincount(usage_after, minlength=NUM_BINS)
                self._store(number, place, rows, weights)
        rows_S, usage = self._summed(rows_S), self._summed(usage)
        steps, left_over = divmod(int(rows_S.sum()), train.sub_batch)
        if not steps:
            raise ValueError(
                f"round {number} chose {left_over} of {self._num_rows} rows, fewer than train.sub_batch="
                f"{train.sub_batch}"
            )
        used = np.flatnonzero(usage)
        gap = self._selector.usage_gap(values) if isinstance(self._selector, EvenSelector) else None
        if gap is not None and used[-1] - used[0] > gap:
            raise UsageBroken(
                f"after round {number} rows were used {used[0]} to {used[-1]} times; the method promises a difference "
                f"of at most {gap}"
            )
        head = Round(
            round=number,
            first_step=first_step,
            steps=steps,
            rows=int(rows_S.sum()),
            left_over=left_over,
            usage_min=int(used[0]),
            usage_max=int(used[-1]),
            usage_gini=round(gini(usage), 6),
            usage_gap=gap,
            seconds=round(time.perf_counter() - begun, 4),
        )
        if self._rank == 0:
            self._drop_old(number, first_step)
            with storage.write_atomic(self._file(number, "counts.npy")) as file:
                np.save(file, rows_S)
            storage.write_bytes(self._file(number, ROUND_HEAD), json.dumps(head._asdict(), indent=1).encode())
        self._barrier()

    def _keep(self) -> int | None:
        """Rows of a round, a whole number of batches; None where the method decides."""
        if not self._selector.fixed_size:
            return None
        size = self._recipe.train.sub_batch
        wanted = round(self._recipe.train.keep_fraction * self._num_rows / size)
        return max(1, min(wanted, self._num_rows // size)) * size

    def _by_cut(
        self, spill: _Spill, values: Rows, *, keep: int | None, progress: float, seed: int
    ) -> Iterator[_ChosenRows]:
        """The exact top `keep` of the sort key, of this rank's shards. Collective."""
        selector = self._selector
        assert isinstance(selector, PoolSelector) and keep is not None
        own = range(self._rank, len(self._shards), self._world_size)
        for place in own:
            rows = self._rows(place) | values
            keys = selector.sort_key(rows, progress, seed).numpy()
            ties = sampling.tie_hash(rows["uid"].numpy().view(np.uint64))
            spill.save(place, sampling.order_bits(keys), ties, _usage(rows))
        search = CutSearch(keep, collect_limit=1)
        while not search.done:
            this_pass = search.current_pass
            counts = (count_pass(this_pass, *spill.load(place)[:2]) for place in own)
            nothing = PassCount(
                this_pass.number, np.zeros(NUM_BINS, np.int64), np.zeros(0, np.uint32), np.zeros(0, np.uint64)
            )
            mine = reduce(add, counts, nothing)
            search.merge(dataclasses.replace(mine, histogram=self._summed(mine.histogram)))
            search.end_pass()
        for place in own:
            bits, ties, usage = spill.load(place)
            chosen = kept(search.cut, bits, ties)
            # A row without a key, for it lacks a column, can never be chosen.
            yield _ChosenRows(place, np.flatnonzero(chosen), None, (usage + chosen)[bits > 0])

    def _in_memory(self, values: Rows, *, keep: int | None, progress: float, seed: int) -> Iterator[_ChosenRows]:
        """What the selector chooses with all rows before it, by rank 0 for all shards."""
        if self._rank:
            return
        parts = [self._rows(place) for place in range(len(self._shards))]
        sizes = [len(part["address"]) for part in parts]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        generator = torch.Generator().manual_seed(seed)
        selection = self._selector.select(whole | values, keep, progress, generator)
        weights = torch.full((sum(sizes),), torch.nan)
        weights[selection.indices] = selection.weights.cpu()
        for place, (part, of_shard) in enumerate(zip(parts, weights.split(sizes), strict=True)):
            chosen = of_shard.isfinite()
            yield _ChosenRows(
                place, np.flatnonzero(chosen.numpy()), of_shard[chosen].numpy(), _usage(part) + chosen.numpy()
            )

    def _rows(self, place: int) -> Rows:
        """What the method needs of the rows that a shard offers, and their addresses."""
        shard, needs, data = self._shards[place], self._selector.needs, self._recipe.data
        numbers = shard.row_numbers(0, shard.offered)
        stored = needs - LEDGER_COLUMNS - RUN_VALUES - {"label"} | {"uid"}
        names = sorted(stored | ({str(data.label)} if "label" in needs else set()))
        table = tables.read(data.run, shard.number, names).take(pa.array(numbers))
        rows: Rows = {name: torch.from_numpy(np.array(values)) for name, values in columns_of(table, stored).items()}
        rows["address"] = torch.from_numpy(addresses.pack(shard.number, numbers))
        if "label" in needs:
            places = {name: number for number, name in enumerate(self._feed.classes)}
            rows["label"] = torch.tensor([places[str(value)] for value in table[str(data.label)].to_pylist()])
        recalled = self._recall(rows["address"])
        return rows | {name: recalled[name] for name in recalled if name in needs | {"usage_count"}}

    # What is stored.

    def _store(self, number: int, place: int, rows: np.ndarray, weights: np.ndarray | None) -> None:
        """The chosen rows (k,) of a shard; they are places among the rows that it offers."""
        shard = self._shards[place]
        numbers = shard.row_numbers(0, shard.offered)[rows].astype(np.int32)
        weights = np.ones(len(rows), np.float32) if weights is None else weights.astype(np.float32)
        with storage.write_atomic(self._file(number, _shard_file(shard.number))) as file:
            stored = np.empty(len(rows), STORED)
            stored["row"], stored["weight"] = numbers, weights
            np.save(file, stored)

    def _chosen(self, number: int) -> list[ChosenShard]:
        with storage.open_read(self._file(number, "counts.npy")) as file:
            rows_S = np.load(file, allow_pickle=False)
        return [
            ChosenShard(shard.number, shard.url, self._file(number, _shard_file(shard.number)), int(rows))
            for shard, rows in zip(self._shards, rows_S, strict=True)
        ]

    def _weights(self, number: int, of_addresses: np.ndarray) -> np.ndarray:
        """The round's weights (n,) float32 of rows that it chose."""
        weights = np.zeros(len(of_addresses), np.float32)
        shards, at_rows = addresses.shard_of(of_addresses), addresses.row_of(of_addresses)
        for shard in np.unique(shards).tolist():
            here, stored = shards == shard, _stored(self._file(number, _shard_file(shard)))
            at = np.searchsorted(stored["row"], at_rows[here])
            assert (stored["row"][at] == at_rows[here]).all()
            weights[here] = stored["weight"][at]
        return weights

    def _drop_old(self, number: int, first_step: int) -> None:
        """Delete the rows of rounds that no checkpoint needs any more; their accounts stay."""
        behind = first_step - CHECKPOINTS_BEHIND * self._recipe.checkpoint_every
        for earlier in range(number - 1, -1, -1):
            head = self._head(earlier)
            if head.first_step + head.steps > behind:
                continue
            names = [name for name in storage.names_in(self._folder(earlier)) if name.endswith(".npy")]
            if not names:
                return
            for name in names:
                storage.delete(self._file(earlier, name))

    def _head(self, number: int) -> Round:
        return Round(**manifest.read(self._file(number, ROUND_HEAD)))

    def _folder(self, number: int) -> str:
        return storage.join(self._recipe.output, "train", "rounds", f"{number:06d}")

    def _file(self, number: int, name: str) -> str:
        return storage.join(self._folder(number), name)

    def _seed(self, number: int) -> int:
        """A seed of its own for each round, from the run's."""
        return int.from_bytes(hashlib.sha256(f"{self._recipe.seed}/{number}".encode()).digest()[:8], "little") >> 1

    def _summed(self, counts: np.ndarray) -> np.ndarray:
        return sum_over_ranks(torch.from_numpy(counts).to(self._device)).cpu().numpy()

    def _barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()


class _ChosenRows(NamedTuple):
    """Of a shard: which of its offered rows were chosen, their weights unless all are 1, usage after the round."""

    place: int
    rows: np.ndarray
    weights: np.ndarray | None
    usage_after: np.ndarray


class _Spill:
    """Keys, ties and usage of this rank's shards on its disk, 14 bytes a row, for the passes that find the cut."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, place: int, *columns: np.ndarray) -> None:
        with open(self._folder / str(place), "wb") as file:
            for column in columns:
                np.save(file, column)

    def load(self, place: int) -> tuple[np.ndarray, ...]:
        with open(self._folder / str(place), "rb") as file:
            return tuple(np.load(file, allow_pickle=False) for _ in range(3))


STORED = np.dtype([("row", np.int32), ("weight", np.float32)])


def _shard_file(number: int) -> str:
    return f"{manifest.shard_name(number)}.npy"


@functools.lru_cache(maxsize=64)
def _stored(file: str) -> np.ndarray:
    """A shard's chosen rows of a round. No process lives to see a round chosen twice."""
    with storage.open_read(file) as opened:
        return np.load(opened, allow_pickle=False)


def _stored_rows(file: str) -> np.ndarray:
    return _stored(file)["row"]


def _usage(rows: Rows) -> np.ndarray:
    return rows["usage_count"].numpy().astype(np.int64)
