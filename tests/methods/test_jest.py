"""JEST against Algorithm 1 on dense matrices, written here from the paper, and against numbers by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from curation.methods import jest
from curation.methods.jest import Jest, SigmoidLogits, SoftmaxLogits, chunk_sizes
from curation.numerics.contrastive import softmax_loss
from curation.numerics.sampling import gumbel_top_k
from curation.selector import Rows, take

BY_HAND = torch.tensor([[1, -2, 0, 3], [0.5, 2, 1, -1], [0, 1, -1, 2], [2, 0, 1, 0.5]], dtype=torch.float64)
SCORINGS = ["learnability", "easy_reference", "hard_learner"]


def random_rows(n: int, *, seed: int, scale: float = 10.0, width: int = 16) -> Rows:
    """Pairs whose images and texts agree more under the reference than under the learner."""
    rng = Generator().manual_seed(seed)
    rows: Rows = {}
    for prefix, noise, size, logit_scale in (("", 1.5, width, scale), ("reference_", 0.7, width + 3, 1.5 * scale)):
        meaning = torch.randn(n, size, generator=rng)
        for name in ("image_embedding", "text_embedding"):
            rows[prefix + name] = F.normalize(meaning + noise * torch.randn(n, size, generator=rng), dim=1)
        rows[f"{prefix}logit_scale"] = torch.tensor(logit_scale)
        rows[f"{prefix}logit_bias"] = torch.tensor(-0.3 * logit_scale)
    return rows


def rows_with_scores(scores_NN: Tensor) -> Rows:
    """Rows whose learnability matrix is `scores_NN`, whatever it is."""
    # The reference loses the same on every pair, and the learner that plus the score.
    reference_NN = torch.full_like(scores_NN, 1.0 - min(0.0, scores_NN.min().item()))
    return {
        name: value
        for prefix, losses_NN in (("", reference_NN + scores_NN), ("reference_", reference_NN))
        for name, value in _rows_with_losses(prefix, losses_NN).items()
    }


def _rows_with_losses(prefix: str, losses_NN: Tensor) -> Rows:
    bias = -1.5
    logits_NN = losses_NN + torch.log(-torch.expm1(-losses_NN))  # the inverse of softplus
    logits_NN.diagonal().neg_()
    # Image i is axis i, so text j has as its coordinate i the cosine of the two; one more axis makes it unit.
    scale = 1.1 * (logits_NN - bias).norm(dim=0).max()
    text_ND = ((logits_NN - bias) / scale).T
    text_ND = torch.cat([text_ND, (1 - text_ND.square().sum(dim=1, keepdim=True)).sqrt()], dim=1)
    return {
        f"{prefix}image_embedding": torch.eye(*text_ND.shape),
        f"{prefix}text_embedding": text_ND.float(),
        f"{prefix}logit_scale": scale.float(),
        f"{prefix}logit_bias": torch.tensor(bias),
    }


def logits_after(rows: Rows, chosen: list[int], **fields) -> Tensor:
    logits = Jest(**fields)._logits(rows)
    return logits.add(torch.tensor(chosen)) if chosen else logits.diagonal


def choose(rows: Rows, keep: int, *, seed: int = 0, **fields) -> Tensor:
    return Jest(**fields).select(rows, keep, 0.0, Generator().manual_seed(seed)).indices


# The paper's own form of the algorithm: B x B matrices in float64.


def dense_losses(rows: Rows, prefix: str) -> Tensor:
    image, text = rows[f"{prefix}image_embedding"].double(), rows[f"{prefix}text_embedding"].double()
    logits_BB = rows[f"{prefix}logit_scale"].double() * image @ text.T + rows[f"{prefix}logit_bias"].double()
    sign_BB = 2 * torch.eye(len(logits_BB), dtype=torch.float64) - 1
    return F.softplus(-sign_BB * logits_BB)


def dense_scores(rows: Rows, scoring: str) -> Tensor:
    if scoring == "hard_learner":
        return dense_losses(rows, "")
    reference_BB = dense_losses(rows, "reference_")
    return dense_losses(rows, "") - reference_BB if scoring == "learnability" else -reference_BB


def dense_logits(scores_BB: Tensor, is_chosen: Tensor) -> Tensor:
    chosen = is_chosen.to(scores_BB.dtype)
    return scores_BB.diagonal() + chosen @ scores_BB + scores_BB @ chosen - 1e8 * chosen


def dense_algorithm_1(scores_BB: Tensor, keep: int, num_chunks: int, rng: Generator) -> list[int]:
    chosen = gumbel_top_k(scores_BB.diagonal(), keep // num_chunks, rng)
    for _ in range(num_chunks - 1):
        is_chosen = torch.eye(len(scores_BB), dtype=torch.bool)[chosen].any(dim=0)
        new = gumbel_top_k(dense_logits(scores_BB, is_chosen), keep // num_chunks, rng)
        chosen = torch.cat([chosen, new])
    return chosen.tolist()


# The logits


def test_the_logits_of_four_rows_are_those_by_hand():
    rows = rows_with_scores(BY_HAND)
    assert Jest().score(rows, 0.0).tolist() == pytest.approx([1, 2, -1, 0.5], abs=1e-4)
    assert logits_after(rows, [0])[1:].tolist() == pytest.approx([0.5, -1, 5.5], abs=1e-4)
    assert logits_after(rows, [0, 3])[1:3].tolist() == pytest.approx([-0.5, 2], abs=1e-4)
    assert dense_logits(BY_HAND, torch.tensor([True, False, False, True]))[1:3].tolist() == [-0.5, 2]


def test_the_score_of_a_set_of_four_rows_is_that_by_hand():
    rows = rows_with_scores(BY_HAND)
    for chosen, total in [([0], 1), ([0, 3], 6.5), ([0, 3, 2], 8.5)]:
        assert len(chosen) * Jest().set_score(rows, torch.tensor(chosen)) == pytest.approx(total, abs=1e-4)


def test_a_logit_is_what_the_row_adds_to_the_total_of_the_set():
    scores_BB = torch.randn(12, 12, generator=Generator().manual_seed(0), dtype=torch.float64)
    chosen = torch.zeros(12, dtype=torch.bool)
    chosen[[3, 7, 1, 10]] = True
    total = scores_BB[chosen][:, chosen].sum()
    for row in (~chosen).nonzero().flatten():
        with_row = chosen | (torch.arange(12) == row)
        added = scores_BB[with_row][:, with_row].sum() - total
        assert dense_logits(scores_BB, chosen)[row].item() == pytest.approx(added.item(), abs=1e-10)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_logit_is_what_the_row_adds_to_the_set_score(scoring):
    rows, chosen = random_rows(40, seed=1), [5, 0, 31, 8, 22]
    total = len(chosen) * Jest(scoring=scoring).set_score(rows, torch.tensor(chosen))
    logits = logits_after(rows, chosen, scoring=scoring)
    for row in (1, 17, 39):
        with_row = Jest(scoring=scoring).set_score(rows, torch.tensor([*chosen, row])) * (len(chosen) + 1)
        assert logits[row].item() == pytest.approx(with_row - total, abs=1e-4)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_logits_are_those_of_the_dense_matrix_however_the_set_was_built(scoring):
    rows = random_rows(300, seed=2)
    chosen = torch.randperm(300, generator=Generator().manual_seed(0))[:100]
    is_chosen = torch.zeros(300, dtype=torch.bool)
    is_chosen[chosen] = True
    dense = dense_logits(dense_scores(rows, scoring), is_chosen)[~is_chosen]
    logits = Jest(scoring=scoring)._logits(rows)
    logits.add(chosen[:1])
    stepwise = logits.add(chosen[1:])
    at_once = logits_after(rows, chosen.tolist(), scoring=scoring)
    for logits_B in (stepwise, at_once):
        torch.testing.assert_close(logits_B[~is_chosen], dense, rtol=1e-5, atol=1e-4)


def test_pointwise_scores_make_it_independent_selection_at_a_falling_temperature():
    rng = Generator().manual_seed(3)
    learner, reference = torch.rand(64, generator=rng, dtype=torch.float64), torch.rand(64, generator=rng)
    rows = rows_with_scores(learner[:, None] - reference[None, :].double())
    logits, alone = logits_after(rows, list(range(20)))[20:], (learner - reference)[20:]
    slope = ((logits - logits.mean()) * (alone - alone.mean())).sum() / (alone - alone.mean()).square().sum()
    assert slope.item() == pytest.approx(21, abs=1e-3)
    assert torch.corrcoef(torch.stack([logits, alone]))[0, 1].item() == pytest.approx(1, abs=1e-6)


# The selection


@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_selection_is_that_of_the_dense_algorithm_with_the_same_noise(scoring):
    for seed in range(10):
        rows = random_rows(200, seed=seed)
        dense = dense_algorithm_1(dense_scores(rows, scoring), 64, 8, Generator().manual_seed(seed))
        assert choose(rows, 64, seed=seed, num_chunks=8, scoring=scoring).tolist() == dense


@pytest.mark.parametrize(("num_chunks", "joint"), [(1, False), (2, True)])
def test_two_of_four_rows_are_drawn_with_their_exact_probability(num_chunks, joint):
    rows, draws, rng = rows_with_scores(BY_HAND), 3000, Generator().manual_seed(0)
    selector = Jest(num_chunks=num_chunks)
    counts = Counter(tuple(selector.select(rows, 2, 0.0, rng).indices.tolist()) for _ in range(draws))
    first = BY_HAND.diagonal().softmax(dim=0)
    for i in range(4):
        logits = dense_logits(BY_HAND, torch.arange(4) == i) if joint else BY_HAND.diagonal().clone()
        logits[i] = -torch.inf
        second = logits.softmax(dim=0)
        for j in range(4):
            # The standard deviation of a share is 0.009 at most.
            assert counts[i, j] / draws == pytest.approx((first[i] * second[j]).item(), abs=0.03), (i, j)


@pytest.mark.parametrize(("super_batch", "filter_ratio", "chunk"), [
    (65_536, 0.5, 2048), (163_840, 0.8, 2048), (327_680, 0.9, 2048), (5_120, 0.8, 64),
])  # fmt: skip
def test_the_papers_super_batches_are_drawn_in_chunks_of_the_papers_size(super_batch, filter_ratio, chunk):
    assert chunk_sizes(round(super_batch * (1 - filter_ratio)), 16) == [chunk] * 16


def test_chunks_differ_by_at_most_one_row_and_none_is_empty():
    for keep in range(70):
        sizes = chunk_sizes(keep, 16)
        assert sum(sizes) == keep
        assert len(sizes) == min(keep, 16)
        assert all(size >= 1 for size in sizes)
        assert max(sizes, default=0) - min(sizes, default=0) <= 1


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
@pytest.mark.parametrize("keep", [0, 1, 5, 16, 50, 99, 100])
def test_exactly_as_many_distinct_rows_are_chosen_as_asked_for(form, keep):
    indices, weights = Jest(form=form).select(random_rows(100, seed=4), keep, 0.0, Generator().manual_seed(0))
    assert len(indices) == len(indices.unique()) == keep
    assert torch.equal(weights, torch.ones(keep))


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_a_scale_of_100_overflows_nowhere(form, monkeypatch):
    rows, seen = random_rows(4096, seed=5, scale=100.0), []
    monkeypatch.setattr(
        jest, "gumbel_top_k", lambda logits, k, rng: (seen.append(logits), gumbel_top_k(logits, k, rng))[1]
    )
    indices = choose(rows, 816, form=form)
    assert len(indices.unique()) == 816
    assert len(seen) == 16
    for chunk, logits in enumerate(seen):
        free = torch.ones(4096, dtype=torch.bool)
        free[indices[: 51 * chunk]] = False
        assert torch.isfinite(logits[free]).all()
        assert torch.isneginf(logits[~free]).all()


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_rows_in_another_order_are_chosen_alike_if_their_noise_goes_with_them(form, monkeypatch):
    rows, order = random_rows(300, seed=6), torch.randperm(300, generator=Generator().manual_seed(0))
    noise_TN = -torch.empty(16, 300, dtype=torch.float64).exponential_(generator=Generator().manual_seed(1)).log()

    def chosen_with(noise_TN: Tensor, rows: Rows) -> Tensor:
        noise = iter(noise_TN)
        monkeypatch.setattr(jest, "gumbel_top_k", lambda logits, k, rng: (logits + next(noise)).topk(k).indices)
        return choose(rows, 60, form=form)

    assert torch.equal(order[chosen_with(noise_TN[:, order], take(rows, order))], chosen_with(noise_TN, rows))


def test_another_seed_chooses_otherwise_and_a_high_gain_leaves_no_choice():
    rows = random_rows(300, seed=7)
    assert not torch.equal(choose(rows, 60, seed=0), choose(rows, 60, seed=1))
    first, second = (choose(rows, 60, seed=seed, gain=1e6) for seed in (0, 1))
    assert torch.equal(first, second)


def test_half_precision_columns_choose_what_their_values_in_float32_choose():
    half = {name: value.half() if value.ndim else value for name, value in random_rows(300, seed=8).items()}
    assert torch.equal(choose(half, 60), choose({name: value.float() for name, value in half.items()}, 60))


def test_embeddings_with_a_gradient_leave_no_graph_behind():
    rows = random_rows(50, seed=9)
    rows["image_embedding"].requires_grad_()
    rows["logit_scale"].requires_grad_()
    assert not Jest().score(rows, 0.0).requires_grad
    assert torch.equal(choose(rows, 10), choose({name: value.detach() for name, value in rows.items()}, 10))


def test_the_joint_set_is_more_learnable_than_the_independent_one_and_that_than_a_random_one():
    rows = random_rows(1000, seed=10, scale=30.0)
    joint, alone = (Jest().set_score(rows, choose(rows, 200, num_chunks=chunks)) for chunks in (16, 1))
    assert joint > alone > Jest().set_score(rows, torch.arange(200))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_a_gpu_chooses_what_a_cpu_chooses(form):
    rows = random_rows(2000, seed=11)
    on_gpu = choose({name: value.cuda() for name, value in rows.items()}, 400, form=form)
    assert on_gpu.is_cuda
    assert sorted(on_gpu.tolist()) == sorted(choose(rows, 400, form=form).tolist())


# The softmax form


def own_softmax_loss(rows: Rows, prefix: str, chosen: list[int], row: int) -> float:
    """Loss of `row` in the batch of `chosen` and itself."""
    batch = torch.tensor([*chosen, row])
    image, text = (rows[f"{prefix}{name}"][batch].double() for name in ("image_embedding", "text_embedding"))
    scale, bias = rows[f"{prefix}logit_scale"].double(), rows[f"{prefix}logit_bias"].double()
    return softmax_loss(image, text, logit_scale=scale, logit_bias=bias)[-1].item()


@pytest.mark.parametrize(("scoring", "signs"), [
    ("learnability", {"": 1, "reference_": -1}), ("easy_reference", {"reference_": -1}), ("hard_learner", {"": 1}),
])  # fmt: skip
def test_a_softmax_logit_is_the_rows_own_loss_beside_the_set(scoring, signs):
    rows, chosen = random_rows(30, seed=12), [4, 9, 11, 2, 25]
    logits = logits_after(rows, chosen, form="softmax", scoring=scoring)
    for row in (0, 13, 29):
        by_hand = sum(sign * own_softmax_loss(rows, prefix, chosen, row) for prefix, sign in signs.items())
        assert logits[row].item() == pytest.approx(by_hand, abs=1e-4)


def test_without_the_self_term_only_the_set_is_in_the_denominator():
    rows, chosen = random_rows(30, seed=13), torch.tensor([4, 9, 11, 2, 25])
    by_hand = torch.zeros(30, dtype=torch.float64)
    for prefix, sign in (("", 1), ("reference_", -1)):
        image, text = (rows[f"{prefix}{name}"].double() for name in ("image_embedding", "text_embedding"))
        logits_BB = rows[f"{prefix}logit_scale"].double() * image @ text.T
        over_both = logits_BB[:, chosen].logsumexp(dim=1) + logits_BB[chosen].logsumexp(dim=0)
        by_hand += sign * (over_both / 2 - logits_BB.diagonal())
    logits = SoftmaxLogits(Jest(form="softmax")._views(rows), with_self_term=False)
    logits.add(chosen[:2])
    torch.testing.assert_close(logits.add(chosen[2:]), by_hand, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(logits_after(rows, chosen.tolist(), form="softmax"), by_hand, atol=1e-2)


@pytest.mark.parametrize("with_self_term", [True, False])
def test_the_softmax_selection_is_that_of_a_loop_over_dense_matrices(with_self_term):
    rows, keep, chunks = random_rows(200, seed=14), 40, 5
    dense = []
    for prefix, sign in (("", 1), ("reference_", -1)):
        image, text = (rows[f"{prefix}{name}"].double() for name in ("image_embedding", "text_embedding"))
        dense.append((sign, rows[f"{prefix}logit_scale"].double() * image @ text.T))
    for seed in range(3):
        rng = Generator().manual_seed(seed)
        is_chosen, order = torch.zeros(200, dtype=torch.bool), []
        for _ in range(chunks):
            logits = torch.zeros(200, dtype=torch.float64)
            for sign, logits_BB in dense:
                logits -= sign * logits_BB.diagonal()
                if order:
                    seen_BB = is_chosen.expand(200, 200)
                    seen_BB = seen_BB | torch.eye(200, dtype=torch.bool) if with_self_term else seen_BB
                    over_texts = logits_BB.masked_fill(~seen_BB, -torch.inf).logsumexp(dim=1)
                    over_images = logits_BB.T.masked_fill(~seen_BB, -torch.inf).logsumexp(dim=1)
                    logits += sign * (over_texts + over_images) / 2
            new = gumbel_top_k(logits.masked_fill(is_chosen, -torch.inf), keep // chunks, rng)
            is_chosen[new] = True
            order += new.tolist()
        fields = {"form": "softmax", "num_chunks": chunks, "with_self_term": with_self_term}
        assert choose(rows, keep, seed=seed, **fields).tolist() == order


# What is said about a selection


def test_the_off_diagonal_share_tells_a_coupled_set_from_an_uncoupled_one():
    coupled, chosen = random_rows(400, seed=15, scale=30.0), torch.arange(100)
    uncoupled = {**coupled, **{f"{p}logit_bias": torch.tensor(-60.0) for p in ("", "reference_")}}
    assert Jest().off_diagonal_share(coupled, chosen) > 0.5
    assert Jest().off_diagonal_share(uncoupled, chosen) < 0.01


def test_the_off_diagonal_share_is_that_of_the_dense_matrix():
    rows, chosen = random_rows(60, seed=16), torch.arange(20)
    scores_BB = dense_scores(rows, "learnability")
    alone = scores_BB.diagonal()[20:]
    joint = dense_logits(scores_BB, torch.arange(60) < 20)[20:] - alone
    expected = joint.var() / (joint.var() + alone.var())
    assert Jest().off_diagonal_share(rows, chosen) == pytest.approx(expected.item(), abs=1e-5)


def test_a_set_that_says_nothing_is_refused():
    rows = random_rows(5, seed=17)
    with pytest.raises(ValueError, match="two rows outside the set, got 1"):
        Jest().off_diagonal_share(rows, torch.arange(4))
    with pytest.raises(ValueError, match="all logits are equal"):
        Jest().off_diagonal_share(take(rows, torch.zeros(5, dtype=torch.int64)), torch.arange(0))
    with pytest.raises(ValueError, match="at least one row, got an empty set"):
        Jest().set_score(rows, torch.arange(0))


# What is refused


def test_the_needs_follow_from_the_scoring_and_the_form():
    learner = {"image_embedding", "text_embedding", "logit_scale", "logit_bias"}
    reference = {f"reference_{name}" for name in learner}
    assert Jest().needs == learner | reference
    assert Jest(scoring="hard_learner").needs == learner
    assert Jest(scoring="easy_reference").needs == reference
    assert Jest(scoring="hard_learner", form="softmax").needs == learner - {"logit_bias"}


@pytest.mark.parametrize(("fields", "complaint"), [
    ({"scoring": "learnable"}, r"scoring must be one of .*, got 'learnable'; did you mean 'learnability'\?"),
    ({"form": "sigmoidal"}, r"form must be one of \['sigmoid', 'softmax'\], got 'sigmoidal'; did you mean 'sigmoid'"),
    ({"num_chunks": 0}, "num_chunks must be at least 1, got 0"),
    ({"gain": 0.0}, "gain must be finite and above 0, got 0.0"),
    ({"gain": float("inf")}, "gain must be finite and above 0, got inf"),
])  # fmt: skip
def test_a_field_out_of_bounds_is_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        Jest(**fields)


@pytest.mark.parametrize(("name", "value", "complaint"), [
    ("logit_scale", torch.tensor(0.0), "logit_scale must be 0-dim, finite and above 0, got 0.0"),
    ("reference_logit_scale", torch.tensor([1.0]), r"reference_logit_scale must be 0-dim, .* got \[1.0\]"),
    ("logit_bias", torch.tensor(torch.nan), "logit_bias must be 0-dim, finite, got nan"),
    ("reference_logit_bias", torch.tensor(torch.inf), "reference_logit_bias must be 0-dim, finite, got inf"),
    ("text_embedding", torch.ones(9, 5), r"image_embedding and text_embedding must be \(n, D\) alike, got \(9, 16\)"),
    ("reference_text_embedding", torch.ones(9), r"must be \(n, D\) alike, got \(9, 19\) and \(9,\)"),
    ("text_embedding", torch.ones(9, 16), "text_embedding must be of unit norm, got norm 4 in row 0"),
    ("reference_image_embedding", torch.full((9, 19), torch.nan), "reference_image_embedding .* got norm nan in row 0"),
    ("reference_image_embedding", torch.ones(8, 19), "columns differ in length"),
])  # fmt: skip
def test_malformed_rows_are_refused_by_name(name, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        choose({**random_rows(9, seed=18), name: value}, 3)


def test_the_logits_have_one_state_per_selection():
    rows = random_rows(50, seed=19)
    selector = Jest()
    first = selector.select(rows, 20, 0.0, Generator().manual_seed(0)).indices
    assert torch.equal(selector.select(rows, 20, 1.0, Generator().manual_seed(0)).indices, first)
    views = selector._views(rows)
    torch.testing.assert_close(SigmoidLogits(views).add(first), SigmoidLogits(views).add(first))
