"""The demo at its smallest size: from nothing to a kept set and the truth about it."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import demo
from jobs.demo_pool import DemoPool

ARGUMENTS = ["--samples", "200", "--reference-pairs", "130", "--reference-steps", "2", "--race-steps", "3"]


@pytest.mark.usefixtures("ray_session")
def test_the_demo_ends_with_the_truth_and_a_second_run_decodes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--folder", str(tmp_path), *ARGUMENTS]) == 0
    said = capsys.readouterr().out
    assert "junk in all" in said and str(tmp_path / "run" / "shards") in said
    pool = DemoPool(str(tmp_path / "pool" / "shards" / "*.tar"), tmp_path / "pool" / "truth.parquet")
    shares = {row["what"]: row for row in demo.junk_shares(tmp_path / "run", pool).to_pylist()}
    assert shares["clean"]["pool"] + shares["junk in all"]["pool"] == 200
    assert shares["clean"]["kept"] + shares["junk in all"]["kept"] == round(198 * demo.KEEP_FRACTION)
    assert shares["corrupt"]["kept"] == 0
    assert "race.png" in said and (tmp_path / "race.png").stat().st_size > 10_000
    for method, loaded in (("uniform", 60), ("jest", 300)):
        steps = pq.read_table(tmp_path / f"race-{method}-3" / "train" / "steps.parquet")
        assert steps["samples_loaded"].to_pylist()[-1] == loaded and steps["samples_trained"].to_pylist()[-1] == 60

    page = (tmp_path / "run" / "report.html").read_text()
    assert str(tmp_path / "run" / "report.html") in said and page.count("<svg") > 5
    assert '<data value="200" data-fact="read" data-run="0">' in page and "Saved against uniform" in page

    checkpoint = next(tmp_path.glob("reference-*.pt"))
    trained = checkpoint.stat().st_mtime_ns
    assert demo.main(["--folder", str(tmp_path), *ARGUMENTS]) == 0
    assert checkpoint.stat().st_mtime_ns == trained
    assert "images/s embed" not in capsys.readouterr().out
