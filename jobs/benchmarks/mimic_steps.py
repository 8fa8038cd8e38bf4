"""What a Grad-Mimic step costs against a plain one, and against the way by per-sample gradients (claim G-3).

All three sides take the same training step, clipping and finite checks included; they differ in how they come by the
weights. Ours: the closed form on the kept forward pass for a linear head, one forward-mode pass for the last block of a
CLIP image tower. The rival, as in the authors' code: every row's gradient of the mimic layer, by vmap of grad for the
head and by a vectorised backward pass per row for the pairs, then its product with the way to the reference.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

from curation.methods._softmax import softmax_weights
from curation.models.classifier import build_classifier
from curation.models.clip import build_network
from curation.numerics.contrastive import load_objective
from curation.numerics.gradients import towards
from curation.training.classifier_learner import HEAD, ClassifierLearner
from curation.training.contrastive_learner import ContrastiveLearner
from curation.training.mimic import layer_of
from jobs.benchmarks.pairs import interleaved, paired_ratio

BLOCK = "visual.transformer.resblocks.3"
NEEDS = frozenset({"mimic_score"})
TARGETS = {"linear head": 1.1, "last block of a CLIP tower": 1.6}
Step = Callable[[], Any]


def step_times(*, pairs: int, tiny: bool) -> dict[str, Any]:
    """Ratios to a plain step in CPU seconds, each the median of interleaved pairs of runs of many steps."""
    sizes = (32,) if tiny else (64, 4096)
    found = {f"linear head, {n} rows": _ratios(_head(n), steps=2 if tiny else 200_000 // n, pairs=pairs) for n in sizes}
    n = 4 if tiny else 32
    found[f"last block of a CLIP tower, {n} pairs"] = _ratios(_tower(n), steps=1 if tiny else 5, pairs=pairs)
    for name, ratios in found.items():
        print(f"{name}: " + ", ".join(f"{side} {value['told']}" for side, value in ratios.items()), flush=True)
    return {"targets": TARGETS, **found}


def _ratios(sides: dict[str, Step], *, steps: int, pairs: int) -> dict[str, Any]:
    def timed(step: Step, steps: int) -> Callable[[], float]:
        def run() -> float:
            begun = time.process_time()
            for _ in range(steps):
                step()
            return (time.process_time() - begun) / steps

        return run

    for step in sides.values():
        step()
    plain, found = timed(sides["plain"], steps), {}
    for name in ("ours", "per-sample gradients"):
        few = steps if name == "ours" else max(1, steps // 10)
        figures = interleaved(timed(sides[name], few), plain, pairs=pairs)
        ratio = paired_ratio(figures)
        found[name] = {**ratio._asdict(), "told": str(ratio), "seconds_and_plain": figures}
    return found


def _head(n: int) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(0)
    block = {
        "features": torch.randn(n, 1024, generator=generator).abs(),
        "label": torch.randint(10, (n,), generator=generator),
    }

    def learner_of() -> tuple[ClassifierLearner, torch.optim.Optimizer]:
        network, reference = (build_classifier("linear", num_classes=10, num_features=1024, seed=s) for s in (0, 1))
        learner = ClassifierLearner(network=network, reference=reference, score_batch=n)
        return learner, torch.optim.SGD(network.parameters(), lr=1e-3)

    (ours, our_sgd), (plain, plain_sgd), (rival, rival_sgd) = (learner_of() for _ in range(3))
    inputs, ones = [block["features"], block["label"]], torch.ones(n)

    def our_step() -> None:
        kept = ours.keep(ours.network, block, NEEDS)
        assert kept is not None
        kept.step(softmax_weights(kept.rows["mimic_score"], 0.1), our_sgd, 1.0)

    def plain_step() -> None:
        plain.step(plain.network, inputs, weights=ones, optimizer=plain_sgd, max_grad_norm=1.0)

    def loss_of(layer: dict[str, Tensor], features: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(rival.network, layer, (features[None],)), label[None])

    def rival_step() -> None:
        assert rival.reference is not None
        layer = {HEAD: rival.network.head.weight.detach()}
        direction, _ = towards(layer, {HEAD: rival.reference.head.weight})
        gradients = vmap(grad(loss_of), in_dims=(None, 0, 0))(layer, *inputs)
        scores = -(gradients[HEAD] * direction[HEAD]).sum(dim=(1, 2))
        weights = softmax_weights(scores.detach(), 0.1)
        rival.step(rival.network, inputs, weights=weights, optimizer=rival_sgd, max_grad_norm=1.0)

    return {"ours": our_step, "plain": plain_step, "per-sample gradients": rival_step}


def _tower(n: int) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 48, 48, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 400, (n, 28), generator=generator)
    block, inputs, ones = {"pixels": pixels, "tokens": tokens}, [pixels, tokens], torch.ones(n)
    first, reference = build_network("nano", seed=0), build_network("nano", seed=1)

    def learner_of() -> tuple[ContrastiveLearner, torch.optim.Optimizer]:
        network = copy.deepcopy(first)
        learner = ContrastiveLearner(network=network, mimicked=reference, mimic_layer=BLOCK, score_batch=n)
        return learner, torch.optim.SGD(network.parameters(), lr=1e-3)

    (ours, our_sgd), (plain, plain_sgd), (rival, rival_sgd) = (learner_of() for _ in range(3))

    def take(learner: ContrastiveLearner, optimizer: torch.optim.Optimizer, weights: Tensor) -> None:
        learner.step(learner.network, inputs, weights=weights, optimizer=optimizer, max_grad_norm=1.0)

    def our_step() -> None:
        take(ours, our_sgd, softmax_weights(ours.rows(block, NEEDS)["mimic_score"], 0.1))

    def rival_step() -> None:
        layer = {name: value.detach() for name, value in layer_of(rival.network.clip, BLOCK).items()}
        direction, _ = towards(layer, layer_of(reference.clip, BLOCK))

        def losses_of(at: dict[str, Tensor]) -> Tensor:
            named = {f"clip.{name}": value for name, value in at.items()}
            image, text, scale, bias = functional_call(rival.network, named, (pixels, tokens))
            return load_objective(rival.objective)(image, text, logit_scale=scale, logit_bias=bias)

        gradients = jacrev(losses_of)(layer)
        scores = -sum((gradients[name].flatten(1) @ direction[name].flatten()) for name in layer)
        assert isinstance(scores, Tensor)
        take(rival, rival_sgd, softmax_weights(scores.detach(), 0.1))

    return {"ours": our_step, "plain": lambda: take(plain, plain_sgd, ones), "per-sample gradients": rival_step}
