"""A diffusion model's loss of a row is the same whenever it is asked, in units that compare times."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from curation.models.frozen import load_frozen
from curation.training.diffusion_proxy import DiffusionProxy, diffusion_proxy
from curation.training.rater import Rows, alignment, losses

pytest.importorskip("diffusers")


def rows(n: int) -> torch.Tensor:
    return torch.rand(n, 3 * 16 * 16, generator=torch.Generator().manual_seed(n))


def small(condition_width: int = 0) -> DiffusionProxy:
    torch.manual_seed(0)
    return DiffusionProxy(rows(20), condition_width=condition_width, seed=1, channels=(8, 8), norm_groups=2)


def test_patches_come_together_as_the_image_that_they_were():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels = load_frozen("pixels", "16")
    row = torch.from_numpy(pixels.embed(pixels.resize(Image.fromarray(image))[None]))
    expected = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(small().prepare(row)[0], expected, rtol=0, atol=1e-5)


def test_a_rows_loss_is_its_own_and_moves_with_the_condition():
    proxy = small(condition_width=3)
    images, condition = proxy.prepare(rows(4)), torch.randn(4, 3)
    told = proxy(images, condition)
    assert told.shape == (4,) and 0.3 < told.mean().item() < 100
    torch.testing.assert_close(proxy(images[1:2], condition[1:2]), told[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(proxy(images, condition + 1), told)


def test_it_learns_and_has_a_forward_derivative():
    proxy = small()
    some = Rows(torch.zeros(8, 1), proxy.prepare(0.2 + 0.1 * rows(8)))
    first = losses(proxy, some).mean().item()
    optimiser = torch.optim.Adam(proxy.parameters(), lr=3e-3)
    for _ in range(15):
        optimiser.zero_grad()
        losses(proxy, some).mean().backward()
        optimiser.step()
    assert losses(proxy, some).mean().item() < first
    told = alignment(proxy, some.at(np.arange(3)), some.at(np.arange(3, 8)))
    gradient = torch.autograd.grad(losses(proxy, some.at(np.arange(3, 8))).mean(), list(proxy.parameters()))
    one = torch.autograd.grad(losses(proxy, some.at(np.array([1])))[0], list(proxy.parameters()))
    expected = torch.stack([(a * b).sum() for a, b in zip(gradient, one, strict=True)]).sum()
    torch.testing.assert_close(told[1], expected, rtol=1e-3, atol=1e-4)


def test_rows_that_are_no_images_are_refused():
    with pytest.raises(ValueError, match="rows of 100 numbers are no square images"):
        diffusion_proxy(torch.rand(5, 100), 0, 0)
