"""Ratings on the page: what `jobs.fit ratings` left, with pictures from the pool, and no cut where nothing is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from curation.data import tables
from curation.report.page import Wanted, report
from tests.report.conftest import Row
from tests.report.test_page import HOSTILE, Page

ALCHEMIST = [{"method": {"name": "alchemist"}, "keep": 4}]
DYNAMICS = {"loss": [[3.0, 4.0], [1.0, 3.5]], "gradient_norm": [[1.0, 1.0], [0.5, None]]}
DYNAMICS |= {"gradient_change": [[None, None], [0.5, 0.7]], "format_version": 1, "ranges": 2}
RANGES = {"head-0-20": [0, 1], "middle-30-80": [4, 3], "tail-80-100": [8, 1 << 30]}


@pytest.fixture
def rated(write_run) -> Path:
    """Nine rows with hostile captions, rated, some of them kept; one of the noted images is of a shard that is gone."""
    run = write_run("run", [[Row(text, {"punsafe": 0.1}, score=1.0) for text in HOSTILE]], keep=4, selection=ALCHEMIST)
    rows = len(HOSTILE)
    percentiles = pa.array([place / (rows - 1) for place in range(rows)], pa.float32())
    tables.write_piece(str(run), "rating_percentile", 0, {"rating_percentile": percentiles})
    facts = {"edge_density": {"spearman_with_rating": -0.75, "head-0-20": 0.1, "middle-30-80": 0.2, "tail-80-100": 0.5}}
    facts |= {"<b>luminance</b>": {"spearman_with_rating": None, "head-0-20": 0.5}}
    folder = run / "fit" / "rating_percentile"
    folder.mkdir(parents=True)
    told = {"format_version": 1, "rows": 9, "not_decoded": 0, "facts": facts, "images": RANGES}
    (folder / "correlations.json").write_text(json.dumps(told))
    (folder / "dynamics.json").write_text(json.dumps(DYNAMICS))
    (run / "fit" / "factors-1").mkdir()  # another job's, which is not shown
    return run


def part_of(html: str, anchor: str) -> Page:
    return Page(html.partition(f'<h2 id="{anchor}">')[2].partition("<h2 ")[0])


def test_what_was_left_is_shown_with_pictures_whose_captions_are_text(rated: Path) -> None:
    html = report([str(rated)], Wanted())
    shown = part_of(html, "ratings")
    text = "".join(shown.texts)
    assert "edge density" in text and "−0.75" in text and "<b>luminance</b>" in text and not shown.count("b")
    assert "head, 0–20%" in text and "middle, 30–80%" in text and "tail, 80–100%" in text
    assert shown.count("img") == 5  # the sixth is gone
    assert "<script>alert(1)</script>" in text and not shown.count("script")
    assert len([tag for tag, attrs in shown.tags if tag == "polyline"]) == 2 * 3
    assert Page(html).count("script") == 1


def test_a_page_to_pass_on_keeps_the_figures_only(rated: Path) -> None:
    shown = part_of(report([str(rated)], Wanted(with_images=False)), "ratings")
    assert not shown.count("img") and shown.count("polyline") == 6 and "alert" not in "".join(shown.texts)


def test_a_draw_around_a_middle_has_no_cut_and_its_bands_are_the_ratings(rated: Path) -> None:
    html = report([str(rated)], Wanted())
    assert 'class="cut-mark"' not in html and "Borderline" not in html
    assert "rating_percentile from 0.8 to 1" in html


@pytest.mark.parametrize("method", ["typicality", "coreset", "uniform"])
def test_a_selector_that_looks_at_vectors_or_nothing_has_a_page(write_run, method: str) -> None:
    run = write_run(
        "run", [[Row(score=place) for place in range(5)]], keep=2, selection=[{"method": {"name": method}, "keep": 2}]
    )
    html = report([str(run)], Wanted())
    assert 'class="cut-mark"' not in html and "Borderline" not in html and "clip_score from" in html


def test_a_run_that_nobody_rated_has_no_such_part(write_run) -> None:
    assert 'id="ratings"' not in report([str(write_run("run", [[Row()]], keep=1))], Wanted())
