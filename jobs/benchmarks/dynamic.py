"""`python -m jobs.benchmark dynamic`: dynamic selection by representativeness and rarity, against its rivals.

Claims D-1 to D-9 and D-c of its specification (D-8 in its analogue for CPUs), on small networks over frozen features.
The paper (arXiv:2603.04981) is only partly public: every figure of the method is of our completion of it. All arms of
one keep fraction take equally many sample-gradients; `full, fewer steps` (D-c) spends them on the whole pool, `rs2` on
fresh random rows. InfoBatch decides itself how many rows a round has, so at equal sample-gradients it has fewer rounds;
`infobatch, capped` is made to keep as many as the others. InfoBatch as published ends on full rounds, no other arm
does: `infobatch, no tail` tells what that is worth. The penalty is such that usage differs by less than its mean.
Accuracies are of clean test labels, after the last step. All parts of the study run side by side; what an arm costs by
the clock is measured afterwards, one at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from curation.methods import load_selector
from curation.methods.dynamic import usage_gap
from curation.numerics.quantiles import gini
from curation.training.schedules import RateSchedule
from jobs.benchmarks.dynamic_claims import claims
from jobs.benchmarks.dynamic_clock import clock, feature_seconds, speeds
from jobs.benchmarks.dynamic_plot import draw_usage
from jobs.benchmarks.dynamic_runs import BATCH, Arm, Outcome, Pool, Stack, train_stack
from jobs.benchmarks.dynamic_sets import Found, Rows, factor_seconds, factors_of, pool_of, rows_of
from jobs.benchmarks.dynamic_tables import BIAS_PENALTIES, LABEL, OURS, show_all, summary
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.parts import once

ROUNDS = 40
KEEPS = (0.7, 0.5, 0.3, 0.2)
FEW_KEEPS = (0.7, 0.2)
TINY_KEEPS = (1.0, 0.2)
CLOCKED_KEEPS = (0.7, 0.2)
RIVALS = (
    Arm("full, fewer steps"),
    Arm("rs2", "rs2"),
    Arm("infobatch", "infobatch"),
    Arm("rcap", "rcap"),
)
DYNAMIC = Arm(OURS, "dynamic")
NO_TAIL = Arm("infobatch, no tail", "infobatch", {"delta": 1.0})
MORE = (
    NO_TAIL,
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
PARTS: tuple[tuple[str, str, tuple[float, ...], bool, tuple[RateSchedule, ...]], ...] = (
    ("mobilenet", "symmetric", KEEPS, True, ("cosine",)),
    ("mobilenet", "clean", KEEPS, True, ("cosine", "step", "one-cycle")),
    ("mobilenet", "human", KEEPS, True, ("cosine",)),
    ("text", "clean", FEW_KEEPS, False, ("cosine",)),
    ("text", "symmetric", FEW_KEEPS, False, ("cosine",)),
    ("resnet20", "clean", FEW_KEEPS, False, ("cosine",)),
    ("resnet20", "symmetric", FEW_KEEPS, False, ("cosine",)),
)
"""Set, noise, keep fractions, whether all arms are run, learning-rate schedules (but cosine at keep 0.7 alone)."""
BIAS_KEEP = 0.3


def benchmark(*, seeds: int, tiny: bool, folder: Path, hours: float = 24.0, processes: int = 0) -> dict[str, Any]:
    """All figures; what is in `folder` already is not done again. After `hours` nothing more is begun, and the figures
    are of what there is: each says of how many seeds. `processes` 0: as many as there are CPUs."""
    folder, until = folder / "dynamic", time.time() + 3600 * hours
    begun, done_before = time.monotonic(), len(list(folder.glob("*.json")))
    chosen = [task for task in tasks(seeds) if not tiny or task.keep in TINY_KEEPS]
    size = Size(folder, tiny, until)
    sets = dict.fromkeys(task.set for task in chosen)
    seeds_of_sets = dict.fromkeys((task.set, task.seed) for task in chosen)
    with _mapping(1 if tiny else processes or len(os.sched_getaffinity(0))) as over:
        # What several parts read is made before them, each thing once.
        list(over(partial(_make_rows, size=size), sets))
        list(over(partial(_make_factors, size=size), seeds_of_sets))
        parts = [part for part in over(partial(_part, size=size), chosen) if part]
    with _mapping(1) as over:
        clocks = [told for told in over(partial(_clock, size=size), range(seeds)) if told]
    figures = summary(parts)
    if clocks:
        figures["speed"] = speeds(clocks, num_rows=clocks[0]["num_rows"])
    figures["claims"] = claims(figures)
    if drawn := [part for part in parts if _is_drawn(part)]:
        with open(folder / "usage.png", "wb") as file:
            draw_usage(drawn, file=file)
    show_all(figures)
    told = {
        "parts": len(parts),
        "of_parts": len(chosen),
        "parts_made_now": len(list(folder.glob("*.json"))) - done_before,
    }
    told |= {"seconds_of_this_call": time.monotonic() - begun}
    settings = {"rounds": ROUNDS, "batch": BATCH, "seeds": seeds, "keeps": KEEPS, "network": "64-128-C", **told}
    return {**provenance(), "benchmark": "dynamic", "tiny": tiny, "label": LABEL, "settings": settings, **figures}


class Size(NamedTuple):
    """How large the study is, where its files are, and when (time.time) nothing more is begun."""

    folder: Path
    tiny: bool
    until: float

    @property
    def rounds(self) -> int:
        """Rounds of an arm that keeps its fraction in each."""
        return 4 if self.tiny else ROUNDS

    @property
    def suffix(self) -> str:
        """Of a file's name."""
        return "-tiny" if self.tiny else ""


