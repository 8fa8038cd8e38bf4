"""`python -m jobs.benchmark decode`: `--resize fast` against Pillow and open_clip's transform, on one core.

The JPEGs are the demo's rendered scenes, enlarged to 512 px with a photograph's grain and saved at quality 90, 47 kB
each; DataComp's pool has 35 kB a sample at no more than 512 px. Both sides begin with the bytes and have one thread;
what counts is CPU time, so other work on the machine weighs little. Ours ends where a decode thread of ours ends, with
uint8 pixels, theirs where a loader's worker ends, with normalised floats. A second figure puts our normalisation, which
runs batched on the model's device, on the same core.

What it costs in CLIP score is measured on a demo pool, as it is and enlarged to 512 px, with the nano model that is
trained here as the demo trains its reference: no other weights are at hand. A model that sees 224 px may differ.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import open_clip
import torch
from PIL import Image
from torchvision.transforms import Compose

from curation.data.images import ImageError, fast_pixels, open_image, pixels
from curation.data.read_rules import ReadRules
from curation.data.shards import ShardReader
from curation.data.storage import list_shards, open_read
from curation.models.clip import Towers, build_network, load_towers
from curation.models.resize import FastResize, load_fast_resize, load_resize
from curation.numerics.contrastive import cosine
from jobs.benchmarks.pairs import interleaved, paired_ratio, provenance
from jobs.demo_pool import make_pool
from jobs.demo_reference import MODEL, NUM_PAIRS, NUM_STEPS, train_reference
from jobs.demo_scenes import make_pairs

SIDE, GRAIN = 512, 4.0
QUALITIES = (75, 90, 95)
QUALITY = 90
MAX_PIXELS = 90_000_000
MODEL_224 = "ViT-B-32"
KEPT = 0.3
TARGET = 5.0


class Scores(NamedTuple):
    """CLIP scores (n,) of the same rows, with pixels of either way."""

    exact: np.ndarray
    fast: np.ndarray


def benchmark(*, pairs: int, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        speed = {str(quality): race(jpegs(8 if tiny else 128, quality), pairs=pairs) for quality in QUALITIES}
        for quality, figures in speed.items():
            _print_speed(quality, figures)
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory(prefix="curation-bench-") as folder:
            difference = score_difference(Path(folder), samples=200 if tiny else 4_000, tiny=tiny)
    finally:
        torch.set_num_threads(threads)
    return {**provenance(), "benchmark": "decode", "speed": speed, "clip_score": difference}


def jpegs(n: int, quality: int) -> list[bytes]:
    """`n` JPEGs of 512 x 512 pixels."""
    rng = np.random.default_rng(0)
    return [_enlarged(pair.image, rng, quality) for pair in make_pairs(n, stream="held_out")]


def _enlarged(image: bytes, rng: np.random.Generator, quality: int = QUALITY) -> bytes:
    large = Image.open(io.BytesIO(image)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    grainy = np.asarray(large, np.float32) + GRAIN * rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32)
    out = io.BytesIO()
    Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=quality)
    return out.getvalue()


def race(images: Sequence[bytes], *, pairs: int) -> dict[str, Any]:
    """Images per CPU second on one core, of both sides, in interleaved pairs."""
    resize, exact = load_fast_resize(MODEL_224), load_resize(MODEL_224)
    transform = cast(Compose, open_clip.image_transform(exact.image_size[0], is_train=False))
    normalising = build_network(MODEL)  # the nano model normalises as the large one does
    seen: dict[str, list[float]] = {"fast": [], "fast_normalised": [], "clip": []}

    def fast() -> float:
        rate, made = _rate(lambda data: _fast(data, resize, exact), images)
        normalise, _ = _rate(lambda pixels: normalising.normalise(torch.from_numpy(pixels)[None]), made)
        seen["fast"].append(rate)
        seen["fast_normalised"].append(1 / (1 / rate + 1 / normalise))
        return rate

    def clip() -> float:
        rate, _ = _rate(lambda data: transform(Image.open(io.BytesIO(data))), images)
        seen["clip"].append(rate)
        return rate

    ratio = paired_ratio(interleaved(fast, clip, pairs=pairs))
    normalised = paired_ratio(list(zip(seen["fast_normalised"], seen["clip"], strict=True)))
    outcome = "met" if ratio.median >= TARGET else "not told apart" if ratio.high >= TARGET else "short"
    return {
        "mean_kilobytes": round(statistics.mean(map(len, images)) / 1e3, 1),
        "ratio": {**ratio._asdict(), "target": TARGET, "outcome": outcome},
        "ratio_with_our_normalisation": normalised._asdict(),
        "images_per_cpu_second": seen,
    }


def _fast(data: bytes, resize: FastResize, exact: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    decoded = fast_pixels(data, max_pixels=MAX_PIXELS, fast=resize, exact=exact)
    if decoded.fell_back:
        raise RuntimeError("a JPEG of this benchmark did not go the fast way")
    return decoded.pixels


def _rate(decode: Callable[[Any], Any], images: Sequence[Any]) -> tuple[float, list[Any]]:
    begun = time.process_time()
    made = [decode(data) for data in images]
    return len(images) / (time.process_time() - begun), made


def _print_speed(quality: str, figures: dict[str, Any]) -> None:
    ratio, normalised = figures["ratio"], figures["ratio_with_our_normalisation"]
    medians = {side: statistics.median(rates) for side, rates in figures["images_per_cpu_second"].items()}
    target = f"target {TARGET:g}: {ratio['outcome']}" if int(quality) == QUALITY else "no target"
    print(f"{SIDE} px, quality {quality}, {figures['mean_kilobytes']:.0f} kB: fast / Pillow + CLIP transform, a core:")
    print(f"  {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] ({target});", end=" ")
    print(f"{medians['fast']:,.0f} against {medians['clip']:,.0f} images/s")
    print(f"  {normalised['median']:.2f} [{normalised['low']:.2f}, {normalised['high']:.2f}] with our normalisation")


def score_difference(folder: Path, *, samples: int, tiny: bool) -> dict[str, Any]:
    """How much the CLIP score of a demo pool's rows moves, and how many of the kept ones stay kept."""
    checkpoint = folder / "reference.pt"
    train_reference(checkpoint, num_pairs=128 if tiny else NUM_PAIRS, num_steps=2 if tiny else NUM_STEPS)
    towers = load_towers(MODEL, checkpoint=str(checkpoint))
    pool = make_pool(folder / "pool", samples=samples, samples_per_shard=samples // 2)
    rng = np.random.default_rng(1)
    rows = list(_rows(pool.shards))
    enlarged = [(_enlarged(image, rng), caption) for image, caption in rows[: 64 if tiny else 2_000]]
    figures = {"as rendered, 64 to 96 px": rows, f"enlarged to {SIDE} px": enlarged}
    return {
        "model": f"{MODEL}, trained as the demo's reference",
        **{name: told(name, scores(towers, pairs)) for name, pairs in figures.items()},
    }


def _rows(shards: str) -> list[tuple[bytes, str]]:
    """Image and caption of a pool's rows that decode."""
    rows = []
    for shard in list_shards(shards):
        with open_read(shard.url) as raw:
            for sample in ShardReader(raw, url=shard.url, rules=ReadRules()):
                if sample.reason is not None or sample.image is None or sample.caption is None:
                    continue
                with suppress(ImageError):  # some of the demo's images are corrupt
                    open_image(sample.image, max_pixels=MAX_PIXELS)
                    rows.append((sample.image, sample.caption))
    return rows


def scores(towers: Towers, rows: Sequence[tuple[bytes, str]]) -> Scores:
    """The rows' CLIP scores, both ways."""
    exact, fast = towers.resize, FastResize(towers.resize.preprocess)
    captions = [caption for _, caption in rows]
    images = [
        (
            pixels(image, max_pixels=MAX_PIXELS, resize=exact).pixels,
            fast_pixels(image, max_pixels=MAX_PIXELS, fast=fast, exact=exact).pixels,
        )
        for image, _ in rows
    ]
    texts = towers.embed_texts(towers.tokenize(captions))
    both = (towers.embed_images(torch.from_numpy(np.stack(way))) for way in zip(*images, strict=True))
    return Scores(*(cosine(images_ND, texts).numpy() for images_ND in both))


def told(name: str, both: Scores) -> dict[str, float]:
    """The difference in figures, printed."""
    difference = np.abs(both.fast - both.exact)
    keep = round(KEPT * len(difference))
    kept = set(np.argsort(-both.exact)[:keep]) & set(np.argsort(-both.fast)[:keep])
    figures = {
        "rows": len(difference),
        "mean_difference": float(difference.mean()),
        "p99_difference": float(np.quantile(difference, 0.99)),
        "mean_shift": float((both.fast - both.exact).mean()),
        "spread_of_scores": float(both.exact.std()),
        "correlation": float(np.corrcoef(both.exact, both.fast)[0, 1]),
        "kept_in_both": len(kept) / keep,
    }
    print(
        f"CLIP score, fast - exact, {MODEL} trained as in the demo, {len(difference):,} rows {name}: "
        f"mean |difference| {figures['mean_difference']:.4f}, 99% below {figures['p99_difference']:.4f}, shift "
        f"{figures['mean_shift']:+.4f}; the scores' spread is {figures['spread_of_scores']:.3f}; "
        f"{figures['kept_in_both']:.1%} of the top {KEPT:.0%} are the same"
    )
    return figures
