from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation.report.curves import Curve, draw


def evaluations(*recall: float, scale: float = 1.0) -> pa.Table:
    steps = list(range(1, len(recall) + 1))
    columns = {
        name: [scale * step for step in steps] for name in ("samples_trained", "samples_loaded", "flops", "seconds")
    }
    return pa.table({"step": steps, **columns, "mean_r1": list(recall)})


def test_costs_are_means_over_seeds_and_what_was_spent_before_is_added() -> None:
    curve = Curve("JEST", [evaluations(0.1, 0.4), evaluations(0.3, 0.6, scale=3.0)], {"flops": 10.0})
    cost, values = curve.along("flops", "mean_r1")
    np.testing.assert_allclose(cost, [12.0, 14.0])
    np.testing.assert_allclose(values, [[0.1, 0.4], [0.3, 0.6]])
    np.testing.assert_allclose(curve.along("seconds", "mean_r1")[0], [2.0, 4.0])


def test_a_picture_with_four_axes_is_drawn_and_is_the_same_each_time() -> None:
    curves = [Curve("uniform", [evaluations(0.1, 0.2)], {}), Curve("JEST", [evaluations(0.1, 0.5)], {})]
    pictures = []
    for _ in range(2):
        out = io.BytesIO()
        draw(curves, metric="mean_r1", title="race", file=out)
        pictures.append(out.getvalue())
    assert pictures[0] == pictures[1]
    picture = Image.open(io.BytesIO(pictures[0]))
    assert picture.width > 3 * picture.height
    # Both lines are there: the first two colours of matplotlib's cycle.
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours


def test_seeds_that_were_measured_at_other_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="not evaluated at the same steps"):
        Curve("JEST", [evaluations(0.1), evaluations(0.1, 0.2)], {})
    with pytest.raises(ValueError, match="has no seed"):
        Curve("JEST", [], {})
    with pytest.raises(ValueError, match="no axis 'time'"):
        Curve("JEST", [evaluations(0.1)], {"time": 1.0})
