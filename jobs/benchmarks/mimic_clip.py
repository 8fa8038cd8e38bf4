"""`python -m jobs.benchmark mimic_clip`: Grad-Mimic on image–text pairs, the nano CLIP on the demo pool.

Claims G-7 to G-9 of its specification, small enough for a CPU. 60% of the pool's captions are another image's. The
learner starts where the reference started, and the reference has seen other, clean pairs; the mimic layer is the last
MLP of the image tower. Controls: a reference from another start, one whose hidden units are permuted (the same
function), random weights as far away, plain training's own end, and the softmax of the reducible loss.

    G-7   steps to the plain run's last held-out loss (its plain loss, on clean pairs that nobody trains on), from
          where on it is never above it again
    G-8   plain training on the top 30% by clip score, and on those without the lowest 15% by mean mimic score
    G-9   AUC of one scoring of the pool, matching against mismatched pairs; also where it can be seen whole, on two
          small towers (`mimic_towers`)

Temperatures are chosen once, by the held-out loss of a seed that is not reported.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from curation.data.held_out import read_held_out
from curation.data.read_rules import ReadRules
from curation.evaluation.retrieval import retrieval_recall
from curation.methods import load_selector
from curation.models.clip import ClipNetwork, build_network, load_tokenizer
from curation.models.resize import load_resize
from curation.numerics.contrastive import sigmoid_loss
from curation.selector import Rows
from curation.training.contrastive import make_optimizer
from curation.training.contrastive_learner import ContrastiveLearner, Reference
from curation.training.mimic import layer_of
from curation.training.online_step import OnlineSettings, OnlineTrainer
from curation.training.scoring import embed_rows
from jobs.benchmarks import mimic_clip_tables, mimic_towers
from jobs.benchmarks.mimic_runs import auc
from jobs.benchmarks.pairs import provenance
from jobs.benchmarks.parts import once
from jobs.demo_pool import make_pool
from jobs.demo_reference import LEARNING_RATE, MODEL, WARMUP, load_pairs

LAYER = "visual.transformer.resblocks.3.mlp"
MIMIC_TEMPERATURES, RHO_TEMPERATURES = (0.1, 0.3, 1.0, 3.0), (0.3, 1.0, 3.0, 10.0)
TUNING_SEED = 1000
OTHER_START = 500
TOP_SHARE, LOWEST_SHARE = 0.3, 0.15


class Scale(NamedTuple):
    """How large the study is."""

    pool: int
    reference_pairs: int
    reference_steps: int
    steps: int
    batch: int
    every: int
    held_out: int
    retrieved: int


WHOLE = Scale(3000, 3000, 300, 160, 64, 8, 192, 500)
TINY = Scale(120, 40, 2, 4, 16, 2, 24, 24)


class Pool(NamedTuple):
    """Pairs that can be decoded, what is known of them, and clean pairs that nobody trains on."""

    pixels: Tensor
    tokens: Tensor
    matches: np.ndarray
    is_scene: np.ndarray
    held_out: Rows
    retrieved: Rows


class Trained(NamedTuple):
    """A run: the network at its end, held-out losses, CPU seconds of the steps until each, and mean scores by row."""

    network: ClipNetwork
    steps: list[int]
    losses: list[float]
    seconds: list[float]
    scores: np.ndarray | None


def benchmark(*, seeds: int, tiny: bool, folder: Path, hours: float = 24.0) -> dict[str, Any]:
    """All figures; a seed that is in `folder` already is not done again. After `hours` no other one is begun."""
    folder, scale, threads = folder / "mimic_clip", TINY if tiny else WHOLE, torch.get_num_threads()
    until, suffix = time.monotonic() + 3600 * hours, "-tiny" if tiny else ""
    torch.set_num_threads(1)
    try:
        tuned = once(folder / f"temperatures{suffix}.json", lambda: _tuned(folder, scale))
        done = [
            once(folder / f"seed-{seed}{suffix}.json", lambda seed=seed: _of_seed(folder, scale, seed, tuned))
            for seed in range(seeds)
            if time.monotonic() < until or (folder / f"seed-{seed}{suffix}.json").exists()
        ]
        towers = [
            once(folder / f"towers-{seed}.json", lambda seed=seed: mimic_towers.aucs(seed)) for seed in range(seeds)
        ]
    finally:
        torch.set_num_threads(threads)
    figures = {**mimic_clip_tables.summary(done), "auc_of_two_towers": mimic_towers.summary(towers)}
    mimic_clip_tables.show_all(figures)
    settings = {**scale._asdict(), "temperatures": tuned, "layer": LAYER, "seeds": len(done)}
    return {**provenance(), "benchmark": "mimic_clip", "tiny": tiny, "settings": settings, **figures}


def _tuned(folder: Path, scale: Scale) -> dict[str, float]:
    """The temperature of each method whose run ends at the lowest held-out loss, on a seed of its own."""
    pool, [(start, reference)] = _pool(folder, scale, TUNING_SEED), _grown(scale, TUNING_SEED, TUNING_SEED)
    losses: dict[str, dict[float, float]] = {"grad_mimic": {}, "rho": {}}
    for tau in MIMIC_TEMPERATURES:
        losses["grad_mimic"][tau] = _train(pool, scale, TUNING_SEED, start, mimics=reference, tau=tau).losses[-1]
    for tau in RHO_TEMPERATURES:
        losses["rho"][tau] = _train(pool, scale, TUNING_SEED, start, compares=reference, tau=tau).losses[-1]
    return {name: min(of, key=lambda tau, of=of: of[tau]) for name, of in losses.items()}


def _of_seed(folder: Path, scale: Scale, seed: int, tuned: dict[str, float]) -> dict[str, Any]:
    pool, grown = _pool(folder, scale, seed), _grown(scale, seed, seed, seed + OTHER_START)
    (start, reference), (_, other) = grown
    plain = _train(pool, scale, seed, start)
    references = {
        "held-out": reference,
        "other start": other,
        "permuted": _permuted(reference, seed),
        "random": _random(start, reference, seed),
        "same noise": plain.network,
    }
    tau = tuned["grad_mimic"]
    runs = {"plain": plain}
    for name, of in references.items():
        runs[f"mimic {name}"] = _train(pool, scale, seed, start, mimics=of, tau=tau)
    runs["softmax-rho"] = _train(pool, scale, seed, start, compares=reference, tau=tuned["rho"])
    by_clip = _clip_scores(reference, pool)
    mimic_scores = runs["mimic held-out"].scores
    assert mimic_scores is not None
    subsets = _subsets(by_clip, mimic_scores, seed)
    filtered = {name: _train(pool, scale, seed, start, rows=rows) for name, rows in subsets.items()}
    return {
        "seed": seed,
        "rows": len(pool.matches),
        "runs": {name: _told(run, plain, pool) for name, run in runs.items()},
        "auc": {name: _auc(run, pool) for name, run in runs.items() if run.scores is not None},
        "auc_of_one_scoring": {
            when: {name: _auc_of(network, of, pool, scale) for name, of in references.items() if name != "same noise"}
            for when, network in (("at the start", start), ("after plain training", plain.network))
        },
        "filters": {
            name: {**_told(run, plain, pool), "samples": len(rows), "matching": float(pool.matches[rows].mean())}
            for (name, run), rows in zip(filtered.items(), subsets.values(), strict=True)
        },
    }


def _pool(folder: Path, scale: Scale, seed: int) -> Pool:
    made = make_pool(folder / f"pool-{scale.pool}-{seed}", samples=scale.pool, seed=seed, workers=1)
    read = read_held_out(
        made.shards,
        max_samples=scale.pool,
        resize=load_resize(MODEL),
        rules=ReadRules(),
        max_pixels=10**6,
        label_field=None,
    )
    truth = {
        row["uid"]: row for row in pq.read_table(made.truth, columns=["uid", "kind", "caption_matches"]).to_pylist()
    }
    held_out = load_pairs(scale.held_out + scale.retrieved, stream="held_out", seed=seed)
    parts = (slice(0, scale.held_out), slice(scale.held_out, None))
    clean = [{"pixels": held_out.pixels[part], "tokens": held_out.tokens[part]} for part in parts]
    return Pool(
        torch.from_numpy(read.images),
        load_tokenizer(MODEL)(read.captions),
        np.array([truth[uid]["caption_matches"] for uid in read.uids]),
        np.array([truth[uid]["kind"] == "scene" for uid in read.uids]),
        *clean,
    )


def _grown(scale: Scale, seed: int, *starts: int) -> list[tuple[ClipNetwork, ClipNetwork]]:
    """Random weights by their seeds, and what became of each by plain training on the same clean pairs."""
    pairs = load_pairs(scale.reference_pairs, stream="reference", seed=seed)
    every = np.ones(len(pairs.tokens), bool)
    whole = Pool(pairs.pixels, pairs.tokens, every, every, {}, {})
    scale = scale._replace(steps=scale.reference_steps)
    networks = [build_network(MODEL, seed=start) for start in starts]
    return [(network, _train(whole, scale, seed, network).network) for network in networks]


def _permuted(reference: ClipNetwork, seed: int) -> ClipNetwork:
    """The same function: the layer's hidden units in another order."""
    permuted = copy.deepcopy(reference)
    layer = {name.removeprefix(f"{LAYER}."): value for name, value in layer_of(permuted.clip, LAYER).items()}
    order = torch.randperm(len(layer["c_fc.bias"]), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, axis in (("c_fc.weight", 0), ("c_fc.bias", 0), ("c_proj.weight", 1)):
            layer[name].copy_(layer[name].index_select(axis, order))
    return permuted


def _random(start: ClipNetwork, reference: ClipNetwork, seed: int) -> ClipNetwork:
    """The layer as far from the start as the reference's, in a random direction."""
    found, generator = copy.deepcopy(reference), torch.Generator().manual_seed(seed)
    begun, grown = layer_of(start.clip, LAYER), layer_of(reference.clip, LAYER)
    with torch.no_grad():
        for name, value in layer_of(found.clip, LAYER).items():
            step = torch.randn(value.shape, generator=generator)
            value.copy_(begun[name] + step * ((grown[name] - begun[name]).norm() / step.norm()))
    return found


def _train(
    pool: Pool,
    scale: Scale,
    seed: int,
    start: ClipNetwork,
    *,
    mimics: ClipNetwork | None = None,
    compares: ClipNetwork | None = None,
    tau: float = 1.0,
    rows: np.ndarray | None = None,
) -> Trained:
    """From the start: weighed by mimic scores, by the reducible loss, or not at all; on all pairs or on `rows`."""
    network = copy.deepcopy(start).train()
    reference, columns = None, {}
    if compares is not None:
        log_scale, bias = compares.scale_and_bias()
        reference = Reference(log_scale.item(), bias.item(), None)
        image_ND, text_ND = embed_rows(compares.eval(), pool.pixels, pool.tokens, batch_size=scale.batch)
        columns = {"reference_image_embedding": image_ND, "reference_text_embedding": text_ND}
    learner = ContrastiveLearner(
        network=network, reference=reference, mimicked=mimics, mimic_layer=LAYER, score_batch=scale.batch
    )
    name = "grad_mimic" if mimics is not None else "rho" if compares is not None else "uniform"
    trainer = OnlineTrainer(
        learner,
        make_optimizer(network, learning_rate=LEARNING_RATE),
        load_selector(name, **({} if name == "uniform" else {"temperature": tau})),
        OnlineSettings(keep=scale.batch, num_steps=scale.steps, seed=seed, learning_rate=LEARNING_RATE, warmup=WARMUP),
    )
    totals, counts = np.zeros(len(pool.matches)), np.zeros(len(pool.matches))
    found, seconds = Trained(network, [], [], [], None), 0.0
    for number, places in zip(range(scale.steps), _batches(pool, scale, seed, rows), strict=False):
        block = {
            "pixels": pool.pixels[places],
            "tokens": pool.tokens[places],
            "address": places,
            "uid": torch.stack([places, places], dim=1),
            "ok": torch.ones(len(places), dtype=torch.bool),
            **{column: values[places] for column, values in columns.items()},
        }
        begun = time.process_time()
        picked = trainer.step(number, block).picked
        seconds += time.process_time() - begun
        totals[places] += picked.chosen.scores.numpy()
        counts[places] += 1
        if pool.held_out and ((number + 1) % scale.every == 0 or number + 1 == scale.steps):
            found.steps.append(number + 1)
            found.losses.append(_held_out_loss(network, pool.held_out))
            found.seconds.append(seconds)
    means = np.divide(totals, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    return found._replace(scores=means if mimics is not None else None)


def _batches(pool: Pool, scale: Scale, seed: int, rows: np.ndarray | None) -> Iterator[Tensor]:
    """Places of each step's batch: round after round, each in a random order."""
    own = torch.arange(len(pool.matches)) if rows is None else torch.from_numpy(rows)
    rng = torch.Generator().manual_seed(seed)
    while True:
        for places in own[torch.randperm(len(own), generator=rng)].split(scale.batch):
            if len(places) == scale.batch:
                yield places


@torch.no_grad()
def _held_out_loss(network: ClipNetwork, held_out: Rows) -> float:
    network.eval()
    image_ND, text_ND = embed_rows(network, held_out["pixels"], held_out["tokens"], batch_size=64)
    scale, bias = network.scale_and_bias()
    network.train()
    return sigmoid_loss(image_ND, text_ND, logit_scale=scale, logit_bias=bias).mean().item()


def _told(run: Trained, plain: Trained, pool: Pool) -> dict[str, Any]:
    """What a run came to, and when it had come for good to where the plain one ends."""
    image_ND, text_ND = embed_rows(
        run.network.eval(), pool.retrieved["pixels"], pool.retrieved["tokens"], batch_size=64
    )
    recall = retrieval_recall(image_ND, text_ND, ks=[1])
    at = crossing(run.losses, plain.losses[-1])
    return {
        "held_out_loss": run.losses[-1],
        "mean_r1": statistics.fmean([recall.image_to_text[1], recall.text_to_image[1]]),
        "losses": run.losses,
        "seconds": run.seconds[-1],
        "share_of_steps": None if at is None else run.steps[at] / plain.steps[-1],
        "share_of_seconds": None if at is None else run.seconds[at] / plain.seconds[-1],
    }


def crossing(losses: list[float], goal: float) -> int | None:
    """The first place from which on no loss is above the goal; None if the last one is."""
    above = [place for place, loss in enumerate(losses) if loss > goal]
    first = above[-1] + 1 if above else 0
    return first if first < len(losses) else None


def _clip_scores(reference: ClipNetwork, pool: Pool) -> np.ndarray:
    image_ND, text_ND = embed_rows(reference.eval(), pool.pixels, pool.tokens, batch_size=64)
    return (image_ND * text_ND).sum(dim=1).numpy()


def _subsets(by_clip: np.ndarray, by_mimic: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Rows of the caption-match filter, of it without the lowest mimic scores, and without as many random ones."""
    ranks = np.argsort(np.argsort(np.nan_to_num(by_mimic, nan=np.inf), kind="stable")) / len(by_mimic)
    top = np.sort(np.argsort(-by_clip, kind="stable")[: round(TOP_SHARE * len(by_clip))])
    both = top[ranks[top] >= LOWEST_SHARE]
    fewer = np.sort(np.random.default_rng(seed).permutation(top)[: len(both)])
    return {"clip score": top, "clip score and mimic": both, "clip score and chance": fewer}


def _auc(run: Trained, pool: Pool) -> float:
    """Of mean scores over the run, among scenes: matching against mismatched captions."""
    assert run.scores is not None
    known = pool.is_scene & np.isfinite(run.scores)
    return auc(run.scores[known], pool.matches[known])


def _auc_of(network: ClipNetwork, reference: ClipNetwork, pool: Pool, scale: Scale) -> float:
    """Of one scoring of scenes, in batches of the training's size."""
    learner = ContrastiveLearner(network=network, mimicked=reference, mimic_layer=LAYER, score_batch=scale.batch)
    places = torch.from_numpy(np.flatnonzero(pool.is_scene)[: 16 * scale.batch])
    scores = [
        learner.rows({"pixels": pool.pixels[some], "tokens": pool.tokens[some]}, frozenset({"mimic_score"}))
        for some in places.split(scale.batch)
    ]
    return auc(torch.cat([rows["mimic_score"] for rows in scores]).numpy(), pool.matches[places.numpy()])
