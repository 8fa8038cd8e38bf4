from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from curation.evaluation import retrieval
from curation.evaluation.retrieval import retrieval_recall


def unit_rows(n, *, seed, width=12):
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def embeddings_with_cosines(cosines_NM):
    """Images are axes, so a text's coordinates are its cosines."""
    return torch.eye(len(cosines_NM)), cosines_NM.T.contiguous()


def recall_by_sorting(cosines_NM, image_of_text, k):
    """For cosines without ties."""
    found_texts = cosines_NM.argsort(dim=1, descending=True)[:, :k]
    images = torch.arange(len(cosines_NM))
    image_to_text = (image_of_text[found_texts] == images[:, None]).any(dim=1).double().mean().item()
    found_images = cosines_NM.T.argsort(dim=1, descending=True)[:, :k]
    text_to_image = (found_images == image_of_text[:, None]).any(dim=1).double().mean().item()
    return image_to_text, text_to_image


def test_the_example_of_the_module():
    image, text = embeddings_with_cosines(torch.tensor([[0.8, 0.1, 0.9, 0.2], [0.3, 0.4, 0.5, 0.6]]))
    recall = retrieval_recall(image, text, image_of_text=torch.tensor([0, 0, 1, 1]), ks=(1, 2))
    assert recall.image_to_text == {1: 0.5, 2: 1.0}
    assert recall.text_to_image == {1: 0.5, 2: 1.0}


@pytest.mark.parametrize("block_rows", [1, 7, 1024])
def test_recall_is_that_of_a_sorted_list(block_rows):
    image, text = unit_rows(40, seed=0), unit_rows(100, seed=1)
    image_of_text = torch.cat([torch.arange(40), torch.randint(40, (60,), generator=torch.Generator().manual_seed(2))])
    recall = retrieval_recall(image, text, image_of_text=image_of_text, block_rows=block_rows)
    for k in (1, 5, 10):
        expected = recall_by_sorting(image @ text.T, image_of_text, k)
        assert (recall.image_to_text[k], recall.text_to_image[k]) == pytest.approx(expected)


def test_one_caption_each_is_the_default_and_the_order_of_pairs_does_not_matter():
    image, text = unit_rows(30, seed=3), unit_rows(30, seed=4)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    plain = retrieval_recall(image, text)
    assert plain == retrieval_recall(image, text, image_of_text=torch.arange(30))
    assert plain == retrieval_recall(image[order], text[order])
    assert retrieval_recall(image, image).image_to_text[1] == 1.0


def test_a_model_that_maps_everything_to_one_point_scores_nothing():
    same = torch.ones(20, 4) / 2
    recall = retrieval_recall(same, same)
    assert set(recall.image_to_text.values()) == set(recall.text_to_image.values()) == {0.0}


def test_an_equal_caption_of_the_same_image_does_not_count_against_it():
    image, text = embeddings_with_cosines(torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.2, 0.7]]))
    recall = retrieval_recall(image, text, image_of_text=torch.tensor([0, 0, 1]), ks=(1,))
    assert recall == ({1: 1.0}, {1: 1.0})


ROWS = unit_rows(4, seed=5)


@pytest.mark.parametrize(("image", "text", "fields", "complaint"), [
    (ROWS[:0], ROWS, {}, r"image embeddings must be \(n, D\) with n >= 1, got \(0, 12\)"),
    (ROWS, ROWS[0], {}, r"text embeddings must be \(n, D\) with n >= 1, got \(12,\)"),
    (ROWS, ROWS * torch.nan, {}, "text embeddings must be finite"),
    (ROWS, ROWS[:, :5], {}, "of one width, got 12, 5"),
    (ROWS, ROWS, {"image_of_text": torch.arange(3)}, r"image_of_text must be int64 \(4,\), got torch.int64 \(3,\)"),
    (ROWS, ROWS, {"image_of_text": torch.ones(4)}, r"image_of_text must be int64 \(4,\), got torch.float32 \(4,\)"),
    (ROWS, ROWS, {"image_of_text": torch.arange(4) + 1}, r"image_of_text must be in \[0, 4\), got 1 to 4"),
    (ROWS, ROWS[:3], {}, "every image needs a caption, 1 have none, the first is image 3"),
    (ROWS, ROWS, {"ks": (1, 5)}, r"ks must be in \[1, 4\], the number of candidates, got \[1, 5\]"),
    (ROWS, ROWS, {"ks": (0,)}, r"ks must be in \[1, 4\], the number of candidates, got \[0\]"),
    (ROWS, ROWS, {"ks": ()}, r"got \[\]"),
    (ROWS, ROWS, {"ks": (1,), "block_rows": 0}, "block_rows must be at least 1, got 0"),
])  # fmt: skip
def test_what_cannot_be_ranked_is_refused(image, text, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        retrieval_recall(image, text, **fields)


def test_however_many_candidates_there_are_a_block_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = unit_rows(9, seed=1), unit_rows(9, seed=2)
    whole = retrieval_recall(image, text, ks=(1, 5))
    monkeypatch.setattr(retrieval, "BLOCK_CELLS", 4)
    assert retrieval_recall(image, text, ks=(1, 5)) == whole
