"""`python -m jobs.benchmark dynamic`: dynamic selection by representativeness and rarity, against its rivals.

Claims D-1 to D-7, D-9 and D-c of its specification, on small networks over frozen features. The paper
(arXiv:2603.04981) is only partly public: every figure of the method is of our completion of it. All arms of one keep
fraction take equally many sample-gradients; `full, fewer steps` (D-c) spends them on the whole pool, `rs2` on fresh
random rows. InfoBatch
decides itself how many rows a round has, so at equal sample-gradients it has fewer rounds; `infobatch, capped` is made
to keep as many as the others. No arm has a tail of full rounds. The penalty is such that usage differs by less than its
mean. Accuracies are of clean test labels, after the last step.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from curation.evaluation.correlation import spearman
from curation.methods import load_selector
from curation.methods.dynamic import usage_gap
from curation.numerics.quantiles import gini
from jobs.benchmarks.dynamic_plot import draw_usage
from jobs.benchmarks.dynamic_runs import BATCH, Arm, Outcome, Pool, Stack, train_stack
from jobs.benchmarks.dynamic_sets import Found, Rows, factors_of, pool_of, rows_of
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.race import interval, show

LABEL = "our completion of 2603.04981"
ROUNDS = 40
KEEPS = (0.7, 0.5, 0.3, 0.2)
FEW_KEEPS = (0.7, 0.2)
TINY_KEEPS = (1.0, 0.2)
OURS = "dynamic"
RIVALS = (
    Arm("full, fewer steps"),
    Arm("rs2", "rs2"),
    Arm("infobatch", "infobatch"),
    Arm("rcap", "rcap"),
)
DYNAMIC = Arm(OURS, "dynamic")
MORE = (
    Arm("rs2 with replacement", "rs2", {"replacement": True}),
    Arm("epsilon-greedy", "epsilon_greedy"),
    Arm("loss-greedy", "epsilon_greedy", {"epsilon": 0.0}),
    Arm("ucb", "ucb"),
    *(
        Arm(f"dynamic, {schedule}", "dynamic", {"schedule": schedule})
        for schedule in ("constant", "reversed", "linear", "sigmoid")
    ),
    *(Arm(f"dynamic, {piece}", "dynamic", {"factors": piece}) for piece in ("kmeans", "pca", "random")),
    Arm("dynamic, no penalty", "dynamic", {"penalty": 0.0}),
    Arm("dynamic, lead 0.05", "dynamic", {"lead": 0.05}),
    Arm("dynamic, lead 0.5", "dynamic", {"lead": 0.5}),
    Arm("dynamic, frequency form", "dynamic", {"usage": "frequency", "penalty": 1.0}),
    Arm("dynamic, Gumbel", "dynamic", {"temperature": 0.05}),
)
PARTS: tuple[tuple[str, str, tuple[float, ...], bool, tuple[str, ...]], ...] = (
    ("mobilenet", "symmetric", KEEPS, True, ("cosine",)),
    ("mobilenet", "clean", KEEPS, True, ("cosine", "step", "one-cycle")),
    ("mobilenet", "human", KEEPS, True, ("cosine",)),
    ("text", "clean", FEW_KEEPS, False, ("cosine",)),
    ("text", "symmetric", FEW_KEEPS, False, ("cosine",)),
    ("resnet20", "clean", FEW_KEEPS, False, ("cosine",)),
    ("resnet20", "symmetric", FEW_KEEPS, False, ("cosine",)),
)
"""Set, noise, keep fractions, whether all arms are run, learning-rate schedules (but cosine at keep 0.7 alone)."""
BIAS_PENALTIES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
BIAS_KEEP = 0.3


def benchmark(*, seeds: int, tiny: bool, folder: Path, hours: float = 24.0) -> dict[str, Any]:
    """All figures; what is in `folder` already is not done again. After `hours` nothing more is begun, and the figures
    are of what there is: each says of how many seeds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on two
    folder, until = folder / "dynamic", time.monotonic() + 3600 * hours
    try:
        chosen = [task for task in tasks(seeds) if not tiny or task.keep in TINY_KEEPS]
        parts = [part for task in chosen if (part := _part(task, tiny=tiny, folder=folder, until=until))]
    finally:
        torch.set_num_threads(threads)
    figures = summary(parts)
    if drawn := [part for part in parts if _is_drawn(part)]:
        with open(folder / "usage.png", "wb") as file:
            draw_usage(drawn, file=file)
    _print(figures)
    told = {"parts": len(parts), "of_parts": len(chosen)}
    settings = {"rounds": ROUNDS, "batch": BATCH, "seeds": seeds, "keeps": KEEPS, "network": "64-128-C", **told}
    return {**provenance(), "benchmark": "dynamic", "tiny": tiny, "label": LABEL, "settings": settings, **figures}


