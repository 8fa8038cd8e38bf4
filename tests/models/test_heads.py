"""Heads score embeddings as the networks whose state dicts they were do."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curation.models.heads import HeadLayout, head_digest, load_head

DIM = 12
ROWS = torch.randn(7, DIM, generator=torch.Generator().manual_seed(0))


def sequential(*layers: nn.Module) -> nn.Module:
    """As the published classes have it: a module whose only child is `layers`."""
    network = nn.Module()
    network.layers = nn.Sequential(*layers)
    return network


def aesthetic() -> nn.Module:
    drop = nn.Dropout(0.2)
    sizes = [nn.Linear(DIM, 10), drop, nn.Linear(10, 8), drop, nn.Linear(8, 6), drop, nn.Linear(6, 4), nn.Linear(4, 1)]
    return sequential(*sizes)


def nsfw_h14() -> nn.Module:
    widths, layers = [DIM, 10, 20, 10, 6, 5], list[nn.Module]()
    for a, b in pairwise(widths[:6]):
        layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.2)]
    return sequential(*layers, nn.Linear(5, 4), nn.Linear(4, 1))


def saved(tmp_path: Path, state: object) -> str:
    torch.save(state, tmp_path / "head.pth")
    return str(tmp_path / "head.pth")


@pytest.mark.parametrize(("layout", "build"), [("aesthetic", aesthetic), ("nsfw-h14", nsfw_h14)])
def test_published_sequential_heads_load_as_they_are(tmp_path: Path, layout: HeadLayout, build) -> None:
    network = build().eval()
    with torch.inference_mode():
        expected = network.layers(F.normalize(ROWS, dim=1))[:, 0]
    scores = load_head(saved(tmp_path, network.state_dict()), layout)(ROWS.numpy())
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert scores.dtype == np.float32


def test_the_linear_aesthetic_head_loads_as_it_is(tmp_path: Path) -> None:
    network = nn.Linear(DIM, 1)
    with torch.inference_mode():
        expected = network(F.normalize(ROWS, dim=1))[:, 0].numpy()
    scores = load_head(saved(tmp_path, network.state_dict()), "linear")(ROWS.numpy().astype(np.float16))
    np.testing.assert_allclose(scores, expected, atol=1e-3)


@pytest.mark.parametrize("num_layers", [3, 4])  # those of ViT-B-32 and ViT-L-14
def test_the_torch_port_of_the_nsfw_heads_loads_as_it_is(tmp_path: Path, num_layers: int) -> None:
    widths = [*[DIM, 5, 7, 6][:num_layers], 1]
    linear = [nn.Linear(a, b) for a, b in pairwise(widths)]
    mean, variance = torch.randn(DIM), torch.rand(DIM) + 0.1
    state = {"norm.mean": mean, "norm.variance": variance}
    for number, layer in enumerate(linear, start=1):
        state |= {f"linear_{number}.{name}": value for name, value in layer.state_dict().items()}
    with torch.inference_mode():
        x = (F.normalize(ROWS, dim=1) - mean) / (variance.sqrt() + 1e-10)
        for layer in linear[:-1]:
            x = F.relu(layer(x))
        expected = torch.sigmoid(linear[-1](x))[:, 0].numpy()
    np.testing.assert_allclose(load_head(saved(tmp_path, state), "nsfw")(ROWS.numpy()), expected, rtol=1e-4, atol=1e-6)


def test_an_mlp_of_ones_own_has_relu_between_its_layers(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(DIM, 5), nn.ReLU(), nn.Linear(5, 1))
    with torch.inference_mode():
        expected = network(F.normalize(ROWS, dim=1))[:, 0].numpy()
    path = saved(tmp_path, {"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}})
    np.testing.assert_allclose(load_head(path, "mlp")(ROWS.numpy()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "state", "message"),
    [
        ("aesthetic", nn.Linear(DIM, 1).state_dict(), "is no head of layout 'aesthetic': it holds"),
        ("linear", aesthetic().state_dict(), "is no head of layout 'linear'"),
        ("aesthetic", nsfw_h14().state_dict(), r"its layers are \[0, 3, 6, 9, 12, 15, 16\], not \[0, 2, 4, 6, 7\]"),
        ("nsfw", {"linear_1.weight": torch.ones(1, 2), "linear_1.bias": torch.ones(1)}, "is no head of layout 'nsfw'"),
        ("mlp", nn.Sequential(nn.Linear(DIM, 3), nn.Linear(2, 1)).state_dict(), "its layers have weights"),
        ("mlp", nn.Sequential(nn.Linear(DIM, 2)).state_dict(), "is no head with one score"),
        ("mlp", {"0.weight": torch.ones(1, 2), "0.bias": torch.ones(1), "x": torch.ones(1)}, "is no head of layout"),
        ("mlp", [1], "holds no state dict, it holds a list"),
    ],
)
def test_what_is_no_such_head_is_an_error(tmp_path: Path, layout: HeadLayout, state: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_head(saved(tmp_path, state), layout)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "head.pth").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path / "zip.pth")
    for name in ("head.pth", "zip.pth", "absent.pth"):
        with pytest.raises(ValueError, match="holds no state dict"):
            load_head(str(tmp_path / name), "linear")
    assert not (tmp_path / "ran").exists()


def test_embeddings_of_another_width_are_refused(tmp_path: Path) -> None:
    head = load_head(saved(tmp_path, nn.Linear(DIM + 1, 1).state_dict()), "linear")
    with pytest.raises(ValueError, match="is a head on 13 numbers, the embeddings have 12"):
        head(ROWS.numpy())


def test_the_digest_names_file_and_layout(tmp_path: Path) -> None:
    path = saved(tmp_path, nn.Linear(DIM, 1).state_dict())
    assert len({head_digest(path, "linear"), head_digest(path, "mlp")}) == 2
    with pytest.raises(ValueError, match="is not a file"):
        head_digest(str(tmp_path / "gone"), "linear")
