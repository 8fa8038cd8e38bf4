"""What a selection always leaves out: each row once, with its reason, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.data import manifest, tables
from curation.data.manifest import OtherRun
from curation.distributed import stored_columns
from curation.distributed.guards import highest_cosine, in_parts
from curation.distributed.pipeline import curate
from curation.recipe import CurateRecipe, Embed, Pool, Write
from curation.recipe.guards import Decontaminate, Exclude, Holdout
from tests.distributed.conftest import WriteShard, kept_uids, select_again

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, write_shard: WriteShard) -> Path:
    """Two shards of 30 rows with urls, one image broken."""
    root = tmp_path_factory.mktemp("guards")
    for number in range(2):
        urls = {"fields": lambda row, number=number: {"url": f"https://site{row % 3}.example/{number}/{row}"}}
        write_shard(root / f"{number:05d}.tar", count=30, seed=80 + number, broken=[number], **urls)
    return root


@pytest.fixture(scope="module")
def base(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> CurateRecipe:
    """A run that keeps everything, of which the tests re-run the selection."""
    recipe = CurateRecipe(
        pool=Pool(shards=str(pool)),
        embed=Embed(model="nano", batch_size=16, seed=7),
        compute={"device": "cpu", "actors": 1},  # type: ignore[arg-type]
        selection=(),
        write=Write(tars=False),
        output=str(tmp_path_factory.mktemp("run") / "out"),
    )
    assert curate(recipe).selected == 58
    return recipe


def rows_of(recipe: CurateRecipe, columns: list[str]) -> list[dict[str, Any]]:
    rows = tables.read_unified(recipe.output, [0, 1], [*columns, "status"]).to_pylist()
    return [row for row in rows if row["status"] == "ok"]


def test_excluded_samples_are_left_out_with_the_lists_name(base: CurateRecipe, tmp_path: Path) -> None:
    rows = rows_of(base, ["uid", "sha256", "json.url"])
    (tmp_path / "opt_out.txt").write_text("\n".join(row["uid"] for row in rows[:5]))
    (tmp_path / "bad.txt").write_text(rows[4]["sha256"] + "\n" + rows[5]["sha256"])
    (tmp_path / "urls.txt").write_text(rows[6]["json.url"])
    lists = (
        Exclude(name="opt-out", files=str(tmp_path / "opt_out.txt")),
        Exclude(name="known bad", files=str(tmp_path / "bad.txt"), by="sha256"),
        Exclude(name="site", files=str(tmp_path / "urls.txt"), by="url"),
    )
    summary = select_again(base, exclude=lists)
    assert [tuple(step) for step in summary.waterfall] == [
        ("duplicate_uid", 58, 58),
        ("excluded: opt-out", 58, 53),
        ("excluded: known bad", 53, 52),
        ("excluded: site", 52, 51),
    ]
    assert kept_uids(base) == {row["uid"] for row in rows[7:]}


def test_guards_do_not_change_what_a_seeded_step_draws(base: CurateRecipe, tmp_path: Path) -> None:
    uniform = CurateRecipe.model_validate(
        {**base.model_dump(), "selection": [{"method": {"name": "uniform"}, "keep": 20}]}
    )
    select_again(uniform)
    before = kept_uids(base)
    (tmp_path / "none.txt").write_text("0" * 32)
    select_again(uniform, exclude=(Exclude(name="nobody", files=str(tmp_path / "none.txt")),))
    assert kept_uids(base) == before


def test_a_list_that_is_applied_at_read_leaves_nothing_of_a_sample_but_its_uid_and_place(
    base: CurateRecipe, tmp_path: Path
) -> None:
    rows = rows_of(base, ["uid", "sha256", "json.url", "image_embedding", "caption"])
    (tmp_path / "uids.txt").write_text("\n".join(row["uid"] for row in rows[:3]))
    (tmp_path / "urls.txt").write_text(rows[3]["json.url"])
    lists = (
        Exclude(name="opt-out", files=str(tmp_path / "uids.txt"), at_read=True),
        Exclude(name="site", files=str(tmp_path / "urls.txt"), by="url", at_read=True),
    )
    recipe = base.model_copy(update={"exclude": lists, "output": str(tmp_path / "out"), "max_drop_fraction": 0.5})
    summary = curate(recipe)
    assert not summary.failures and summary.decoded_now == 60 - 4
    assert (summary.read, summary.embedded, summary.dropped["sample:excluded"]) == (60, 54, 4)
    table = tables.read_unified(recipe.output, [0, 1], None).to_pylist()
    gone = [row for row in table if row["reason"] == "sample:excluded"]
    assert [row["uid"] for row in gone] == [row["uid"] for row in rows[:4]]
    for row in gone:
        assert not any(row[name] for name in ("caption", "sha256", "json.url", "image_embedding", "clip_score"))
    left = [row for row in table if row["status"] == "ok"]
    assert [row["sha256"] for row in left] == [row["sha256"] for row in rows[4:]]
    assert curate(recipe).decoded_now == 0
    with pytest.raises(OtherRun, match="exclude.at_read was"):
        curate(recipe.model_copy(update={"exclude": lists[:1]}))


def test_parts_are_disjoint_and_with_the_rest_they_are_the_pool(base: CurateRecipe, tmp_path: Path) -> None:
    parts: dict[str, tuple[float, float]] = {"reference": (0.0, 0.3), "test": (0.3, 0.4)}
    kept = {}
    for keep in ("rest", "reference", "test"):
        summary = select_again(base, holdout=Holdout(parts=parts, keep=keep))
        kept[keep] = kept_uids(base)
        assert summary.selected == len(kept[keep])
    assert sum(map(len, kept.values())) == 58 and len(set().union(*kept.values())) == 58
    assert len(kept["reference"]) > len(kept["test"]) > 0
    overlapping = Holdout(parts={"validation": (0.25, 0.35)})
    with pytest.raises(ValueError, match=r"'validation' \[0.25, 0.35\) overlaps 'reference' \[0.0, 0.3\)"):
        select_again(base, holdout=overlapping)
    with pytest.raises(ValueError, match="with uid and seed 1 its parts would overlap"):
        select_again(base, holdout=Holdout(parts=parts, seed=1))
    select_again(base, holdout=Holdout(parts={**parts, "more": (0.4, 0.5)}))
    assert len(json.loads((Path(base.output) / "holdouts.json").read_text())) == 2


def test_the_same_images_under_other_uids_are_in_the_same_part(base: CurateRecipe) -> None:
    table = tables.read(base.output, 0, ["uid", "sha256"]).slice(5, 10)
    [test] = in_parts(Holdout(parts={"a": (0.0, 0.5)}, by="sha256"))
    renamed = table.set_column(0, "uid", [[f"{row:032x}" for row in range(10)]])
    assert test.passes(table).tolist() == test.passes(renamed).tolist()
    assert 0 < test.passes(table).sum() < 10


def test_copies_of_an_evaluation_set_are_cut_exact_ones_and_near_ones(
    base: CurateRecipe, tmp_path: Path, write_shard: WriteShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The set's images are those of the pool's first shard that both have, and others.
    write_shard(tmp_path / "eval" / "00000.tar", count=12, seed=80)
    write_shard(tmp_path / "eval" / "00001.tar", count=12, seed=99)
    evaluation = base.model_copy(
        update={"pool": Pool(shards=str(tmp_path / "eval")), "output": str(tmp_path / "eval_run")}
    )
    assert curate(evaluation).selected == 24
    rows = rows_of(base, ["uid", "sha256", "image_embedding"])
    theirs = rows_of(evaluation, ["sha256", "image_embedding"])
    ours_ND, theirs_MD = (np.array([row["image_embedding"] for row in part], np.float64) for part in (rows, theirs))
    cosines = ours_ND @ theirs_MD.T
    cosines /= np.linalg.norm(ours_ND, axis=1)[:, None] * np.linalg.norm(theirs_MD, axis=1)
    exact = np.array([row["sha256"] in {other["sha256"] for other in theirs} for row in rows])
    assert exact.sum() == 11  # one of the twelve is broken in the pool
    best = np.sort(cosines.max(1)[~exact])
    threshold = float((best[30] + best[31]) / 2)  # some rows are near, the others are not
    sets = {"flowers": evaluation.output}
    summary = select_again(base, decontaminate=Decontaminate(sets=sets, near=threshold))
    near = ~exact & (cosines.max(1) >= threshold)
    assert kept_uids(base) == {row["uid"] for row, cut in zip(rows, exact | near, strict=True) if not cut}
    named = {name: before - after for name, before, after in summary.waterfall}
    assert named["copy in flowers"] == 11 and named[f"near copy in flowers (cosine >= {threshold:g})"] == near.sum()
    # Another threshold reads the same columns.
    monkeypatch.setattr(stored_columns, "_make", lambda *_: pytest.fail("made again"))
    assert select_again(base, decontaminate=Decontaminate(sets=sets, near=None)).selected == 58 - 11
    with pytest.raises(ValueError, match="is no run of jobs.curate"):
        select_again(base, decontaminate=Decontaminate(sets={"flowers": str(tmp_path)}))


def test_a_set_that_another_model_embedded_is_refused(
    base: CurateRecipe, tmp_path: Path, write_shard: WriteShard
) -> None:
    write_shard(tmp_path / "eval" / "00000.tar", count=2, seed=1)
    other = base.model_copy(
        update={
            "pool": Pool(shards=str(tmp_path / "eval")),
            "embed": Embed(model="nano", batch_size=16, seed=8),
            "output": str(tmp_path / "eval_run"),
        }
    )
    assert curate(other).selected == 2
    # In one command with the embedding: nothing is left of the second shard's own two images.
    whole = other.model_copy(
        update={"output": str(tmp_path / "whole"), "decontaminate": Decontaminate(sets={"x": other.output}, near=None)}
    )
    assert curate(whole).selected == 0
    with pytest.raises(ValueError, match=r"decontaminate.sets\['x'\] is embedded by"):
        select_again(base, decontaminate=Decontaminate(sets={"x": other.output}))


def test_the_highest_cosine_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    rows, others = rng.normal(size=(50, 8)).astype(np.float16), rng.normal(size=(20, 8)).astype(np.float16)
    unit = [
        part.astype(np.float64) / np.linalg.norm(part.astype(np.float64), axis=1)[:, None] for part in (rows, others)
    ]
    np.testing.assert_allclose(highest_cosine(rows, others), (unit[0] @ unit[1].T).max(1), atol=1e-6)


def test_a_column_made_otherwise_is_refused(base: CurateRecipe) -> None:
    samples = manifest.committed(base.output, "embed")

    class Ones:
        piece = "ones"
        needs = frozenset({"uid"})

        def __init__(self, made_by: dict[str, Any]):
            self.made_by = made_by

        def make(self, table: Any) -> dict[str, Any]:
            return {"value": table["uid"].combine_chunks()}

    assert stored_columns.make(base.output, samples, [0, 1], Ones({"a": 1})) == 2
    assert stored_columns.make(base.output, samples, [0, 1], Ones({"a": 1})) == 0
    read = tables.read(base.output, 1, ["ones.value", "uid", "status"]).to_pylist()
    assert all(row["ones.value"] == (row["uid"] if row["status"] == "ok" else None) for row in read)
    with pytest.raises(OtherRun, match="the column 'ones' of shard 0"):
        stored_columns.make(base.output, samples, [0, 1], Ones({"a": 2}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Holdout(parts={"a": (0.0, 0.2), "b": (0.1, 0.3)}), "'a' .* overlaps 'b'"),
        (lambda: Holdout(parts={"a": (0.2, 0.2)}), "0 <= low < high <= 1, got 'a'"),
        (lambda: Holdout(parts={"rest": (0.1, 0.2)}), "a name other than 'rest'"),
        (lambda: Holdout(parts={"a": (0.1, 0.2)}, keep="b"), "holdout.keep must be 'rest' or one of"),
        (lambda: Decontaminate(sets={"a": "x"}, exact=False, near=None), "decontaminate cuts nothing"),
        (lambda: Decontaminate(sets={"a b": "x"}), "a piece's name"),
    ],
)
def test_guards_that_make_no_sense_are_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
