"""`python -m jobs.benchmark alchemist`: raters and Shift-Gsample on a pool whose junk is known.

No image model is trained: subsets are judged by the Fréchet distance of their own rows to clean test images, in
features that no rule saw, and by the junk in them. Claims and controls of the specification (alchemist.md, Sec. 7):

    A-1   the rating ranks plain > real > chaotic: AUC of both pairs, for each way to teach
    A-2   top-k, random, plain Gaussian and Shift-Gsample at 20% and 50% of the pool: Fréchet distance, for each rating
    A-3   blocks of the ranking, start 0 to 80%
    A-c1  the rater against the loss of a proxy trained on validation rows alone, both with Shift-Gsample
    A-c2  Eq. 6 against Eq. 9; A-c3 the group head; A-c5 mode code against clean: Spearman of ratings, and distance
    A-c4  bounds: random, and all junk removed by its label

Beside the ratings stand numbers of the image alone, the straw men among them: clarity, colourfulness, edge density.

Each (seed, way to teach) is written when it is done and not done again. Settings were fixed before any figure was seen:
proxy of width 48, 64 codes, learning rate 3e-3, 10 epochs of 10 steps of 2 x 32 rows, g from 1.0 by 0.03 an epoch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curation.evaluation.correlation import spearman
from curation.evaluation.fid import distance_of_moments, moments
from curation.methods.alchemist import Alchemist
from curation.numerics.intervals import t_interval
from curation.numerics.percentiles import inclusion, percentiles, sorted_sample
from curation.training.rater import Collapsed, RaterSpec, Rows
from curation.training.rater_dynamics import dynamics
from curation.training.rater_run import ProxySpec, RaterRun, RaterShape, Split, ratings_of, row_losses
from jobs.benchmarks.alchemist_pools import CHAOTIC, FACTS, KINDS, NEAR, PLAIN, REAL, Part, Study, study_of
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.parts import once
from jobs.benchmarks.straw_men import AESTHETIC, CLARITY

KEEPS = (0.2, 0.5)
TEACH: dict[str, Any] = {"epochs": 10, "steps_per_epoch": 10, "learning_rate": 3e-3}
PROXY: dict[str, Any] = {"width": 48, "num_codes": 64}
TINY_TEACH: dict[str, Any] = {"epochs": 3, "steps_per_epoch": 2, "batch_size": 16, "learning_rate": 3e-3}
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "clean": {},
    "clean, no group": {"shape": {"group": False}},
    "clean, Eq. 6": {"teach": {"use_reference": True}},
    "clean, entropy 0.1": {"teach": {"entropy": 0.1}},
    "clean, real validation": {"validation": {"real": True}},
    "clean, masked proxy": {"proxy": {"kind": "masked", "width": 128}},
    "paper": {"teach": {"mode": "paper"}},
    "paper, no group": {"teach": {"mode": "paper"}, "shape": {"group": False}},
    "code": {"teach": {"mode": "code"}},
    "align": {"teach": {"mode": "align"}},
}
HELD_OUT = "held-out loss"
"""A-c1: minus the loss of a proxy that is trained on validation rows alone, g = 1 throughout; no rater."""
SELECTORS: dict[str, dict[str, Any]] = {
    "top-k": {"rule": "top"},
    "random": {"rule": "random"},
    "Gaussian": {"rule": "gaussian"},
    "Shift-Gsample": {"rule": "shift"},
}
SHAPES: dict[str, dict[str, Any]] = {
    f"m {mean:g}, s {spread:g}": {"mean": mean, "spread": spread}
    for mean in (0.5, 0.625, 0.75)
    for spread in (0.125, 0.25)
}
BLOCKS = tuple(round(start, 2) for start in np.arange(0, 0.81, 0.1).tolist())
DRAWS = 3
"""Draws of each selection; their mean is one seed's figure."""
PUBLISHED = {"TopK": 48.20, "Gsample": 19.22, "Shift-Gsample": 18.37, "random": 20.69}
"""FID of models trained on 6 of 30 million LAION images (the article, Tables 4 and 2): of another kind than ours."""
PAIRS = {
    "A-c1, rater and held-out loss": ("clean", HELD_OUT),
    "A-c2, Eq. 9 and Eq. 6": ("clean", "clean, Eq. 6"),
    "A-c3, with and without group head": ("clean", "clean, no group"),
    "A-c5, clean and code": ("clean", "code"),
    "loss and alignment": ("clean", "align"),
    "autoregressive and masked proxy": ("clean", "clean, masked proxy"),
    "mixed and real validation": ("clean", "clean, real validation"),
}


