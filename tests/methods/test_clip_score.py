import numpy as np
import torch
from torch import Generator

from curation.methods.clip_score import ClipScore
from curation.numerics.sampling import tie_hash, uid_words


def rows_of(scores):
    words = uid_words([f"{i:032x}" for i in range(len(scores))])
    return {"clip_score": torch.tensor(scores, dtype=torch.float32), "uid": torch.from_numpy(words.view(np.int64))}


def test_the_highest_scores_are_kept_best_first():
    selection = ClipScore().select(rows_of([0.1, 0.4, -0.2, 0.3]), 2, 0.0, Generator())
    assert selection.indices.tolist() == [1, 3]
    assert selection.weights.tolist() == [1.0, 1.0]


def test_equal_scores_are_parted_by_the_hash_of_the_uid():
    rows = rows_of([0.3] * 5)
    by_hash = np.argsort(tie_hash(rows["uid"].numpy().view(np.uint64)))[::-1]
    assert ClipScore().select(rows, 3, 0.0, Generator()).indices.tolist() == by_hash[:3].tolist()


def test_a_row_whose_score_is_nan_goes_last():
    rows = rows_of([float("nan"), -1.0, float("-inf")])
    assert ClipScore().select(rows, 3, 0.0, Generator()).indices.tolist() == [1, 2, 0]


def test_the_score_is_the_column_whatever_the_seed():
    rows = rows_of([0.1, 0.4])
    assert torch.equal(ClipScore().score(rows, 0.0), rows["clip_score"])
    assert torch.equal(ClipScore().sort_key(rows, 0.0, 1), ClipScore().sort_key(rows, 0.9, 2))


def test_a_score_that_came_with_the_pool_takes_the_place_of_ours():
    rows = {**rows_of([0.1, 0.4, 0.2]), "json.theirs": torch.tensor([0.3, 0.1, 0.2])}
    selector = ClipScore(column="json.theirs")
    assert selector.needs == {"json.theirs", "uid"}
    assert selector.select(rows, 2, 0.0, Generator()).indices.tolist() == [0, 2]