class Task(NamedTuple):
    """One part of the study: all its arms are trained together."""

    set: str
    noise: str
    schedule: str
    keep: float
    seed: int
    all_arms: bool


def tasks(seeds: int) -> list[Task]:
    """All parts, those first that most claims hang on: keep 20% and full data with and without symmetric noise."""
    found = [
        Task(name, noise, schedule, keep, seed, all_arms and schedule == "cosine")
        for name, noise, keeps, all_arms, schedules in PARTS
        for schedule in schedules
        for keep in (1.0, *(keeps if schedule == "cosine" else (0.7,)))
        for seed in range(seeds)
    ]
    return sorted(found, key=lambda task: (_urgency(task), task.seed))


def _urgency(task: Task) -> int:
    is_first = task.set == "mobilenet" and task.noise != "human" and task.schedule == "cosine"
    return (0 if task.keep in (0.2, 1.0) else 1 if task.keep == 0.7 else 3) if is_first else 2


def _is_drawn(part: dict[str, Any]) -> bool:
    return (part["set"], part["noise"], part["keep"]) == ("mobilenet", "symmetric", 0.2)


def _part(task: Task, *, tiny: bool, folder: Path, until: float) -> dict[str, Any] | None:
    """A part, made or read; None if it is not there and there is no time left to make it."""
    suffix = f"{task.seed}{'-tiny' if tiny else ''}"
    file = folder / f"{task.set}-{task.noise}-{task.schedule}-{task.keep}-{suffix}.json"
    if not file.exists():
        if time.monotonic() > until:
            return None
        print(file.stem, flush=True)
        rows = rows_of(task.set, folder, tiny=tiny)
        found = factors_of(rows, folder / f"{task.set}-factors-{suffix}.npz", seed=task.seed, tiny=tiny)
        part = _measure(task, rows, found, rounds=4 if tiny else ROUNDS)
        file.with_suffix(".part").write_text(json.dumps(part))
        file.with_suffix(".part").rename(file)
    return json.loads(file.read_text())


