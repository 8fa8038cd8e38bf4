"""The tables of the study of dynamic selection: means with intervals over seeds, and differences paired by seed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from curation.evaluation.correlation import spearman
from jobs.benchmarks.race import interval, show

OURS = "dynamic"
LABEL = "our completion of 2603.04981"
BIAS_PENALTIES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)


def summary(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals over seeds, paired differences, and what each claim comes to."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for part in parts:
        groups.setdefault((part["set"], part["noise"], part["schedule"], part["keep"]), []).append(part)
    full = {
        key[:3]: {part["seed"]: part["arms"]["full"]["accuracy"] for part in of}
        for key, of in groups.items()
        if key[3] == 1
    }
    with_full = {key: [part for part in of if part["seed"] in full.get(key[:3], {})] for key, of in groups.items()}
    tables = {"/".join(map(str, key)): _table(of, full[key[:3]]) for key, of in with_full.items() if key[3] != 1 and of}
    firsts = [part for part in parts if "factors" in part]
    return {
        "full": {"/".join(key): interval(list(values.values())) for key, values in full.items()},
        "tables": tables,
        "noise_robustness": _robustness(groups, full),
        "gradient_bias": _bias(firsts),
        "factors": _factors(firsts),
        "seconds": sum(part["seconds"] for part in parts),
    }


def _table(of: list[dict[str, Any]], full: dict[int, float]) -> dict[str, Any]:
    """A set, noise, schedule and keep fraction: every arm's figures, and differences paired by seed."""
    arms = list(of[0]["arms"])
    accuracy = {arm: [part["arms"][arm]["accuracy"] for part in of] for arm in arms}
    fields = (
        "rounds",
        "rows",
        "choose_seconds",
        "wrong_share",
        "wrong_share_late",
        "smallest_class",
        "gini",
        "never_used",
        "largest_gap",
    )
    return {
        "sample_gradients": of[0]["sample_gradients"],
        "mean_usage": of[0]["mean_usage"],
        "noise_share": statistics.fmean(part["noise_share"] for part in of),
        "arms": {
            arm: {
                "accuracy": interval(accuracy[arm]),
                "minus_full": paired(accuracy[arm], [full[part["seed"]] for part in of]),
                "dynamic_minus_this": None if arm == OURS else paired(accuracy[OURS], accuracy[arm]),
                **{name: statistics.fmean(part["arms"][arm][name] for part in of) for name in fields},
                "gap_bound": of[0]["arms"][arm]["gap_bound"],
                "bound_holds": all(part["arms"][arm]["bound_holds"] for part in of),
            }
            for arm in arms
        },
    }


