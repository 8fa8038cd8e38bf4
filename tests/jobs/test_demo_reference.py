"""The reference's training as the demo calls it, at a size that takes a second."""

from __future__ import annotations

from pathlib import Path

import torch

from curation.models.clip import load_towers
from jobs.demo_reference import BATCH_SIZE, MODEL, load_pairs, train_reference


def test_it_writes_a_checkpoint_that_the_towers_load_and_reports_each_step(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    train_reference(
        tmp_path / "reference.pt",
        num_pairs=BATCH_SIZE,
        num_steps=2,
        report=lambda step, num_steps, seen: steps.append((step, num_steps)),
    )
    assert steps == [(1, 2), (2, 2)]
    trained, untrained = load_towers(MODEL, checkpoint=str(tmp_path / "reference.pt")), load_towers(MODEL, seed=0)
    pairs = load_pairs(4, stream="held_out")
    assert pairs.pixels.shape == (4, *trained.image_size, 3)
    assert trained.embed_texts(pairs.tokens).shape == (4, trained.embedding_dim)
    assert not torch.equal(trained.embed_images(pairs.pixels), untrained.embed_images(pairs.pixels))
