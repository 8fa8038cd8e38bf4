"""Two nights with new shards between them: compared, promoted or held back, and taken back by one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.data import nights
from curation.data.drift import QUANTILES
from curation.distributed.nightly import nightly
from curation.recipe import Select
from curation.recipe.nightly import Drift, NightlyRecipe
from jobs import nightly as job

WriteShard = Callable[..., Path]


def language(row: int) -> dict[str, str]:
    return {"language": "en" if row % 4 else "de"}


@pytest.fixture
def recipe(tmp_path: Path, recipe_for: Callable[..., Any]) -> NightlyRecipe:
    loose = Drift(drop_share=1, quantile=10, share=0.3, kept=10, cost=1e9)
    half = (Select(method={"name": "clip_score"}, keep_fraction=0.5),)
    curate = recipe_for(str(tmp_path / "pool"), output=tmp_path / "nights", selection=half, max_drop_fraction=0.9)
    return NightlyRecipe(curate=curate, shares=("json.language",), drift=loose)


@pytest.mark.slow
def test_nights_are_compared_promoted_held_back_and_taken_back(
    ray_session: None,
    recipe: NightlyRecipe,
    tmp_path: Path,
    write_shard: WriteShard,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = str(tmp_path / "nights")
    write_shard(tmp_path / "pool" / "00000.tar", count=24, seed=1, broken=[3], fields=language)
    (tmp_path / "nightly.json").write_text(recipe.model_dump_json())
    assert job.main([str(tmp_path / "nightly.json")]) == 0
    first = nights.current(output)
    said = capsys.readouterr()
    assert first and f"promoted: {first} is current" in said.err
    assert f"{output}/run: selection/ has the kept set" in said.out
    told = nights.read(output, first)
    assert (told["against"], told["changes"]) == (None, [])

    # The same pool again: nothing to promote, no other folder.
    idle = nightly(recipe)
    assert (idle.name, idle.against) == (None, first) and nights.complete(output) == [first]
    misspelt = recipe.model_copy(update={"shares": ("json.langauge",)})
    with pytest.raises(
        ValueError, match=r"shares: no shard has a column 'json.langauge', did you mean 'json.language'"
    ):
        nightly(misspelt)

    # A shard like the first one: promoted. Its figures are those of its rows.
    write_shard(tmp_path / "pool" / "00001.tar", count=24, seed=2, broken=[5, 6], fields=language)
    second = nightly(recipe)
    assert second.name and second.against == first and second.held_back == ()
    assert nights.current(output) == second.name
    told = nights.read(output, second.name)
    groups = told["groups"]
    assert [groups[group]["rows"] for group in ("pool", "new", "kept")] == [45, 22, 22]
    assert (groups["new"]["read"], sum(groups["new"]["dropped"].values())) == (24, 2)
    assert groups["pool"]["shares"]["json.language"] == {"de": 12, "en": 33}
    table = pq.read_table(tmp_path / "nights" / "run" / "samples" / "00000001.parquet")
    scores = np.array([score for score in table["clip_score"].to_pylist() if score is not None], np.float32)
    assert groups["new"]["quantiles"]["clip_score"] == np.quantile(scores, QUANTILES, method="inverted_cdf").tolist()
    [reason] = groups["new"]["dropped"]
    [drop] = [change for change in second.changes if change.name == f"new: dropped {reason}"]
    assert (drop.then, drop.now) == (1 / 24, 2 / 24)

    # A shard in another language, and one that left the pool: written, and held back.
    (tmp_path / "pool" / "00001.tar").unlink()
    write_shard(tmp_path / "pool" / "00002.tar", count=24, seed=3, fields=lambda row: {"language": "vi"})
    third = nightly(recipe)
    # 24 of the pool's 47 rows moved (0.511), all of the new ones (1.0); of the kept ones, as the scores have it.
    held = {change.name: change.distance for change in third.held_back}
    assert held["new: json.language"] == 1.0 and held["pool: json.language"] == pytest.approx(24 / 47)
    assert nights.current(output) == second.name and third.name in nights.complete(output)
    told = nights.read(output, third.name)
    assert [told["groups"][group]["rows"] for group in ("pool", "new")] == [47, 24]
    assert told["groups"]["pool"]["read"] == told["summary"]["read"] == 48 and told["last_shard"] == 2

    # The next night comes to the same, which still waits: no second copy.
    assert nightly(recipe).name == third.name and nights.complete(output)[2:] == [third.name]

    # By hand: promoted after all, and taken back, each by one command. What was taken back stays out.
    assert third.name and job.main([f"--promote={third.name}", output]) == 0
    assert nights.current(output) == third.name
    assert job.main(["--rollback", output]) == 0 and nights.current(output) == second.name
    tolerant = recipe.model_copy(update={"drift": recipe.drift.model_copy(update={"share": 1.0})})
    (tmp_path / "tolerant.json").write_text(tolerant.model_dump_json())
    assert job.main([str(tmp_path / "tolerant.json")]) == 0 and nights.current(output) == second.name
    assert f"nothing promoted: {third.name}, with the same kept set, was rolled back" in capsys.readouterr().err

    # New shards of which nothing can be kept change no kept set, and are told all the same.
    assert job.main(["--promote", third.name, output]) == 0
    write_shard(tmp_path / "pool" / "00003.tar", count=8, seed=4, broken=range(8), fields=language)
    idle = nightly(recipe)
    assert idle.name is None and not idle.summary.failures
    strict = recipe.model_copy(update={"drift": recipe.drift.model_copy(update={"drop_share": 0.5})})
    fourth = nightly(strict)
    assert [change.name for change in fourth.held_back] == [f"new: dropped {reason}"]
    assert fourth.name not in (None, third.name) and nights.current(output) == third.name
    assert job.main(["--rollback", output]) == 0 and nights.current(output) == second.name
    assert job.main(["--rollback", output]) == 0 and nights.current(output) == first
    assert job.main(["--rollback", output]) == 2
    assert "no night was promoted before" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        job.main(["--promote", third.name, "--rollback", output])
    assert job.main(["--promote", "", output]) == 2 and nights.current(output) == first  # a shell's unset variable
    night = tmp_path / "nights" / "nights" / first
    subset = json.loads((night / "summary.json").read_text())
    assert subset["selected"] == pq.read_metadata(night / "selection" / "selected.parquet").num_rows
