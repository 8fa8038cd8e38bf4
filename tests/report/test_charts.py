from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from curation.report.charts import MAX_POINTS, Bars, Line, Mark, histogram, line_chart, look, number, ticks


def numbers_in(svg: str) -> list[float]:
    shapes = re.findall(r'(?:points|d|x|y|cx|cy)="([^"]*)"', svg)
    return [float(found) for shape in shapes for found in re.findall(r"-?[\d.]+|nan|inf", shape)]


@pytest.mark.parametrize(
    "y", [[0.0], [5.0, 5.0, 5.0], [-3.0, 2.0], [np.nan, 1.0, np.inf, 2.0], [1e-12, 2e12], [-1.0, -1.0]]
)
def test_every_coordinate_is_finite_and_inside(y) -> None:
    svg = str(line_chart([Line("a", list(range(len(y))), y, 0)], x_label="x", y_label="y"))
    ElementTree.fromstring(svg)
    assert numbers_in(svg) and all(-1 <= value <= 361 for value in numbers_in(svg))


def test_nothing_to_draw_is_nothing() -> None:
    assert line_chart([Line("a", [1.0], [np.nan], 0)], x_label="x", y_label="y") == ""
    assert histogram([0.0, 1.0], [Bars("kept", "kept", [0])], x_label="x") == ""


def test_labels_are_escaped() -> None:
    svg = str(line_chart([Line("<script>", [0, 1], [0, 1], 0)], x_label="a<b", y_label='"&'))
    assert "<script>" not in svg and "a&lt;b" in svg
    ElementTree.fromstring(svg)


def test_a_long_line_is_drawn_by_means() -> None:
    svg = str(line_chart([Line("a", np.arange(10_000), np.ones(10_000), 0)], x_label="x", y_label="y"))
    points = re.findall(r'<polyline[^>]*points="([^"]*)"', svg)[0].split()
    assert len(points) == MAX_POINTS and len({point.split(",")[1] for point in points}) == 1


def test_bars_stack_to_their_counts() -> None:
    svg = str(
        histogram(
            [0.0, 1.0, 2.0],
            [Bars("kept", "kept", [0, 2]), Bars("cut", "cut", [3, 2])],
            x_label="x",
            marks=[Mark(1.0, "cut")],
        )
    )
    kept, cut = re.findall(r'class="bar \w+" d="([^"]*)"', svg)
    heights = [
        [float(bottom) - float(top) for bottom, top in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", d)] for d in (kept, cut)
    ]
    assert heights[1][0] == pytest.approx(1.5 * heights[0][0], abs=0.2) and heights[1][1] == pytest.approx(
        heights[0][0], abs=0.2
    )
    assert "cut 1" in svg


def test_a_shares_band_is_drawn_as_far_as_shares_go() -> None:
    line = Line("a", [0, 1], [0.1, 0.9], 0, [-0.5, 0.2], [0.6, 1.7])
    svg = str(line_chart([line], x_label="x", y_label="y", as_share=True))
    ticks_shown = re.findall(r">(−?[\d.]+%)<", svg)
    assert ticks_shown[0] == "0%" and ticks_shown[-1] == "100%"
    assert ">−0.5<" in str(line_chart([line], x_label="x", y_label="y"))


def test_ticks_are_round_and_in_range() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.7, 0.55) == [-0.5, 0.0, 0.5]
    assert ticks(0.0, 37_000.0) == [0.0, 10_000.0, 20_000.0, 30_000.0]
    assert ticks(0.0, 1e-13) == [0.0, 2e-14, 4e-14, 6e-14, 8e-14, 1e-13]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1500, "1.5k"),
        (-0.25, "−0.25"),
        (2.5e12, "2.5T"),
        (999, "999"),
        (999.6, "1k"),
        (-5e37, "−5e37"),
        (5e20, "500E"),
        (1e-13, "1e−13"),
    ],
)
def test_numbers_are_short(value, text) -> None:
    assert number(value) == text


def test_a_histogram_without_width_is_drawn() -> None:
    svg = str(histogram([1.7e18, 1.7e18], [Bars("kept", "kept", [3])], x_label="x"))
    assert all(-1 <= value <= 361 for value in numbers_in(svg))


def test_all_marks_are_drawn_whose_values_are_shown_each_label_on_a_line_of_its_own() -> None:
    marks = [Mark(0.5, "at least"), Mark(0.5, "cut"), Mark(7.0, "at most")]
    svg = str(histogram([0.0, 1.0], [Bars("kept", "kept", [1])], x_label="x", marks=marks))
    assert re.findall(r'class="cut-label"[^>]*>([^<]*)', svg) == ["at least 0.5", "cut 0.5"]
    assert len(set(re.findall(r'class="cut-label"[^>]* y="([^"]*)"', svg))) == 2


def test_24_curves_look_different() -> None:
    assert len({look(place) for place in range(24)}) == 24 and look(24) == look(0)
    svg = str(line_chart([Line("a", [0, 1], [0, 1], *look(7)[:1], dash=look(7)[1])], x_label="x", y_label="y"))
    assert 'class="line s1 d1"' in svg
