from __future__ import annotations

import json

import pytest

from curation.report.agreement import agreement
from jobs import correlation
from tests.report.conftest import Row


def test_scores_of_tables_and_ledgers_agree_as_computed_by_hand(write_run, write_training, tmp_path, capsys) -> None:
    seeds = []
    for seed, scores in enumerate(([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0])):
        rows = [Row(f"{place}", {"clarity": -score}, score=score) for place, score in enumerate(scores)]
        run = write_run(f"run{seed}", [rows])
        # Its ledger holds row r's number as its score.
        jest = write_training(f"jest{seed}", [0.5], method="jest", data_run=run, usage=[1, 0, 0, 0])
        seeds.append(f"{run}+{jest}")
    found = agreement(seeds)
    assert found.scores == ["clip_score", "json.clarity", "jest"] and found.left_out == []
    of_ledger, of_clarity = found.pairs[0][2], found.pairs[0][1]
    assert of_ledger is not None and of_ledger.mean == pytest.approx((1.0 + 0.8) / 2)
    assert of_clarity is not None and of_clarity.mean == pytest.approx(-1.0)
    assert correlation.main([*seeds, "--json", str(tmp_path / "x.json")]) == 0
    assert "-1.000 ± 0.000" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["by_seed"][1][0][2] == pytest.approx(0.8)


def test_what_is_no_seed_is_refused(write_run, write_training, capsys) -> None:
    run = write_run("run", [[Row()]])
    training = write_training("training", [0.5])
    assert correlation.main([str(training)]) == 2
    assert "must name one curated run" in capsys.readouterr().err
    assert correlation.main([f"{run}+{training}"]) == 2
    assert "has no ledger on disk" in capsys.readouterr().err
    assert correlation.main([str(run)]) == 2
    assert "takes two scores that all seeds have" in capsys.readouterr().err