def _measure(task: Task, rows: Rows, found: Found, *, rounds: int) -> dict[str, Any]:
    begun, seed, keep = time.perf_counter(), task.seed, task.keep
    pool = pool_of(rows, task.noise, found, seed=seed)
    steps = max(1, min(round(keep * len(pool.labels_N) / BATCH), len(pool.labels_N) // BATCH))
    arms = [Arm("full")] if keep == 1 else _arms(keep, task.all_arms)
    outcomes = train_stack(pool, arms, num_steps=rounds * steps, seed=seed, schedule=task.schedule)
    told = {
        **task._asdict(),
        "sample_gradients": rounds * steps * BATCH,
        "seconds": time.perf_counter() - begun,
        "noise_share": float(pool.is_wrong_N.mean()),
        "arms": {arm.name: _told(outcome) for arm, outcome in zip(arms, outcomes, strict=True)},
    }
    if keep == 1 and task.schedule == "cosine":
        told["factors"] = found.report
        told["ranks"] = found.ranks["factors"][0].tolist() if task.noise == "symmetric" else None
        told["bias"] = gradient_bias(pool, rounds=rounds, seed=seed)
    return told


def _arms(keep: float, all_arms: bool) -> list[Arm]:
    """Every arm with its keep fraction; full data and InfoBatch as it is published have none."""
    capped = Arm("infobatch, capped", "infobatch", {"kept_share": keep})
    arms = [DYNAMIC, *RIVALS, capped, *(MORE if all_arms else ())]
    free = {"full, fewer steps", "infobatch", capped.name}
    return [arm if arm.name in free else Arm(arm.name, arm.method, arm.fields, keep) for arm in arms]


def _told(outcome: Outcome) -> dict[str, Any]:
    log = outcome.log
    gaps = [(entry.usage_max - entry.usage_min, entry.usage_gap) for entry in log]
    late = [entry.wrong_share for entry in log[len(log) // 2 :]]
    return {
        "accuracy": outcome.accuracy,
        "rounds": len(log),
        "rows": statistics.fmean(entry.rows for entry in log),
        "wrong_share": statistics.fmean(entry.wrong_share for entry in log),
        "wrong_share_late": statistics.fmean(late),
        "wrong_share_each_round": [round(entry.wrong_share, 4) for entry in log],
        "smallest_class": min(entry.smallest_class for entry in log),
        "usage_min": [entry.usage_min for entry in log],
        "usage_max": [entry.usage_max for entry in log],
        "usage_gini": [round(entry.usage_gini, 4) for entry in log],
        "gini": gini(np.bincount(outcome.usage_N)),
        "never_used": float((outcome.usage_N == 0).mean()),
        "largest_gap": max(gap for gap, _ in gaps),
        "gap_bound": gaps[-1][1],
        "bound_holds": all(bound is None or gap <= bound for gap, bound in gaps),
    }


def gradient_bias(pool: Pool, *, rounds: int, seed: int) -> dict[str, float]:
    """||g_t - g|| / ||g|| of the last layer's gradients, by penalty (D-7): nothing is trained while it is selected.

    g is the mean over the pool at a network after a tenth of its training, g_t the mean over what the rounds chose.
    """
    stack = Stack(1, pool.features_NF.shape[1], pool.num_classes, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(max(1, rounds * len(pool.labels_N) // BATCH // 10)):
        batch = torch.randint(len(pool.labels_N), (1, BATCH), generator=rng)
        stack.step(pool.features_NF[batch], pool.labels_N[batch], torch.ones(1, BATCH), rate=1e-3)
    gradients_NP = stack.last_layer_gradients(pool.features_NF, pool.labels_N)
    whole_P = gradients_NP.mean(dim=0)
    return {
        str(penalty): ((usage_N @ gradients_NP - whole_P).norm() / whole_P.norm()).item()
        for penalty in BIAS_PENALTIES
        for usage_N in [_usage_share(pool, penalty, rounds=rounds, seed=seed)]
    }


def _usage_share(pool: Pool, penalty: float, *, rounds: int, seed: int) -> torch.Tensor:
    """Each row's share of all uses, (N,)."""
    selector, n = load_selector("dynamic", penalty=penalty), len(pool.labels_N)
    usage, places, keep = torch.zeros(n), torch.arange(n), round(BIAS_KEEP * n)
    representative, rare = pool.factors["factors"]
    rows = {"uid": torch.stack([places, places], dim=1)}
    rows |= {"factors.representativeness": representative, "factors.rarity": rare}
    for number in range(rounds):
        rows |= {"usage_count": usage, "mean_usage": usage.mean()}
        rng = torch.Generator().manual_seed(1_000_003 * seed + number)
        usage[selector.select(rows, keep, number / rounds, rng).indices] += 1
    if penalty:
        assert usage.max() - usage.min() <= usage_gap(penalty)
    return usage / usage.sum()


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
    tables = {"/".join(map(str, key)): _table(of, full[key[:3]]) for key, of in groups.items() if key[3] != 1}
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
        "wrong_share",
        "wrong_share_late",
        "smallest_class",
        "gini",
        "never_used",
        "largest_gap",
    )
    return {
        "sample_gradients": of[0]["sample_gradients"],
        "noise_share": statistics.fmean(part["noise_share"] for part in of),
        "arms": {
            arm: {
                "accuracy": interval(accuracy[arm]),
                "minus_full": interval(_minus(accuracy[arm], [full[part["seed"]] for part in of])),
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
        seeds = sorted(noisy.keys() & clean.keys())
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


def _print(figures: dict[str, Any]) -> None:
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
