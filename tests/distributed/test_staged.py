"""The staged mode: its parts make the very table that the fused mode makes, and only whole shards are committed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.data import storage
from curation.data.read_rules import ReadRules
from curation.data.shard_list import Shard
from curation.distributed import staged
from curation.distributed.account import Summary
from curation.distributed.embed import EmbedSpec, ShardEmbed
from curation.distributed.pipeline import curate
from curation.distributed.resources import Placement
from curation.distributed.staged import PartEmbed, commit_shard, covers_shard, decode_shard, rows_per_part
from curation.recipe import Compute, CurateRecipe, Embed, Pool
from tests.distributed.conftest import nano_spec

BATCH = 4


@pytest.fixture
def spec(tmp_path: Path) -> EmbedSpec:
    return nano_spec(str(tmp_path / "out"), batch_size=BATCH, staged=True)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a single batch."""
    monkeypatch.setattr(staged, "MAX_BLOCK_BYTES", 1)


def row_of(url: str, *, number: int = 7, fingerprint: str | None = None) -> dict[str, np.ndarray]:
    mark = storage.fingerprint(url) if fingerprint is None else fingerprint
    return {"number": np.array([number]), "url": np.array([url]), "fingerprint": np.array([mark])}


def embedded(parts: Iterator[pa.Table], spec: EmbedSpec) -> list[dict[str, Any]]:
    embed = PartEmbed(spec)
    return [json.loads(embed(part)["record"][0]) for part in parts]


def deep(row: int) -> Any:
    value: Any = row
    for _ in range(900):
        value = [value]
    return value


FIELDS: dict[int, dict[str, Any]] = {
    0: {"number": 1, "list": [1, 2], "text": "ä\u0000b", "uid": "0" * 32},
    1: {"number": 2.5, "list": [], "big": 2**70},
    6: {"number": float("nan"), "list": [[1]], "object": {"a": [None, True]}},
    9: {"deep": deep(9), "later": True},
}


def fields_of(row: int) -> dict[str, Any]:
    return FIELDS.get(row, {})


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_the_parts_of_a_shard_make_the_table_and_the_account_of_the_fused_mode(
    spec: EmbedSpec, write_shard: Callable[..., Path], tmp_path: Path, resize: Any
) -> None:
    shard = str(write_shard(tmp_path / "a.tar", count=2 * BATCH + 6, broken=[0, 5, 13], fields=fields_of))
    spec = dataclasses.replace(spec, resize=resize)
    records = embedded(decode_shard(row_of(shard), spec=spec), spec)
    assert [(r["first"], r["read"], r["embedded"]) for r in records] == [(0, 5, 4), (5, 5, 4), (10, 4, 3)]
    record = commit_shard(spec, records)

    fused = dataclasses.replace(spec, output=str(tmp_path / "fused"))
    other = json.loads(ShardEmbed(fused)(row_of(shard))["record"][0])
    table, expected = (tmp_path / out / "samples" / "00000007.parquet" for out in ("out", "fused"))
    for name, column in zip(pq.read_schema(expected).names, pq.read_table(expected).columns, strict=True):
        assert repr(pq.read_table(table)[name].to_pylist()) == repr(column.to_pylist()), name  # NaN is not NaN
    assert table.read_bytes() == expected.read_bytes()
    assert set(record) == set(other)
    told_apart = {"seconds", "batch_ends"}
    assert {k: v for k, v in record.items() if k not in told_apart} == {
        k: v for k, v in other.items() if k not in told_apart
    }
    assert [rows for _, rows in record["batch_ends"]] == [rows for _, rows in other["batch_ends"]] == [4, 4, 3]
    assert not list((tmp_path / "out" / "parts").iterdir())


