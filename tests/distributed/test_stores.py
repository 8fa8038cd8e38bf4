"""From an S3 bucket to an S3 bucket, through a server that throttles, cuts, truncates, hangs and refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.data import manifest, storage, tables
from curation.data.read_rules import ReadRules
from curation.data.rows import read_rows
from curation.distributed.embed import ShardEmbed
from curation.distributed.pipeline import curate
from curation.distributed.train import learner_url, train
from curation.models.clip import Towers, load_towers
from curation.recipe import CurateRecipe, Pool, Select, Threshold, TrainRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, Train, Workers
from tests.distributed.conftest import jpeg, nano_spec


@pytest.fixture(scope="module")
def towers() -> Towers:
    return load_towers("nano", seed=0)


@pytest.fixture
def embed(towers: Towers, s3_bucket: str) -> ShardEmbed:
    """Embeds into the bucket."""
    return ShardEmbed(nano_spec(f"{s3_bucket}/out"), towers=towers)


@pytest.fixture(scope="module")
def big_shard(tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path]) -> bytes:
    """A tar of more than one range: 400 samples, two of them broken."""
    path = write_shard(tmp_path_factory.mktemp("big") / "a.tar", count=400, broken=[7, 399])
    return path.read_bytes()


def call(embed: ShardEmbed, url: str) -> dict[str, Any]:
    row = {"number": np.array([0]), "url": np.array([url]), "fingerprint": np.array([storage.fingerprint(url)])}
    return json.loads(embed(row)["record"][0])


@pytest.mark.parametrize("fault", ["throttle", "expire", "cut", "truncate"])
def test_a_store_that_fails_for_a_while_costs_no_sample_and_one_that_stays_down_leaves_the_shard_pending(
    embed: ShardEmbed, object_store: Any, s3_bucket: str, big_shard: bytes, fault: str
) -> None:
    url, out = f"{s3_bucket}/pool/a.tar", f"{s3_bucket}/out"
    storage.write_bytes(url, big_shard)

    object_store.fault = lambda request: fault if (request.method, request.key) == ("GET", "pool/a.tar") else None
    record = call(embed, url)
    assert record["pending"] and "read" not in record and object_store.faults[fault] >= 4
    assert not manifest.committed(out, "embed") and storage.names_in(f"{out}/samples") == []

    object_store.heal()
    # The first request of each kind fails, on the shard as on the table and the manifest.
    object_store.fault = lambda request: fault if request.nth == 1 else None
    record = call(embed, url)
    assert (record["read"], record["embedded"], record["dropped"]) == (400, 398, {"image:unrecognized": 2})
    assert record["sha256"] == hashlib.sha256(big_shard).hexdigest() and object_store.faults[fault]
    object_store.heal()
    assert manifest.committed(out, "embed")[0]["read"] == 400 == tables.read(out, 0, ["uid"]).num_rows

    # What training reads of a pool in a bucket: rows of the table, and their bytes, here up to the end of the tar.
    object_store.fault = lambda request: fault if request.nth == 1 else None
    rows = read_rows(out, 0, url, np.arange(380, 400), ["uid"], rules=ReadRules())
    assert [row.place for row in rows.images] == list(range(20)) and rows.columns.num_rows == 20
    assert object_store.faults[fault]


def test_a_table_that_the_store_refuses_leaves_the_shard_pending_and_uncommitted(
    embed: ShardEmbed, object_store: Any, s3_bucket: str, big_shard: bytes
) -> None:
    storage.write_bytes(f"{s3_bucket}/a.tar", big_shard)
    object_store.fault = lambda request: "throttle" if request.method == "PUT" and "samples" in request.key else None
    assert "pending" in call(embed, f"{s3_bucket}/a.tar")
    object_store.heal()
    assert not manifest.committed(f"{s3_bucket}/out", "embed")


def upload(folder: Path, url: str) -> None:
    for path in sorted(folder.rglob("*.tar")):
        storage.write_bytes(storage.join(url, str(path.relative_to(folder))), path.read_bytes())


@pytest.mark.slow
def test_a_pool_in_a_bucket_is_curated_into_a_bucket_as_from_disk_to_disk_whatever_the_store_does(
    ray_session: None,
    object_store: Any,
    s3_bucket: str,
    small_pool: Path,
    recipe_for: Callable[..., CurateRecipe],
    tmp_path: Path,
) -> None:
    steps = (Select(method={"name": "clip_score"}, keep_fraction=0.5),)
    assert not curate(recipe_for(f"{small_pool}/a::{small_pool}/b", selection=steps)).failures
    upload(small_pool, f"{s3_bucket}/pool")
    out = f"{s3_bucket}/run"
    recipe = recipe_for(f"{s3_bucket}/pool/a/*.tar::{s3_bucket}/pool/b", selection=steps)
    recipe = recipe.model_copy(update={"output": out})

    # One shard cannot be read at all; for every other file of the pool and piece the first request fails, one way each.
    ways = ("throttle", "cut", "truncate", "expire")

    def fault(request: Any) -> str | None:
        if request.key == "pool/b/00007.tar" and request.method == "GET":
            return "expire"
        is_watched = request.key.startswith("pool/") or "0000" in request.key
        return ways[crc32(request.key.encode()) % 4] if request.nth == 1 and is_watched else None

    object_store.fault = fault
    first = curate(recipe)
    [failure] = first.failures
    assert "pool/b/00007.tar is pending, run again to read it" in failure
    assert len(manifest.committed(out, "embed")) == 4 and len(object_store.faults) == len(ways)

    object_store.heal()
    again = curate(recipe)
    assert not again.failures
    assert (again.read, again.embedded, again.decoded_now) == (75, 73, 8)
    assert not storage.exists(f"{out}/lease.json")
    disk = str(tmp_path / "out")
    # Tables name the shards by their URLs; what was kept, and how it is written, does not depend on where it lies.
    assert storage.names_in(f"{out}/shards") == storage.names_in(f"{disk}/shards")
    for name in ("shards/00000.tar", "selection/subset.npy", "shards/sizes.json"):
        assert storage.sha256_of(f"{out}/{name}") == storage.sha256_of(f"{disk}/{name}"), name


@pytest.mark.slow
def test_a_run_in_a_bucket_is_trained_into_a_bucket_as_from_disk_to_disk(
    curated: Path, object_store: Any, s3_bucket: str, tmp_path: Path
) -> None:
    """`curated`'s tars stay on disk; its tables and manifests, and all that training writes, are in the bucket."""
    for path in sorted(path for path in curated.rglob("*") if path.is_file() and path.suffix != ".tar"):
        storage.write_bytes(f"{s3_bucket}/run/{path.relative_to(curated)}", path.read_bytes())

    def trained(run: str, output: str) -> TrainRecipe:
        return TrainRecipe(
            data=Data(run=run, segment_rows=8),
            learner=Weights(model="nano", seed=1),
            train=Train(num_steps=2, sub_batch=8, filter_ratio=0.5, score_batch=16),
            compute=Workers(device="cpu", max_failures=0),
            output=output,
        )

    in_bucket, on_disk = trained(f"{s3_bucket}/run", f"{s3_bucket}/out"), trained(str(curated), str(tmp_path / "out"))
    assert not train(on_disk).failures
    summary = train(in_bucket)
    assert not summary.failures and summary.steps == 2 and len(object_store.requests) > 50
    assert storage.sha256_of(learner_url(in_bucket.output)) == storage.sha256_of(learner_url(on_disk.output))

    # Checkpoint, ledger and log are found again: without its account the run goes on from its last step.
    storage.delete(f"{in_bucket.output}/train/summary.json")
    assert train(in_bucket).last == summary.last


