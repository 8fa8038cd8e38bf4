"""Trains the demo's reference: the nano CLIP on a small clean set of rendered pairs, on a CPU, in about a minute.

The set comes from the stream "reference", which shares no sample with the pool. Model and settings were chosen by speed
and by retrieval on the stream "held_out" (400 steps: R@1 of 300 is 0.37), after the pool was fixed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from curation.models.clip import build_network, load_tokenizer, save_checkpoint
from curation.models.resize import load_resize
from curation.training.contrastive import fit_contrastive, make_optimizer, shuffled_batches
from curation.training.step import PairBatch, StepReport
from jobs.demo_scenes import Stream, make_pairs

MODEL = "nano"
NUM_PAIRS = 6_000
NUM_STEPS = 400
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
WARMUP = 0.1


def load_pairs(n: int, *, stream: Stream, seed: int = 0) -> PairBatch:
    """`n` clean pairs, rendered, resized for MODEL and tokenized; they fit in memory (7 kB each)."""
    resize, tokenize, pairs = load_resize(MODEL), load_tokenizer(MODEL), list(make_pairs(n, stream=stream, seed=seed))
    pixels = np.stack([resize(Image.open(io.BytesIO(pair.image))) for pair in pairs])
    return PairBatch(torch.from_numpy(pixels), tokenize([pair.caption for pair in pairs]))


def train_reference(
    checkpoint: Path,
    *,
    num_pairs: int = NUM_PAIRS,
    num_steps: int = NUM_STEPS,
    seed: int = 0,
    report: Callable[[int, int, StepReport], None] = lambda step, num_steps, seen: None,
) -> None:
    """Write the reference's weights to `checkpoint`; `report(step, num_steps, seen)` is called after each step.

    Computes with as many threads as torch has in this process; the weights depend on that number in their last bits.
    """
    network = build_network(MODEL, seed=seed)
    fit_contrastive(
        network,
        shuffled_batches(load_pairs(num_pairs, stream="reference", seed=seed), batch_size=BATCH_SIZE, seed=seed),
        optimizer=make_optimizer(network, learning_rate=LEARNING_RATE),
        num_steps=num_steps,
        learning_rate=LEARNING_RATE,
        warmup=WARMUP,
        report=lambda step, seen: report(step, num_steps, seen),
    )
    save_checkpoint(network, checkpoint)
