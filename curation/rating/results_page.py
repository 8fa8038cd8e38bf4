"""What came of a study in words and numbers: for the results page, and for a terminal.

Bars of the page are SVG with attributes, since its policy allows no inline style.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from curation.evaluation.pairwise import Bounds, Model, Pair, Rate, Results

WIDTH = 200
"""Of a bar, in its own units."""
NONE = "–"


def shown(results: Results) -> dict[str, Any]:
    """What the template of the results page is given."""
    reach = max([0.5, *(abs(bound) for model in results.models for bound in model.bootstrap or (model.theta,))])
    return {
        "results": results,
        "models": [
            {
                "model": model,
                "theta": signed(model.theta),
                "bounds": bounds(model.bootstrap),
                "elo": f"{model.elo:+.0f}",
                "elo_bounds": bounds(model.elo_bootstrap, digits=0),
                "bar": _bar(model.theta, model.bootstrap, low=-reach, high=reach),
            }
            for model in results.models
        ],
        "pairs": [
            {
                "pair": pair,
                "half": share(pair.rate_ties_half.value),
                "half_bounds": rate_bounds(pair.rate_ties_half),
                "decisive": share(pair.rate_decisive.value),
                "decisive_bounds": rate_bounds(pair.rate_decisive),
                "expected": share(pair.expected),
                "residual": points(pair.residual),
                "residual_bounds": point_bounds(pair.residual_bootstrap),
                "bar": _bar(pair.rate_ties_half.value, pair.rate_ties_half.bootstrap, low=0, high=1),
            }
            for pair in results.pairs
        ],
        "tie_share": share(results.tie_share),
        "nu": nu(results),
        "alphas": [alpha(results.alpha_nominal), alpha(results.alpha_interval)],
        "detect": f"{results.detect:.0%}",
        "width": WIDTH,
    }


def lines(results: Results) -> Iterator[str]:
    """The same for a terminal."""
    yield f"{results.num_votes} votes of {results.num_raters} raters; not sure: {share(results.tie_share)}"
    yield from (f"WARNING: {warning}" for warning in results.warnings)
    yield ""
    yield "strength (Bradley-Terry with Davidson's ties, 95% over raters)         Elo points, for display"
    width = max(len(model.name) for model in results.models)
    for model in results.models:
        yield _model_line(model, width)
    yield f"nu {nu(results)}: at equal strength a tie is so many times as likely as a win of one side"
    yield ""
    for pair in results.pairs:
        yield from _pair_lines(pair, results.detect)
    yield ""
    yield (
        f"agreement on {results.num_shared} shared pairs: Krippendorff's alpha {alpha(results.alpha_nominal)} nominal, "
        f"{alpha(results.alpha_interval)} interval (a loss is further from a win than a tie is)"
    )


def _model_line(model: Model, width: int) -> str:
    strength = f"{signed(model.theta)} {bounds(model.bootstrap)}"
    elo = f"{model.elo:+.0f} {bounds(model.elo_bootstrap, digits=0)}"
    return f"  {model.name:<{width}}  {strength:<28} {model.votes:>6} votes  {elo}"


def _pair_lines(pair: Pair, detect: float) -> Iterator[str]:
    yield f"{pair.first} against {pair.second}: {pair.wins} won, {pair.ties} not sure, {pair.losses} lost"
    for name, rate in (("ties half", pair.rate_ties_half), ("ties excluded", pair.rate_decisive)):
        yield f"  {name + ':':<15}{share(rate.value)}  {rate_bounds(rate)}"
    yield (
        f"  expected by the strengths {share(pair.expected)}, residual {points(pair.residual)} "
        f"{point_bounds(pair.residual_bootstrap)}"
    )
    wanted = f"{pair.still_needed} decisive votes" if pair.still_needed else "none"
    yield f"  still needed to tell {detect:.0%} from 50%: {wanted}"


def share(value: float | None) -> str:
    """A share in percent."""
    return NONE if value is None else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """A difference of shares in percentage points."""
    return NONE if value is None else f"{100 * value:+.1f} points"


def signed(value: float) -> str:
    """A strength."""
    return f"{value:+.2f}"


def alpha(value: float | None) -> str:
    """An agreement."""
    return "not known yet" if value is None else f"{value:.2f}"


def nu(results: Results) -> str:
    """The tie parameter."""
    return "has no bound (every vote is a tie)" if results.nu > 1e9 else f"{results.nu:.2f}"


def bounds(found: Bounds | None, *, digits: int = 2) -> str:
    """An interval of strengths or points."""
    return NONE if found is None else f"[{found[0]:+.{digits}f}, {found[1]:+.{digits}f}]"


def point_bounds(found: Bounds | None) -> str:
    """An interval of differences of shares."""
    return NONE if found is None else f"[{100 * found[0]:+.1f}, {100 * found[1]:+.1f}]"


def rate_bounds(rate: Rate) -> str:
    """Both intervals of a share."""
    of = {"Wilson": rate.wilson if rate.value is not None else None, "over raters": rate.bootstrap}
    return ", ".join(f"{name} {_percent_bounds(found)}" for name, found in of.items())


def _percent_bounds(found: Bounds | None) -> str:
    return NONE if found is None else f"[{100 * found[0]:.1f}, {100 * found[1]:.1f}]"


def _bar(value: float | None, found: Bounds | None, *, low: float, high: float) -> dict[str, float] | None:
    """Where a dot and its whisker stand, from 0 to WIDTH; None without a value."""
    if value is None or not math.isfinite(value):
        return None

    def place(at: float) -> float:
        return round(WIDTH * (min(max(at, low), high) - low) / (high - low), 1)

    start, stop = found or (value, value)
    return {"dot": place(value), "start": place(start), "length": round(place(stop) - place(start), 1)}
