"""Which samples are shown, under which heading: kept, cut by each step, next to the cut, copies, score bands, drops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from curation.data.drop_reasons import DROP_REASONS
from curation.report.outcomes import DUPLICATE
from curation.report.picks import JUST_CUT, JUST_KEPT
from curation.report.scan import Scan
from curation.report.thumbnails import Sample

BANDS = ((0, 20), (30, 80), (80, 100))
"""Percentiles of the score, those in which Alchemist (arXiv:2512.16905) looks at its ratings."""
SHOWN = 16
SHOWN_OF_A_REASON = 8
COPY_GROUPS, SHOWN_OF_A_GROUP = 6, 4


class Gallery(NamedTuple):
    """Addresses to show under a heading."""

    title: str
    about: str
    groups: list[list[int]]
    """One list, or one for each group of copies."""
    kind: str
    """kept, cut, dropped or mixed: the page's colour."""


def galleries(scan: Scan, *, cut: Mapping[str, list[int]] | None, is_selected: bool = True) -> list[Gallery]:
    """The galleries of a curated run, without empty ones; before its selection none that tells kept from cut.

    `cut`: step -> some of the rows that it removed. Without it what was cut is shown as one, by whatever step.
    """
    found = [Gallery("Kept", "drawn at random", [scan.picks.addresses("kept", SHOWN)], "kept")]
    if not is_selected:
        found = []
    elif cut is None:
        known = {*DROP_REASONS, "kept", DUPLICATE, JUST_KEPT, JUST_CUT}
        pooled = sorted(shown for name in scan.picks.chosen.keys() - known for shown in scan.picks.chosen[name])
        found.append(Gallery("Cut", "by any step", [[shown.address for shown in pooled[:SHOWN]]], "cut"))
    else:
        found += [Gallery(f"Cut by {name}", "some of them", [rows[:SHOWN]], "cut") for name, rows in cut.items()]
    if is_selected and scan.ranked is not None and scan.ranked.has_cut:
        near, by = [scan.picks.addresses(name, SHOWN) for name in (JUST_KEPT, JUST_CUT)], scan.ranked.column
        found.append(Gallery("Borderline, just kept", f"the lowest {by} that was kept", [near[0]], "kept"))
        found.append(Gallery("Borderline, just cut", f"the highest {by} that was cut", [near[1]], "cut"))
    copies = [group[:SHOWN_OF_A_GROUP] for group in scan.copies[:COPY_GROUPS]]
    found.append(Gallery("One uid, several rows", "the first one may be kept, the later ones never", copies, "mixed"))
    alike = [group[:SHOWN_OF_A_GROUP] for group in scan.alike[:COPY_GROUPS]]
    found.append(Gallery("Same image bytes", "groups of rows whose images are equal to the bit", alike, "mixed"))
    if (score := scan.shown_score) is not None:
        found += [_band(scan, score, low, high) for low, high in BANDS]
    return [gallery for gallery in found if any(gallery.groups)]


def _band(scan: Scan, score: str, low: int, high: int) -> Gallery:
    """Rows of the sample between two percentiles of a score, drawn at random."""
    values = scan.scores[score]
    known = values[np.isfinite(values)]
    least, most = np.quantile(known, [low / 100, high / 100])
    inside = np.flatnonzero((values >= least) & (values <= most))
    chosen = inside[np.argsort(_shuffled(scan.addresses[inside]), kind="stable")[:SHOWN]]
    about = f"{score} from {least:.4g} to {most:.4g}".replace("-", "−")
    return Gallery(f"Percentiles {low} to {high}", about, [scan.addresses[chosen].tolist()], "mixed")


def _shuffled(addresses: np.ndarray) -> np.ndarray:
    """Keys in whose order addresses lie anyhow, the same each time: Fibonacci hashing, the high bits."""
    return addresses.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def of_reason(scan: Scan, reason: str) -> list[int]:
    """Some of the rows that were dropped for a reason."""
    return scan.picks.addresses(reason, SHOWN_OF_A_REASON)


def all_addresses(found: Sequence[Gallery], reasons: Iterable[str], scan: Scan) -> list[int]:
    """Every address that some gallery shows."""
    of_galleries = [address for gallery in found for group in gallery.groups for address in group]
    return of_galleries + [address for reason in reasons for address in of_reason(scan, reason)]


class ShownGallery(NamedTuple):
    """A gallery with its samples."""

    title: str
    about: str
    groups: list[list[Sample]]
    kind: str


def shown(found: Sequence[Gallery], samples: Mapping[int, Sample]) -> list[ShownGallery]:
    """The galleries with their samples; one whose address is none of the pool's any more is without it."""
    return [
        ShownGallery(g.title, g.about, [[samples[a] for a in group if a in samples] for group in g.groups], g.kind)
        for g in found
    ]
