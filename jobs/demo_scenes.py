"""Rendered scenes and captions that describe them: the clean pairs of the demo, and the stuff its pool is made of.

FROZEN, with `demo_pool`: changing what this draws, in any way, invalidates every race that was published on the pool.

A scene is one or two groups of shapes (each with count, size, texture, colour, shape), a relation between them and a
background; there are about 10^9. It is rendered to an image of 64 to 96 px a side, with noise, and described in one of
many ways. Everything is drawn from (stream, seed, index) alone: the same numbers for any number of workers, given the
pinned versions of numpy and Pillow. Pool, reference and held-out pairs are different streams: no seed makes them meet.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, cast, get_args

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

T = TypeVar("T")
RGB = tuple[int, int, int]
Stream = Literal["pool", "reference", "held_out", "plan", "damage"]
STREAMS: tuple[Stream, ...] = get_args(Stream)

COLOURS: dict[str, RGB] = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 150, 50),
    "cyan": (40, 200, 210),
    "blue": (40, 70, 210),
    "purple": (130, 50, 170),
    "pink": (250, 130, 180),
    "brown": (125, 80, 45),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
    "gray": (130, 130, 130),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (240, 240, 240),
    "black": (25, 25, 25),
    "gray": (150, 150, 150),
    "pale blue": (185, 210, 240),
    "pale green": (195, 235, 195),
    "pale pink": (245, 210, 220),
    "beige": (225, 210, 175),
    "dark blue": (20, 30, 85),
    "dark green": (15, 65, 35),
    "dark red": (90, 15, 25),
}
BACKGROUND_TEXTURES = ("", "", "", "gradient", "striped", "checkered")
# Corners in a unit square centred on 0, before rotation; the three round shapes are drawn, not listed.
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "ring": (),
    "crescent": (),
    "square": ((-0.44, -0.44), (0.44, -0.44), (0.44, 0.44), (-0.44, 0.44)),
    "triangle": ((0.0, -0.5), (0.5, 0.42), (-0.5, 0.42)),
    "diamond": ((0.0, -0.5), (0.32, 0.0), (0.0, 0.5), (-0.32, 0.0)),
    "star": tuple(
        (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
        for k, r in zip(range(10), (0.5, 0.2) * 5, strict=True)
    ),
    "heart": tuple(
        (0.5 * math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 32)
        for a in (k * math.pi / 15 for k in range(30))
    ),
    "cross": (
        *((-0.16, -0.5), (0.16, -0.5), (0.16, -0.16), (0.5, -0.16), (0.5, 0.16), (0.16, 0.16)),
        *((0.16, 0.5), (-0.16, 0.5), (-0.16, 0.16), (-0.5, 0.16), (-0.5, -0.16), (-0.16, -0.16)),
    ),
    "arrow": ((-0.5, -0.14), (0.05, -0.14), (0.05, -0.42), (0.5, 0.0), (0.05, 0.42), (0.05, 0.14), (-0.5, 0.14)),
    "hexagon": tuple((0.5 * math.cos(k * math.pi / 3), 0.5 * math.sin(k * math.pi / 3)) for k in range(6)),
    "bolt": ((0.1, -0.5), (-0.34, 0.1), (-0.04, 0.1), (-0.14, 0.5), (0.34, -0.12), (0.04, -0.12), (0.26, -0.5)),
}
DIAMETERS = {"small": 0.17, "": 0.27, "large": 0.42}  # of the image's short side
TEXTURES = ("", "", "", "striped", "dotted", "checkered")

COUNT_WORDS = {1: ("a", "a", "one"), 2: ("two", "two", "a pair of"), 3: ("three",), 4: ("four",)}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "": ("",), "large": ("large", "large", "big", "huge")}
TEXTURE_TAILS = {"striped": "with stripes", "dotted": "with dots", "checkered": "with a checkered pattern"}
# First group's place -> how to say it, and how to say it from the second group's side.
RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "above": (("above", "over", "on top of"), ("below", "under", "beneath")),
    "left": (("to the left of", "left of"), ("to the right of", "right of")),
    "inside": (("inside", "within", "in the middle of"), ("around", "surrounding")),
}
OPENINGS = ("{}", "{}", "{}", "a picture of {}", "an image of {}", "a drawing of {}", "there is {}", "we see {}")
BACKDROPS = ("{scene} on {ground}", "{scene} against {ground}", "{scene}, {ground} behind", "on {ground}, {scene}")
FRAMES = ("circle", "square", "ring", "hexagon", "heart", "diamond")  # shapes that another one fits into


@dataclass(frozen=True)
class Group:
    """Equal shapes side by side."""

    count: int
    size: str
    texture: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What an image shows and a caption says. `groups` are one or two; `relation` is "" for one."""

    groups: tuple[Group, ...]
    relation: str
    background: str
    background_texture: str


