"""What the page says of one curated run, computed from its folder; the template only lays it out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from curation.data import manifest, storage, tables
from curation.data.drop_reasons import DROP_REASONS
from curation.evaluation.correlation import spearman_matrix
from curation.recipe import Embed, Pool, Step, parse_steps
from curation.report import costs, folder, galleries, thumbnails
from curation.report.costs import Cost, Estimate, Prices
from curation.report.folder import CurationRun, StepCount
from curation.report.galleries import ShownGallery
from curation.report.lift import GroupTable, group_tables
from curation.report.outcomes import DUPLICATE
from curation.report.rating_view import RatingView, rating_views
from curation.report.scan import Scan, scan
from curation.report.score_views import ScoreView, score_views
from curation.report.thumbnails import Sample


class Stage(NamedTuple):
    """A bar of the waterfall: `rows` are left after it, `removed` went."""

    name: str
    kind: str
    rows: int
    removed: int
    about: str


class Dropped(NamedTuple):
    """A drop reason with some of its samples."""

    reason: str
    about: str
    count: int
    samples: list[Sample]


@dataclass(frozen=True)
class CurationView:
    """All that is shown of a run."""

    run: CurationRun
    read: int
    embedded: int
    dropped: int
    selected: int | None
    """Rows that were kept; None if nothing was selected yet."""
    waterfall: list[Stage]
    reasons: list[Dropped]
    scores: list[ScoreView]
    sampled: int
    """Rows that the score figures are of; `embedded` unless the pool is very large."""
    galleries: list[ShownGallery]
    ratings: list[tuple[RatingView, list[ShownGallery]]]
    """What `jobs.fit ratings` left, with its images."""
    groups: list[GroupTable]
    score_names: list[str]
    unread_scores: list[str]
    """Scores that the tables have beyond those."""
    correlation: np.ndarray
    costs: list[Cost]
    estimates: list[Estimate]
    device: str
    recipe_json: str
    digests: dict[str, str]
    command: str
    warnings: list[str]

    @property
    def rate(self) -> float | None:
        """Images a second of the scoring pass."""
        scoring = self.scoring
        return scoring.samples / scoring.seconds if scoring and scoring.samples and scoring.seconds else None

    @property
    def scoring(self) -> Cost | None:
        """What the scoring pass cost; None if nothing was scored."""
        return next((cost for cost in self.costs if cost.part == "scoring"), None)


def curation_view(
    run: CurationRun,
    *,
    prices: Prices,
    safety: Mapping[str, float],
    must_have_safety: bool = False,
    group_by: Sequence[str] = (),
    beside: Mapping[str, Callable[[int], np.ndarray]] | None = None,
    with_images: bool = True,
    max_image_bytes: int,
) -> CurationView:
    """Read a run's tables once and say what they hold. ValueError if a column that is asked for is nowhere."""
    for column in safety if must_have_safety else ():
        thumbnails.check_safety_column(run.url, run.numbers, column)
    steps = _steps(run)
    found = scan(run.url, run.numbers, steps=steps, beside=beside, group_by=group_by)
    dropped = {reason: count for reason, count in found.outcomes.items() if reason in DROP_REASONS}
    read, kept = sum(found.outcomes.values()), found.outcomes["kept"]
    selected = run.summary.get("selected")
    is_selected = selected is not None or kept > 0
    counts = folder.waterfall(run)
    cut = _examples(counts, found)
    planned = galleries.galleries(found, cut=cut, is_selected=is_selected) if with_images else []
    rated = rating_views(run)
    of_ratings = [gallery for view in rated for gallery in view.galleries if with_images]
    shown = _samples(run, [*planned, *of_ratings], dropped if with_images else {}, found, safety, max_image_bytes)
    return CurationView(
        run=run,
        read=read,
        embedded=found.embedded,
        dropped=sum(dropped.values()),
        selected=kept if is_selected else None,
        waterfall=_waterfall(counts, selected, read=read, dropped=dropped),
        reasons=_reasons(dropped, found, shown),
        scores=score_views(found, steps, is_selected=is_selected),
        sampled=len(found.addresses),
        galleries=galleries.shown(planned, shown),
        ratings=[(view, galleries.shown(view.galleries if with_images else [], shown)) for view in rated],
        groups=group_tables(found.groups, folder.audited(run), embedded=found.embedded, kept=kept)
        if is_selected
        else [],
        score_names=list(found.scores),
        unread_scores=found.unread,
        correlation=spearman_matrix(found.scores),
        costs=costs.curation_costs(run, prices),
        estimates=costs.estimates(run, prices, table_bytes_per_row=_bytes_per_row(run, read)),
        device=run.whole_recipe.get("embedded_by", {}).get("compute.device", "cpu"),
        recipe_json=json.dumps(run.recipe, indent=1, ensure_ascii=False),
        digests=_digests(run),
        command=f"python -m jobs.curate {shlex.quote(storage.join(run.url, 'recipe.json'))} --output AGAIN",
        warnings=_warnings(run, read, kept),
    )


