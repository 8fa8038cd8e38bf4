"""Measures a learner on held-out samples.

Pairs by retrieval, and by zero-shot classification where they have labels; a classifier by its accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from curation.data.held_out import HeldOut
from curation.data.step_log import Row
from curation.evaluation.retrieval import retrieval_recall
from curation.evaluation.zero_shot import class_embeddings, zero_shot_accuracy
from curation.models.clip import ClipNetwork, load_tokenizer
from curation.training.scoring import embed_rows

TOP_KS = (1, 5, 10)


class Evaluation(Protocol):
    """Held-out samples, ready to be measured on."""

    def measure(self, network: Any) -> Row:
        """Shares in [0, 1] by name; the network's training mode is left as it was."""
        ...


class PairEvaluation:
    """Held-out pairs, tokenised once; prompts for their classes if they have labels."""

    def __init__(self, held_out: HeldOut, *, model: str, templates: tuple[str, ...], batch_size: int):
        """ValueError if some pairs have a label and others have none."""
        tokenize = load_tokenizer(model)
        self._images, self._tokens = torch.from_numpy(held_out.images), tokenize(held_out.captions)
        self._batch_size = batch_size
        labels = held_out.labels
        self._classes = sorted({label for label in labels if label is not None})
        if self._classes and None in labels:
            raise ValueError(f"evaluate.label_field: {labels.count(None)} of {len(labels)} pairs have no label")
        if self._classes:
            self._labels = torch.tensor([self._classes.index(str(label)) for label in labels])
            self._prompts = tokenize([template.format(name) for name in self._classes for template in templates])

    def measure(self, network: ClipNetwork) -> Row:
        """Recall at 1, 5 and 10 in both directions, and top-1 and top-5 accuracy with labels; shares in [0, 1]."""
        was_training = network.training
        network.eval()
        try:
            image_ND, text_ND = embed_rows(network, self._images, self._tokens, batch_size=self._batch_size)
            ks = [k for k in TOP_KS if k <= len(image_ND)]
            recall = retrieval_recall(image_ND, text_ND, ks=ks)
            measured: Row = {f"image_to_text_r{k}": share for k, share in recall.image_to_text.items()}
            measured |= {f"text_to_image_r{k}": share for k, share in recall.text_to_image.items()}
            measured["mean_r1"] = float(np.mean([recall.image_to_text[1], recall.text_to_image[1]]))
            if self._classes:
                measured |= self._zero_shot(network, image_ND)
        finally:
            network.train(was_training)
        return measured

    def _zero_shot(self, network: ClipNetwork, image_ND: torch.Tensor) -> Row:
        with torch.no_grad():
            prompts = network.embed_texts(self._prompts.to(image_ND.device))
        classes_CD = class_embeddings(prompts.reshape(len(self._classes), -1, prompts.shape[1]))
        ks = [k for k in (1, 5) if k <= len(self._classes)]
        accuracy = zero_shot_accuracy(image_ND, classes_CD, self._labels.to(image_ND.device), ks=ks)
        return {f"zero_shot_top{k}": share for k, share in accuracy.items()}


class ClassEvaluation:
    """Held-out samples whose class is known."""

    def __init__(self, held_out: HeldOut, *, classes: Sequence[str], batch_size: int):
        """ValueError if a sample's label is none of the classes that are learnt."""
        self._images, self._batch_size = torch.from_numpy(held_out.images), batch_size
        places = {name: place for place, name in enumerate(classes)}
        if unknown := [label for label in held_out.labels if label not in places]:
            raise ValueError(
                f"evaluate: {len(unknown)} held-out samples have a label that is none of the {len(places)} classes "
                f"learnt, {unknown[0]!r} for one"
            )
        self._labels = torch.tensor([places[str(label)] for label in held_out.labels])

    @torch.no_grad()
    def measure(self, network: nn.Module) -> Row:
        """`accuracy`, and the mean cross-entropy as `held_out_loss`."""
        was_training, device = network.training, next(network.parameters()).device
        network.eval()
        try:
            parts = self._images.split(self._batch_size)
            logits = torch.cat([network(part.to(device)) for part in parts])
        finally:
            network.train(was_training)
        labels = self._labels.to(device)
        return {
            "accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
            "held_out_loss": F.cross_entropy(logits, labels).item(),
        }