class Pair(NamedTuple):
    """A JPEG, a caption that describes it, and the first group's colour and shape as labels."""

    image: bytes
    caption: str
    colour: str
    shape: str


def make_pairs(n: int, *, stream: Stream = "reference", seed: int = 0) -> Iterator[Pair]:
    """`n` clean pairs, one by one: what the pool would be without junk. Streams never meet, whatever the seeds."""
    for index in range(n):
        rng = stream_rng(stream, seed, index)
        scene = draw_scene(rng)
        caption = describe(scene, rng)
        yield Pair(encode(render(scene, rng), rng), caption, scene.groups[0].colour, scene.groups[0].shape)


def stream_rng(stream: Stream, seed: int, index: int) -> Generator:
    """The generator of sample `index` of a stream."""
    return np.random.default_rng([STREAMS.index(stream), seed, index])


def draw_scene(rng: Generator) -> Scene:
    """A random scene whose colours can be told apart."""
    relation = pick(rng, ("", "above", "above", "left", "left", "inside"))
    groups = [_draw_group(rng, relation=relation, place=place) for place in range(2 if relation else 1)]
    while len(groups) == 2 and not _tells_apart(COLOURS[groups[0].colour], COLOURS[groups[1].colour]):
        groups[1] = _draw_group(rng, relation=relation, place=1)
    background = pick(rng, tuple(BACKGROUNDS))
    while not all(_tells_apart(COLOURS[group.colour], BACKGROUNDS[background]) for group in groups):
        background = pick(rng, tuple(BACKGROUNDS))
    return Scene(tuple(groups), relation, background, pick(rng, BACKGROUND_TEXTURES))


def describe(scene: Scene, rng: Generator) -> str:
    """One of the many captions of `scene`; the background may stay unsaid, nothing said is untrue."""
    phrases = [_noun_phrase(group, rng) for group in scene.groups]
    said = phrases[0]
    if scene.relation:
        forward, backward = RELATIONS[scene.relation]
        if rng.random() < 0.65:
            said = f"{phrases[0]} {pick(rng, forward)} {phrases[1]}"
        else:
            said = f"{phrases[1]} {pick(rng, backward)} {phrases[0]}"
    said = pick(rng, OPENINGS).format(said)
    if rng.random() < 0.6:
        texture = f"{scene.background_texture} " if scene.background_texture and rng.random() < 0.7 else ""
        said = pick(rng, BACKDROPS).format(scene=said, ground=f"a {texture}{scene.background} background")
    return said[0].upper() + said[1:] + "." if rng.random() < 0.3 else said