@pytest.mark.slow
def test_a_parquet_pool_and_its_metadata_in_a_bucket_are_curated_as_on_disk(
    ray_session: None, s3_bucket: str, recipe_for: Callable[..., CurateRecipe], tmp_path: Path
) -> None:
    uids = [f"{row:032x}" for row in range(12)]
    pool = pa.table({"uid": uids, "jpg": [jpeg(row) for row in range(12)], "txt": [f"row {row}" for row in range(12)]})
    known = pa.table({"uid": uids[::-1], "score": np.arange(12.0)})
    runs = []
    for root in (str(tmp_path), s3_bucket):
        for name, table in (("pool/a.parquet", pool), ("metadata/m.parquet", known)):
            with storage.write_atomic(f"{root}/{name}") as file:
                pq.write_table(table, file)
        steps = (Threshold(column="json.score", at_least=9),)
        recipe = recipe_for("", pool=Pool(shards=f"{root}/pool", metadata=f"{root}/metadata"), selection=steps)
        recipe = recipe.model_copy(update={"output": f"{root}/run"})
        summary = curate(recipe)
        assert not summary.failures and (summary.read, summary.embedded, summary.selected) == (12, 12, 3)
        runs.append(recipe.output)
    for name in ("shards/00000.tar", "selection/subset.npy"):
        assert storage.sha256_of(f"{runs[0]}/{name}") == storage.sha256_of(f"{runs[1]}/{name}"), name
