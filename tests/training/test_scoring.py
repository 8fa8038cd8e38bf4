from __future__ import annotations

import torch

from curation.models.clip import build_network
from curation.numerics.contrastive import sigmoid_loss
from curation.training.scoring import embed_rows, losses_in_super_batch


def test_rows_are_embedded_as_in_one_pass_and_without_gradient() -> None:
    network = build_network("nano", seed=0)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 48, 48, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 400, (7, 28), generator=generator)
    image_nD, text_nD = embed_rows(network, pixels, tokens, batch_size=3)
    with torch.no_grad():
        whole = network(pixels, tokens)
    torch.testing.assert_close(image_nD, whole.image)
    torch.testing.assert_close(text_nD, whole.text)
    assert not image_nD.requires_grad and network.training

    scale, bias = (value.detach() for value in network.scale_and_bias())
    losses = losses_in_super_batch(image_nD, text_nD, logit_scale=scale, logit_bias=bias, objective="sigmoid")
    torch.testing.assert_close(losses, sigmoid_loss(image_nD, text_nD, logit_scale=scale, logit_bias=bias))
