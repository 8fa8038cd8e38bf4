"""Pair losses against numbers by hand and against a loop over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from curation.numerics.contrastive import (
    Batch,
    blocked_pair_losses,
    cosine,
    load_objective,
    pick_accuracy,
    sigmoid_loss,
    softmax_loss,
)

SCALE, BIAS = torch.tensor(10.0), torch.tensor(-2.0)


def unit_rows(n: int, *, seed: int, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1)


def test_cosine_is_the_row_wise_dot_product() -> None:
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float16)
    text = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]], dtype=torch.float16)
    scores = cosine(image, text)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.96, -1.0]), atol=1e-3, rtol=0)
    assert cosine(image[:0], text[:0]).shape == (0,)


def test_the_losses_of_two_orthogonal_pairs_are_those_by_hand() -> None:
    # Logits [[1, -1], [-1, 1]] for scale 2 and bias -1; without bias [[2, 0], [0, 2]].
    eye = torch.eye(2)
    by_hand = math.log1p(math.exp(-1)) + math.log1p(math.exp(-1))
    sigmoid = sigmoid_loss(eye, eye, logit_scale=torch.tensor(2.0), logit_bias=torch.tensor(-1.0))
    torch.testing.assert_close(sigmoid, torch.full((2,), by_hand))
    softmax = softmax_loss(eye, eye, logit_scale=torch.tensor(2.0), logit_bias=torch.tensor(-1.0))
    torch.testing.assert_close(softmax, torch.full((2,), math.log(math.exp(2) + 1) - 2))


def test_the_losses_of_an_asymmetric_two_by_two_are_those_by_hand() -> None:
    # Images (1,0), (0,1); texts (0.6,0.8), (0,1): cosines [[0.6, 0], [0.8, 1]], scale 1, no bias.
    image, text = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    one, zero = torch.tensor(1.0), torch.tensor(0.0)

    def plus(x: float) -> float:
        return math.log1p(math.exp(x))

    negatives = (plus(0.0) + plus(0.8)) / 2
    expected = torch.tensor([plus(-0.6) + negatives, plus(-1.0) + negatives])
    torch.testing.assert_close(sigmoid_loss(image, text, logit_scale=one, logit_bias=zero), expected)
    e = math.exp
    expected = torch.tensor(
        [
            (math.log(e(0.6) + e(0.0)) + math.log(e(0.6) + e(0.8))) / 2 - 0.6,
            (math.log(e(0.8) + e(1.0)) + math.log(e(0.0) + e(1.0))) / 2 - 1.0,
        ]
    )
    torch.testing.assert_close(softmax_loss(image, text, logit_scale=one, logit_bias=zero), expected)


def test_the_losses_equal_a_loop_over_pairs() -> None:
    n = 7
    image, text = unit_rows(n, seed=1), unit_rows(n, seed=2)
    logits = [[float(SCALE * (image[i] @ text[j]) + BIAS) for j in range(n)] for i in range(n)]
    for row in range(n):
        sigmoid = -math.log(1 / (1 + math.exp(-logits[row][row])))
        others = [j for j in range(n) if j != row]
        sigmoid += sum(-math.log(1 / (1 + math.exp(logits[row][j]))) for j in others) / 2
        sigmoid += sum(-math.log(1 / (1 + math.exp(logits[j][row]))) for j in others) / 2
        softmax = -math.log(math.exp(logits[row][row]) / sum(math.exp(logits[row][j]) for j in range(n))) / 2
        softmax -= math.log(math.exp(logits[row][row]) / sum(math.exp(logits[j][row]) for j in range(n))) / 2
        assert sigmoid_loss(image, text, logit_scale=SCALE, logit_bias=BIAS)[row].item() == pytest.approx(sigmoid)
        assert softmax_loss(image, text, logit_scale=SCALE, logit_bias=BIAS)[row].item() == pytest.approx(softmax)


def test_the_mean_of_the_losses_is_the_published_loss() -> None:
    image, text = unit_rows(6, seed=3), unit_rows(6, seed=4)
    logits = SCALE * image @ text.T + BIAS
    siglip = -F.logsigmoid((2 * torch.eye(6) - 1) * logits).sum() / 6
    torch.testing.assert_close(sigmoid_loss(image, text, logit_scale=SCALE, logit_bias=BIAS).mean(), siglip)
    own = torch.arange(6)
    clip = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(softmax_loss(image, text, logit_scale=SCALE, logit_bias=BIAS).mean(), clip)


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
def test_images_and_texts_play_the_same_part(loss) -> None:
    image, text = unit_rows(6, seed=5), unit_rows(6, seed=6)
    one_way = loss(image, text, logit_scale=SCALE, logit_bias=BIAS)
    torch.testing.assert_close(one_way, loss(text, image, logit_scale=SCALE, logit_bias=BIAS))


def test_the_softmax_loss_does_not_depend_on_the_bias() -> None:
    image, text = unit_rows(6, seed=7), unit_rows(6, seed=8)
    without = softmax_loss(image, text, logit_scale=SCALE, logit_bias=torch.tensor(0.0))
    torch.testing.assert_close(softmax_loss(image, text, logit_scale=SCALE, logit_bias=BIAS), without)


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
def test_losses_and_gradients_stay_finite_at_a_scale_of_100(loss) -> None:
    image, text = unit_rows(8, seed=9).float().requires_grad_(), unit_rows(8, seed=9).float()
    losses = loss(image, -text, logit_scale=torch.tensor(100.0), logit_bias=torch.tensor(-10.0))
    losses.mean().backward()
    assert image.grad is not None
    assert torch.isfinite(losses).all() and (losses >= 0).all() and torch.isfinite(image.grad).all()


def test_pick_accuracy_counts_images_whose_own_text_is_nearest() -> None:
    image = torch.eye(3)
    assert pick_accuracy(image, image).item() == 1.0
    assert pick_accuracy(image, image[[0, 2, 1]]).item() == pytest.approx(1 / 3)


def test_embeddings_of_unlike_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        cosine(torch.zeros(2, 3), torch.zeros(2, 4))


def test_an_unknown_objective_is_refused_with_the_nearest_name() -> None:
    assert load_objective("softmax") is softmax_loss
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        load_objective("sigmoidal")


@pytest.mark.parametrize("objective", [sigmoid_loss, softmax_loss])
def test_rows_of_a_batch_lose_what_they_lose_in_the_whole(objective) -> None:
    generator = torch.Generator().manual_seed(3)
    image_MD, text_MD = (torch.nn.functional.normalize(torch.randn(9, 5, generator=generator), dim=1) for _ in "it")
    whole = objective(image_MD, text_MD, logit_scale=SCALE, logit_bias=BIAS)
    for first, stop in [(0, 4), (4, 9), (8, 9), (0, 9)]:
        within = Batch(image_MD, text_MD, first)
        image_ND, text_ND = image_MD[first:stop], text_MD[first:stop]
        part = objective(image_ND, text_ND, logit_scale=SCALE, logit_bias=BIAS, within=within)
        torch.testing.assert_close(part, whole[first:stop])


def test_rows_that_are_not_within_the_batch_are_refused() -> None:
    rows = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"rows \[1, 4\) of width 4 are not within"):
        sigmoid_loss(rows, rows, logit_scale=SCALE, logit_bias=BIAS, within=Batch(rows, rows, 1))


@pytest.mark.parametrize("objective", ["sigmoid", "softmax"])
@pytest.mark.parametrize("block_rows", [1, 13, 50, 1024])
def test_losses_in_blocks_are_the_losses(objective, block_rows) -> None:
    image, text = unit_rows(50, seed=10), unit_rows(50, seed=11)
    for scale, bias in [(1.0, 0.0), (10.0, -10.0), (100.0, -20.0)]:
        logit_scale, logit_bias = torch.tensor(scale), torch.tensor(bias)
        expected = load_objective(objective)(image, text, logit_scale=logit_scale, logit_bias=logit_bias).float()
        losses = blocked_pair_losses(
            image, text, logit_scale=logit_scale, logit_bias=logit_bias, objective=objective, block_rows=block_rows
        )
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5 * scale)
        assert losses.dtype == torch.float32


def test_losses_in_blocks_take_half_precision_and_give_no_gradient() -> None:
    image, text = unit_rows(20, seed=12).half(), unit_rows(20, seed=13).half().requires_grad_()
    losses = blocked_pair_losses(image, text, logit_scale=SCALE, logit_bias=BIAS, objective="sigmoid", block_rows=6)
    torch.testing.assert_close(losses, sigmoid_loss(image.float(), text.float(), logit_scale=SCALE, logit_bias=BIAS))
    assert not losses.requires_grad
    none = blocked_pair_losses(image[:0], text[:0], logit_scale=SCALE, logit_bias=BIAS, objective="sigmoid")
    assert none.shape == (0,)


def test_blocks_that_make_no_sense_are_refused() -> None:
    rows = torch.ones(2, 3)
    with pytest.raises(ValueError, match="block_rows must be at least 1, got 0"):
        blocked_pair_losses(rows, rows, logit_scale=SCALE, logit_bias=BIAS, objective="sigmoid", block_rows=0)
    with pytest.raises(ValueError, match="got 'softmaxx'; did you mean 'softmax'"):
        blocked_pair_losses(rows, rows, logit_scale=SCALE, logit_bias=BIAS, objective="softmaxx")
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 2\)"):
        blocked_pair_losses(rows, rows[:, :2], logit_scale=SCALE, logit_bias=BIAS, objective="sigmoid")