def render(scene: Scene, rng: Generator) -> Image.Image:
    """An RGB image, 64 to 96 px a side: anti-aliased shapes, jittered colours and places, sensor noise.

    All shapes lie in the middle square, so that a square crop of the short side loses none.
    """
    short = 64 + int(rng.random() * 17)
    long = short + int(rng.random() * 0.2 * short)
    width, height = (long, short) if rng.random() < 0.5 else (short, long)
    image = Image.fromarray(_background(scene, width=width, height=height, rng=rng))
    left, top, side = (width - short) / 2, (height - short) / 2, float(short)
    split = side * (0.42 + 0.16 * rng.random())
    areas = {
        "above": ((left, top, side, split), (left, top + split, side, side - split)),
        "left": ((left, top, split, side), (left + split, top, side - split, side)),
    }.get(scene.relation, ((left, top, side, side),) * 2)
    # Back to front: "inside" paints the second group first, almost as large as the image, and the first onto it.
    for place in reversed(range(len(scene.groups))):
        frame, inside = scene.relation == "inside" and place == 1, scene.relation == "inside" and place == 0
        diameter = short * (0.86 if frame else DIAMETERS[scene.groups[place].size]) * (0.9 + 0.2 * rng.random())
        _draw_into(image, scene.groups[place], areas[place], diameter=diameter, jitter=0.1 if inside else 0.8, rng=rng)
    return photograph(np.asarray(image), rng)