@contextlib.contextmanager
def _mapping(processes: int) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]]:
    """A map over `processes` processes of one thread each: matrices this small are slower on two."""
    if processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield map
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        yield executor.map


class Task(NamedTuple):
    """One part of the study: all its arms are trained together."""

    set: str
    noise: str
    schedule: RateSchedule
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


def _make_rows(name: str, size: Size) -> None:
    rows_of(name, size.folder, tiny=size.tiny)


def _make_factors(of: tuple[str, int], size: Size) -> None:
    name, seed = of
    if time.time() < size.until:
        _found(name, seed, rows_of(name, size.folder, tiny=size.tiny), size)


def _found(name: str, seed: int, rows: Rows, size: Size) -> Found:
    file = size.folder / f"{name}-factors-{seed}{size.suffix}.npz"
    return factors_of(rows, file, seed=seed, tiny=size.tiny)


def _part(task: Task, size: Size) -> dict[str, Any] | None:
    """A part, made or read; None if it is not there and there is no time left to make it."""
    name = f"{task.set}-{task.noise}-{task.schedule}-{task.keep}-{task.seed}{size.suffix}"
    return _kept(size, name, lambda: _measure(task, size))


def _clock(seed: int, size: Size) -> dict[str, Any] | None:
    """What the arms of the widest comparison cost, each by itself."""

    def made() -> dict[str, Any]:
        rows = rows_of("mobilenet", size.folder, tiny=size.tiny)
        found = _found("mobilenet", seed, rows, size)
        pool = pool_of(rows, "clean", found, seed=seed)
        return {
            "seed": seed,
            "num_rows": len(pool.labels_N),
            "feature_seconds": feature_seconds(images=8 if size.tiny else 200),
            "factor_seconds": factor_seconds(rows, seed=seed, tiny=size.tiny),
            "by_keep": {
                str(keep): clock(pool, _arms(keep, all_arms=False), keep=keep, rounds=size.rounds, seed=seed)
                for keep in CLOCKED_KEEPS
            },
        }

    return _kept(size, f"clock-{seed}{size.suffix}", made)


def _kept(size: Size, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    file = size.folder / f"{name}.json"
    return None if time.time() > size.until and not file.exists() else once(file, make)


def _measure(task: Task, size: Size) -> dict[str, Any]:
    begun, seed, keep, rounds = time.perf_counter(), task.seed, task.keep, size.rounds
    rows = rows_of(task.set, size.folder, tiny=size.tiny)
    found = _found(task.set, seed, rows, size)
    pool = pool_of(rows, task.noise, found, seed=seed)
    steps = max(1, min(round(keep * len(pool.labels_N) / BATCH), len(pool.labels_N) // BATCH))
    arms = [Arm("full")] if keep == 1 else _arms(keep, task.all_arms)
    outcomes = train_stack(pool, arms, num_steps=rounds * steps, seed=seed, schedule=task.schedule)
    told = {
        **task._asdict(),
        "sample_gradients": rounds * steps * BATCH,
        "mean_usage": rounds * steps * BATCH / len(pool.labels_N),
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
    free = {"full, fewer steps", "infobatch", capped.name, NO_TAIL.name}
    return [arm if arm.name in free else Arm(arm.name, arm.method, arm.fields, keep) for arm in arms]


def _told(outcome: Outcome) -> dict[str, Any]:
    log = outcome.log
    gaps = [(entry.usage_max - entry.usage_min, entry.usage_gap) for entry in log]
    late = [entry.wrong_share for entry in log[len(log) // 2 :]]
    return {
        "accuracy": outcome.accuracy,
        "rounds": len(log),
        "choose_seconds": outcome.choose_seconds,
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