def benchmark(*, seeds: int, tiny: bool, folder: Path) -> dict[str, Any]:
    """All figures; what is in `folder` already is not done again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = [_of_seed(seed, folder / "alchemist", tiny=tiny) for seed in range(seeds)]
    finally:
        torch.set_num_threads(threads)
    figures = summary(done)
    say(figures)
    settings = {"teach": TINY_TEACH if tiny else TEACH, "proxy": PROXY, "seeds": seeds, "draws": DRAWS}
    return {**provenance(), "benchmark": "alchemist", "tiny": tiny, "settings": settings, **figures}


def _of_seed(seed: int, folder: Path, *, tiny: bool) -> dict[str, dict[str, Any]]:
    study, prefix = study_of(seed, folder / "pools", tiny=tiny), f"{'tiny-' if tiny else ''}{seed}"
    told: dict[str, dict[str, Any]] = {}
    for way in (*WAYS, HELD_OUT):
        path = folder / f"{prefix}-{way.replace(' ', '_')}.json"
        told[way] = once(path, lambda way=way: taught(way, study, seed=seed, tiny=tiny))
    rated = {way: np.array(of["rating"]) for way, of in told.items() if of.get("rating") is not None}
    judged = once(folder / f"{prefix}-judged.json", lambda: _judged(study, rated, seed=seed))
    return {"judged": judged, **told}


def taught(way: str, study: Study, *, seed: int, tiny: bool) -> dict[str, Any]:
    """The pool's rating by one way to teach; `collapsed` in its place if the batch's weight fell to 0."""
    told = WAYS.get(way, {})
    validation = study.real_validation if told.get("validation") else study.validation
    fields = {**(TINY_TEACH if tiny else TEACH), **told.get("teach", {})}
    if way == HELD_OUT:
        fields["share_decay"] = 0.0
    proxy = {**PROXY, **told.get("proxy", {})}
    run = RaterRun(
        RaterSpec(**fields),
        RaterShape(**told.get("shape", {})),
        ProxySpec(**proxy),
        train=Split(study.pool.seen, study.pool.pixels),
        validation=Split(np.zeros((len(validation.pixels), 0), np.float32), validation.pixels),
        test=Split(np.zeros((len(study.test.pixels), 0), np.float32), study.test.pixels),
        seed=seed,
    )
    snapshots, effective = [], 0.0
    while not run.is_over:
        try:
            facts = run.step()
        except Collapsed as error:
            return {"rating": None, "collapsed": str(error), "step": run.trainer.step}
        effective = facts.effective_rows if facts else effective
        if facts and run.ends_epoch and way == "clean":
            snapshots.append({name: value.clone() for name, value in run.trainer.proxy.state_dict().items()})
    pool = run.rows("train", np.arange(len(study.pool.pixels)))
    losses = row_losses(run.trainer.proxy, pool)
    rating = -losses if way == HELD_OUT else ratings_of(run.finished_rater(), study.pool.seen)
    found: dict[str, Any] = {
        "rating": [round(value, 5) for value in rating.tolist()],
        "loss": run.evaluated(),
        "effective_rows": effective,
        "spearman_with_minus_loss": spearman(rating, -losses),
        "loss_by_kind": {kind: float(losses[study.pool.kind == kind].mean()) for kind in KINDS},
    }
    if snapshots:
        found["dynamics"] = _dynamics(run, snapshots, pool, rating)
    return found


def _dynamics(run: RaterRun, snapshots: list[dict[str, Any]], pool: Rows, rating: np.ndarray) -> dict[str, Any]:
    percentile = percentiles(rating, sorted_sample(rating))
    found = dynamics(run.trainer.proxy, snapshots, pool, percentile, ranges=10)
    return {
        name: [[None if np.isnan(v) else round(v, 5) for v in line] for line in of.tolist()]
        for name, of in found._asdict().items()
    }


def auc(higher: np.ndarray, lower: np.ndarray) -> float:
    """Probability that a value of `higher` (n,) exceeds one of `lower` (m,), ties by half."""
    values = np.sort(lower)
    below = np.searchsorted(values, higher, "left") + np.searchsorted(values, higher, "right")
    return float(below.mean() / (2 * len(values)))


def separation(rating: np.ndarray, kind: np.ndarray) -> dict[str, float]:
    """A-1's two figures, and how the doubled images stand to the real ones."""
    of = {name: rating[kind == name] for name in KINDS}
    return {
        "plain over real": auc(of[PLAIN], of[REAL]),
        "real over chaotic": auc(of[REAL], of[CHAOTIC]),
        "near duplicate over real": auc(of[NEAR], of[REAL]),
    }


