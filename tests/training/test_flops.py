from __future__ import annotations

import pytest
import torch
from open_clip import CLIP
from open_clip.transform import PreprocessCfg

from curation.models.clip import ClipNetwork, build_network
from curation.training.flops import flexi_step, jest_step, tower_flops, uniform_step


@pytest.mark.parametrize(
    ("filter_ratio", "uncached_reuse", "cached_reuse", "cached", "flexi"),
    [(0.5, 2.00, 1.333, 1.667, 0.827), (0.8, 4.00, 2.333, 2.667, 1.107), (0.9, 7.333, 4.000, 4.333, 1.573)],
)
def test_the_costs_per_step_are_the_published_ratios(filter_ratio, uncached_reuse, cached_reuse, cached, flexi):
    uncached = jest_step(filter_ratio, reference_cost=1.0, reuse_forward=True) / uniform_step()
    assert uncached == pytest.approx(uncached_reuse, abs=0.0005)
    assert jest_step(filter_ratio, reuse_forward=True) / uniform_step() == pytest.approx(cached_reuse, abs=0.0005)
    assert jest_step(filter_ratio) / uniform_step() == pytest.approx(cached, abs=0.0005)
    assert flexi_step(filter_ratio) / uniform_step() == pytest.approx(flexi, abs=0.0005)


def test_flexi_at_full_resolution_is_jest():
    assert flexi_step(0.8, low_cost=1.0) == jest_step(0.8)
    assert flexi_step(0.8, full_share=1.0, low_cost=0.5, reference_cost=0.25) == pytest.approx(5 * 0.75 + 3)


def test_scoring_nothing_away_costs_one_pass_more_than_uniform():
    assert jest_step(0.0) == uniform_step() + 1
    assert jest_step(0.0, reuse_forward=True) == uniform_step()


@pytest.mark.parametrize(("call", "complaint"), [
    (lambda: jest_step(1.0), r"filter_ratio must be in \[0, 1\), got 1.0"),
    (lambda: flexi_step(-0.1), r"filter_ratio must be in \[0, 1\), got -0.1"),
    (lambda: jest_step(0.5, reference_cost=-1.0), "reference_cost must be at least 0, got -1.0"),
    (lambda: flexi_step(0.5, low_cost=0.0), r"low_cost must be in \(0, 1\], got 0.0"),
    (lambda: flexi_step(0.5, full_share=1.5), r"full_share must be in \[0, 1\], got 1.5"),
])  # fmt: skip
def test_a_step_out_of_bounds_is_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


def transformer_flops(*, tokens, width, layers, mlp_ratio):
    """2 FLOPs per multiply-add: queries, keys, values and output; the two products of attention; the two of the MLP."""
    return layers * (2 * tokens * width**2 * (4 + 2 * mlp_ratio) + 4 * tokens**2 * width)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_towers_of_the_small_model_cost_what_they_cost_by_hand(training, frozen):
    network = build_network("nano").train(training).requires_grad_(not frozen)
    # 48 x 48 pixels in patches of 8 are 36 tokens, and one for the class; each tower ends in a projection to width 96.
    image = transformer_flops(tokens=37, width=96, layers=4, mlp_ratio=2) + 2 * 36 * 96 * 8 * 8 * 3 + 2 * 96 * 96
    text = transformer_flops(tokens=28, width=96, layers=2, mlp_ratio=2) + 2 * 96 * 96
    for n in (1, 3):
        pixels, tokens = torch.zeros(n, 48, 48, 3, dtype=torch.uint8), torch.zeros(n, 28, dtype=torch.int64)
        assert tower_flops(network, pixels, tokens) == (image, text)


def test_attention_is_counted_where_torch_would_take_its_fast_path():
    # In eval mode, without gradients and with an even number of heads nn.MultiheadAttention is one fused kernel.
    vision = {"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "layers": 1, "width": 32, "heads": 2}
    network = ClipNetwork(CLIP(32, vision, text), PreprocessCfg(size=16)).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    image = transformer_flops(tokens=5, width=32, layers=2, mlp_ratio=4) + 2 * 4 * 32 * 8 * 8 * 3 + 2 * 32 * 32
    text = transformer_flops(tokens=8, width=32, layers=1, mlp_ratio=4) + 2 * 32 * 32
    pixels, tokens = torch.zeros(1, 16, 16, 3, dtype=torch.uint8), torch.zeros(1, 8, dtype=torch.int64)
    assert tower_flops(network, pixels, tokens) == (image, text)


def test_counting_leaves_the_network_as_it_was():
    network = build_network("nano").eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    tower_flops(network, torch.zeros(1, 48, 48, 3, dtype=torch.uint8), torch.zeros(1, 28, dtype=torch.int64))
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="needs a pixel row and a token row, got 0 and 1"):
        tower_flops(build_network("nano"), torch.zeros(0, 48, 48, 3), torch.zeros(1, 28))
