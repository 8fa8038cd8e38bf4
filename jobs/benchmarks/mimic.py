"""`python -m jobs.benchmark mimic`: Grad-Mimic under label noise, against its rivals and its controls.

Claims G-2 to G-6 of its specification on linear probes of frozen MobileNet features: accuracy of each method and
control, AUC of the mean score for clean against mislabelled rows, F1 of each binariser and aggregator in finding
mislabelled rows, the kept share over noise levels, and a top share of clean data against a random one. Temperatures are
chosen per arm on clean held-out rows that nothing else sees. Step times (G-3) are `mimic_steps`.

The reference: held-out clean rows (the primary one). Controls: the pool's own rows with clean labels, the held-out
reference with its features permuted, random weights of its length, and one trained on the noisy pool itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curation.numerics.votes import AGGREGATORS, BINARISERS, RoundVotes, aggregate, binarise
from jobs.benchmarks.mimic_runs import (
    BATCH,
    LEARNING_RATE,
    Arm,
    Head,
    Parts,
    Run,
    Split,
    auc,
    by_selector,
    f1,
    mimic,
    plain,
    probe,
    probes,
    rho,
    symmetric_noise,
)
from jobs.benchmarks.mimic_sets import NOT_SHOWN, SETS, ImageSet, image_set
from jobs.benchmarks.mimic_steps import step_times
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.parts import once
from jobs.benchmarks.race import interval, show

TEMPERATURES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Scores are as wide as features are long: a MobileNet row's length is about 27, so these are not the authors' 0.05.
The products of `influence` are wider still. At the last one all rows weigh nearly alike."""
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7)
LEVEL_TEMPERATURE = 1.0
SETTINGS = {
    "cifar10": ("0.4", "0.5", "0.6", "human", "levels", "clean"),
    "fashion": ("0.4", "0.6", "levels"),
    "emoji": ("0.4", "0.6", "levels"),
    "cifar100": ("0.4",),
}
"""What is measured on each set: symmetric noise, people's labels, kept share over levels, top shares of clean rows."""
SHARES = (0.8, 0.7, 0.6, 0.5)
REFERENCE_EPOCHS = 10
MIMICS = ("mimic held-out", "mimic same data", "mimic permuted", "mimic random", "mimic same noise")
TUNED = (*MIMICS, "softmax-rho", "influence", "mimic held-out, scope all")


