"""All the real pools in one run: the counts are those that the data's own description gives."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.distributed.account import Summary
from curation.distributed.pipeline import curate
from curation.recipe import CurateRecipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

POOLS = {
    "flickr8k": 6_000,
    "cc12m-mini": 32,
    "emoji-noto": 2_100,
    "fashion": 3_000,
    "vietnamese": 600,
    "bad-input": 159,
}
BAD_INPUT = "bad-input/00000.tar"
NUM_BROKEN = 37 + 30


@pytest.fixture(scope="module")
def run(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    output = tmp_path_factory.mktemp("real")
    patterns = [str(real_data / (BAD_INPUT if name == "bad-input" else name)) for name in POOLS]
    recipe = CurateRecipe.model_validate(
        {
            "pool": {"shards": "::".join(patterns)},
            "embed": {"model": "nano", "batch_size": 64},
            "compute": {"device": "cpu", "actors": 2},
            "output": str(output),
        }
    )
    return output, curate(recipe)


def test_every_sample_is_read_and_only_the_broken_ones_are_dropped(run: tuple[Path, Summary]) -> None:
    output, summary = run
    table = pq.ParquetDataset(output / "samples", schema=None).read(["shard", "status"])
    folders = Counter(Path(shard).parent.name for shard in table["shard"].to_pylist())
    assert folders == POOLS
    assert (summary.read, summary.embedded) == (sum(POOLS.values()), sum(POOLS.values()) - NUM_BROKEN)
    drops = pq.read_table(output / "drops.parquet")
    assert {Path(shard).parent.name for shard in drops["shard"].to_pylist()} == {"bad-input"}
    assert sum(summary.dropped.values()) == drops.num_rows == NUM_BROKEN
    assert not summary.failures


def test_each_bad_file_has_the_outcome_that_its_manifest_tells(run: tuple[Path, Summary], real_data: Path) -> None:
    with open(real_data / "bad-input" / "manifest.csv", newline="") as file:
        decodes = {row["key"]: row["result"] == "decodes" for row in csv.DictReader(file)}
    for path in (run[0] / "samples").iterdir():
        table = pq.read_table(path)
        if table.num_rows and Path(table["shard"][0].as_py()).parent.name == "bad-input":
            assert {row["key"]: row["status"] == "ok" for row in table.to_pylist()} == decodes
            assert all(row["reason"].startswith("image:") for row in table.to_pylist() if row["reason"])
            return
    pytest.fail("no table of bad-input")


def test_the_pools_own_fields_are_in_the_table(run: tuple[Path, Summary]) -> None:
    tables = {Path(t["shard"][0].as_py()).parent.name: t for t in map(pq.read_table, (run[0] / "samples").iterdir())}
    assert set(tables["vietnamese"]["json.language"].to_pylist()) == {"vi"}
    assert "json.articleType" in tables["fashion"].column_names
    assert tables["flickr8k"].schema.field("json.width").type == "int64"
    assert len(tables["flickr8k"]["json.captions"][0]) == 5


def test_thirty_percent_are_kept_and_written(run: tuple[Path, Summary], real_data: Path) -> None:
    output, summary = run
    assert summary.selected == round(summary.embedded * 0.3)
    assert pq.read_table(output / "shards" / "00000.parquet").num_rows == summary.selected


def test_the_files_of_originals_tar_under_no_image_extension_are_image_missing(
    real_data: Path, recipe_for: Callable[..., CurateRecipe]
) -> None:
    with open(real_data / "bad-input" / "manifest.csv", newline="") as file:
        suffixes = Counter(Path(row["path"]).suffix.lower() for row in csv.DictReader(file))
    images = sum(suffixes[suffix] for suffix in (".jpg", ".png", ".jpeg", ".webp"))
    summary = curate(recipe_for(str(real_data / "bad-input" / "originals.tar"), max_drop_fraction=1.0))
    assert summary.read == 159
    assert summary.dropped["image:missing"] == 159 - images
    assert summary.dropped["caption:missing"] == images
