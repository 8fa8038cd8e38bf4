"""A pool whose junk is known, for Alchemist's study: CIFAR-10 with plain, chaotic and doubled images among its own.

The specification's test bed (its Sec. 7) at a twenty-fifth of its size, for two busy cores: 1,200 real images, 400
plain ones (a flat or graded ground with one small object, or a real image blurred until little is left), 400 chaotic
ones (4 x 4 mosaics of patches of sixteen images, or noise of sigma 0.3), and 80 near-duplicates (cropped by up to 6% a
side, brightened or darkened). Beside it a validation set of 600 from the same mixture, and one of 600 real images. A
rater sees features of a small MobileNet v1, the proxy 32 x 32 pixels, and subsets are judged by ResNet-20's. Seeds
share no image but those of the test set.

Figures compare with nobody's: the images are JPEG copies, and the reference is 1,000 images of the test split.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

from curation.models.frozen import load_frozen
from curation.numerics.picture import edge_density
from jobs.benchmarks.real_data import RESNET20, real_data
from jobs.benchmarks.straw_men import AESTHETIC, CLARITY, measured
from jobs.demo_scenes import make_pairs

REAL, PLAIN, CHAOTIC, NEAR = "real", "plain", "chaotic", "near_duplicate"
KINDS = (REAL, PLAIN, CHAOTIC, NEAR)
SIDE = 32
Source = Literal["real", "mixed", "rendered"]
ALCHEMIST_SCENES = 7
"""Seed of the rendered scenes: not the demo's own."""
SMALL_MOBILENET = Path("weights") / "mobilenet_v1_0.25_128_quant.tflite"
BLUR_RADIUS, NOISE_SIGMA = 5.0, 0.3


class Sizes(NamedTuple):
    """Rows of each kind in the pool, of the validation sets, and of the test set."""

    pool: tuple[int, int, int, int]
    validation: tuple[int, int, int, int]
    real_validation: int
    test: int


FULL = Sizes((1_200, 400, 400, 80), (346, 115, 115, 24), 600, 1_000)
TINY = Sizes((120, 40, 40, 8), (36, 12, 12, 4), 32, 64)


FACTS = ("png_bytes", "edge_density", "luminance", CLARITY, AESTHETIC)
"""Numbers of an image alone. The last two are straw men; the third, `match`, wants captions, which are not here."""


class Part(NamedTuple):
    """n images: what the rater sees (n, F), what the proxy sees (n, G), what judges see (n, H), each image's kind (n,),
    and its FACTS (n, 5). A rater sees the pool alone, judges also the test set: elsewhere these are (0, 0)."""

    seen: np.ndarray
    pixels: np.ndarray
    judged: np.ndarray
    kind: np.ndarray
    facts: np.ndarray


class Study(NamedTuple):
    """One seed's images; no image is in two parts, but copies are of images of their own part."""

    pool: Part
    validation: Part
    real_validation: Part
    test: Part


def study_of(seed: int, folder: Path, *, tiny: bool = False, source: Source = "real") -> Study:
    """The images of one seed; their features are kept in the folder and not made again."""
    size = TINY if tiny else FULL
    of_each = sum((size.pool[0], size.validation[0], size.real_validation))
    train = _encoded("train", seed * of_each, of_each, source)
    ends = np.cumsum([size.pool[0], size.validation[0], size.real_validation])
    parts = {
        "pool": (train[: ends[0]], size.pool),
        "validation": (train[ends[0] : ends[1]], size.validation),
        "real_validation": (train[ends[1] :], (size.real_validation, 0, 0, 0)),
        "test": (_encoded("test", 0, size.test, source), (size.test, 0, 0, 0)),
    }
    made = {}
    for place, (name, (encoded, counts)) in enumerate(parts.items()):
        of_seed = "" if name == "test" else f"{seed}-"
        of_source = "" if source == "real" else f"{source}-"
        path = folder / f"{'tiny-' if tiny else ''}{of_source}{of_seed}{name}.npz"
        rng = np.random.default_rng([seed, place])
        is_seen, is_judged = name == "pool", name in ("pool", "test")
        made[name] = _featured(path, encoded, counts, rng=rng, is_seen=is_seen, is_judged=is_judged)
    return Study(**made)