def benchmark(*, seeds: int, pairs: int, tiny: bool, folder: Path) -> dict[str, Any]:
    """All figures; a set, setting and seed that is in `folder` already is not done again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on two
    try:
        done: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for seed in range(seeds):
            for name, settings in SETTINGS.items():
                for setting, found in _of_seed(name, settings, seed=seed, tiny=tiny, folder=folder / "mimic").items():
                    done.setdefault((name, setting), []).append(found)
        steps = step_times(pairs=pairs, tiny=tiny)
    finally:
        torch.set_num_threads(threads)
    sets = {name: _summary_of_set(name, done) for name in SETTINGS}
    figures = {
        "sets_shown": {"of": 6, "shown": sorted(SETS), "not_shown": NOT_SHOWN},
        "settings": {"batch": BATCH, "learning_rate": LEARNING_RATE, "temperatures": TEMPERATURES, "seeds": seeds},
        "sets": sets,
        "quality": _quality(sets),
        "steps": steps,
    }
    _print(figures)
    return {**provenance(), "benchmark": "mimic", "tiny": tiny, **figures}


def _of_seed(name: str, settings: tuple[str, ...], *, seed: int, tiny: bool, folder: Path) -> dict[str, dict[str, Any]]:
    whole = image_set(name, folder, tiny=tiny)
    parts, epochs = split(whole, seed=seed), 1 if tiny else 5 if name == "cifar10" else 10
    done = {}
    for setting in settings:
        file = folder / f"{name}-{setting}-{seed}{'-tiny' if tiny else ''}.json"

        def made(setting: str = setting) -> dict[str, Any]:
            found = _measure(parts, setting, num_classes=whole.num_classes, epochs=epochs, seed=seed)
            return found | {"rows": len(parts.pool.labels_N), "classes": whole.num_classes, "epochs": epochs}

        done[setting] = once(file, made)
    return done


def _summary_of_set(name: str, done: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, Any]:
    of = {setting: done[name, setting] for setting in SETTINGS[name]}
    first = next(iter(of.values()))[0]
    found: dict[str, Any] = {field: first[field] for field in ("rows", "classes", "epochs")}
    found["noise"] = {setting: _summary(runs) for setting, runs in of.items() if setting not in ("levels", "clean")}
    if "levels" in of:
        found["kept_share"] = {level: interval([d[level] for d in of["levels"]]) for level in map(str, LEVELS)}
    if "clean" in of:
        found["top_share"] = {
            share: {
                "mimic": interval([d[share]["mimic"] for d in of["clean"]]),
                "mimic_minus_random": interval([d[share]["mimic"] - d[share]["random"] for d in of["clean"]]),
            }
            for share in map(str, SHARES)
        }
    return found


def split(whole: ImageSet, *, seed: int) -> Parts:
    """Shares of 10/13, 2/13 and 1/13 of what is no test split; without one of its own, a fifth of the set is tested."""
    order = np.random.default_rng(seed).permutation(len(whole.labels_N))
    is_test = whole.is_test_N[order]
    if not is_test.any():
        is_test = np.arange(len(order)) < len(order) // 5
    train, test = order[~is_test], order[is_test]
    ends = len(train) * 10 // 13, len(train) * 12 // 13
    features, labels = torch.from_numpy(whole.features_NF).float(), torch.from_numpy(whole.labels_N)

    def part(rows: np.ndarray) -> Split:
        return Split(features[rows], labels[rows])

    return Parts(
        pool=part(train[: ends[0]]),
        reference=part(train[ends[0] : ends[1]]),
        validation=part(train[ends[1] :]),
        test=part(test),
        human_N=torch.from_numpy(whole.human_N)[train[: ends[0]]],
    )


def _measure(parts: Parts, setting: str, *, num_classes: int, epochs: int, seed: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1000 + seed)
    if setting == "levels":
        return _kept_shares(parts, num_classes=num_classes, epochs=epochs, seed=seed, rng=rng)
    if setting == "clean":
        return _top_shares(parts, num_classes=num_classes, epochs=epochs, seed=seed, rng=rng)
    clean_N = parts.pool.labels_N
    noisy_N = parts.human_N if setting == "human" else _noisy(parts, float(setting), num_classes, rng)
    pool = parts.pool._replace(labels_N=noisy_N)
    is_clean_N = (noisy_N == clean_N).numpy()
    references = _references(parts, pool, num_classes=num_classes, epochs=epochs, seed=seed)
    found: dict[str, Any] = {
        "noise": float((~is_clean_N).mean()),
        "reference_accuracy": {name: head.accuracy(parts.test) for name, head in references.items()},
        "accuracy": {},
        "temperature": {},
        "auc": {},
        "auc_last_weight": {},
        "f1": {},
        "temperature_1": {},
    }
    arms = _arms(parts, pool, references)
    runs = iter(
        probes(
            pool,
            [arm for of in arms.values() for arm in of.values()],
            num_classes=num_classes,
            epochs=epochs,
            seed=seed,
        )
    )
    for name, choices in arms.items():
        by_temperature = {tau: next(runs) for tau in choices}
        tau = max(by_temperature, key=lambda tau: by_temperature[tau].head.accuracy(parts.validation))
        run = by_temperature[tau]
        found["accuracy"][name] = run.head.accuracy(parts.test)
        if len(choices) > 1:
            found["temperature"][name] = tau
            found["auc"][name] = auc(run.scores_EN.mean(axis=0), is_clean_N)
            found["auc_last_weight"][name] = auc(run.weights_EN[-1], is_clean_N)
        if name in ("mimic held-out", "mimic same data"):
            found["f1"][name] = _detection(run, is_clean_N)
            found["temperature_1"][name] = by_temperature[1.0].head.accuracy(parts.test)
    return found


def _noisy(parts: Parts, share: float, num_classes: int, rng: torch.Generator) -> torch.Tensor:
    return symmetric_noise(parts.pool.labels_N, share=share, num_classes=num_classes, rng=rng)


def _reference(on: Split, *, num_classes: int, epochs: int, seed: int) -> Head:
    return probe(on, plain, num_classes=num_classes, epochs=max(epochs, REFERENCE_EPOCHS), seed=seed).head


def _references(parts: Parts, pool: Split, *, num_classes: int, epochs: int, seed: int) -> dict[str, Head]:
    """Heads to mimic. All are trained alike, from the learner's own beginning."""

    trained = partial(_reference, num_classes=num_classes, epochs=epochs, seed=seed)
    held_out = trained(parts.reference)
    rng = torch.Generator().manual_seed(2000 + seed)
    permutation = torch.randperm(held_out.weight_CF.shape[1], generator=rng)
    random_CF = torch.randn(held_out.weight_CF.shape, generator=rng)
    return {
        "mimic held-out": held_out,
        "mimic same data": trained(parts.pool),
        "mimic permuted": held_out._replace(weight_CF=held_out.weight_CF[:, permutation]),
        "mimic random": held_out._replace(weight_CF=random_CF * (held_out.weight_CF.norm() / random_CF.norm())),
        "mimic same noise": trained(pool),
    }