@pytest.mark.usefixtures("small_parts")
def test_parts_with_several_captions_a_row_make_the_table_of_the_fused_mode(
    spec: EmbedSpec, write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    def captions(row: int) -> dict[str, Any]:
        return {"captions": [f"caption {row} {n}" for n in range(row % 4)]}

    shard = str(write_shard(tmp_path / "a.tar", count=2 * BATCH + 3, broken=[5], fields=captions))
    spec = dataclasses.replace(spec, rules=ReadRules(best_caption_of=("json.captions", "txt")))
    commit_shard(spec, embedded(decode_shard(row_of(shard), spec=spec), spec))
    fused = dataclasses.replace(spec, output=str(tmp_path / "fused"))
    ShardEmbed(fused)(row_of(shard))
    table, expected = (tmp_path / out / "samples" / "00000007.parquet" for out in ("out", "fused"))
    assert pq.read_table(table).to_pylist() == pq.read_table(expected).to_pylist()
    assert table.read_bytes() == expected.read_bytes()
    assert set(pq.read_table(table)["caption_from"].to_pylist()) > {"txt", "json.captions[0]"}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("count, broken", [(0, []), (3, [0, 1, 2]), (BATCH, []), (BATCH + 1, [BATCH])])
def test_shards_at_the_edges_of_a_part_are_one_part(
    spec: EmbedSpec, write_shard: Callable[..., Path], tmp_path: Path, count: int, broken: list[int]
) -> None:
    shard = str(write_shard(tmp_path / "a.tar", count=count, broken=broken))
    records = embedded(decode_shard(row_of(shard), spec=spec), spec)
    assert commit_shard(spec, records)["read"] == count
    assert pq.read_table(tmp_path / "out" / "samples" / "00000007.parquet").num_rows == count


def test_a_shard_that_breaks_off_or_changed_ends_in_a_part_that_says_so_and_is_never_committed(
    spec: EmbedSpec, write_shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = str(write_shard(tmp_path / "a.tar", count=6))
    (changed,) = embedded(decode_shard(row_of(shard, fingerprint="listed:before"), spec=spec), spec)
    assert changed["pending"].endswith("changed while it was read")
    monkeypatch.setattr(storage, "open_read", lambda url: (_ for _ in ()).throw(ConnectionResetError("it hung up")))
    (broken,) = embedded(decode_shard(row_of(shard), spec=spec), spec)
    assert broken == {"shard": 7, "url": shard, "pending": "ConnectionResetError: it hung up"}


def test_a_shard_is_covered_when_no_row_is_missing_up_to_its_end() -> None:
    def part(first: int, read: int, end: Any = None) -> dict[int, dict[str, Any]]:
        return {first: {"read": read, "end": end}}

    assert covers_shard(part(0, 5) | part(5, 2, {}))
    assert covers_shard(part(5, 2, {}) | part(0, 5))
    assert covers_shard(part(0, 0, {}))
    assert not covers_shard(part(0, 5))
    assert not covers_shard(part(5, 2, {}))
    assert not covers_shard(part(0, 5) | part(7, 2, {}))
    assert not covers_shard({})


@pytest.mark.parametrize("side", [48, 224, 256, 336, 384])
@pytest.mark.parametrize("batch_size", [64, 128, 200])
def test_a_part_is_whole_batches_in_a_block_of_64_to_128_mib(side: int, batch_size: int) -> None:
    rows = rows_per_part((side, side), batch_size)
    assert rows % batch_size == 0
    assert 64 <= rows * side * side * 3 / 2**20 <= 128


def test_a_batch_that_alone_is_larger_than_a_block_is_a_part() -> None:
    assert rows_per_part((336, 336), 1024) == 1024


@pytest.fixture(scope="module")
def both(
    ray_session: None, small_pool: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Summary]]:
    """The output and the summary of a run of the small pool in either mode."""
    runs = {}
    for mode in ("fused", "staged"):
        output = tmp_path_factory.mktemp(mode)
        runs[mode] = output, curate(recipe(f"{small_pool}/a::{small_pool}/b", output, mode=mode))
    return runs


def test_both_modes_leave_the_same_files_and_the_same_account(both: dict[str, tuple[Path, Summary]]) -> None:
    (fused, account), (staged_run, other) = both["fused"], both["staged"]
    for name in ("read", "embedded", "dropped", "selected", "decoded_now", "warnings", "shards", "failures"):
        assert getattr(account, name) == getattr(other, name), name
    for folder in ("samples", "selection"):
        files = sorted(path.name for path in (fused / folder).iterdir())
        assert files == sorted(path.name for path in (staged_run / folder).iterdir())
        for name in files:
            assert (fused / folder / name).read_bytes() == (staged_run / folder / name).read_bytes(), name
    assert not list((staged_run / "parts").iterdir())


def test_a_run_goes_on_in_the_other_mode_and_redoes_nothing(
    both: dict[str, tuple[Path, Summary]], small_pool: Path
) -> None:
    assert curate(recipe(f"{small_pool}/a::{small_pool}/b", both["fused"][0], mode="staged")).decoded_now == 0


@pytest.mark.usefixtures("ray_session")
def test_parts_of_a_killed_run_are_removed_and_a_shard_that_is_gone_is_pending(spec: EmbedSpec, tmp_path: Path) -> None:
    stale = tmp_path / "out" / "parts" / "00000000-0000000.parquet"
    stale.parent.mkdir(parents=True)
    stale.write_text("of another run")
    lost = Shard(1, str(tmp_path / "gone.tar"), "1:2")
    placement = Placement("cpu", "float32", 1, 1.0, 0.0)
    (found,) = staged.staged_shards([lost], spec, placement)
    assert (found["shard"], found["pending"].split(":")[0]) == (1, "FileNotFoundError")
    assert not stale.exists()


def recipe(shards: str, output: Path, *, mode: Literal["fused", "staged"]) -> CurateRecipe:
    return CurateRecipe(
        pool=Pool(shards=shards),
        embed=Embed(model="nano", batch_size=8),
        compute=Compute(device="cpu", actors=1, mode=mode),
        output=str(output),
    )