def images_of(
    encoded: list[bytes], counts: tuple[int, int, int, int], rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Images (32, 32, 3) uint8: all real ones, then plain, chaotic and near-duplicate ones made of them."""
    real = np.stack([np.asarray(_small(Image.open(io.BytesIO(image)).convert("RGB"))) for image in encoded])
    yield from real
    for number in range(counts[1]):
        yield _object_on_ground(rng) if number % 2 else _blurred(real[rng.integers(len(real))])
    for number in range(counts[2]):
        yield _mosaic(real, rng) if number % 2 else _noisy(real[rng.integers(len(real))], rng)
    for original in rng.choice(len(real), counts[3], replace=False):
        yield _near(real[original], rng)


def _small(image: Image.Image) -> Image.Image:
    return image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _encoded(split: str, first: int, count: int, source: Source) -> list[bytes]:
    """Images without junk: CIFAR-10's, the demo's rendered scenes, or every second one of each."""
    if source == "rendered":
        scenes = make_pairs(first + count, stream="pool" if split == "train" else "held_out", seed=ALCHEMIST_SCENES)
        return [scene.image for scene in islice(scenes, first, None)]
    if source == "mixed":
        photos = _encoded(split, first // 2, count - count // 2, "real")
        scenes = _encoded(split, first // 2, count // 2, "rendered")
        return [image for pair in zip_longest(photos, scenes) for image in pair if image is not None]
    table = pq.read_table(real_data() / "cifar" / f"cifar10-{split}-jpeg.parquet", columns=["image"])
    if first + count > len(table):
        raise ValueError(f"{split} has {len(table)} images, {first + count} are wanted: fewer seeds, please")
    return table["image"].slice(first, count).to_pylist()


def _featured(
    path: Path,
    encoded: list[bytes],
    counts: tuple[int, int, int, int],
    *,
    rng: np.random.Generator,
    is_seen: bool,
    is_judged: bool,
) -> Part:
    if not path.exists():
        seen, pixels = small_mobilenet(), load_frozen("pixels", str(SIDE))
        judged = load_frozen("cifar", "resnet20", checkpoint=str(real_data() / RESNET20))
        images = np.stack(list(images_of(encoded, counts, rng)))
        opened = [Image.fromarray(image) for image in images]
        part = Part(
            seen=_of_each(seen, opened if is_seen else []),
            pixels=pixels.embed(images).astype(np.float16),
            judged=_of_each(judged.embed, np.array_split(images, -(-len(images) // 256)) if is_judged else []),
            kind=np.repeat(KINDS, counts),
            facts=np.array([_facts(image) for image in opened]),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path.with_suffix(".partial.npz"), **part._asdict())
        os.replace(path.with_suffix(".partial.npz"), path)
    with np.load(path, allow_pickle=False) as held:
        return Part(**{name: held[name] for name in Part._fields})


def small_mobilenet() -> Callable[[Image.Image], np.ndarray]:
    """The pooled features of MobileNet v1 at a quarter of its width, (1, 256): 0.7 ms an image, the larger one takes 7.

    The file ends in a classifier, so they are read from inside it.
    """
    from ai_edge_litert.interpreter import Interpreter  # an extra: few runs need it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that inner tensors are for debugging: they cost memory, here little
        interpreter = Interpreter(
            str(real_data() / SMALL_MOBILENET), num_threads=1, experimental_preserve_all_tensors=True
        )
    interpreter.allocate_tensors()
    [taken] = interpreter.get_input_details()
    [pooled] = [t for t in interpreter.get_tensor_details() if list(t["shape"]) == [1, 1, 1, 256]]

    def embed(image: Image.Image) -> np.ndarray:
        side = int(taken["shape"][1])
        interpreter.set_tensor(taken["index"], np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))[None])
        interpreter.invoke()
        return interpreter.get_tensor(pooled["index"]).reshape(1, -1).astype(np.float32) * pooled["quantization"][0]

    return embed


def _of_each(embed: Callable[[Any], np.ndarray], batches: Sequence[Any]) -> np.ndarray:
    """What `embed` makes of each batch, in a row; (0, 0) of none."""
    return np.concatenate([embed(batch) for batch in batches]) if len(batches) else np.zeros((0, 0), np.float32)


def _facts(image: Image.Image) -> tuple[float, ...]:
    """FACTS of an RGB image."""
    return (
        _png_bytes(image),
        edge_density(np.asarray(image.convert("L"))),
        float(np.asarray(image).mean() / 255),
        *measured(image),
    )


def _png_bytes(image: Image.Image) -> int:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.tell()


def _object_on_ground(rng: np.random.Generator) -> np.ndarray:
    """A flat or graded ground with one small rectangle or ellipse."""
    start, stop = rng.integers(0, 256, (2, 3))
    stop = start if rng.random() < 0.5 else stop
    ramp = np.linspace(0, 1, SIDE)[:, None, None]
    ground = (start * (1 - ramp) + stop * ramp).repeat(SIDE, 1)
    image = Image.fromarray((ground if rng.random() < 0.5 else ground.swapaxes(0, 1)).astype(np.uint8))
    side, (left, top) = int(rng.integers(3, 9)), rng.integers(0, SIDE - 9, 2).tolist()
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    shape((left, top, left + side, top + side), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return np.asarray(image)


def _blurred(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR_RADIUS)))


def _mosaic(real: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sixteen patches of as many images, each from its own place."""
    tile = SIDE // 4
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    for row in range(4):
        for column in range(4):
            top, left = rng.integers(0, SIDE - tile + 1, 2)
            patch = real[rng.integers(len(real))][top : top + tile, left : left + tile]
            image[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile] = patch
    return image


def _noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + 255 * NOISE_SIGMA * rng.standard_normal(image.shape), 0, 255).astype(np.uint8)


def _near(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cut = 0.06 * SIDE * rng.random(4)
    box = (cut[0], cut[1], SIDE - cut[2], SIDE - cut[3])
    cropped = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box), np.float32)
    return np.clip(cropped * rng.uniform(0.8, 1.2), 0, 255).astype(np.uint8)
