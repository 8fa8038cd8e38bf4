"""What the claims about dynamic selection come to, by the tables of its study: met, missed, or not told apart.

A difference is paired by seed and judged by its 95% t interval: it is told apart if 0 is outside; with fewer than three
seeds nothing is. D-5 and D-6 ask for what is measured, so their differences are judged one by one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jobs.benchmarks.dynamic_tables import OURS

Verdict = Literal["met", "missed", "not told apart"]
FEWEST_SEEDS = 3
NOISE_SHARE, NOISE_SLACK = 0.2, 0.02


def claims(figures: dict[str, Any]) -> dict[str, Any]:
    """The verdict on each claim, and its figures; nothing of a claim that the tables say nothing of."""
    tables = figures["tables"]
    symmetric, mobilenet, others, at_20 = (
        {name: table for name, table in tables.items() if name.startswith(begin)}
        for begin in ("mobilenet/symmetric/", "mobilenet/", ("text/", "resnet20/"), "mobilenet/symmetric/cosine/0.2")
    )
    told = {
        "D-1": _even_usage(tables),
        "D-2": _wrong_labels(symmetric),
        "D-3": _gains(at_20, ("infobatch", "infobatch, capped")),
        "D-4": _gains(mobilenet, ("rs2",)),
        "D-5": _gains(mobilenet, ("dynamic, constant", "dynamic, reversed")),
        "D-6": _gains(mobilenet, ("dynamic, kmeans", "dynamic, pca", "dynamic, random")),
        "D-7": _bias(figures["gradient_bias"]),
        "D-8, on a CPU": _as_good_as_full(tables),
        "D-9": _gains(others, ("rs2", "full, fewer steps")),
        "D-c": _gains(tables, ("full, fewer steps",)),
    }
    return {name: claim for name, claim in told.items() if claim}


def verdict_of(difference: dict[str, Any]) -> Verdict:
    """Of a paired difference that ought to be above 0."""
    mean, half_width = difference["mean"], difference["half_width"]
    if difference["standard_errors"] is None or len(difference["values"]) < FEWEST_SEEDS or abs(mean) <= half_width:
        return "not told apart"
    return "met" if mean > 0 else "missed"


def _gains(tables: dict[str, Any], rivals: Sequence[str]) -> dict[str, Any]:
    """`dynamic` minus each rival in each table, and how many differences are which."""
    found = {
        f"{name} minus {rival}": table["arms"][rival]["dynamic_minus_this"]
        for name, table in tables.items()
        for rival in rivals
        if rival in table["arms"]
    }
    return _judged(found)


def _judged(differences: dict[str, dict[str, Any]]) -> dict[str, Any]:
    judged = {name: {**each, "verdict": verdict_of(each)} for name, each in differences.items()}
    verdicts = [each["verdict"] for each in judged.values()]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    told = ", ".join(f"{count} of {len(verdicts)} {verdict}" for verdict, count in counts.items())
    return {"verdict": told, "differences": judged} if judged else {}


def _even_usage(tables: dict[str, Any]) -> dict[str, Any]:
    """D-1: wherever a method promises a bound on usage, it holds in every round."""
    bounded = [arm for table in tables.values() for arm in table["arms"].values() if arm["gap_bound"] is not None]
    if not bounded:
        return {}
    shares = [table["arms"][OURS]["gap_bound"] / table["mean_usage"] for table in tables.values()]
    return {
        "verdict": "met" if all(arm["bound_holds"] for arm in bounded) else "missed",
        "arms_with_a_bound": len(bounded),
        "bound_over_mean_usage": [min(shares), max(shares)],
    }


def _wrong_labels(tables: dict[str, Any]) -> dict[str, Any]:
    """D-2: of what `dynamic` trains on as many labels are wrong as of the pool, give or take two points."""
    if not tables:
        return {}
    shares = {name: table["arms"][OURS]["wrong_share"] for name, table in tables.items()}
    is_near = all(abs(share - NOISE_SHARE) <= NOISE_SLACK for share in shares.values())
    late = {
        name: {arm: found["wrong_share_late"] for arm, found in table["arms"].items()} for name, table in tables.items()
    }
    return {"verdict": "met" if is_near else "missed", "wrong_share": shares, "wrong_share_late": late}


def _bias(bias: dict[str, Any]) -> dict[str, Any]:
    """D-7: in every seed the bias falls with each larger penalty."""
    falls = [each for of in bias.values() for each in of["falls_with_the_penalty"]]
    if not falls:
        return {}
    return {"verdict": "met" if all(falls) else "missed", "falls_in": sum(falls), "of": len(falls)}


def _as_good_as_full(tables: dict[str, Any]) -> dict[str, Any]:
    """D-8's analogue: at keep 0.7 without noise `dynamic` is nowhere told apart below full data."""
    whole = {
        name: table["arms"][OURS]["minus_full"]
        for name, table in tables.items()
        if name.startswith("mobilenet/clean/") and name.endswith("/0.7")
    }
    judged = _judged(whole)
    if judged:
        is_below = any(each["verdict"] == "missed" for each in judged["differences"].values())
        judged["verdict"] = "missed" if is_below else "met"
    return judged
