"""Curation from end to end on small pools: every sample accounted for, nothing done twice, the same bytes always."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.data import manifest, shard_list, storage
from curation.data.lease import Lease, OutputInUse
from curation.data.manifest import OtherRun
from curation.data.pieces import Record
from curation.distributed.account import Summary
from curation.distributed.metrics import RunMetrics
from curation.distributed.pipeline import ActorsFailed, Watch, curate, embed_shards, make_plan
from curation.recipe import Audit, Compute, CurateRecipe, Embed, Group, Pool, Select, Threshold, Write

RecipeFor = Callable[..., CurateRecipe]
RESULTS = ("samples", "selection", "shards")

pytestmark = pytest.mark.usefixtures("ray_session")


def results(output: Path, *, folders: tuple[str, ...] = RESULTS) -> dict[str, str]:
    """sha256 of every file in the result folders."""
    files = [path for folder in folders for path in sorted((output / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def keep(fraction: float) -> tuple[Select, ...]:
    return (Select(method={"name": "clip_score"}, keep_fraction=fraction),)


@pytest.fixture(scope="module")
def finished(small_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """One finished run of the small pool."""
    output = tmp_path_factory.mktemp("finished")
    summary = curate(
        CurateRecipe(
            pool=Pool(shards=f"{small_pool}/a::{small_pool}/b"),
            embed=Embed(model="nano", batch_size=8),
            compute=Compute(device="cpu", actors=1),
            selection=keep(0.3),
            output=str(output),
        )
    )
    return output, summary


def test_read_is_embedded_plus_dropped_for_the_run_and_for_each_shard(finished: tuple[Path, Summary]) -> None:
    output, summary = finished
    assert (summary.read, summary.embedded, summary.dropped) == (75, 73, {"image:unrecognized": 2})
    assert summary.selected == round(73 * 0.3) and not summary.failures
    for path in (output / "manifest" / "embed").iterdir():
        record = json.loads(path.read_text())
        assert record["read"] == record["embedded"] + sum(record["dropped"].values())
        assert record["read"] == pq.read_metadata(output / "samples" / f"{path.stem}.parquet").num_rows


def test_every_dropped_sample_is_a_row_of_drops_parquet(finished: tuple[Path, Summary]) -> None:
    drops = pq.read_table(finished[0] / "drops.parquet").to_pylist()
    assert [(Path(d["shard"]).parent.name, Path(d["shard"]).name, d["reason"]) for d in drops] == [
        ("a", "00001.tar", "image:unrecognized"),
        ("b", "00000.tar", "image:unrecognized"),
    ]
    assert all(len(d["uid"]) == 32 for d in drops)


def test_the_kept_set_is_the_top_by_score(finished: tuple[Path, Summary]) -> None:
    output, summary = finished
    table = pq.read_table(output / "samples").to_pylist()
    best = sorted((row for row in table if row["status"] == "ok"), key=lambda row: -row["clip_score"])[
        : summary.selected
    ]
    selected = pq.read_table(output / "selection" / "selected.parquet").to_pylist()
    assert {row["uid"] for row in selected} == {row["uid"] for row in best}
    assert [row["address"] for row in selected] == sorted(row["address"] for row in best)
    subset = np.load(output / "selection" / "subset.npy")
    assert subset.dtype == np.dtype("u8,u8")
    assert [f"{high:016x}{low:016x}" for high, low in subset.tolist()] == sorted(row["uid"] for row in best)


def test_kept_samples_keep_their_bytes_in_the_curated_tars(finished: tuple[Path, Summary], small_pool: Path) -> None:
    output, summary = finished
    assert json.loads((output / "shards" / "sizes.json").read_text()) == {"00000.tar": summary.selected}
    origins = pq.read_table(output / "shards" / "00000.parquet").to_pylist()
    with tarfile.open(output / "shards" / "00000.tar") as curated:
        for origin in origins:
            with tarfile.open(origin["shard"]) as source:
                for extension in ("jpg", "json", "txt"):
                    kept = curated.extractfile(f"{origin['key']}.{extension}")
                    original = source.extractfile(f"{origin['source_key']}.{extension}")
                    assert kept and original and kept.read() == original.read()


def test_two_actors_write_the_same_bytes_as_one(
    finished: tuple[Path, Summary], small_pool: Path, recipe_for: RecipeFor, tmp_path: Path
) -> None:
    curate(recipe_for(f"{small_pool}/a::{small_pool}/b", actors=2, selection=keep(0.3)))
    assert results(tmp_path / "out", folders=("samples", "selection")) == results(
        finished[0], folders=("samples", "selection")
    )


def test_metrics_tell_of_the_actors_while_shards_are_embedded_and_not_while_they_are_selected(
    small_pool: Path, recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(RunMetrics, "actors", lambda self, count: heard.append(f"{count} actor"))
    monkeypatch.setattr(RunMetrics, "embedding", lambda self, record: heard.append(f"{record['read']} read"))
    monkeypatch.setattr(RunMetrics, "close", lambda self: heard.append("closed"))

    class Stages(Watch):
        def stage(self, name: str) -> None:
            heard.append(name)

    recipe = recipe_for(f"{small_pool}/b")
    assert not curate(recipe, watch=Stages()).failures
    shards = len(list((small_pool / "b").iterdir()))
    assert heard[0] == "1 actor" and heard[1 + shards :] == ["closed", "select", "write"]
    assert all(said.endswith(" read") for said in heard[1 : 1 + shards])


def test_another_selection_decodes_nothing_and_replaces_the_kept_set(
    small_pool: Path, recipe_for: RecipeFor, tmp_path: Path
) -> None:
    shards, output = str(small_pool / "b"), tmp_path / "out"
    wide = recipe_for(shards, selection=keep(0.9), write={"samples_per_shard": 10, "embeddings": True})
    first = curate(wide)
    before = results(output, folders=("samples",))
    assert first.decoded_now == 41 and len(list((output / "shards").glob("*.tar"))) == 4
    assert len(results(output, folders=("embeddings",))) == 3 * 4

    none = curate(recipe_for(shards, selection=keep(0.4), write=Write(tars=False)))
    assert none.selected == 16 and results(output, folders=("shards", "embeddings")) == {}
    assert manifest.committed(str(output), "write") == manifest.committed(str(output), "embeddings") == {}
    audit = Audit(groups=(Group(column="json.langauge"),))
    with pytest.raises(ValueError, match="audit.groups: no shard has a column 'json.langauge'"):
        curate(recipe_for(shards, audit=audit))

    narrow = curate(recipe_for(shards, selection=keep(0.4), write={"samples_per_shard": 10}))
    assert narrow.decoded_now == 0 and narrow.selected == 16
    assert results(output, folders=("samples",)) == before
    assert sorted(path.name for path in (output / "shards").glob("*.tar")) == ["00000.tar", "00001.tar"]

    fresh = tmp_path / "fresh"
    curate(recipe_for(shards, selection=keep(0.4), write={"samples_per_shard": 10}, output=fresh))
    replaced = results(output, folders=("selection", "shards"))
    assert {k: v for k, v in replaced.items() if "README" not in k} == {
        k: v for k, v in results(fresh, folders=("selection", "shards")).items() if "README" not in k
    }


def test_only_new_shards_are_embedded_and_a_shard_that_sorts_first_shifts_no_number(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path
) -> None:
    pool = tmp_path / "pool"
    write_shard(pool / "b.tar", count=5, seed=1)
    curate(recipe_for(str(pool)))
    before = results(tmp_path / "out", folders=("samples",))
    write_shard(pool / "a.tar", count=4, seed=2)
    summary = curate(recipe_for(str(pool)))
    assert summary.shards["embedded_now"] == 1 and summary.decoded_now == 4 and summary.read == 9
    assert before.items() <= results(tmp_path / "out", folders=("samples",)).items()
    assert [Path(s.url).name for s in shard_list.load(str(tmp_path / "out"))] == ["b.tar", "a.tar"]


def test_what_a_run_put_into_the_index_is_its_own_in_the_next_run(
    small_pool: Path, recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MIN_INDEXED", 1)
    recipe = recipe_for(f"{small_pool}/b")
    assert not curate(recipe).failures
    assert storage.names_in(f"{recipe.output}/manifest/embed.index") == ["000000.parquet"]
    again = curate(recipe)
    assert not again.failures and again.shards["embedded_now"] == 0


def test_an_edited_shard_gets_a_new_number_and_its_old_rows_leave_the_pool(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path
) -> None:
    pool = tmp_path / "pool"
    write_shard(pool / "a.tar", count=5, seed=1)
    curate(recipe_for(str(pool)))
    write_shard(pool / "a.tar", count=7, seed=2)
    os.utime(pool / "a.tar", ns=(1, 1))
    summary = curate(recipe_for(str(pool), selection=keep(1.0)))
    assert (summary.read, summary.selected, summary.shards["retired"]) == (7, 7, 1)
    old, new = shard_list.load(str(tmp_path / "out"))
    assert (old.retired, old.rows, new.number, new.retired, new.rows) == (True, 5, 1, False, 7)
    addresses = pq.read_table(tmp_path / "out" / "selection" / "selected.parquet")["address"].to_pylist()
    assert all(address >> 20 == 1 for address in addresses)


def test_content_decides_when_the_recipe_says_so(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path
) -> None:
    path = write_shard(tmp_path / "pool" / "a.tar", count=3)
    by_content = Pool(shards=str(path), verify="content")
    curate(recipe_for("", pool=by_content))
    os.utime(path, ns=(5, 5))
    assert not make_plan(recipe_for("", pool=by_content)).todo
    assert len(make_plan(recipe_for(str(path))).todo) == 1
    data = bytearray(path.read_bytes())
    stat = path.stat()
    data[600] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(make_plan(recipe_for("", pool=by_content)).todo) == 1


def test_a_repeated_uid_is_embedded_and_the_lowest_address_is_kept(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path
) -> None:
    def same(row: int) -> dict[str, str]:
        return {"uid": f"{row % 4:032x}"}

    write_shard(tmp_path / "pool" / "a.tar", count=6, seed=1, fields=same)
    write_shard(tmp_path / "pool" / "b.tar", count=3, seed=2, fields=same)
    summary = curate(recipe_for(str(tmp_path / "pool"), selection=keep(1.0)))
    assert (summary.embedded, summary.selected, summary.waterfall[0]) == (9, 4, ("duplicate_uid", 9, 4))
    addresses = pq.read_table(tmp_path / "out" / "selection" / "selected.parquet")["address"].to_pylist()
    assert addresses == [0, 1, 2, 3]


def test_filters_and_selectors_apply_in_order_each_with_its_own_count(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path
) -> None:
    write_shard(tmp_path / "pool" / "a.tar", count=12, fields=lambda row: {"punsafe": None if row == 0 else row / 10})
    steps = (
        Threshold(column="json.punsafe", at_most=0.8),
        Select(method={"name": "uniform"}, keep=5),
        Select(method={"name": "clip_score"}, keep_fraction=0.4),
    )
    summary = curate(recipe_for(str(tmp_path / "pool"), selection=steps))
    assert summary.waterfall == [
        ("duplicate_uid", 12, 12),
        ("json.punsafe <= 0.8", 12, 8),
        ("uniform", 8, 5),
        ("clip_score", 5, 2),
    ]


def test_a_run_that_drops_too_much_fails_and_leaves_what_it_committed(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path
) -> None:
    write_shard(tmp_path / "pool" / "a.tar", count=4, broken=[1, 2])
    summary = curate(recipe_for(str(tmp_path / "pool"), max_drop_fraction=0.4))
    assert summary.selected is None
    assert "2 of 4 samples were dropped (50.0%), more than max_drop_fraction 40.0%" in summary.failures[0]
    again = curate(recipe_for(str(tmp_path / "pool"), max_drop_fraction=0.5))
    assert not again.failures and again.decoded_now == 0


def test_a_shard_that_the_store_refuses_is_pending_and_nothing_of_it_is_dropped(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "pool" / "a.tar", count=3)
    write_shard(tmp_path / "pool" / "b.tar", count=2)
    refused = tmp_path / "pool" / "b.tar"
    plan = make_plan(recipe_for(str(tmp_path / "pool")))
    monkeypatch.setattr("curation.distributed.pipeline.make_plan", lambda recipe: plan)
    refused.rename(tmp_path / "b.tar")
    summary = curate(recipe_for(str(tmp_path / "pool")))
    assert summary.read == 3 and not summary.dropped and summary.selected is None
    assert "b.tar is pending, run again to read it: FileNotFoundError" in summary.failures[0]
    monkeypatch.undo()
    (tmp_path / "b.tar").rename(refused)
    assert curate(recipe_for(str(tmp_path / "pool"))).read == 5


def test_a_shard_that_is_named_but_absent_is_a_warning_with_a_count(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path
) -> None:
    write_shard(tmp_path / "pool" / "00000.tar", count=3)
    write_shard(tmp_path / "pool" / "00002.tar", count=3)
    summary = curate(recipe_for(f"{tmp_path}/pool/{{00000..00002}}.tar"))
    assert summary.read == 6 and summary.warnings == {"shard:absent": 1} and not summary.failures


def test_another_model_on_the_same_output_is_refused(small_pool: Path, recipe_for: RecipeFor) -> None:
    recipe = recipe_for(str(small_pool / "a" / "00002.tar"))
    curate(recipe)
    with pytest.raises(OtherRun, match=r"embed.batch_size was 8, now 9"):
        curate(recipe.model_copy(update={"embed": Embed(model="nano", batch_size=9)}))


def test_a_second_run_on_an_output_in_use_is_refused(small_pool: Path, recipe_for: RecipeFor, tmp_path: Path) -> None:
    with Lease(str(tmp_path / "out")), pytest.raises(OutputInUse, match="is held by process"):
        curate(recipe_for(str(small_pool / "a")))


def test_a_pool_or_output_that_is_not_named_is_an_error(small_pool: Path, recipe_for: RecipeFor) -> None:
    with pytest.raises(ValueError, match=r"pool\.shards is empty"):
        curate(recipe_for(""))
    with pytest.raises(ValueError, match="output is empty"):
        make_plan(recipe_for(str(small_pool)).model_copy(update={"output": ""}))
    with pytest.raises(ValueError, match="no shard matches"):
        curate(recipe_for(str(small_pool / "nothing*.tar")))


def test_asking_for_a_gpu_where_there_is_none_is_an_error(small_pool: Path, recipe_for: RecipeFor) -> None:
    recipe = recipe_for(str(small_pool / "a")).model_copy(update={"compute": Compute(device="cuda")})
    with pytest.raises(ValueError, match="the cluster has no GPU"):
        curate(recipe)


def test_more_actors_than_cpus_are_an_error_not_a_hang(small_pool: Path, recipe_for: RecipeFor) -> None:
    with pytest.raises(ValueError, match=r"compute\.actors=99"):
        curate(recipe_for(str(small_pool / "a"), actors=99))


def test_an_empty_tar_is_a_shard_of_no_samples(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path
) -> None:
    write_shard(tmp_path / "pool" / "a.tar", count=0)
    summary = curate(recipe_for(str(tmp_path / "pool")))
    assert (summary.read, summary.selected, summary.failures) == (0, 0, [])
    assert len(np.load(tmp_path / "out" / "selection" / "subset.npy")) == 0


def test_a_shard_edited_between_embedding_and_writing_stops_the_run_with_its_name(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "pool" / "a.tar", count=3, seed=1)
    recipe = recipe_for(str(path), selection=keep(1.0))
    curate(recipe.model_copy(update={"write": Write(tars=False)}))
    plan = make_plan(recipe)
    write_shard(path, count=3, seed=2)
    monkeypatch.setattr("curation.distributed.pipeline.make_plan", lambda recipe: plan)
    with pytest.raises(OSError, match=r"a\.tar no longer holds sample '000000000' at offset 0: it was edited"):
        curate(recipe)


def test_a_shard_list_that_was_lost_is_an_error_not_a_new_numbering(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path
) -> None:
    path = write_shard(tmp_path / "pool" / "a.tar", count=2)
    curate(recipe_for(str(path)))
    (tmp_path / "out" / "shards.parquet").unlink()
    with pytest.raises(ValueError, match=r"shard 0 is committed as .*a\.tar, but .*shards\.parquet does not say so"):
        curate(recipe_for(str(path)))


def test_a_checkpoint_that_does_not_fit_the_model_is_told_as_such(
    write_shard: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path
) -> None:
    path = write_shard(tmp_path / "pool" / "a.tar", count=2)
    (tmp_path / "other.pt").write_bytes(b"no weights")
    embed = Embed(model="nano", checkpoint=str(tmp_path / "other.pt"))
    with pytest.raises(
        ActorsFailed, match=r"ValueError: .*other\.pt does not hold weights of nano: it is no state dict"
    ):
        curate(recipe_for(str(path)).model_copy(update={"embed": embed}))


def test_an_output_that_the_workers_do_not_share_is_told_after_the_first_shard(
    small_pool: Path, recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(*given: Any) -> Iterator[Record]:
        for record in embed_shards(*given):
            Path(manifest.url_of(recipe.output, "embed", record["shard"])).unlink()
            yield record

    recipe = recipe_for(f"{small_pool}/a")
    monkeypatch.setattr("curation.distributed.pipeline.embed_shards", elsewhere)
    monkeypatch.setattr("curation.distributed.pipeline.SEEN_WITHIN_S", 0.1)
    with pytest.raises(OSError, match="must be on storage that all nodes share"):
        curate(recipe)
