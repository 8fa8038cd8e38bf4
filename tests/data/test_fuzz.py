"""Hostile bytes at the door: tars and images that were valid once, damaged at random. A short look in each test run;
CURATION_FUZZ_MINUTES=10 python -m pytest tests/data/test_fuzz.py for a long one.

Whatever comes, a tar's samples are rows with a reason, an image decodes or is refused, in little time and memory. The
input under way lies in `last.bin` of the test's folder, so one that kills the process is found there.
"""

from __future__ import annotations

import io
import os
import resource
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from curation.data.drop_reasons import DROP_REASONS, WARNINGS
from curation.data.images import FORMATS, ImageError, fast_pixels, pixels
from curation.data.read_rules import ReadRules
from curation.data.shards import ShardReader
from curation.models.resize import FastResize, Resize, load_resize

MINUTES = float(os.environ.get("CURATION_FUZZ_MINUTES", "0"))
EXAMPLES = 10_000 if MINUTES else 25
MAX_PIXELS = 1 << 20
MAX_SECONDS = 20.0
"""A single input; a damaged one of this size takes milliseconds, on a loaded machine more."""
MAX_GROWTH = 1 << 30
"""Bytes by which the process may grow over all inputs: a cap that fails grows it by gigabytes at once."""
INTERESTING = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0",
    b"\x80" + bytes(7),
)

Attack = Callable[[bytes], None]


def picture(image_format: str, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, image_format, **options)
    return out.getvalue()


def images() -> dict[str, bytes]:
    """A few hundred bytes of each format that Pillow can write, and of the variants that other code decodes."""
    modes = {"GIF": "P", "XBM": "1", "BLP": "P"}
    seeds = {}
    for name in FORMATS:
        if name in Image.SAVE and name not in ("CUR", "PSD", "QOI", "SUN", "XPM"):
            seeds[name] = picture(name, modes.get(name, "RGB"))
    return seeds | {
        "JPEG progressive": picture("JPEG", progressive=True),
        "JPEG CMYK": picture("JPEG", "CMYK"),
        "PNG palette": picture("PNG", "P"),
        "TIFF deflate": picture("TIFF", compression="tiff_deflate"),
        "WEBP lossless": picture("WEBP", "RGBA", lossless=True),
    }


def tars() -> dict[str, bytes]:
    """A small shard in each format of a tar, with long names and members of no sample."""
    seeds = {}
    for name, tar_format in (("ustar", tarfile.USTAR_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
            for stem in ("a/00", "ä" * 30 + "/01", "x" * 90 + "/02"):
                for extension, data in (("jpg", b"\xff\xd8\xff"), ("json", b'{"uid": 3, "k": [1]}'), ("txt", b"words")):
                    header = tarfile.TarInfo(f"{stem}.{extension}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
        seeds[name] = out.getvalue()
    return seeds


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds, changed in a few places: bytes set, cut out, doubled, or taken from another seed."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(("set", "set", "set", "cut", "double", "splice", "end")))
        length = draw(st.integers(1, 600))
        if how == "set":
            new = draw(st.one_of(st.sampled_from(INTERESTING), st.binary(min_size=1, max_size=4)))
            data[at : at + len(new)] = new
        elif how == "cut":
            del data[at : at + length]
        elif how == "double":
            data[at:at] = data[at : at + length]
        elif how == "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, max(0, len(other) - 1)))
            data[at : at + length] = other[start : start + length]
        else:
            del data[at:]
    return bytes(data)


SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def besiege(attack: Attack, seeds: list[bytes], folder: Path) -> int:
    """Attack with damaged seeds: EXAMPLES of them, or for MINUTES; how many it was."""
    count = [0]
    last = folder / "last.bin"

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=SUPPRESSED)
    @given(damaged(seeds))
    def attacked(data: bytes) -> None:
        count[0] += 1
        last.write_bytes(data)
        begun = time.thread_time()
        attack(data)
        assert time.thread_time() - begun < MAX_SECONDS

    until = time.monotonic() + 60 * MINUTES / 3
    attacked()
    while time.monotonic() < until:
        attacked()
    print(f"{count[0]} inputs")
    return count[0]


@pytest.fixture(autouse=True)
def no_growth() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_GROWTH


@pytest.fixture(scope="module")
def resize() -> Resize:
    return load_resize("nano")


def test_a_damaged_image_decodes_or_is_refused(resize: Resize, tmp_path: Path) -> None:
    def attack(data: bytes) -> None:
        try:
            decoded = pixels(data, max_pixels=MAX_PIXELS, resize=resize)
        except ImageError as error:
            assert error.reason in DROP_REASONS
        else:
            assert decoded.pixels.shape == (*resize.image_size, 3) and decoded.width * decoded.height <= MAX_PIXELS

    seeds = list(images().values())
    for seed in seeds:
        attack(seed)
    assert besiege(attack, seeds, tmp_path) >= EXAMPLES


def test_a_damaged_jpeg_decodes_or_is_refused_the_fast_way(resize: Resize, tmp_path: Path) -> None:
    fast = FastResize(resize.preprocess)

    def attack(data: bytes) -> None:
        try:
            decoded = fast_pixels(data, max_pixels=MAX_PIXELS, fast=fast, exact=resize)
        except ImageError as error:
            assert error.reason in DROP_REASONS
        else:
            assert decoded.pixels.shape == (*resize.image_size, 3)

    seeds = [picture("JPEG"), picture("JPEG", progressive=True), picture("JPEG", "L"), picture("JPEG", quality=100)]
    assert besiege(attack, seeds, tmp_path) >= EXAMPLES


def test_every_row_of_a_damaged_tar_is_whole_or_has_a_reason(tmp_path: Path) -> None:
    rules = ReadRules()

    def attack(data: bytes) -> None:
        reader = ShardReader(io.BytesIO(data), url="pool/00000.tar", rules=rules)
        rows = list(reader)
        assert reader.num_bytes == len(data) and len(rows) <= len(data) // 512 + 1
        assert [row.row for row in rows] == list(range(len(rows)))
        for row in rows:
            assert row.reason in DROP_REASONS if row.reason else row.image and row.caption is not None
            assert 0 <= row.offset <= len(data) and row.key.encode() and len(row.uid) == 32
        assert reader.warnings.keys() <= WARNINGS.keys()

    assert besiege(attack, list(tars().values()), tmp_path) >= EXAMPLES
