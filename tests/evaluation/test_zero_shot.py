from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from curation.evaluation.zero_shot import class_embeddings, zero_shot_accuracy

EYE = torch.eye(3)


def test_a_class_is_the_direction_between_its_prompts():
    prompts_CTD = torch.tensor([[[1.0, 0.0], [0.0, 5.0]], [[0.0, -2.0], [0.0, -1.0]]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]])
    torch.testing.assert_close(class_embeddings(prompts_CTD), expected)
    torch.testing.assert_close(class_embeddings(prompts_CTD.half()), expected, atol=1e-3, rtol=0)


def test_accuracies_of_four_images_are_those_by_hand():
    # Nearest classes, best first: 0 1 2; 1 2 0; 2 0 1; 0 2 1.
    images = torch.tensor([[0.9, 0.3, 0.1], [0.1, 0.8, 0.2], [0.3, 0.2, 0.9], [0.9, 0.1, 0.2]])
    labels = torch.tensor([0, 2, 1, 2])
    for block_rows in (1, 3, 4096):
        accuracy = zero_shot_accuracy(images, EYE, labels, ks=(1, 2, 3), block_rows=block_rows)
        assert accuracy == {1: 0.25, 2: 0.75, 3: 1.0}


def test_accuracy_is_that_of_the_sorted_classes():
    rng = torch.Generator().manual_seed(0)
    images, classes = (F.normalize(torch.randn(n, 8, generator=rng), dim=1) for n in (200, 20))
    labels = torch.randint(20, (200,), generator=rng)
    nearest = (images @ classes.T).argsort(dim=1, descending=True)
    for k, share in zero_shot_accuracy(images, classes, labels).items():
        assert share == pytest.approx((nearest[:, :k] == labels[:, None]).any(dim=1).double().mean().item())


def test_equal_classes_count_against_us():
    images, labels = torch.ones(6, 3) / 3**0.5, torch.tensor([0, 1, 2] * 2)
    assert zero_shot_accuracy(images, EYE, labels, ks=(1, 2, 3)) == {1: 0.0, 2: 0.0, 3: 1.0}


@pytest.mark.parametrize(("prompts", "complaint"), [
    (torch.ones(2, 3), r"prompts must be \(C, T, D\), none of them 0, got \(2, 3\)"),
    (torch.ones(2, 0, 3), r"prompts must be \(C, T, D\), none of them 0, got \(2, 0, 3\)"),
    (torch.full((2, 1, 3), torch.inf), "prompts must be finite"),
    (torch.stack([EYE[:2], torch.stack([EYE[0], -EYE[0]])]), "the prompts of class 1 have mean 0"),
])  # fmt: skip
def test_prompts_without_a_direction_are_refused(prompts, complaint):
    with pytest.raises(ValueError, match=complaint):
        class_embeddings(prompts)


LABELS = torch.arange(3)


@pytest.mark.parametrize(("image", "classes", "labels", "fields", "complaint"), [
    (EYE, EYE[:, :2], LABELS, {}, r"must be \(N, D\) and \(C, D\) with N >= 1, got \(3, 3\) and \(3, 2\)"),
    (EYE[:0], EYE, LABELS[:0], {}, r"with N >= 1, got \(0, 3\)"),
    (EYE * torch.nan, EYE, LABELS, {}, "image and class embeddings must be finite"),
    (EYE, EYE, LABELS[:2], {}, r"labels must be int64 \(3,\), got torch.int64 \(2,\)"),
    (EYE, EYE, LABELS.float(), {}, r"labels must be int64 \(3,\), got torch.float32 \(3,\)"),
    (EYE, EYE, LABELS - 1, {}, r"labels must be in \[0, 3\), got -1 to 1"),
    (EYE, EYE, LABELS, {}, r"ks must be in \[1, 3\], the number of classes, got \[1, 5\]"),
    (EYE, EYE, LABELS, {"ks": ()}, r"the number of classes, got \[\]"),
    (EYE, EYE, LABELS, {"ks": (1,), "block_rows": 0}, "block_rows must be at least 1, got 0"),
])  # fmt: skip
def test_what_cannot_be_classified_is_refused(image, classes, labels, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        zero_shot_accuracy(image, classes, labels, **fields)
