"""The feed: every offered row once a round, whatever the number of workers, and paired with its own columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import addresses
from curation.data import manifest, offered, storage, tables
from curation.data.images import pixels
from curation.data.offered import OfferedShard, Rounds
from curation.data.read_rules import ReadRules
from curation.data.rows import StaleTable, read_rows
from curation.data.shards import ShardReader
from curation.distributed import feed
from curation.distributed.feed import FeedSpec, ReadShare, Share, blocks, plan_step
from curation.models.clip import load_tokenizer
from curation.models.resize import load_resize

RULES = ReadRules()
OFFERED = 236


def spec_of(
    run: Path, *, columns: tuple[str, ...] = ("image_embedding", "clip_score"), max_pixels: int = 90_000_000
) -> FeedSpec:
    return FeedSpec(
        run=str(run),
        model="nano",
        pretrained=None,
        features=None,
        label=None,
        classes=(),
        columns=tuple((name, name) for name in columns),
        max_pixels=max_pixels,
        rules=RULES,
        decode_threads=2,
    )


def shards_of(run: Path) -> list[OfferedShard]:
    return offered.offered_shards(str(run), manifest.committed(str(run), "embed"))


def planned(shard: OfferedShard, first: int, count: int) -> pa.Table:
    rows = shard.row_numbers(first, count)
    return pa.table({"step": [3], "number": [[shard.number]], "url": [[shard.url]], "rows": [[rows]]})


def test_offered_rows_are_those_that_were_embedded(curated: Path) -> None:
    shards = shards_of(curated)
    assert [shard.offered for shard in shards] == [40, 38, 40, 40, 38, 40]
    assert shards[1].dropped.tolist() == [0, 17] and shards[4].dropped.tolist() == [38, 39]


def test_a_run_without_embedded_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no embedded sample"):
        offered.offered_shards(str(tmp_path), {})


@pytest.mark.parametrize(("number", "first", "count"), [(1, 0, 38), (1, 15, 4), (4, 30, 8), (0, 39, 1)])
def test_a_row_is_its_own_image_caption_and_columns(curated: Path, number: int, first: int, count: int) -> None:
    shard = shards_of(curated)[number]
    block = ReadShare(spec_of(curated))(planned(shard, first, count))
    rows = shard.row_numbers(first, count)
    table = pq.read_table(curated / "samples" / f"{number:08d}.parquet").take(pa.array(rows))
    assert block["address"].tolist() == addresses.pack(number, rows).tolist() == table["address"].to_pylist()
    np.testing.assert_array_equal(block["image_embedding"], tables.as_array(table["image_embedding"], name="i"))
    np.testing.assert_allclose(block["clip_score"], table["clip_score"].to_numpy())
    np.testing.assert_array_equal(block["tokens"], load_tokenizer("nano")(table["caption"].to_pylist()).numpy())
    with open(shard.url, "rb") as raw:
        images = {sample.key: sample.image for sample in ShardReader(raw, url=shard.url, rules=RULES)}
    for place, key in enumerate(table["key"].to_pylist()):
        decoded = pixels(images[key] or b"", max_pixels=10**6, resize=load_resize("nano")).pixels
        np.testing.assert_array_equal(block["pixels"][place], decoded)
    assert block["ok"].all() and (block["step"] == 3).all()


def test_only_the_range_of_bytes_that_is_needed_is_read(curated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, asked = shards_of(curated)[0], []
    read_range = storage.read_range
    monkeypatch.setattr(
        "curation.data.rows.storage.read_range", lambda *where: asked.append(where) or read_range(*where)
    )
    read = read_rows(str(curated), shard.number, shard.url, np.array([4, 5, 6]), ["caption"], rules=RULES)
    assert [row.place for row in read.images] == [0, 1, 2] and read.columns.column_names == ["caption"]
    offsets = pq.read_table(curated / "samples" / "00000000.parquet")["offset"].to_pylist()
    assert asked == [(shard.url, offsets[4], offsets[7])]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_round_offers_each_row_once_to_any_number_of_workers(curated: Path, world_size: int) -> None:
    shards = shards_of(curated)
    seen: list[int] = []
    read = ReadShare(spec_of(curated))
    for rank in range(world_size):
        rounds = Rounds(np.array([shard.offered for shard in shards]), segment_rows=8, seed=2)
        share = Share(4 * (OFFERED // 16), rank, world_size)
        for step in range(4):
            seen += read(plan_step(step, shards, rounds, share))["address"].tolist()
    wanted = [int(a) for s in shards for a in addresses.pack(s.number, s.row_numbers(0, s.offered))]
    assert len(seen) == len(set(seen)) == 4 * 4 * (OFFERED // 16) and set(seen) <= set(wanted)


def test_a_later_start_gets_what_it_would_have_got(curated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "STEPS_PER_WAVE", 2)
    shards = shards_of(curated)

    def run(steps: range) -> list[list[int]]:
        rounds = Rounds(np.array([shard.offered for shard in shards]), segment_rows=8, seed=2)
        found = blocks(spec_of(curated), shards, rounds, Share(64, 0, 1), steps=steps, actors=2, prefetch=1)
        return [block["address"].tolist() for block in found]

    whole = run(range(4))
    assert len(whole) == 4 and run(range(3, 4)) == whole[3:]


def test_a_shard_that_is_not_what_its_table_says_is_an_error(curated: Path, tmp_path: Path, write_shard) -> None:
    shard = shards_of(curated)[0]
    other = write_shard(tmp_path / "00000.tar", count=40, seed=99)
    changed = shard._replace(url=str(other))
    with pytest.raises(StaleTable, match=r"does not hold the sample .* Curate it again"):
        ReadShare(spec_of(curated))(planned(changed, 2, 3))


def test_an_image_that_no_longer_decodes_is_a_row_that_may_not_be_chosen(curated: Path) -> None:
    shard = shards_of(curated)[0]
    block = ReadShare(spec_of(curated, columns=(), max_pixels=10))(planned(shard, 0, 5))
    assert not block["ok"].any() and block["pixels"].shape == (5, 48, 48, 3) and not block["pixels"].any()


def test_only_the_row_groups_of_a_range_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curated: Path
) -> None:
    table = pq.read_table(curated / "samples" / "00000000.parquet")
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 7)
    tables.write(str(tmp_path), 0, table)
    for rows in (range(1), range(6, 8), range(13, 40), range(38, 60), range(50, 60)):
        read = tables.read(str(tmp_path), 0, ["key", "address"], rows=rows)
        assert read["address"].to_pylist() == [row for row in rows if row < 40]
