"""The towers against open_clip itself: same pixels bit for bit, same weights, and nothing loaded by mistake."""

from __future__ import annotations

import logging
import random
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import cast

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from curation.models import registry
from curation.models.clip import (
    ClipNetwork,
    Towers,
    build_network,
    load_tokenizer,
    load_towers,
    resolve_device,
    save_checkpoint,
)
from curation.models.registry import weights_digest
from curation.models.resize import FastResize, Resize, load_resize

SIZES = [(64, 64), (130, 50), (51, 300), (1, 1), (3, 500), (48, 48), (49, 47)]
MODES = ["RGB", "L", "P", "RGBA", "1", "LA", "CMYK"]
PREPROCESSES = [
    PreprocessCfg(size=(48, 48)),
    PreprocessCfg(size=(48, 48), resize_mode="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    PreprocessCfg(size=(48, 48), resize_mode="longest", interpolation="bilinear", fill_color=7),
    PreprocessCfg(size=(48, 32)),
]


@pytest.fixture(scope="module")
def towers() -> Towers:
    return load_towers("nano", seed=3)


def images() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (500, 300, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise, "RGBA")
    made = []
    for width, height in SIZES:
        for mode in MODES:
            image = rgba.crop((0, 0, min(width, 300), height)).resize((width, height))
            made.append((image if mode == "RGBA" else image.convert("RGB")).convert(mode))
    return made


def pixels_of(towers: Towers, *, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, *towers.image_size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("preprocess", PREPROCESSES, ids=["shortest", "squash", "longest", "not square"])
def test_resize_then_batched_normalise_equals_the_transform_bit_for_bit(preprocess: PreprocessCfg) -> None:
    network, transform = ClipNetwork(torch.nn.Identity(), preprocess), image_transform_v2(preprocess, is_train=False)
    resize = Resize(preprocess)
    # open_clip itself refuses what "longest" would make narrower than a pixel.
    inputs = [image for image in images() if preprocess.resize_mode != "longest" or image.height < 100 * image.width]
    halves = [resize(image) for image in inputs]
    assert all(half.dtype == np.uint8 and half.shape == (*resize.image_size, 3) for half in halves)
    expected = torch.stack([transform(image) for image in inputs])  # type: ignore[operator]
    assert torch.equal(network.normalise(torch.from_numpy(np.stack(halves))), expected)


def test_the_towers_see_and_embed_what_the_model_itself_would(towers: Towers) -> None:
    made, _, transform = open_clip.create_model_and_transforms("nano")
    model = cast(open_clip.CLIP, made)
    model.load_state_dict(towers.network.clip.state_dict())
    model.eval()
    pixels = torch.from_numpy(np.stack([towers.resize(image) for image in images()]))
    inputs = torch.stack([transform(image) for image in images()])  # type: ignore[operator]
    assert torch.equal(towers.network.normalise(pixels), inputs)
    captions = ["two red circles", "", "a very long caption " * 30, "Ünïcode 漢字"]
    tokens = open_clip.get_tokenizer("nano")(captions)
    assert torch.equal(towers.tokenize(captions), tokens)
    with torch.inference_mode():
        torch.testing.assert_close(towers.embed_images(pixels), model.encode_image(inputs, normalize=True))
        torch.testing.assert_close(towers.embed_texts(tokens), model.encode_text(tokens, normalize=True))
    assert towers.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert towers.logit_bias == pytest.approx(cast(torch.Tensor, model.logit_bias).item())


def test_embeddings_are_float32_of_unit_norm_and_do_not_depend_on_the_batch(towers: Towers) -> None:
    pixels = pixels_of(towers, n=5)
    embedded = towers.embed_images(pixels)
    assert embedded.shape == (5, towers.embedding_dim) and embedded.dtype == torch.float32
    assert not embedded.requires_grad and not towers.network.training
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(torch.cat([towers.embed_images(row) for row in pixels.split(1)]), embedded)


def test_no_rows_give_no_embeddings(towers: Towers) -> None:
    assert towers.embed_images(pixels_of(towers, n=0)).shape == (0, towers.embedding_dim)
    assert towers.embed_texts(towers.tokenize([])).shape == (0, towers.embedding_dim)


def test_pixels_and_tokens_of_another_form_are_refused(towers: Towers) -> None:
    size = towers.image_size[0]
    with pytest.raises(ValueError, match=rf"uint8 \(n, {size}, {size}, 3\), got float32 \(1, {size}, {size}, 3\)"):
        towers.embed_images(pixels_of(towers, n=1).float())
    with pytest.raises(ValueError, match=r"got uint8 \(1, 3, "):
        towers.embed_images(pixels_of(towers, n=1).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"tokens must be int64 .* got int64 \(2, 3\)"):
        towers.embed_texts(torch.zeros(2, 3, dtype=torch.int64))


def test_the_resize_alone_is_the_towers_resize_and_travels_between_processes(towers: Towers) -> None:
    resize, image = load_resize("nano"), images()[8]
    assert resize.image_size == towers.image_size
    assert np.array_equal(resize(image), towers.resize(image))
    assert len(ForkingPickler.dumps(resize)) < 10_000


@pytest.mark.parametrize("preprocess", PREPROCESSES[:2], ids=["shortest", "squash"])
@pytest.mark.parametrize("size", [(64, 64), (131, 50), (51, 301), (48, 48), (20, 31), (97, 96)])
def test_the_fast_resize_of_an_unscaled_image_is_the_exact_one_but_for_rounding(
    preprocess: PreprocessCfg, size: tuple[int, int]
) -> None:
    # No black and white: where a filter overshoots, what comes out depends on which axis is resized first.
    image = Image.fromarray(np.random.default_rng(1).integers(80, 176, (size[1], size[0], 3), dtype=np.uint8))
    exact = Resize(preprocess)(image)
    fast = FastResize(preprocess)(np.array(image), height=size[1], width=size[0])
    assert fast.shape == exact.shape and fast.dtype == np.uint8
    difference = np.abs(fast.astype(int) - exact.astype(int))
    assert difference.max() <= 2 and difference.mean() < 0.5


def test_the_fast_resize_crops_by_the_size_as_stored_not_by_what_the_scaled_decoding_rounded_it_to() -> None:
    # 101 x 997 at 1/2 is 51 x 499: that shape alone would give 469 rows, and the centre one row off.
    tall = np.zeros((499, 51, 3), np.uint8)
    resize = FastResize(PREPROCESSES[0])
    assert resize._whole_size(997, 101) == (int(48 * 997 / 101), 48) == (473, 48)
    assert resize(tall, height=997, width=101).shape == (48, 48, 3)


@pytest.mark.parametrize("preprocess", PREPROCESSES[2:], ids=["longest", "not square"])
def test_a_transform_that_the_fast_resize_does_not_know_is_refused(preprocess: PreprocessCfg) -> None:
    with pytest.raises(ValueError, match="resize 'fast' knows transforms that squash, or crop to a square"):
        FastResize(preprocess)


def test_a_tag_brings_its_own_transform_at_the_size_of_the_architecture() -> None:
    halves = Image.new("RGB", (400, 200), "black")
    halves.paste("white", (300, 0, 400, 200))
    cropped, squashed = load_resize("ViT-B-32")(halves), load_resize("ViT-B-16-SigLIP", pretrained="webli")(halves)
    assert cropped.shape == squashed.shape == (224, 224, 3)
    assert cropped[:, -1].max() < 30 and squashed[:, -1].min() > 225


def test_random_weights_depend_on_the_seed_alone_and_touch_no_global_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    first = build_network("nano", seed=5).state_dict()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # type: ignore[index,arg-type] # noqa: NPY002
    torch.manual_seed(2)
    again, other = build_network("nano", seed=5).state_dict(), build_network("nano", seed=6).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["clip.token_embedding.weight"], other["clip.token_embedding.weight"])


def test_a_saved_checkpoint_gives_the_same_embeddings_here_and_in_open_clip(towers: Towers, tmp_path: Path) -> None:
    path = tmp_path / "reference.pt"
    save_checkpoint(towers.network, path)
    assert [file.name for file in tmp_path.iterdir()] == ["reference.pt"]
    loaded = load_towers("nano", checkpoint=str(path), seed=99)
    pixels = pixels_of(towers, n=3)
    assert torch.equal(loaded.embed_images(pixels), towers.embed_images(pixels))
    model = open_clip.create_model("nano", pretrained=str(path))
    own = towers.network.clip.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_that_is_missing_misfit_or_no_weights_is_refused(towers: Towers, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.pt' is not a file"):
        load_towers("nano", checkpoint=str(tmp_path / "nowhere.pt"))
    text, misfit = tmp_path / "text.pt", tmp_path / "misfit.pt"
    text.write_text("no weights")
    with pytest.raises(ValueError, match=r"text.pt does not hold weights of nano"):
        load_towers("nano", checkpoint=str(text))
    weights = towers.network.clip.state_dict()
    torch.save({key: value for key, value in weights.items() if key != "ln_final.weight"}, misfit)
    with pytest.raises(ValueError, match=r"misfit.pt does not hold weights of nano: .*ln_final.weight"):
        load_towers("nano", checkpoint=str(misfit))


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "bomb.pt", tmp_path / "ran"
    torch.save({"state_dict": _Bomb(proof)}, path)
    with pytest.raises(ValueError, match="bomb.pt does not hold weights"):
        load_towers("nano", checkpoint=str(path))
    assert not proof.exists()


def test_unknown_names_and_tags_are_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'nano'"):
        load_towers("nanoo")
    with pytest.raises(ValueError, match="did you mean 'ViT-B-32'"):
        load_tokenizer("ViT-B32")
    with pytest.raises(ValueError, match="'ViT-B-32' has no pretrained tag 'opennai'; did you mean 'openai'"):
        load_towers("ViT-B-32", pretrained="opennai")
    with pytest.raises(ValueError, match="a pretrained tag or a checkpoint"):
        load_towers("ViT-B-32", pretrained="openai", checkpoint="x.pt")


def test_the_device_is_what_was_asked_for_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="'cuda' was asked for, this machine has 0 CUDA devices"):
        load_towers("nano", device="cuda")
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'tpu'"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert (resolve_device("auto"), resolve_device("cuda:0")) == ("cuda", "cuda:0")
    with pytest.raises(ValueError, match="'cuda:1' was asked for"):
        resolve_device("cuda:1")


def test_a_cpu_computes_in_float32_and_says_so(towers: Towers) -> None:
    asked = load_towers("nano", seed=3, precision="bfloat16")
    assert asked.precision == "float32"
    pixels = pixels_of(towers, n=2)
    assert torch.equal(asked.embed_images(pixels), towers.embed_images(pixels))
    with pytest.raises(ValueError, match="precision must be 'float32' or 'bfloat16', got 'float16'"):
        load_towers("nano", precision="float16")  # type: ignore[arg-type]


def test_the_digest_changes_with_whatever_could_change_an_embedding_and_builds_nothing(
    towers: Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "reference.pt"
    save_checkpoint(towers.network, path)
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("built a model"))
    digest = weights_digest("nano", checkpoint=str(path))
    assert len(digest) == 64 and digest == weights_digest("nano", checkpoint=str(path), seed=1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    digests = {digest, weights_digest("nano", checkpoint=str(path)), weights_digest("ViT-B-32")}
    digests |= {weights_digest("nano", seed=0), weights_digest("nano", seed=1)}
    assert len(digests) == 5
    before = weights_digest("nano", seed=0)
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert weights_digest("nano", seed=0) != before


def test_the_digest_of_a_tag_is_that_of_the_file_it_resolves_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "downloaded.pt"
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(path))
    path.write_bytes(b"one")
    one = weights_digest("ViT-B-32", pretrained="openai")
    assert one != weights_digest("ViT-B-32-quickgelu", pretrained="openai")
    path.write_bytes(b"two")
    assert weights_digest("ViT-B-32", pretrained="openai") != one


def test_ours_is_registered_once_from_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[Path] = []
    original = open_clip.add_model_config
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"ViT-B-32": {}})
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip, "add_model_config", lambda path: (added.append(path), original(path)))
    failures: list[BaseException] = []

    def load() -> None:
        try:
            load_resize("nano")
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and added == [registry.CONFIGS]


def test_loading_installs_no_log_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    build_network("nano")
    assert logging.getLogger().handlers == []


def test_an_image_too_narrow_for_the_transform_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="height and width must be > 0"):
        Resize(PREPROCESSES[2])(Image.new("RGB", (3, 500)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_bfloat16_on_a_gpu_is_close_to_float32_on_the_cpu(towers: Towers) -> None:
    on_gpu = load_towers("nano", seed=3, precision="bfloat16", device="cuda")
    assert on_gpu.precision == "bfloat16"
    pixels = pixels_of(towers, n=16)
    embedded = on_gpu.embed_images(pixels)
    assert embedded.dtype == torch.float32 and embedded.device.type == "cuda"
    assert (embedded.cpu() * towers.embed_images(pixels)).sum(dim=1).min() > 0.999