def paired(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The interval of paired differences, and how many standard errors their mean is from 0; None where unknown."""
    gains = _minus(mine, theirs)
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    errors = statistics.fmean(gains) / (spread / math.sqrt(len(gains))) if spread else None
    return {**interval(gains), "standard_errors": errors}


def _minus(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(mine, theirs, strict=True)]


def _robustness(
    groups: dict[tuple[Any, ...], list[dict[str, Any]]], full: dict[tuple[Any, ...], dict[int, float]]
) -> dict[str, Any]:
    """Accuracy lost at keep 20% under noise: against full data under the same noise, and against no noise (D-3)."""
    found = {}
    for name, noise in dict.fromkeys((key[0], key[1]) for key in groups if key[1] != "clean"):
        noisy, clean = (
            {part["seed"]: part["arms"] for part in groups.get((name, kind, "cosine", 0.2), [])}
            for kind in (noise, "clean")
        )
        whole = (full.get((name, kind, "cosine"), {}) for kind in (noise, "clean"))
        seeds = sorted(noisy.keys() & clean.keys() & set.intersection(*(set(of) for of in whole)))
        if not seeds:
            continue
        arms = [arm for arm in noisy[seeds[0]] if arm in clean[seeds[0]]]
        told = {}
        for arm in arms:
            ends = [noisy[seed][arm]["accuracy"] for seed in seeds]
            rivals = {
                "drop_from_full_with_noise": [full[name, noise, "cosine"][seed] for seed in seeds],
                "drop_from_full_without_noise": [full[name, "clean", "cosine"][seed] for seed in seeds],
                "drop_from_itself_without_noise": [clean[seed][arm]["accuracy"] for seed in seeds],
            }
            told[arm] = {kind: interval(_minus(values, ends)) for kind, values in rivals.items()}
        found[f"{name}/{noise}"] = told
    return found


def _bias(firsts: list[dict[str, Any]]) -> dict[str, Any]:
    """D-7 over all sets and noises of each seed."""
    told: dict[str, Any] = {}
    for part in firsts:
        told.setdefault(f"{part['set']}/{part['noise']}", []).append(part["bias"])
    return {
        name: {
            **{penalty: interval([bias[penalty] for bias in of]) for penalty in of[0]},
            "falls_with_the_penalty": [_falls(list(bias.values())) for bias in of],
        }
        for name, of in told.items()
    }


def _falls(values: list[float]) -> bool:
    return all(later < earlier for earlier, later in itertools.pairwise(values))


def _factors(firsts: list[dict[str, Any]]) -> dict[str, Any]:
    """What each encoder found, and how far seeds agree on the ranks."""
    found: dict[str, Any] = {}
    for part in firsts:
        if part["ranks"] is not None or part["noise"] == "clean":
            found.setdefault(part["set"], []).append(part)
    told = {}
    for name, of in found.items():
        of_noise = [part for part in of if part["ranks"] is not None]
        ranks = [np.array(part["ranks"]) for part in of_noise]
        pairs = [spearman(a, b) for at, a in enumerate(ranks) for b in ranks[at + 1 :]]
        told[name] = {
            "of_seed_0": of[0]["factors"],
            "agreement_of_seeds": statistics.fmean(pairs) if pairs else None,
        }
    return told


def show_all(figures: dict[str, Any]) -> None:
    """Print the tables and the verdicts."""
    print(f"\n`dynamic` is {LABEL}.")
    for name, accuracy in figures["full"].items():
        print(f"full data, {name}: {show(accuracy)}")
    for name, table in figures["tables"].items():
        print(f"\n{name}: {table['sample_gradients']:,} sample-gradients")
        for arm, found in table["arms"].items():
            minus = found["dynamic_minus_this"]
            told = "" if minus is None else f"   dynamic minus this {show(minus)}"
            usage = f"gini {found['gini']:.2f}   wrong late {found['wrong_share_late']:.3f}"
            print(f"  {arm:<26}{show(found['accuracy'])}   {usage}{told}")
    for name, arms in figures["noise_robustness"].items():
        print(f"\naccuracy lost at keep 20%, {name} (from full data with the noise; without; from itself without):")
        for arm, drops in arms.items():
            print(f"  {arm:<26}" + "   ".join(show(drop) for drop in drops.values()))
    for name, bias in figures["gradient_bias"].items():
        told = ", ".join(f"{penalty}: {show(bias[penalty])}" for penalty in map(str, BIAS_PENALTIES))
        print(f"gradient bias by penalty, {name}: {told}")
    for name, found in figures["factors"].items():
        print(f"factors of {name}: {found}")
    for keep, arms in figures.get("speed", {"by_keep": {}})["by_keep"].items():
        print(
            f"\nspeed against full data at keep {keep}: in sample-gradients, by the clock, in CPU seconds, with factors"
        )
        for arm, found in arms.items():
            told = "   ".join(show(found[kind]) for kind in ("by_the_clock", "in_cpu_seconds", "with_factors"))
            print(f"  {arm:<26}{found['in_sample_gradients']:.2f}   {told}")
    for name, claim in figures["claims"].items():
        print(f"{name}: {claim['verdict']}")
