"""The page: views laid out by a template into one file that asks the network for nothing.

Whatever comes from a pool is text: the template escapes all of it, `plain` takes out what could move the text around
it, and a content security policy lets the browser run only the one script that is here, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from curation.data import storage
from curation.report import charts, folder
from curation.report.costs import HOUR_S, Prices
from curation.report.curation_view import CurationView, curation_view
from curation.report.folder import CurationRun, TrainingRun
from curation.report.plain import plain
from curation.report.thumbnails import PAGE_FULL, Sample
from curation.report.training_view import TrainingView, training_view

MAX_BYTES = 15_000_000
IMAGE_BYTES = 11_000_000
"""Of MAX_BYTES, what thumbnails may take, over all runs."""
SAFETY = {"json.punsafe": 0.5}
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Wanted:
    """What a report is asked to be."""

    prices: Prices = field(default_factory=Prices)
    has_prices: bool = False
    with_images: bool = True
    safety: Mapping[str, float] = field(default_factory=lambda: dict(SAFETY))
    must_have_safety: bool = False
    """Whether the columns of `safety` were asked for by name, and it is an error if they cannot be read."""
    group_by: Sequence[str] = ()
    command: str = ""


def report(urls: Sequence[str], wanted: Wanted) -> str:
    """The report of the runs in these folders, as HTML; one that is named twice is in it once.

    ValueError if one holds no run, or a column is not there.
    """
    runs = [run for url in dict.fromkeys(map(storage.absolute, urls)) for run in folder.load(url)]
    curated = [run for run in runs if isinstance(run, CurationRun)]
    trained = [run for run in runs if isinstance(run, TrainingRun)]
    memories = {run.url: memory for run in trained if (memory := folder.remembered(run)) is not None}
    pools = {run.url: pool for run in trained if (pool := _pool_of(run, curated)) is not None}
    references = {
        run.url: found for run in trained if (found := _reference_of(pools.get(run.url), trained)) is not None
    }
    views = [
        curation_view(
            run,
            prices=wanted.prices,
            safety=wanted.safety,
            must_have_safety=wanted.must_have_safety,
            group_by=wanted.group_by,
            beside={
                f"{name} ({each.label})": read
                for each in trained
                if each.url in memories and pools.get(each.url) is run and _method_of(each) != "uniform"
                for name, read in [folder.scored_by(each, memories[each.url])]
            },
            with_images=wanted.with_images,
            max_image_bytes=IMAGE_BYTES // max(1, len(curated)),
        )
        for run in curated
    ]
    training = training_view(trained, pools=pools, references=references, memories=memories, prices=wanted.prices)
    return render(views, training, wanted)


class Pictures:
    """Thumbnails as the page places them, one after the other, until `left` bytes are spent."""

    def __init__(self, left: int):
        self.left, self.placed = left, 0

    def place(self, sample: Sample) -> str | None:
        """The sample's picture, if it has one and there is room for it."""
        size = len(sample.image or "")
        if size > self.left:
            return None
        self.left, self.placed = self.left - size, self.placed + size
        return sample.image


def render(views: Sequence[CurationView], training: TrainingView | None, wanted: Wanted) -> str:
    """The page of these views; with fewer pictures if it would be larger than MAX_BYTES, ValueError if none is left."""
    left = MAX_BYTES
    while True:
        pictures = Pictures(left)
        html = _laid_out(views, training, wanted, pictures)
        size = len(html.encode())
        if size <= MAX_BYTES:
            return html
        if not pictures.placed:
            raise ValueError(
                f"the report has {size:,} bytes, more than {MAX_BYTES:,}: report fewer runs at a time, or --no-images"
            )
        left = max(0, pictures.placed - (size - MAX_BYTES))


def _laid_out(views: Sequence[CurationView], training: TrainingView | None, wanted: Wanted, pictures: Pictures) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": plain,
        "si": charts.number,
        "hours": hours,
        "percent": percent,
        "figure": figure,
        "signed": signed,
        "lift_bar": lift_bar,
        "energy": energy,
    }
    environment.globals |= {"picture": pictures.place, "page_full": PAGE_FULL}
    style, script = ((TEMPLATES / name).read_text() for name in ("page.css", "calculator.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        views=views,
        training=training,
        wanted=wanted,
        prices=wanted.prices,
        style=Markup(style),
        script=Markup(script),
        script_digest=digest,
        seeds_of=seeds_of,
        title=" · ".join([view.run.label for view in views] or ["training"]),
    )


def _method_of(run: TrainingRun) -> str:
    return str(run.recipe.get("method", {}).get("name"))


def _pool_of(run: TrainingRun, curated: Sequence[CurationRun]) -> CurationRun | None:
    """The curated run that was trained on: one of those in the report, or read from where the recipe says it is."""
    url = run.recipe.get("data", {}).get("run", "")
    known = next((each for each in curated if each.url == url), None)
    if known is not None or not url or not storage.exists(storage.join(url, "shards.parquet")):
        return known
    return next(each for each in folder.load(url) if isinstance(each, CurationRun))


def _reference_of(pool: CurationRun | None, trained: Sequence[TrainingRun]) -> TrainingRun | None:
    """The run that trained the model which embedded a pool, if its folder is where the checkpoint was taken from."""
    checkpoint = (pool.recipe.get("embed", {}).get("checkpoint") if pool else None) or ""
    url = checkpoint.removesuffix("/train/learner.pt")
    known = next((each for each in trained if each.url == url), None)
    if known is not None or url == checkpoint or not storage.exists(storage.join(url, "recipe.json")):
        return known
    return next((each for each in folder.load(url) if isinstance(each, TrainingRun)), None)


def hours(seconds: float) -> str:
    """A duration in the unit that suits it: 42 s, 3.1 min, 5.2 h, 12 days."""
    for unit, length in (("days", 24 * HOUR_S), ("h", HOUR_S), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{charts.number(seconds / length)} {unit}"
    return f"{seconds:.3g} s"


def energy(kwh: float) -> str:
    """An energy in the unit that suits it: Wh, kWh or MWh."""
    for unit, size in (("MWh", 1000.0), ("kWh", 1.0)):
        if kwh >= size:
            return f"{kwh / size:.3g} {unit}" if kwh < 1000 * size else f"{kwh / size:,.0f} {unit}"
    return f"{charts.number(1000 * kwh)} Wh"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f}%"


def seeds_of(whole_recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of a run's seeds, as they are shown."""
    return [(f"seed of {name.replace('_', ' ')}", seed) for name, seed in whole_recipe.get("seeds", {}).items()]


def signed(value: float, digits: int = 2) -> str:
    """A number that may be negative, with a real minus; what rounds to 0 is 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def figure(value: float) -> str:
    """A number in a table: whole ones with separators, others with four digits."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 10_000 else f"{value:.4g}"


def lift_bar(lift: float) -> tuple[str, str]:
    """Where a bar for a lift begins and how wide it is, in percent: from 1 in the middle, a doubling is a quarter."""
    reach = 25 * max(-2.0, min(2.0, math.log2(lift)))
    return f"{50 + min(0.0, reach):.1f}", f"{abs(reach):.1f}"
