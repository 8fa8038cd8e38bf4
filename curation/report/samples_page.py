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
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.arms { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .4rem; }
.wide { overflow-x: auto; }
.warning { background: #fff3cd; padding: .5rem .8rem; }
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
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """One HTML page that needs no other file. `table` has its head first; sample i of each arm began as one noise."""
    figures = "".join(
        f'<figure><figcaption>{html.escape(name)}</figcaption><img alt="samples of {html.escape(name)}" '
        f'src="data:image/png;base64,{_png(grid(images))}"></figure>'
        for name, images in samples.items()
    )
    head, *lines = table
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        + "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in warnings)
        + "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        + '<div class="wide"><table><tr>'
        + "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        + f'</tr>{rows}</table></div><div class="arms">{figures}</div></html>'
    )


def _png(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
