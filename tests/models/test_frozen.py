"""Frozen networks give what their own library gives before its last linear layer, from the same transform."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curation.models.clip import build_network
from curation.models.frozen import frozen_digest, load_frozen

TFLITE = Path("weights") / "mobilenet_v1_1.0_224_quant_embedding_extractor.tflite"


def picture(*, size: tuple[int, int] = (90, 70)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_open_clip_gives_the_image_towers_embedding_not_normalised() -> None:
    frozen, network = load_frozen("open_clip", "nano", seed=5), build_network("nano", seed=5).eval()
    pixels = frozen.resize(picture())[None]
    features = frozen.embed(pixels)
    with torch.no_grad():
        unit = network.embed_images(torch.from_numpy(pixels)).numpy()
    assert features.dtype == np.float32 and not np.allclose(np.linalg.norm(features), 1, atol=1e-2)
    np.testing.assert_allclose(features / np.linalg.norm(features), unit, atol=1e-5)


def test_torchvision_gives_what_its_last_linear_layer_is_given() -> None:
    from torchvision import models

    frozen = load_frozen("torchvision", "resnet18", seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = models.resnet18().eval()
    pixels = frozen.resize(picture())
    assert pixels.shape == (224, 224, 3)
    features = frozen.embed(pixels[None])
    expected = models.ResNet18_Weights.DEFAULT.transforms()(picture())
    network.fc = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        want = network(expected[None]).numpy()
    # The preset resizes a tensor, ours an image: the same up to rounding to whole pixels.
    np.testing.assert_allclose(features, want, rtol=0.1, atol=0.05)


def test_timm_gives_its_pooled_features() -> None:
    import timm

    frozen = load_frozen("timm", "test_resnet", seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = timm.create_model("test_resnet", num_classes=0).eval()
    pixels = frozen.resize(picture())
    features = frozen.embed(np.stack([pixels, pixels]))
    assert features.shape == (2, network.num_features) and np.array_equal(features[0], features[1])


def test_grey_and_transparent_images_are_made_rgb() -> None:
    for library, model in (("torchvision", "resnet18"), ("timm", "test_resnet")):
        resize = load_frozen(library, model).resize
        assert resize(Image.new("L", (30, 40))).shape[2] == 3 and resize(Image.new("RGBA", (30, 40))).shape[2] == 3


def test_a_tflite_file_gives_its_dequantised_output(real_data: Path) -> None:
    frozen = load_frozen("tflite", str(real_data / TFLITE))
    pixels = frozen.resize(picture())
    assert pixels.shape == (224, 224, 3)
    features = frozen.embed(np.stack([pixels, np.zeros_like(pixels)]))
    assert features.shape == (2, 1024) and (features >= 0).all() and (features[0] != features[1]).any()
    # uint8 times the file's scale.
    steps = features / np.float32(0.023528477177023888)
    np.testing.assert_allclose(steps, steps.round(), atol=1e-2)


def test_the_digest_moves_with_all_that_decides_the_features(real_data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.tflite"
    copy.write_bytes((real_data / TFLITE).read_bytes())
    assert frozen_digest("tflite", str(copy)) == frozen_digest("tflite", str(real_data / TFLITE))
    copy.write_bytes(copy.read_bytes() + b"\0")
    digests = {
        frozen_digest("tflite", str(copy)),
        frozen_digest("tflite", str(real_data / TFLITE)),
        frozen_digest("timm", "test_resnet"),
        frozen_digest("timm", "test_resnet", seed=1),
        frozen_digest("timm", "test_resnet", pretrained="a1_in1k"),
        frozen_digest("open_clip", "nano"),
        frozen_digest("open_clip", "nano", seed=1),
    }
    assert len(digests) == 7


@pytest.mark.parametrize(
    ("library", "model", "given", "message"),
    [
        ("keras", "x", {}, "library must be one of"),
        ("timm", "no_such_model", {}, "timm has no model 'no_such_model'"),
        ("torchvision", "no_such_model", {}, "torchvision has no model"),
        ("torchvision", "resnet18", {"pretrained": "NO_TAG"}, "has no weights 'NO_TAG'"),
        ("timm", "test_resnet", {"pretrained": "a", "checkpoint": "b"}, "give pretrained or checkpoint"),
        ("timm", "test_resnet", {"checkpoint": "nowhere.pt"}, "is not a file"),
        ("tflite", "nowhere.tflite", {}, "is not a file"),
        ("tflite", "x.tflite", {"checkpoint": "y"}, "a tflite file holds its weights"),
    ],
)
def test_what_is_unknown_or_does_not_fit_is_refused(library: str, model: str, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_frozen(library, model, **given)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.pt"
    torch.save({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="does not hold weights of this network"):
        load_frozen("torchvision", "resnet18", checkpoint=str(file))
    file.write_bytes(b"no state dict")
    with pytest.raises(ValueError, match="does not hold weights of this network"):
        load_frozen("timm", "test_resnet", checkpoint=str(file))


def test_resnet20_gives_what_its_head_classifies_cifar_by(real_data: Path) -> None:
    checkpoint = real_data / "weights" / "resnet20-12fca82f.th"
    frozen = load_frozen("cifar", "resnet20", checkpoint=str(checkpoint))
    table = pq.read_table(real_data / "cifar" / "cifar10-lossless.parquet", columns=["split", "image", "label"])
    test = table.filter(pc.field("split") == "test").slice(0, 300)
    pixels = np.stack([frozen.resize(Image.open(io.BytesIO(image))) for image in test["image"].to_pylist()])
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    head = state["module.linear.weight"].numpy(), state["module.linear.bias"].numpy()
    predicted = (frozen.embed(pixels) @ head[0].T + head[1]).argmax(axis=1)
    assert (predicted == test["label"].to_numpy()).mean() > 0.88  # 91.6% on all 1,017
