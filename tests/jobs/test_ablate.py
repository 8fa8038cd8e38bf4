"""What `jobs.benchmark ablate` says of sets: learnability by chunks and by filter ratio. Whole runs take minutes."""

from __future__ import annotations

import torch

from jobs.benchmarks import ablate


def test_more_chunks_and_a_larger_filter_ratio_choose_more_learnable_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    # Rows in clusters, so that a pair is hard for its neighbours: what a joint selection finds and one alone does not.
    centres = torch.randn(8, 16, generator=generator)[torch.arange(400) % 8]
    rows = {
        name: torch.nn.functional.normalize(centres + noise * torch.randn(400, 16, generator=generator), dim=1)
        for name, noise in (
            ("image_embedding", 1.0),
            ("text_embedding", 1.0),
            ("reference_image_embedding", 0.3),
            ("reference_text_embedding", 0.3),
        )
    }
    scales = {"logit_scale": 10.0, "logit_bias": -5.0, "reference_logit_scale": 10.0, "reference_logit_bias": -5.0}
    sets = ablate._sets({**rows, **{name: torch.tensor(value) for name, value in scales.items()}}, draws=3)
    large, small = sets["large"], sets["as_in_the_runs"]
    assert (large["rows"], large["chosen"], small["chosen"]) == (400, 80, 128)
    assert set(sets["by_chunks"]) == set(ablate.CHUNKS)
    assert large["independent_sampled"] < large["joint"] and large["uniform"] < large["joint"]
    assert sets["by_chunks_normalised"][1] == 0 and sets["by_chunks_normalised"][32] == 1
    assert sets["by_filter_ratio_normalised"][0.5] == 1 < sets["by_filter_ratio_normalised"][0.9]
    assert 0 < large["off_diagonal_share_of_the_logits_variance"] < 1