def _steps(run: CurationRun) -> tuple[Step, ...]:
    return parse_steps(json.dumps(run.recipe.get("selection", [])))


def _waterfall(
    steps: Sequence[StepCount], selected: int | None, *, read: int, dropped: Mapping[str, int]
) -> list[Stage]:
    """From all that was read to what was kept. The selection's counts are those that the run itself wrote."""
    left = read
    stages = [Stage("read", "read", left, 0, "samples that were begun")]
    for reason, count in sorted(dropped.items(), key=lambda each: -each[1]):
        left -= count
        stages.append(Stage(reason, "dropped", left, count, DROP_REASONS[reason]))
    for step in steps:
        removed = step.rows_in - step.rows_out
        if removed or step.name != DUPLICATE:
            about = "later copies of a uid" if step.name == DUPLICATE else "left out by the selection"
            stages.append(Stage(step.name, "cut", step.rows_out, removed, about))
    if selected is not None:
        stages.append(Stage("kept", "kept", selected, 0, "the selection"))
    return stages


def _examples(steps: Sequence[StepCount], found: Scan) -> dict[str, list[int]] | None:
    """Step -> rows that it removed: those that the run noted, or else those that the tables tell; None if neither."""
    if steps and all(step.examples is not None for step in steps):
        return {step.name: list(step.examples or ()) for step in steps if step.name != DUPLICATE}
    if any(found.outcomes[step.name] != step.rows_in - step.rows_out for step in steps):
        return None
    return {step.name: found.picks.addresses(step.name, galleries.SHOWN) for step in steps if step.name != DUPLICATE}


def _samples(
    run: CurationRun,
    planned: Sequence[galleries.Gallery],
    dropped: Mapping[str, int],
    found: Scan,
    safety: Mapping[str, float],
    max_bytes: int,
) -> dict[int, Sample]:
    pool = Pool.model_validate(run.recipe.get("pool", {}))
    return thumbnails.samples(
        run.url,
        galleries.all_addresses(planned, dropped, found),
        rules=pool.read_rules(),
        max_pixels=pool.max_pixels,
        scores=[found.shown_score] if found.shown_score else [],
        safety=safety,
        max_bytes=max_bytes,
    )


def _reasons(dropped: Mapping[str, int], found: Scan, shown: Mapping[int, Sample]) -> list[Dropped]:
    return [
        Dropped(
            reason, DROP_REASONS[reason], count, [shown[a] for a in galleries.of_reason(found, reason) if a in shown]
        )
        for reason, count in sorted(dropped.items(), key=lambda each: -each[1])
    ]


def _bytes_per_row(run: CurationRun, read: int) -> float:
    """Bytes of a sample table per row, from the first tables."""
    sizes = [len(storage.read_bytes(tables.url_of(run.url, number))) for number in run.numbers[:4]]
    rows = sum(run.records[number]["read"] for number in run.numbers[:4])
    return sum(sizes) / rows if rows else 0.0


def _digests(run: CurationRun) -> dict[str, str]:
    """What the run was made of and what it made, by digests (sha256) that another run can be held against."""
    found = {
        "code": run.whole_recipe.get("code", ""),
        "model weights": str(run.whole_recipe.get("embedded_by", {}).get("embed.weights", "")),
        "pool (sha256 of the shards' own)": manifest.digest(
            [shard.sha256 for shard in run.shards if not shard.retired]
        ),
    }
    subset = storage.join(run.url, "selection", "subset.npy")
    if storage.exists(subset):
        found["kept set (subset.npy)"] = storage.sha256_of(subset)
    return {name: digest for name, digest in found.items() if digest}


def _warnings(run: CurationRun, read: int, kept: int) -> list[str]:
    """What a reader must know before believing the rest."""
    found = [f"the run failed: {failure}" for failure in run.summary.get("failures", [])]
    if run.summary.get("stopped"):
        found.append(f"the run was stopped before its work was done: {run.summary['stopped']}")
    if not run.summary:
        found.append("the run has written no account yet: it is under way, or was stopped")
    else:
        if run.summary["read"] != read:
            found.append(
                f"the tables hold {read:,} samples, the account {run.summary['read']:,}: the pool has changed since"
            )
        if run.summary["selected"] not in (None, kept):
            found.append(f"the tables hold {kept:,} kept samples, the account says {run.summary['selected']:,}")
    embed = Embed.model_validate(run.recipe.get("embed", {}))
    if embed.has_random_weights:
        found.append(f"{embed.model} has random weights, so its scores mean nothing")
    found += [f"{name}: {count:,}" for name, count in run.summary.get("warnings", {}).items()]
    return found
