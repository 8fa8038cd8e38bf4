"""`python -m jobs.benchmark alchemist_models`: small generative models trained on what a rater selects.

The pools of `alchemist_pools`: CIFAR-10's images, the demo's rendered scenes, both by half, each with the same planted
junk. A rating is learnt on each; models of its proxy's family and size, of another size, and of another family are then
trained from scratch on selections by it, and measured by their loss on clean test images, every EVERY steps. All see
the same number of epochs of what was selected, as the article's do; the whole pool also for as many steps as 20% and
50% of it take. Codebooks and components are fitted on the validation mixture, one for all arms.

    A-2, A-4, A-5  test loss: top-k, random, Shift-Gsample; 50% against the whole; 20% against random 50%
    A-6            steps to random's last loss; the published factors are 2.33 and 5
    stability      step-to-step variation of the curve's second half, against random's
    transfer       Shift-Gsample by a rater that a model of another family taught

These are no image models: they give a loss, and no image to judge. That needs a GPU.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from curation.methods.alchemist import Alchemist
from curation.numerics.percentiles import percentiles, sorted_sample
from curation.training.rater import losses
from curation.training.rater_run import ProxySpec, Split, make_proxy, prepared, row_losses
from jobs.benchmarks.alchemist import HELD_OUT, KEEPS, interval, taught, text
from jobs.benchmarks.alchemist_pools import FACTS, REAL, Source, Study, study_of
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.parts import once
from jobs.benchmarks.straw_men import AESTHETIC, CLARITY

SOURCES: tuple[Source, ...] = ("real", "mixed", "rendered")
MODELS = {
    "autoregressive, the rater's size": ProxySpec(width=48, num_codes=64),
    "autoregressive, twice as wide": ProxySpec(width=96, num_codes=64),
    "masked": ProxySpec(kind="masked", width=128),
}
WAYS = ("clean", "clean, masked proxy", HELD_OUT)
"""Ways to rate: by a rater that an autoregressive proxy taught, by one that a masked proxy taught, without a rater."""
EPOCHS, BATCH, LEARNING_RATE, WARMUP, EVERY = 12, 64, 2e-3, 10, 5


class Arm(NamedTuple):
    """What a model is trained on, and for how many steps."""

    rows: np.ndarray
    steps: int


def benchmark(*, seeds: int, tiny: bool, folder: Path) -> dict[str, Any]:
    """All figures; what is in `folder` already is not done again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sources = SOURCES[-1:] if tiny else SOURCES
        found = {source: [_of_seed(source, seed, folder, tiny=tiny) for seed in range(seeds)] for source in sources}
    finally:
        torch.set_num_threads(threads)
    figures = {source: summary(done) for source, done in found.items()}
    say(figures)
    settings = {"epochs": EPOCHS, "batch": BATCH, "learning_rate": LEARNING_RATE, "seeds": seeds}
    return {**provenance(), "benchmark": "alchemist_models", "tiny": tiny, "settings": settings, "pools": figures}


def _of_seed(source: Source, seed: int, folder: Path, *, tiny: bool) -> dict[str, Any]:
    """{model: {arm: curve}} of one pool; a curve is the test loss before the first step and after each EVERY."""
    study = study_of(seed, folder / "alchemist" / "pools", tiny=tiny, source=source)
    prefix = f"{'tiny-' if tiny else ''}{'' if source == 'real' else source + '-'}{seed}"
    rated = {}
    for way in WAYS:
        path = folder / "alchemist" / f"{prefix}-{way.replace(' ', '_')}.json"
        rating = once(path, lambda way=way: taught(way, study, seed=seed, tiny=tiny))["rating"]
        if rating is not None:  # else its batch's weight collapsed
            rated[way] = np.array(rating)
    arms = dict(_arms(study, rated, seed=seed, epochs=2 if tiny else EPOCHS))
    path = folder / "alchemist_models" / f"{prefix}.json"
    return once(
        path,
        lambda: {
            model: {name: _curve(spec, study, arm, seed=seed) for name, arm in arms.items()}
            for model, spec in MODELS.items()
        },
    )


