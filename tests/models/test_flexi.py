"""Vision transformers at another resolution: the resampled kernel against its definition and against timm's."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from open_clip.timm_model import TimmModel
from timm.layers.patch_embed import resample_patch_embed
from torch.nn import functional as F

from curation.models import flexi
from curation.models.clip import build_network
from curation.models.registry import check_resolution


@pytest.fixture(scope="module")
def visual() -> Any:
    return cast(Any, build_network("nano", seed=3).eval().clip).visual


def test_at_its_own_resolution_the_tower_gives_what_it_always_gave(visual: Any) -> None:
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flexi.encode_image(visual, images, patch_size=8), visual(images))


@pytest.mark.parametrize("patch_size", [4, 12, 16])
def test_the_kernel_is_resampled_as_timm_does(visual: Any, patch_size: int) -> None:
    kernel = visual.conv1.weight.detach()
    theirs = resample_patch_embed(kernel, [patch_size, patch_size], interpolation="bilinear", antialias=True)
    torch.testing.assert_close(flexi.resampled_kernel(kernel, patch_size), theirs, rtol=1e-4, atol=1e-5)


def test_an_enlarged_patch_means_what_the_patch_meant(visual: Any) -> None:
    kernel = visual.conv1.weight.detach()
    patches = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    enlarged = F.interpolate(patches, (16, 16), mode="bilinear", antialias=True)
    before = torch.einsum("ncij,ocij->no", patches, kernel)
    after = torch.einsum("ncij,ocij->no", enlarged, flexi.resampled_kernel(kernel, 16))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    mean = F.interpolate(kernel, (16, 16), mode="bilinear")  # what a plain resize of the kernel would give
    assert (torch.einsum("ncij,ocij->no", enlarged, mean) - before).abs().max() > 1


@pytest.mark.parametrize(
    ("name", "pool", "proj"),
    [("vit_tiny_patch16_224", "map", ""), ("vit_tiny_patch16_224", "token", "linear"), ("test_vit3", "avg", "mlp")],
)
def test_a_timm_tower_gives_what_it_always_gave_and_takes_other_patches(name: str, pool: str, proj: str) -> None:
    torch.manual_seed(0)
    tower = TimmModel(name, embed_dim=12, pool=pool, proj=proj).eval()
    own, side = flexi.native_patch_size(tower), cast(Any, tower).trunk.patch_embed.img_size[0]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    theirs = tower(images)
    torch.testing.assert_close(flexi.encode_image(tower, images, patch_size=own), theirs)
    larger = flexi.encode_image(tower, images, patch_size=2 * own)
    assert larger.shape == theirs.shape and not torch.allclose(larger, theirs)
    smaller_images = flexi.encode_image(tower, images[:, :, : 4 * own, : 4 * own], patch_size=own)
    assert smaller_images.shape == theirs.shape
    larger.sum().backward()
    trunk = cast(Any, tower).trunk
    assert trunk.patch_embed.proj.weight.grad.abs().sum() > 0 and trunk.pos_embed.grad.abs().sum() > 0


def test_positions_are_resized_but_for_the_class_tokens() -> None:
    ramp = torch.arange(6.0).repeat(6, 1)  # grows along each row of the grid, and only there
    positions = torch.cat([torch.tensor([[-7.0]]), ramp.reshape(-1, 1)])
    resized = flexi.resized_positions(positions, (6, 6), (3, 3))
    assert resized[0].item() == -7.0
    grid = resized[1:].reshape(3, 3)
    assert (grid[0] == grid[1]).all() and (grid.diff(dim=1) > 1.5).all()
    torch.testing.assert_close(grid.mean(), ramp.mean())


def test_gradients_of_both_resolutions_reach_the_one_kernel() -> None:
    network = build_network("nano", seed=3)
    pixels = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    tokens = torch.ones(4, 28, dtype=torch.int64)
    output = network(pixels[:1], tokens, pixels[1:], low_patch_size=16)
    assert output.image.shape == output.text.shape == (4, 96)
    torch.testing.assert_close(output.image[:1], network.embed_images(pixels[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.image[1:], network.embed_images(pixels[1:], patch_size=16), rtol=1e-4, atol=1e-5)
    output.image[1:, 0].sum().backward()
    visual = cast(Any, network.clip).visual
    assert visual.conv1.weight.grad.abs().sum() > 0 and visual.positional_embedding.grad.abs().sum() > 0


def test_smaller_images_are_a_smaller_grid() -> None:
    network = build_network("nano", seed=3).eval()
    pixels = torch.zeros(2, 24, 24, 3, dtype=torch.uint8)
    assert network.embed_images(pixels, patch_size=8).shape == (2, 96)


@pytest.mark.parametrize(
    ("name", "sizes", "complaint"),
    [
        ("RN50", {"patch_size": 32}, "vision transformers, which 'RN50' has not"),
        ("convnext_base", {"patch_size": 32}, "which 'convnext_base' has not"),
        ("ViT-B-16-SigLIP", {"patch_size": 30}, "patches of 30 pixels do not tile images of 224 pixels"),
        ("nano", {"patch_size": 10}, "patches of 10 pixels do not tile images of 48 pixels"),
        ("nano", {"image_size": 20}, "patches of 8 pixels do not tile images of 20 pixels"),
    ],
)
def test_what_cannot_be_resampled_is_refused(name: str, sizes: dict[str, int], complaint: str) -> None:
    for known in ("ViT-B-16", "ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP"):
        check_resolution(known, image_size=None, patch_size=28 if "14" in known else 32)
    with pytest.raises(ValueError, match=complaint):
        check_resolution(name, **{"image_size": None, "patch_size": None, **sizes})
