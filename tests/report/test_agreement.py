from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pytest

from curation.addresses import pack
from curation.data import tables
from curation.data.score_log import LoggedStep, ScoreLog
from curation.report.agreement import agreement
from curation.report.page import Wanted, report
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


def test_losses_are_not_told_as_scores_unless_the_run_logged_its_scores(write_run, write_training) -> None:
    run = write_run("run", [[Row(score=score) for score in (1.0, 2.0, 3.0)]])
    rho = write_training("rho", [0.5], method="rho", data_run=run, usage=[1, 0, 0])
    assert agreement([f"{run}+{rho}"]).scores == ["clip_score", "rho's loss"]
    log = ScoreLog(str(rho), rank=0, attempt=1)
    for step, scores in enumerate(([9.0, 9.0, 9.0], [-1.0, -2.0, -3.0]), start=1):
        values = np.array(scores, np.float32)
        log.add(LoggedStep(step, pack(0, np.arange(3)), values, np.ones(3, np.float32)))
    log.flush()
    found = agreement([f"{run}+{rho}"])
    cell = found.pairs[0][1]
    assert found.scores == ["clip_score", "rho"] and cell is not None and cell.mean == pytest.approx(-1.0)


def test_typicality_is_one_more_score_and_scores_may_be_chosen(write_run, capsys) -> None:
    """Directions of 0, 6, 14 and 90 degrees: mean distances to the others of 0.59, 0.53, 0.54 and 1.33."""
    seeds = []
    for seed in range(2):
        run = write_run(f"run{seed}", [[Row(score=score) for score in (0.2, 0.4, 0.3, 0.1)], [Row(broken=True)]])
        vectors = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.25], [0.0, 1.0]], np.float16)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 2)
        tables.write_piece(str(run), "net", 0, {"net": column})
        nothing = pa.nulls(1, pa.list_(pa.float16(), 2))
        tables.write_piece(str(run), "net", 1, {"net": nothing})
        seeds.append(str(run))
    found = agreement(seeds, typicality="net")
    assert found.scores == ["clip_score", "typicality"]
    cell = found.pairs[0][1]
    assert cell is not None and cell.mean == pytest.approx(1.0) and cell.half_width == pytest.approx(0.0)
    assert correlation.main([*seeds, "--typicality", "nets"]) == 2
    assert "has no column 'nets'" in capsys.readouterr().err
    assert correlation.main([*seeds, "--typicality", "net", "--scores", "typicality", "clip"]) == 2
    assert "no seed has a score 'clip'" in capsys.readouterr().err
    assert correlation.main([*seeds, "--scores", "clip_score"]) == 2
    assert "takes two scores" in capsys.readouterr().err


def test_what_is_no_seed_is_refused(write_run, write_training, capsys) -> None:
    run = write_run("run", [[Row()]])
    training = write_training("training", [0.5])
    assert correlation.main([str(training)]) == 2
    assert "must name one curated run" in capsys.readouterr().err
    assert correlation.main([f"{run}+{training}"]) == 2
    assert "has no ledger on disk" in capsys.readouterr().err
    assert correlation.main([str(run)]) == 2
    assert "takes two scores that all seeds have" in capsys.readouterr().err


def test_named_scores_are_compared_however_many_there_are_and_what_is_not_looked_at_is_told(
    write_run, tmp_path, capsys
) -> None:
    fields = [{f"s{number:02}": float(row * (number + 1) % 17) for number in range(15)} for row in range(6)]
    run = write_run("run", [[Row(score=row / 10, fields=told) for row, told in enumerate(fields)]])
    assert correlation.main([str(run), "--json", str(tmp_path / "all.json")]) == 0
    assert "4 more scores were not looked at, name them with --scores: json.s11, json.s12" in capsys.readouterr().out
    assert json.loads((tmp_path / "all.json").read_text())["unread"] == [f"json.s{number}" for number in range(11, 15)]
    unshown = "4 more scores are not shown, <code>--scores</code> of that command compares them: json.s11, json.s12"
    assert unshown in report([str(run)], Wanted(with_images=False))
    assert correlation.main([str(run), "--scores", "json.s14", "json.s11"]) == 0
    said = capsys.readouterr().out
    assert "json.s14 and json.s11" in said and "not looked at" not in said
    short = write_run("short", [[Row(score=row / 10, fields={"s14": float(row)}) for row in range(4)]])
    found = agreement([str(run), str(short)], only=["clip_score", "json.s14"])
    assert found.scores == ["clip_score", "json.s14"] and found.left_out == []
    every = [f"json.s{number:02}" for number in range(1, 15)]
    assert len(agreement([str(run)], only=every).scores) == 14


def test_whole_numbers_are_scores_unless_they_say_which_sample_it_is(write_run) -> None:
    fields = [{"aesthetic": row % 3, "image_id": row, "WIDTH": row, "class": row % 2} for row in range(6)]
    rows = [Row(score=row / 10, fields=told) for row, told in enumerate(fields)]
    run = write_run("run", [rows, [Row(fields={"aesthetic": None})]])
    assert agreement([str(run)]).scores == ["clip_score", "json.aesthetic"]
    assert agreement([str(run)], only=["json.WIDTH", "clip_score"]).scores == ["clip_score", "json.WIDTH"]


def test_a_constant_score_has_no_correlation_which_is_null_in_the_json(write_run, tmp_path, capsys) -> None:
    run = write_run("run", [[Row(score=row / 10, fields={"same": 1.0, "c": float(row)}) for row in range(4)]])
    assert correlation.main([str(run), "--json", str(tmp_path / "x.json")]) == 0
    assert "no correlation, constant or without values in a seed: json.same" in capsys.readouterr().out
    told = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert told["by_seed"][0][0] == [1.0, 1.0, None] and told["spearman"][2] == [None] * 3
    assert correlation.main([str(run), "--json", str(tmp_path)]) == 1
    assert re.search(f"error: .*{tmp_path}", capsys.readouterr().err)


def test_a_run_is_one_seed(write_run, capsys) -> None:
    run, other = (
        write_run(name, [[Row(score=row / 10, fields={"c": float(row)}) for row in range(4)]]) for name in "ab"
    )
    assert correlation.main([str(run), str(other)]) == 0
    for again in (f"{run}", f"{run}/", f"{other}/../a", f"{other}+{run}"):
        assert correlation.main([str(run), again]) == 2
        assert "has no run of its own, its runs are named twice" in capsys.readouterr().err


def test_trainings_on_one_pool_are_seeds_of_it(write_run, write_training) -> None:
    pool = write_run("pool", [[Row(score=row / 10, fields={"c": float(row)}) for row in range(4)]])
    trainings = [
        write_training(f"jest-{seed}", [0.5], method="jest", seed=seed, data_run=pool, usage=[1, 0, 0, 0])
        for seed in (0, 1)
    ]
    found = agreement([f"{pool}+{training}" for training in trainings])
    assert len(found.matrices) == 2 and found.scores == ["clip_score", "json.c", "jest"]
    with pytest.raises(ValueError, match="has no run of its own"):
        agreement([f"{pool}+{trainings[0]}", f"{pool}+{trainings[1]}", f"{pool}+{trainings[1]}"])