def pick(rng: Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _tells_apart(a: RGB, b: RGB) -> bool:
    return math.dist(a, b) > 90


def _draw_group(rng: Generator, *, relation: str, place: int) -> Group:
    """The first or second group (`place` 0, 1); "inside" puts a single, not large shape into a large frame."""
    count, size = pick(rng, (1, 1, 1, 2, 3, 4)), pick(rng, tuple(DIAMETERS))
    shape, colour = pick(rng, tuple(SHAPES)), pick(rng, tuple(COLOURS))
    texture = pick(rng, TEXTURES)
    if relation == "inside":
        count, size = 1, "large" if place == 1 else pick(rng, ("small", ""))
        shape = pick(rng, FRAMES) if place == 1 else shape
        texture = "" if place == 1 else texture
    if size == "large":
        count = min(count, 2)
    return Group(count, size, "" if size == "small" else texture, colour, shape)


def _noun_phrase(group: Group, rng: Generator) -> str:
    tail = bool(group.texture) and rng.random() < 0.4
    noun = group.shape if group.count == 1 else f"{group.shape}es" if group.shape == "cross" else f"{group.shape}s"
    adjectives = [pick(rng, SIZE_WORDS[group.size]), "" if tail else group.texture, group.colour]
    if rng.random() < 0.2:
        adjectives[0], adjectives[1] = adjectives[1], adjectives[0]
    words = [*filter(None, adjectives), noun, *([TEXTURE_TAILS[group.texture]] if tail else [])]
    count = pick(rng, COUNT_WORDS[group.count])
    return " ".join(["an" if count == "a" and words[0][0] in "aeiou" else count, *words])


def jittered(colour: RGB, rng: Generator) -> RGB:
    red, green, blue = (max(0, min(255, value + int(rng.random() * 31) - 15)) for value in colour)
    return red, green, blue


def _shaded(colour: RGB) -> RGB:
    """The second colour of a texture: the same hue, towards black if it is light and towards white if it is dark."""
    end = 0 if sum(colour) > 384 else 255
    red, green, blue = (int(value * 0.45 + end * 0.55) for value in colour)
    return red, green, blue


def texture_share(name: str, *, width: int, height: int, period: float, rng: Generator) -> NDArray[np.float32]:
    """How much of the second colour each pixel bears: (height, width) in [0, 1]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    if name == "gradient":
        return (y / height) if rng.random() < 0.5 else (x / width)
    if name == "striped":
        angle = math.pi * rng.random()
        return ((x * math.cos(angle) + y * math.sin(angle)) % period < period / 2).astype(np.float32)
    if name == "checkered":
        return ((x % period < period / 2) ^ (y % period < period / 2)).astype(np.float32)
    if name == "dotted":
        return ((x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (0.32 * period) ** 2).astype(
            np.float32
        )
    return np.zeros((height, width), dtype=np.float32)


def paint(first: RGB, second: RGB, share: NDArray[np.float32]) -> NDArray[np.uint8]:
    start, end = np.array(first, dtype=np.float32), np.array(second, dtype=np.float32)
    return (start + (end - start) * share[..., None]).astype(np.uint8)


def _background(scene: Scene, *, width: int, height: int, rng: Generator) -> NDArray[np.uint8]:
    first = jittered(BACKGROUNDS[scene.background], rng)
    end = 0 if sum(first) > 384 else 255
    second = tuple(int(value * 0.8 + end * 0.2) for value in first)
    share = texture_share(scene.background_texture, width=width, height=height, period=12 + 8 * rng.random(), rng=rng)
    return paint(first, cast(RGB, second), share)


def _draw_into(
    image: Image.Image,
    group: Group,
    area: tuple[float, float, float, float],
    *,
    diameter: float,
    jitter: float,
    rng: Generator,
) -> None:
    """The group's shapes on a grid in `area` (left, top, width, height), each moved within its cell."""
    left, top, width, height = area
    columns = group.count if width > 1.4 * height else 1 if height > 1.4 * width else math.ceil(math.sqrt(group.count))
    if group.count == 4:
        columns = 2
    rows = math.ceil(group.count / columns)
    cell_width, cell_height = width / columns, height / rows
    diameter = min(diameter, 0.96 * cell_width, 0.96 * cell_height)
    colour = jittered(COLOURS[group.colour], rng)
    for number in range(group.count):
        row, column = divmod(number, columns)
        x = left + (column + 0.5) * cell_width + (rng.random() - 0.5) * jitter * (cell_width - diameter)
        y = top + (row + 0.5) * cell_height + (rng.random() - 0.5) * jitter * (cell_height - diameter)
        share = texture_share(
            group.texture, width=(n := math.ceil(diameter) + 2), height=n, period=diameter / 3, rng=rng
        )
        mask = _mask(group.shape, diameter=diameter, rng=rng)
        image.paste(Image.fromarray(paint(colour, _shaded(colour), share)), (round(x - n / 2), round(y - n / 2)), mask)


def _mask(shape: str, *, diameter: float, rng: Generator) -> Image.Image:
    """Coverage of each pixel by one slightly rotated shape; drawn four times as large, then averaged."""
    side = 4 * (math.ceil(diameter) + 2)
    mask = Image.new("L", (side, side))
    draw, middle, radius = ImageDraw.Draw(mask), side / 2, 2 * diameter
    angle = (rng.random() - 0.5) * 0.4
    disc = (middle - radius, middle - radius, middle + radius, middle + radius)
    if SHAPES[shape]:
        cos, sin = 4 * diameter * math.cos(angle), 4 * diameter * math.sin(angle)
        draw.polygon([(middle + x * cos - y * sin, middle + x * sin + y * cos) for x, y in SHAPES[shape]], fill=255)
    elif shape == "ring":
        draw.ellipse(disc, outline=255, width=max(4, round(0.4 * radius)))
    else:
        draw.ellipse(disc, fill=255)
    if shape == "crescent":
        x, y = middle + 0.55 * radius * math.cos(angle), middle + 0.55 * radius * math.sin(angle)
        draw.ellipse((x - 0.8 * radius, y - 0.8 * radius, x + 0.8 * radius, y + 0.8 * radius), fill=0)
    return mask.reduce(4)


def photograph(pixels: NDArray[np.uint8], rng: Generator) -> Image.Image:
    """Contrast, brightness and sensor noise."""
    gain, shift, sigma = 0.85 + 0.3 * rng.random(), 24 * rng.random() - 12, 2 + 10 * rng.random()
    noisy = (pixels.astype(np.float32) - 128) * gain + 128 + shift
    noisy += sigma * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encode(image: Image.Image, rng: Generator) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70 + int(rng.random() * 25))
    return file.getvalue()
