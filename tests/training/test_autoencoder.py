"""The sparse autoencoder finds a dictionary that is known, and revives units that died."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from curation.numerics.factors import count_units
from curation.training.autoencoder import AutoencoderSettings, fit_autoencoder
from curation.training.sparse_autoencoder import SparseAutoencoder

ATOMS, ACTIVE, WIDTH = 64, 3, 32


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """4,000 rows that are sums of 3 of 64 directions."""
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(ATOMS, WIDTH, generator=generator), dim=1)
    chosen = torch.rand(4000, ATOMS, generator=generator).topk(ACTIVE, dim=1).indices
    amounts = 0.5 + torch.rand(4000, ACTIVE, generator=generator)
    made = (atoms[chosen] * amounts[:, :, None]).sum(dim=1)
    return made - made.mean(dim=0)


def batches(rows: Tensor, *, size: int = 500) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)].split(size)


def test_it_writes_rows_of_a_known_dictionary_with_few_dead_units(rows: Tensor) -> None:
    model = SparseAutoencoder(WIDTH, num_units=ATOMS, num_active=4, seed=0)
    settings = AutoencoderSettings(num_steps=500, dead_after=40, learning_rate=3e-3, final_learning_rate=3e-4)
    fit_autoencoder(model, batches(rows), settings)
    with torch.no_grad():
        written = model(rows)
    explained = 1 - ((rows - written.rows_nD).square().sum() / rows.square().sum()).item()
    dead = (count_units(written.active, ATOMS) == 0).mean()
    assert explained > 0.9 and dead < 0.1
    torch.testing.assert_close(model.decoder_MD.norm(dim=1), torch.ones(ATOMS))


def test_dead_units_are_revived(rows: Tensor) -> None:
    def dead_share(revive: float) -> float:
        model = SparseAutoencoder(WIDTH, num_units=ATOMS, num_active=3, seed=0)
        with torch.no_grad():
            model.encoder_bias_M[:32] = -1.5  # these hardly ever win
        settings = AutoencoderSettings(num_steps=150, dead_after=8, revive=revive)
        fit_autoencoder(model, batches(rows, size=250), settings)
        with torch.no_grad():
            return float((count_units(model(rows).active, ATOMS) == 0).mean())

    assert dead_share(1.0) < dead_share(0.0) - 0.1


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="num_active must be in"):
        SparseAutoencoder(4, num_units=2, num_active=3, seed=0)
    model = SparseAutoencoder(4, num_units=8, num_active=2, seed=0)
    with pytest.raises(ValueError, match="batches ended after 0 of 3 steps"):
        fit_autoencoder(model, iter([]), AutoencoderSettings(num_steps=3, dead_after=2))
    with pytest.raises(ValueError, match="loss is nan at step 0"):
        fit_autoencoder(model, iter([torch.full((2, 4), torch.nan)]), AutoencoderSettings(num_steps=1, dead_after=2))
