"""A proxy's loss of a token or a half depends on what it may see, and on nothing that it must not."""

from __future__ import annotations

import pytest
import torch

from curation.models.proxies import Autoregressive, Masked, Standard, checked_losses, offsets_before


def autoregressive(*, num_tokens: int = 16, condition_width: int = 0) -> Autoregressive:
    torch.manual_seed(0)
    rows = torch.randn(40, num_tokens * 3)
    return Autoregressive(
        Standard(rows, per_number=False),
        torch.randn(7, 3),
        num_tokens=num_tokens,
        width=8,
        condition_width=condition_width,
    )


def logits_of(proxy: Autoregressive, tokens: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def hear(_: object, __: object, logits: torch.Tensor) -> None:
        seen.append(logits)

    hook = proxy.outward.register_forward_hook(hear)
    proxy(tokens)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("num_tokens", [16, 10, 1])
def test_a_token_is_predicted_from_those_before_it_alone(num_tokens):
    proxy = autoregressive(num_tokens=num_tokens)
    tokens = torch.randint(7, (3, num_tokens), generator=torch.Generator().manual_seed(1))
    before = logits_of(proxy, tokens)
    for place in range(num_tokens):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 7
        after = logits_of(proxy, changed)
        assert torch.equal(after[:, : place + 1], before[:, : place + 1])
        if place + 1 < num_tokens:
            assert not torch.equal(after[:, place + 1], before[:, place + 1])


def test_a_grid_looks_up_and_a_line_looks_back():
    assert offsets_before(64) == (1, 2, 7, 8, 9, 16)
    assert offsets_before(10) == (1, 2, 3, 4)
    assert offsets_before(2) == (1,)


def test_tokens_are_the_nearest_codes():
    proxy = autoregressive()
    rows = torch.randn(5, 48)
    pieces = proxy.standard(rows).reshape(5, 16, 3)
    assert torch.equal(proxy.prepare(rows), torch.cdist(pieces, proxy.codes_KP.expand(5, 7, 3)).argmin(dim=2))
    with pytest.raises(ValueError, match="48 numbers are not 10 tokens of 3"):
        Autoregressive(proxy.standard, proxy.codes_KP, num_tokens=10, width=8)


def test_a_condition_changes_the_loss_and_rows_do_not_change_each_other():
    proxy = autoregressive(condition_width=2)
    tokens = proxy.prepare(torch.randn(6, 48))
    condition = torch.randn(6, 2)
    losses = proxy(tokens, condition)
    assert losses.shape == (6,) and not torch.allclose(losses, proxy(tokens, condition + 1))
    torch.testing.assert_close(proxy(tokens[2:3], condition[2:3]), losses[2:3])


def test_halves_predict_each_other_and_learn_what_they_share():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(400, 8, generator=generator) @ torch.diag(torch.linspace(2, 0.1, 8))
    torch.manual_seed(0)
    proxy = Masked(torch.cat([half, half], dim=1), components=4, width=32)
    halves = proxy.prepare(torch.cat([half, half], dim=1))
    at_first = proxy(halves).mean().item()
    optimiser = torch.optim.Adam(proxy.parameters(), lr=0.01)
    for _ in range(150):
        optimiser.zero_grad()
        proxy(halves).mean().backward()
        optimiser.step()
    assert 0.6 < at_first < 1.8 and proxy(halves).mean().item() < 0.2 * at_first
    with pytest.raises(ValueError, match="9 components of halves of 8 numbers"):
        Masked(torch.cat([half, half], dim=1), components=9, width=4)


def test_losses_that_are_not_one_per_row_are_refused():
    with pytest.raises(
        ValueError, match=r"the proxy must give one loss per row, floats \(3,\), got torch.float32 \(\)"
    ):
        checked_losses(torch.tensor(1.0), 3, of="the proxy")
    with pytest.raises(ValueError, match="got float"):
        checked_losses(1.0, 3, of="the proxy")