def _arms(parts: Parts, pool: Split, references: dict[str, Head]) -> dict[str, dict[float, Arm]]:
    """Each arm's ways to weigh rows, by temperature; one that has none stands at 1."""
    held_out = references["mimic held-out"]
    ones = {
        "sgd": plain,
        "grand": by_selector("grand", share=0.5),
        "agra": by_selector("agra", compared_with=pool),
        "gradmatch": by_selector("gradmatch", share=0.25),
    }
    tuned = {
        **{name: partial(mimic, references[name]) for name in MIMICS},
        "softmax-rho": partial(rho, held_out, pool),
        "influence": lambda tau: by_selector("influence", compared_with=parts.reference, temperature=tau),
    }
    return {
        **{name: {1.0: Arm(weigh)} for name, weigh in ones.items()},
        **{name: {tau: Arm(weigh(tau)) for tau in TEMPERATURES} for name, weigh in tuned.items()},
        "mimic held-out, scope all": {tau: Arm(mimic(held_out, tau), "all") for tau in TEMPERATURES},
    }


def _detection(run: Run, is_clean_N: np.ndarray) -> dict[str, float]:
    """F1 of finding mislabelled rows, for each binariser and aggregator."""
    return {
        f"{by}, {aggregator}": f1(~_kept(run, by=by, aggregator=aggregator), ~is_clean_N)
        for by in BINARISERS
        for aggregator in AGGREGATORS
    }


def _kept(run: Run, *, by: Any, aggregator: Any) -> np.ndarray:
    def rounds() -> Iterator[RoundVotes]:
        places = np.arange(run.scores_EN.shape[1])
        for scores_N, weights_N in zip(run.scores_EN, run.weights_EN, strict=True):
            yield RoundVotes(places, binarise(scores_N, weights_N, by=by))

    return aggregate(rounds, num_rows=run.scores_EN.shape[1], by=aggregator).keep


def _kept_shares(parts: Parts, *, num_classes: int, epochs: int, seed: int, rng: torch.Generator) -> dict[str, float]:
    """Kept share by threshold and majority at each noise level, with the held-out reference and one temperature."""
    reference = _reference(parts.reference, num_classes=num_classes, epochs=epochs, seed=seed)
    found = {}
    for level in LEVELS:
        pool = parts.pool._replace(labels_N=_noisy(parts, level, num_classes, rng))
        weigh = mimic(reference, LEVEL_TEMPERATURE)
        run = probe(pool, weigh, num_classes=num_classes, epochs=epochs, seed=seed)
        found[str(level)] = float(_kept(run, by="threshold", aggregator="majority").mean())
    return found