def _arms(study: Study, rated: Mapping[str, np.ndarray], *, seed: int, epochs: int) -> Iterator[tuple[str, Arm]]:
    kind, whole = study.pool.kind, np.arange(len(study.pool.kind))
    uid = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**62, (len(whole), 2)))

    def steps_of(rows: np.ndarray) -> int:
        return max(EVERY, epochs * len(rows) // BATCH)

    def chosen(way: str, keep: float, rule: Literal["top", "shift"]) -> Arm:
        percentile = torch.from_numpy(percentiles(rated[way], sorted_sample(rated[way])))
        generator = torch.Generator().manual_seed(seed)
        rows = {"rating_percentile": percentile, "uid": uid}
        taken = Alchemist(rule=rule).select(rows, round(keep * len(whole)), 0.0, generator).indices.numpy()
        return Arm(taken, steps_of(taken))

    yield "whole, equal epochs", Arm(whole, steps_of(whole))
    for keep in KEEPS:
        share = f"{keep:.0%}"
        same = round(keep * len(whole))
        yield f"whole, steps of {share}", Arm(whole, steps_of(whole[:same]))
        rng = np.random.default_rng([seed, same])
        yield f"random {share}", Arm(rng.choice(whole, same, replace=False), steps_of(whole[:same]))
        real = np.flatnonzero(kind == REAL)
        yield f"no junk {share}", Arm(rng.choice(real, min(same, len(real)), replace=False), steps_of(whole[:same]))
        for name in (CLARITY, AESTHETIC):  # straw men: the top of one number
            score = study.pool.facts[:, FACTS.index(name)]
            yield f"top {name} {share}", Arm(np.argsort(-score, kind="stable")[:same], steps_of(whole[:same]))
        if "clean" in rated:
            yield f"top-k {share}", chosen("clean", keep, "top")
        for way in rated:
            yield f"Shift-Gsample {share}, {way}", chosen(way, keep, "shift")


def _curve(spec: ProxySpec, study: Study, arm: Arm, *, seed: int) -> list[float]:
    """A model trained on the arm's rows; its mean loss on the test images, before and during."""
    mixture = Split(np.zeros((len(study.validation.pixels), 0), np.float32), study.validation.pixels)
    model = make_proxy(spec, mixture, seed=seed)
    pool = prepared(model, Split(study.pool.seen, study.pool.pixels), device="cpu")
    test = prepared(model, Split(np.zeros((len(study.test.pixels), 0), np.float32), study.test.pixels), device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    curve = [float(row_losses(model, test).mean())]
    for step, places in enumerate(itertools.islice(_batches(arm.rows, seed=seed), arm.steps), start=1):
        optimizer.zero_grad(set_to_none=True)
        losses(model, pool.at(places)).mean().backward()
        optimizer.step()
        schedule.step()
        if step % EVERY == 0:
            curve.append(round(float(row_losses(model, test).mean()), 5))
    return curve


def _batches(rows: np.ndarray, *, seed: int) -> Iterator[np.ndarray]:
    """Batches of BATCH rows without end; each row once an epoch."""
    rng, left = np.random.default_rng([seed, 1]), rows[:0]
    while True:
        while len(left) < BATCH:
            left = np.concatenate([left, rng.permutation(rows)])
        yield left[:BATCH]
        left = left[BATCH:]


def summary(done: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[str, Any]:
    """Of each model and arm: last loss, minus random's of the same share and minus the whole pool's, steps to random's
    last loss, and variation; with intervals over seeds."""
    told: dict[str, Any] = {}
    for model in done[0]:
        told[model] = {}
        for arm in done[0][model]:
            if not all(arm in of[model] for of in done):
                continue
            curves = [of[model][arm] for of in done]
            cell: dict[str, Any] = {"loss": interval([curve[-1] for curve in curves])}
            share = next((f"{keep:.0%}" for keep in KEEPS if f"{keep:.0%}" in arm), None)
            if share is not None:
                random = [of[model][f"random {share}"] for of in done]
                pairs = list(zip(curves, random, strict=True))
                cell["minus_random"] = interval([mine[-1] - theirs[-1] for mine, theirs in pairs])
                cell["variation_of_randoms"] = interval([variation(mine) / variation(theirs) for mine, theirs in pairs])
                reached = [steps_to(mine, theirs[-1]) for mine, theirs in pairs]
                cell["steps_to_randoms_loss"] = reached
                cell["speed_up"] = [
                    None if steps is None else (len(theirs) - 1) * EVERY / steps
                    for steps, theirs in zip(reached, random, strict=True)
                ]
            for name in ("whole, equal epochs", "random 50%"):
                others = [of[model][name] for of in done]
                gains = [mine[-1] - theirs[-1] for mine, theirs in zip(curves, others, strict=True)]
                cell[f"minus_{name}"] = interval(gains)
            told[model][arm] = cell
    return told


def steps_to(curve: Sequence[float], loss: float) -> int | None:
    """Steps after which a curve is first at a loss or below, at least EVERY; None if never."""
    place = next((place for place, value in enumerate(curve) if value <= loss), None)
    return None if place is None else max(1, place) * EVERY


def variation(curve: Sequence[float]) -> float:
    """Standard deviation of the second half's differences from one evaluation to the next."""
    differences = np.diff(curve[len(curve) // 2 :])
    return float(statistics.pstdev(differences)) if len(differences) > 1 else float("nan")


def say(figures: Mapping[str, Any]) -> None:
    """The tables that one looks at first."""
    for source, models in figures.items():
        for model, arms in models.items():
            print(f"\n{source} pool, {model}: test loss, minus random's of the same share, speed-up")
            for arm, of in arms.items():
                gain = text(of["minus_random"]) if "minus_random" in of else ""
                times = [value for value in of.get("speed_up", []) if value is not None]
                faster = f"{statistics.mean(times):.2f} in {len(times)} seeds" if times else ""
                print(f"  {arm:<40}{text(of['loss']):<22}{gain:<22}{faster}")
