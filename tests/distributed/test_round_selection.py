"""Choosing a round from stored tables, without Ray: what is stored of it, its weights, its account, its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch

from curation.addresses import pack
from curation.data import tables
from curation.data.offered import OfferedShard
from curation.data.read_rules import ReadRules
from curation.distributed.feed import FeedSpec
from curation.distributed.round_selection import RoundFeed, UsageBroken
from curation.recipe import TrainRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, Remember, Train
from curation.selector import Rows

SIZES, DROPPED = (30, 50, 20), {1: [0, 7, 49]}
ROWS = 97


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards' tables with a class each row, and ranks beside them."""
    root, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        ok = [row not in DROPPED.get(number, []) for row in range(size)]
        columns: dict[str, Any] = {
            "address": pack(number, np.arange(size)),
            "uid": [f"{number:016x}{row:016x}" for row in range(size)],
            "status": ["ok" if one else "dropped" for one in ok],
            "image_embedding": np.zeros((sum(ok), 2), np.float16),
            "text_embedding": np.zeros((sum(ok), 2), np.float16),
            **dict.fromkeys(("key", "shard", "caption"), ["x"] * size),
            **dict.fromkeys(("reason", "sha256"), [None] * size),
            **dict.fromkeys(("offset", "width", "height"), [1] * size),
            "clip_score": [0.5] * size,
        }
        fields = [{"class": "cat" if row % 3 else "dog"} for row in range(size)]
        tables.write(str(root), number, tables.sample_table(columns, fields))
        ranks = {f"factors.{part}": pa.array(rng.random(size, np.float32)) for part in ("representativeness", "rarity")}
        tables.write_piece(str(root), "factors", number, ranks)
    return root


def feed_of(run: Path, output: Path, method: dict[str, Any], memory: dict[int, Rows], **train: Any) -> RoundFeed:
    """A feed whose ledger is what `memory` says of an address."""
    settings = {"num_steps": 40, "sub_batch": 10, "filter_ratio": 0.0, "choose": "round", "objective": "cross_entropy"}
    recipe = TrainRecipe(
        data=Data(run=str(run), features="image_embedding", label="json.class"),
        learner=Weights(model="linear"),
        method=method,
        train=Train(**{**settings, "keep_fraction": 0.3, **train}),
        ledger=Remember(statistic="ema", variance=True) if method["name"] == "ucb" else Remember(),
        output=str(output),
    )
    shards = [
        OfferedShard(number, f"{number}.tar", "", size, np.array(DROPPED.get(number, []), np.int32))
        for number, size in enumerate(SIZES)
    ]
    feed = FeedSpec(str(run), "linear", None, "image_embedding", "json.class", ("cat", "dog"), (), 1, ReadRules(), 1)

    def recall(addresses: torch.Tensor) -> Rows:
        rows = [memory.get(address, {}) for address in addresses.tolist()]
        blank = {"ledger_value": np.nan, "ledger_variance": np.nan, "usage_count": 0.0, "last_step": 0.0}
        return {name: torch.tensor([float(row.get(name, nothing)) for row in rows]) for name, nothing in blank.items()}

    return RoundFeed(recipe, shards, feed, settle=lambda: None, recall=recall, device=torch.device("cpu"))


def chosen(feed: RoundFeed, number: int = 0) -> dict[int, float]:
    """Addresses of a round, with their weights."""
    shards = feed._chosen(number)
    found = np.concatenate([pack(shard.number, shard.row_numbers(0, shard.offered)) for shard in shards])
    return dict(zip(found.tolist(), feed._weights(number, found).tolist(), strict=True))


def every_address() -> list[int]:
    return [
        int(pack(number, np.array([row]))[0])
        for number, size in enumerate(SIZES)
        for row in range(size)
        if row not in DROPPED.get(number, [])
    ]


@pytest.mark.parametrize("name", ["dynamic", "rs2", "rcap", "ucb", "epsilon_greedy", "uniform"])
def test_a_round_is_a_whole_number_of_batches_of_rows_that_were_not_dropped(
    run: Path, tmp_path: Path, name: str
) -> None:
    feed = feed_of(run, tmp_path, {"name": name}, {})
    feed._choose(0, 0, last_round_step=0)
    head, rows = feed._head(0), chosen(feed)
    assert (head.rows, head.steps, head.left_over) == (30, 3, 0)
    assert len(rows) == 30 and set(rows) <= set(every_address()) and set(rows.values()) == {1.0}
    assert (head.usage_min, head.usage_max) == (0, 1) and (head.usage_gap is not None) == (name == "dynamic")


def test_infobatch_stores_the_weights_of_the_rows_below_the_mean_and_counts_what_is_left_over(
    run: Path, tmp_path: Path
) -> None:
    addresses = every_address()
    memory: dict[int, Any] = {at: {"ledger_value": 1.0 if place < 60 else 5.0} for place, at in enumerate(addresses)}
    feed = feed_of(run, tmp_path, {"name": "infobatch"}, memory, keep_fraction=1.0)
    feed._choose(0, 0, last_round_step=0)
    head, rows = feed._head(0), chosen(feed)
    assert (head.rows, head.steps, head.left_over) == (30 + 37, 6, 7)
    low = {at: weight for at, weight in rows.items() if at in addresses[:60]}
    assert len(low) == 30 and set(low.values()) == {2.0}
    assert {rows[at] for at in addresses[60:]} == {1.0}


def test_a_round_follows_usage_and_says_when_its_promise_is_broken(run: Path, tmp_path: Path) -> None:
    addresses = every_address()
    method = {"name": "dynamic", "penalty": 1.0}
    used: dict[int, Any] = {at: {"usage_count": 1.0} for at in addresses[:40]}
    feed = feed_of(run, tmp_path / "even", method, used)
    feed._choose(0, 0, last_round_step=0)
    # With one use costing a whole rank, the 57 unused rows come first.
    assert not set(chosen(feed)) & set(addresses[:40])
    broken = feed_of(run, tmp_path / "broken", method, cast(Any, {addresses[0]: {"usage_count": 9.0}}))
    with pytest.raises(UsageBroken, match="used 0 to 9 times; the method promises a difference of at most 2"):
        broken._choose(0, 0, last_round_step=0)


def test_the_same_round_comes_of_the_same_seed_and_another_of_another_round(run: Path, tmp_path: Path) -> None:
    rounds = []
    for folder, number in (("a", 0), ("b", 0), ("a", 1)):
        feed = feed_of(run, tmp_path / folder, {"name": "uniform"}, {})
        feed._choose(number, 3 * number, last_round_step=0)
        rounds.append(chosen(feed, number))
    assert rounds[0] == rounds[1] != rounds[2]
    assert feed._position(0) == (0, 0, False) and feed._position(2) == (0, 0, True)
    assert feed._position(3) == (1, 3, False) and feed._position(5) == (1, 3, True)


def test_a_round_smaller_than_a_batch_is_refused(run: Path, tmp_path: Path) -> None:
    feed = feed_of(run, tmp_path, {"name": "infobatch", "kept_share": 0.05}, {}, keep_fraction=1.0)
    with pytest.raises(ValueError, match="round 0 chose 5 of 97 rows, fewer than train.sub_batch=10"):
        feed._choose(0, 0, last_round_step=0)