def _top_shares(parts: Parts, *, num_classes: int, epochs: int, seed: int, rng: torch.Generator) -> dict[str, Any]:
    """Accuracy of training on the top share by mean mimic score, and on a random one, of a clean pool."""
    pool = parts.pool
    reference = _reference(parts.reference, num_classes=num_classes, epochs=epochs, seed=seed)
    weigh = mimic(reference, LEVEL_TEMPERATURE)
    logged = probe(pool, weigh, num_classes=num_classes, epochs=epochs, seed=seed).scores_EN.mean(axis=0)
    best = torch.from_numpy(np.argsort(-logged, kind="stable"))
    shuffled = torch.randperm(len(best), generator=rng)

    def accuracy(rows: torch.Tensor) -> float:
        some = Split(pool.features_NF[rows], pool.labels_N[rows])
        head = probe(some, plain, num_classes=num_classes, epochs=epochs, seed=seed).head
        return head.accuracy(parts.test)

    return {
        str(share): {"mimic": accuracy(best[:keep]), "random": accuracy(shuffled[:keep])}
        for share in SHARES
        for keep in [round(share * len(best))]
    }


def _summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals over seeds, and paired differences to plain SGD."""
    arms = list(done[0]["accuracy"])
    minus = {arm: [d["accuracy"][arm] - d["accuracy"]["sgd"] for d in done] for arm in arms if arm != "sgd"}
    rho_minus = [d["accuracy"]["mimic held-out"] - d["accuracy"]["softmax-rho"] for d in done]
    return {
        "noise": interval([d["noise"] for d in done]),
        "accuracy": {arm: interval([d["accuracy"][arm] for d in done]) for arm in arms},
        "minus_sgd": {arm: {**interval(gains), "standard_errors": _errors(gains)} for arm, gains in minus.items()},
        "mimic_minus_rho": {**interval(rho_minus), "standard_errors": _errors(rho_minus)},
        "minus_reference": {
            arm: interval([d["accuracy"][arm] - d["reference_accuracy"][arm] for d in done]) for arm in MIMICS
        },
        "reference_accuracy": _by_key(done, "reference_accuracy"),
        "temperature": {arm: [d["temperature"][arm] for d in done] for arm in TUNED},
        "accuracy_at_temperature_1": _by_key(done, "temperature_1"),
        "auc": _by_key(done, "auc"),
        "auc_last_weight": _by_key(done, "auc_last_weight"),
        "f1": {
            arm: {kind: interval([d["f1"][arm][kind] for d in done]) for kind in done[0]["f1"][arm]}
            for arm in done[0]["f1"]
        },
    }


def _by_key(done: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return {arm: interval([d[name][arm] for d in done]) for arm in done[0][name]}


def _errors(gains: list[float]) -> float | None:
    """How many standard errors the mean lies above 0; None for a single seed, or gains that do not differ."""
    if len(gains) < 2 or statistics.stdev(gains) == 0:
        return None
    return statistics.fmean(gains) / (statistics.stdev(gains) / math.sqrt(len(gains)))


def _quality(found: dict[str, Any]) -> dict[str, Any]:
    """Pearson's r of kept share and noise over five levels of all sets (G-5: at most -0.85)."""
    shares = [of_set["kept_share"] for of_set in found.values() if "kept_share" in of_set]
    points = [(level, share[str(level)]["mean"]) for share in shares for level in LEVELS]
    return {"pearson": float(np.corrcoef(np.array(points).T)[0, 1]), "points": points}


def _print(figures: dict[str, Any]) -> None:
    for name, of_set in figures["sets"].items():
        for setting, found in of_set["noise"].items():
            print(f"\n{name}, {of_set['rows']} rows, {of_set['classes']} classes, noise {setting}")
            for arm, accuracy in found["accuracy"].items():
                gain = found["minus_sgd"].get(arm)
                told = f"   minus sgd {show(gain)}" if gain else ""
                told += f"   auc {show(found['auc'][arm])}" if arm in found["auc"] else ""
                told += f"   minus its reference {show(found['minus_reference'][arm])}" if arm in MIMICS else ""
                print(f"  {arm:<28}{show(accuracy)}{told}")
            for arm, kinds in found["f1"].items():
                print(f"  F1, {arm}: " + ", ".join(f"{kind} {show(value)}" for kind, value in kinds.items()))
        for share, value in of_set.get("top_share", {}).items():
            print(f"  clean pool, top {share} by score minus a random one: {show(value['mimic_minus_random'])}")
    print(f"\nkept share against noise: Pearson {figures['quality']['pearson']:.3f}")
    shown = figures["sets_shown"]
    print(f"{len(shown['shown'])} of {shown['of']} image sets: {', '.join(shown['shown'])}; {shown['not_shown']}")
