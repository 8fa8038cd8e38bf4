from __future__ import annotations

from pathlib import Path

from curation.data import step_log


def test_parts_are_one_log_in_order_of_the_steps(tmp_path: Path) -> None:
    out = str(tmp_path)
    step_log.write_part(out, "steps", [{"step": 3, "loss": 0.5}, {"step": 4, "loss": 0.4}])
    step_log.write_part(out, "steps", [{"step": 1, "loss": 0.9}, {"step": 2, "loss": None}])
    assert step_log.read_parts(out, "steps")["step"].to_pylist() == [1, 2, 3, 4]
    assert step_log.read_parts(out, "steps")["loss"].to_pylist() == [0.9, None, 0.5, 0.4]


def test_a_step_that_was_done_again_counts_as_it_was_done_last(tmp_path: Path) -> None:
    out = str(tmp_path)
    step_log.write_part(out, "steps", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}])
    step_log.write_part(out, "steps", [{"step": 2, "loss": 3.0}])
    assert step_log.read_parts(out, "steps")["loss"].to_pylist() == [1.0, 3.0]
    step_log.write_part(out, "steps", [{"step": 1, "loss": 4.0}])
    assert step_log.read_parts(out, "steps")["loss"].to_pylist() == [4.0, 3.0]


def test_columns_may_come_later_and_may_be_absent(tmp_path: Path) -> None:
    out = str(tmp_path)
    step_log.write_part(out, "steps", [{"step": 1, "junk_share": None}])
    step_log.write_part(out, "steps", [{"step": 2, "junk_share": 0.5, "loss": 1}])
    assert step_log.merge(out, "steps").to_pylist() == [
        {"step": 1, "junk_share": None, "loss": None},
        {"step": 2, "junk_share": 0.5, "loss": 1},
    ]
    assert (tmp_path / "train" / "steps.parquet").exists()


def test_nothing_noted_is_an_empty_log(tmp_path: Path) -> None:
    step_log.write_part(str(tmp_path), "steps", [])
    assert step_log.read_parts(str(tmp_path), "steps")["step"].to_pylist() == []
    assert len(step_log.merge(str(tmp_path), "steps")) == 0
