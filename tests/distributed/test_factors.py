"""`jobs.fit factors` on a curated run: columns of ranks, what is refused, what is not done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from curation.data import tables
from curation.distributed.factor_columns import add_factor_columns, checked_factors
from curation.distributed.stored_features import mixed_batches
from curation.evaluation.correlation import ranks
from curation.recipe.columns import FactorsRecipe
from curation.training.factor_encoders import EncoderKind
from jobs import fit

SMALL = {"units_per_feature": 2, "num_active": 8, "batch_size": 64, "epochs": 40, "min_explained": 0.5, "max_dead": 0.6}


@pytest.fixture(scope="module")
def run(curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the curated run, for it gets columns."""
    return Path(shutil.copytree(curated, tmp_path_factory.mktemp("factors") / "run"))


@pytest.mark.slow
def test_every_embedded_row_is_ranked_and_a_second_time_nothing_is_made(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    arguments = ["factors", "cpu", "--run", str(run), *flags]
    assert fit.main(arguments) == 0
    assert "our completion of 2603.04981" in capsys.readouterr().err
    names = ["status", "factors.representativeness", "factors.rarity"]
    table = tables.read_unified(str(run), range(6), names)
    is_ok = np.array([status == "ok" for status in table["status"].to_pylist()])
    for name in names[1:]:
        values = table[name].to_numpy()
        assert np.isfinite(values[is_ok]).all() and np.isnan(values[~is_ok]).all()
        # Average ranks of the whole pool: their ranks are themselves.
        again = (ranks(values[is_ok]) - 1) / (is_ok.sum() - 1)
        assert np.abs(again - values[is_ok]).max() < 1e-5
    [report] = [json.loads(path.read_text()) for path in run.glob("fit/factors-*/report.json")]
    assert report["rows"] == is_ok.sum() and report["explained_variance"] > 0.5
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    assert fit.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == before


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["kmeans", "pca", "random"])
def test_the_rivals_of_the_autoencoder_make_the_same_columns(run: Path, encoder: EncoderKind) -> None:
    recipe = FactorsRecipe(
        run=str(run),
        column=encoder,
        encoder=encoder,
        features=("text_embedding", "clip_score"),
        **{**SMALL, "units_per_feature": 1},
    )
    account = add_factor_columns(recipe)
    assert account.report["explained_variance"] is None and account.made_now == 6
    values = tables.read(str(run), 0, [f"{encoder}.rarity"])[f"{encoder}.rarity"].drop_null().to_numpy()
    assert ((values >= 0) & (values <= 1)).all() and len(np.unique(values)) > 5


@pytest.mark.slow
def test_factors_that_explain_too_little_are_refused_and_nothing_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["factors", "cpu", "--run", str(run), "--column", "poor", "--epochs", "1", "--min-explained", "0.99"]
    assert fit.main(arguments) == 1
    assert "of the features' variance, wanted 0.99" in capsys.readouterr().err
    assert not (run / "columns" / "poor").exists()


def test_batches_hold_every_row_once_a_pass_in_an_order_of_its_own(run: Path) -> None:
    recipe = FactorsRecipe(run=str(run), features=("clip_score",))
    stream = mixed_batches(recipe, range(6), batch=4)
    passes = [np.concatenate([next(stream).numpy() for _ in range(59)]).ravel() for _ in range(2)]
    assert len(passes[0]) == 236 and passes[0].tolist() != passes[1].tolist()
    assert np.array_equal(np.sort(passes[0]), np.sort(passes[1]))


def test_what_cannot_be_fitted_is_refused_by_name(curated: Path) -> None:
    with pytest.raises(ValueError, match="num_active is 40, but 1 features have 8 factors"):
        checked_factors(FactorsRecipe(run=str(curated), features=("clip_score",), num_active=40))
    with pytest.raises(ValueError, match="is no run of jobs.curate"):
        checked_factors(FactorsRecipe(run="nowhere"))
