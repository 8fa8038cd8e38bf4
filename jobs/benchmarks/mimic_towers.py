"""Claim G-9 where it can be seen whole: two small towers on pairs of vectors, in a second.

An image and its caption are two views of one hidden vector; half of the pool's captions are another image's. Learner
and reference are two MLPs under the sigmoid loss; the mimic layer is the image tower's last one. Asked is how well one
scoring of the pool tells matching from mismatched pairs (AUC), by how the reference began and how far the learner is:

    shared        both began from the same weights
    layer apart   the reference's mimic layer began from other weights, all else from the same
    apart         all of the reference began from other weights
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curation.numerics.contrastive import sigmoid_loss
from curation.numerics.gradients import projection, towards
from jobs.benchmarks.mimic_runs import auc
from jobs.benchmarks.race import interval

HIDDEN, WIDTH, INNER, EMBEDDING = 16, 48, 128, 32
ROWS, BATCH, LEARNING_RATE = 4096, 64, 1e-3
REFERENCE_STEPS, LEARNER_STEPS = 300, (0, 50, 300)
LAYER = "image.2"


class Towers(nn.Module):
    """An image and a text tower; embeddings (n, EMBEDDING) of unit norm."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, EMBEDDING)) for _ in range(2)
        )
        self.log_scale, self.bias = nn.Parameter(torch.tensor(10.0).log()), nn.Parameter(torch.tensor(-10.0))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Losses (n,) of a batch of pairs."""
        image_ND, text_ND = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
        return sigmoid_loss(image_ND, text_ND, logit_scale=self.log_scale.exp(), logit_bias=self.bias)


def aucs(seed: int) -> dict[str, dict[str, float]]:
    """{how the reference began: {learner's steps: AUC}}."""
    rng = torch.Generator().manual_seed(seed)
    views = torch.randn(2, HIDDEN, WIDTH, generator=rng) / HIDDEN**0.5
    (images, texts), (clean_images, clean_texts) = (_pairs(views, rng) for _ in range(2))
    matches = torch.rand(ROWS, generator=rng) < 0.5
    moved = torch.nonzero(~matches)[:, 0]
    texts[moved] = texts[moved.roll(1)]
    shared, other = (_begun(1000 * seed + start) for start in (1, 2))
    layer_apart = {**shared, **{name: value for name, value in other.items() if name.startswith(LAYER)}}
    learners = {steps: _trained(shared, images, texts, steps=steps, seed=seed) for steps in LEARNER_STEPS}
    found: dict[str, dict[str, float]] = {}
    for name, begun in (("shared", shared), ("layer apart", layer_apart), ("apart", other)):
        reference = _trained(begun, clean_images, clean_texts, steps=REFERENCE_STEPS, seed=seed + 500)
        found[name] = {
            str(steps): auc(_scores(learner, reference, images, texts).numpy(), matches.numpy())
            for steps, learner in learners.items()
        }
    return found


def summary(seeds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """The same figures as intervals over the seeds."""
    return {
        began: {steps: interval([seed[began][steps] for seed in seeds]) for steps in seeds[0][began]}
        for began in seeds[0]
    }


def _pairs(views: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and captions (ROWS, WIDTH) of as many hidden vectors."""
    hidden = torch.randn(ROWS, HIDDEN, generator=rng)
    images, texts = (torch.tanh(hidden @ view) + 0.1 * torch.randn(ROWS, WIDTH, generator=rng) for view in views)
    return images, texts


def _begun(seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {name: value.clone() for name, value in Towers().state_dict().items()}


def _trained(begun: dict[str, Tensor], images: Tensor, texts: Tensor, *, steps: int, seed: int) -> Towers:
    towers, rng = Towers(), np.random.default_rng(seed)
    towers.load_state_dict(begun)
    optimizer = torch.optim.Adam(towers.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        places = torch.from_numpy(rng.choice(ROWS, BATCH, replace=False))
        optimizer.zero_grad()
        towers(images[places], texts[places]).mean().backward()
        optimizer.step()
    return towers


def _scores(learner: Towers, reference: Towers, images: Tensor, texts: Tensor) -> Tensor:
    """Mimic scores (ROWS,), batch by batch."""
    own, theirs = (
        {name: value.detach() for name, value in towers.named_parameters() if name.startswith(LAYER)}
        for towers in (learner, reference)
    )
    direction, _ = towards(own, theirs)
    scores = []
    for places in torch.arange(ROWS).split(BATCH):

        def losses(weights: dict[str, Tensor], places: Tensor = places) -> Tensor:
            return functional_call(learner, weights, (images[places], texts[places]))

        scores.append(projection(losses, own, direction)[1].detach())
    return torch.cat(scores)