def _judged(study: Study, rated: Mapping[str, np.ndarray], *, seed: int) -> dict[str, Any]:
    """Every figure of one seed that needs no more teaching."""
    pool, reference = study.pool, moments(torch.from_numpy(study.test.judged))
    uid = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**62, (len(pool.kind), 2)))

    def judge(rating: np.ndarray, keep: float, fields: Mapping[str, Any]) -> dict[str, Any]:
        percentile = percentiles(rating, sorted_sample(rating))
        rows = {"rating_percentile": torch.from_numpy(percentile), "uid": uid}
        draws = []
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(1000 * seed + draw)
            chosen = Alchemist(**fields).select(rows, round(keep * len(rating)), 0.0, generator).indices.numpy()
            draws.append({**_subset(pool, chosen, reference), "inclusion": _inclusion(percentile, chosen)})
        return _mean(draws)

    facts = dict(zip(FACTS, pool.facts.T, strict=True))
    straw_men = {name: facts[name] for name in (CLARITY, AESTHETIC)}
    scores = {**rated, **straw_men, "edge density": -facts["edge_density"], "PNG bytes": -facts["png_bytes"]}
    selections = {
        way: {f"{keep:.0%}": {name: judge(rating, keep, of) for name, of in SELECTORS.items()} for keep in KEEPS}
        for way, rating in scores.items()
    }
    clean = rated["clean"]
    is_real = np.flatnonzero(pool.kind == REAL)
    oracle = {}
    for keep in KEEPS:
        rng, size = np.random.default_rng(seed), min(round(keep * len(pool.kind)), len(is_real))
        oracle[f"{keep:.0%}"] = _mean(
            [_subset(pool, rng.choice(is_real, size, replace=False), reference) for _ in range(DRAWS)]
        )
    return {
        "separation": {way: separation(rating, pool.kind) for way, rating in scores.items()},
        "selections": selections,
        "whole pool": _subset(pool, np.arange(len(pool.kind)), reference),
        "oracle": oracle,
        "shapes": {f"{keep:.0%}": {name: judge(clean, keep, of) for name, of in SHAPES.items()} for keep in KEEPS},
        "blocks": {
            way: {f"{start:g}": judge(rated[way], 0.2, {"rule": "block", "block_start": start}) for start in BLOCKS}
            for way in ("clean", HELD_OUT)
        },
        "spearman": {name: spearman(rated[a], rated[b]) for name, (a, b) in PAIRS.items() if a in rated and b in rated},
        "rating_goes_with": {
            way: {name: spearman(rated[way], values) for name, values in facts.items()} for way in ("clean", "align")
        },
    }


def _subset(pool: Part, chosen: np.ndarray, reference: Any) -> dict[str, float]:
    kinds = pool.kind[chosen]
    return {
        "distance": distance_of_moments(moments(torch.from_numpy(pool.judged[chosen])), reference),
        **{f"share of {kind}": float((kinds == kind).mean()) for kind in KINDS},
    }


def _inclusion(percentile: np.ndarray, chosen: np.ndarray) -> list[float]:
    is_kept = np.zeros(len(percentile), bool)
    is_kept[chosen] = True
    return inclusion(percentile, is_kept).tolist()


def _mean(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: np.mean([draw[name] for draw in draws], axis=0).tolist() for name in draws[0]}


