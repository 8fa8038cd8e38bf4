"""The page of a diffusion study: figures by arm, and samples of all arms from the same noise side by side."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

GAP = 2
MIN_TILE = 48
"""Pixels a side of a shown sample, at least; small ones are enlarged without smoothing."""

_STYLE = """
:root { color-scheme: light dark; --line: #ddd; --soft: #666; --warn: #fff3cd; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #aaa; --warn: #5a4a12; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; padding: 0 1rem; max-width: 84rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .87em; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .45rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
.arms { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .4rem; }
img { max-width: 100%; image-rendering: pixelated; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; color: var(--soft); }
dt { font-weight: 600; } dd { margin: 0; }
.wide { overflow-x: auto; }
.warning { background: var(--warn); padding: .5rem .8rem; }
"""


def grid(images_nSS3: np.ndarray) -> Image.Image:
    """Images (n, S, S, 3) uint8 in a square of rows, the first at the top left."""
    num_images, side = images_nSS3.shape[:2]
    columns = math.ceil(math.sqrt(num_images))
    scale = max(1, math.ceil(MIN_TILE / side))
    step = side * scale + GAP
    sheet = Image.new("RGB", (columns * step - GAP, math.ceil(num_images / columns) * step - GAP), "white")
    for place, image in enumerate(images_nSS3):
        tile = Image.fromarray(image).resize((side * scale, side * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (place % columns * step, place // columns * step))
    return sheet


def page(
    title: str,
    samples: Mapping[str, np.ndarray],
    *,
    table: Sequence[Sequence[str]],
    legend: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """One HTML page that needs no other file. `table` has its head first, `legend` says what its columns mean; sample i
    of each arm began as one noise."""
    figures = "".join(
        f'<figure><figcaption>{html.escape(name)}</figcaption><img alt="samples of {html.escape(name)}" '
        f'src="data:image/png;base64,{_png(grid(images))}"></figure>'
        for name, images in samples.items()
    )
    head, *lines = table
    meanings = "".join(
        f"<dt>{html.escape(_words(name))}</dt><dd>{html.escape(meaning)}</dd>"
        for name, meaning in (legend or {}).items()
        if name in head
    )
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        + "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in warnings)
        + "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        + '<div class="wide"><table><tr>'
        + "".join(f"<th>{html.escape(_words(cell))}</th>" for cell in head)
        + f"</tr>{rows}</table></div><dl>{meanings}</dl>"
        + f'<h2>Samples, from the same noise at the same places</h2><div class="arms">{figures}</div></html>'
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _png(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