def summary(done: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds with 95% t intervals, differences paired by seed."""
    judged = [of["judged"] for of in done]
    ways = [way for way in (*WAYS, HELD_OUT) if all(of[way].get("rating") is not None for of in done)]
    told: dict[str, Any] = {
        "collapsed": {
            way: [of[way].get("collapsed") and {"step": of[way]["step"]} for of in done]
            for way in WAYS
            if any(of[way].get("collapsed") for of in done)
        },
        "taught": {
            way: {
                "effective_rows": interval([of[way]["effective_rows"] for of in done]),
                "spearman_with_minus_loss": interval([of[way]["spearman_with_minus_loss"] for of in done]),
                "loss_by_kind": {kind: interval([of[way]["loss_by_kind"][kind] for of in done]) for kind in KINDS},
            }
            for way in ways
        },
        "dynamics_of_seed_0": done[0]["clean"].get("dynamics"),
        "published_fid": PUBLISHED,
    }
    common = [way for way in judged[0]["selections"] if all(way in of["selections"] for of in judged)]
    told["selections"] = {
        way: {
            keep: {name: _of_selection([of["selections"][way][keep] for of in judged], name) for name in SELECTORS}
            for keep in judged[0]["selections"][way]
        }
        for way in common
    }
    told |= {
        name: _intervals([of[name] for of in judged])
        for name in ("separation", "whole pool", "oracle", "shapes", "blocks", "spearman", "rating_goes_with")
    }
    told["rater_minus_held_out_loss"] = {
        keep: _paired(judged, ("clean", keep, "Shift-Gsample"), (HELD_OUT, keep, "Shift-Gsample"))
        for keep in judged[0]["oracle"]
    }
    told["differences"] = {
        f"{name}, {keep}": _paired(judged, (a, keep, "Shift-Gsample"), (b, keep, "Shift-Gsample"))
        for name, (a, b) in PAIRS.items()
        if a in common and b in common
        for keep in judged[0]["oracle"]
    }
    return told


def _of_selection(cells: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    told = _intervals([cell[name] for cell in cells])
    told["distance_minus_random"] = interval([c[name]["distance"] - c["random"]["distance"] for c in cells])
    return told


def _paired(judged: Sequence[Mapping[str, Any]], a: tuple[str, ...], b: tuple[str, ...]) -> dict[str, Any]:
    def distance(of: Mapping[str, Any], path: tuple[str, ...]) -> float:
        way, keep, name = path
        return of["selections"][way][keep][name]["distance"]

    gains = [distance(of, a) - distance(of, b) for of in judged]
    error = float(np.std(gains, ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else None
    mean = float(np.mean(gains))
    return {**interval(gains), "standard_errors": mean / error if error else None}


def _intervals(trees: Sequence[Any]) -> Any:
    """The same tree, its numbers as intervals over the seeds; a list is averaged number by number."""
    if isinstance(trees[0], Mapping):
        names = [name for name in trees[0] if all(name in tree for tree in trees)]
        return {name: _intervals([tree[name] for tree in trees]) for name in names}
    if isinstance(trees[0], list):
        return [round(float(value), 4) for value in np.mean(trees, axis=0)]
    return interval(trees)


def interval(values: Sequence[float]) -> dict[str, Any]:
    return {**t_interval(values)._asdict(), "values": list(values)}


def say(figures: Mapping[str, Any]) -> None:
    """The tables that one looks at first."""
    print(f"\n{'':<26}{'plain > real':>18}{'real > chaotic':>18}")
    for way, of in figures["separation"].items():
        print(f"{way:<26}{text(of['plain over real']):>18}{text(of['real over chaotic']):>18}")
    for way, keeps in figures["selections"].items():
        for keep, of in keeps.items():
            told = "".join(f"   {name} {text(cell['distance'])}" for name, cell in of.items())
            print(f"{way}, {keep}:{told}")
    for name in ("whole pool", "oracle"):
        print(name, json.dumps(figures[name], default=str)[:300])
    for keep, gain in figures["rater_minus_held_out_loss"].items():
        print(f"A-c1, {keep}: rater minus held-out loss {text(gain)}, {gain['standard_errors']} standard errors")
    for name, value in figures["spearman"].items():
        print(f"Spearman, {name}: {text(value)}")
    for way, steps in figures["collapsed"].items():
        print(f"{way}: collapsed {steps}")
    for way, blocks in figures["blocks"].items():
        print(f"blocks, {way}: " + "  ".join(f"s{start} {text(of['distance'])}" for start, of in blocks.items()))


def text(figure: Mapping[str, Any]) -> str:
    half = figure["half_width"]
    return f"{figure['mean']:.4g}" + ("" if half is None else f" ± {half:.2g}")
