"""`python -m jobs.fit KIND RECIPE`: what a method has to know before it can score.

    reference   a model trained on every row of a small, strongly curated set, which JEST and RHO compare a learner with
    features    a column of a curated run: what a frozen network makes of each image
    embeddings  columns of a curated run: both embeddings and the clip score of another model
    quality     columns of a curated run: how sharp and how plain each image is
    mimic       columns of a curated run: what a Grad-Mimic run's score log says of each sample, and of the pool
    factors     columns of a curated run: each row's representativeness and rarity, which `dynamic` ranks by
    rater       Alchemist's rater, taught by validation loss on a curated run's features
    ratings     of a run that was rated: images of its ratings' ranges, what the ratings go with, how the ranges train

`reference --data.run RUN --output DIR` leaves `DIR/train/learner.pt`. Its embeddings over a large pool are what
`python -m jobs.curate RECIPE --embed.checkpoint DIR/train/learner.pt` makes; or, beside those of another model in a
run that is there already, `embeddings --run RUN --column NAME --weights.checkpoint DIR/train/learner.pt`.

`mimic majority --run RUN --log DIR --column NAME` makes NAME.keep, NAME.useful, NAME.score and NAME.rank, which a
selection of `jobs.curate` filters by.

`rater debug --run RUN --output DIR` leaves DIR/rater.pt; `python -m jobs.curate RECIPE --columns '[{"make": "rating",
"rater": "DIR"}, {"make": "percentile"}]'` rates the pool with it, and its selection may name the method alchemist.

Exit codes as in `jobs.train`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from curation.distributed.columns import ColumnsSummary, add_columns, checked
from curation.distributed.factor_columns import FactorsRefused, add_factor_columns, checked_factors
from curation.distributed.mimic_columns import add_mimic_columns, checked_mimic
from curation.distributed.stopping import Stop
from curation.recipe import TrainRecipe
from curation.recipe.columns import (
    ColumnsRecipe,
    EmbeddingsRecipe,
    FactorsRecipe,
    FeaturesRecipe,
    MimicRecipe,
    QualityRecipe,
)
from jobs import log, rater
from jobs.command import EXIT_FAILED, EXIT_OK, EXIT_USAGE, Command, exit_code
from jobs.recipes import EMBEDDINGS, FACTORS, FEATURES, MIMIC, QUALITY, REFERENCE
from jobs.train import print_plan, run_training


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in KINDS:
        print(f"usage: python -m jobs.fit {'|'.join(KINDS)} RECIPE [--dry-run] [fields]", file=sys.stderr)
        return EXIT_USAGE
    return KINDS[arguments[0]](arguments[1:])


def _reference(arguments: list[str]) -> int:
    return Command("fit reference", __doc__).run(
        arguments, recipes=REFERENCE, recipe_type=TrainRecipe, job=_fit_reference, dry_run=print_plan
    )


def _features(arguments: list[str]) -> int:
    return Command("fit features", __doc__).run(
        arguments, recipes=FEATURES, recipe_type=FeaturesRecipe, job=_add_columns, dry_run=_check
    )


def _embeddings(arguments: list[str]) -> int:
    return Command("fit embeddings", __doc__).run(
        arguments, recipes=EMBEDDINGS, recipe_type=EmbeddingsRecipe, job=_add_columns, dry_run=_check
    )


def _quality(arguments: list[str]) -> int:
    return Command("fit quality", __doc__).run(
        arguments, recipes=QUALITY, recipe_type=QualityRecipe, job=_add_columns, dry_run=_check
    )


def _mimic(arguments: list[str]) -> int:
    return Command("fit mimic", __doc__).run(
        arguments, recipes=MIMIC, recipe_type=MimicRecipe, job=_add_mimic_columns, dry_run=_check_mimic
    )


def _factors(arguments: list[str]) -> int:
    return Command("fit factors", __doc__).run(
        arguments, recipes=FACTORS, recipe_type=FactorsRecipe, job=_add_factor_columns, dry_run=_check_factors
    )


KINDS: dict[str, Callable[[list[str]], int]] = {
    "reference": _reference,
    "features": _features,
    "embeddings": _embeddings,
    "quality": _quality,
    "mimic": _mimic,
    "factors": _factors,
    "rater": rater.fit,
    "ratings": rater.picture,
}


def _fit_reference(recipe: TrainRecipe, stop: Stop) -> int:
    if recipe.method != {"name": "uniform"} or recipe.train.filter_ratio:
        raise ValueError(
            f"a reference is trained on every row: method must be uniform and train.filter_ratio 0, got "
            f"{recipe.method['name']} and {recipe.train.filter_ratio}"
        )
    code = run_training(recipe, stop)
    if not code:
        print(
            f"Next: python -m jobs.curate RECIPE --embed.model {recipe.learner.model} "
            f"--embed.pretrained None --embed.checkpoint {recipe.output}/train/learner.pt "
            "--pool.shards 'PATTERN' --output RUN"
        )
    return code


def _check(recipe: ColumnsRecipe) -> None:
    print(f"column {recipe.column!r} of {checked(recipe).run}")


def _check_mimic(recipe: MimicRecipe) -> None:
    checked = checked_mimic(recipe)
    print(f"columns {recipe.column!r} of {checked.run} from the score log of {checked.log}")


def _check_factors(recipe: FactorsRecipe) -> None:
    checked = checked_factors(recipe)
    print(f"columns {recipe.column!r} of {checked.run} from {', '.join(recipe.features)}")


def _add_factor_columns(recipe: FactorsRecipe, stop: Stop) -> int:
    try:
        account = add_factor_columns(recipe)
    except FactorsRefused as error:
        log.say(f"FAILED: {error}", level=logging.ERROR)
        return EXIT_FAILED
    told = account.report
    explained = (
        "" if told["explained_variance"] is None else f"{told['explained_variance']:.3f} of variance explained, "
    )
    log.say(
        f"{recipe.run}/columns/{recipe.column} ({told['label']}): {account.rows:,} rows in {account.shards:,} shards, "
        f"{account.made_now:,} made now; {told['units']} factors, {explained}{told['dead_share']:.1%} dead, "
        f"{told['common']} common, {told['rare']} rare; ranks correlate {told['rank_correlation']:+.2f}"
    )
    if told["warning"]:
        log.say(f"WARNING: {told['warning']}", level=logging.WARNING)
    return EXIT_OK


def _add_mimic_columns(recipe: MimicRecipe, stop: Stop) -> int:
    account = add_mimic_columns(recipe)
    log.say(
        f"{recipe.run}/columns/{recipe.column}: {account.kept:,} of {account.rows:,} rows kept after {account.rounds} "
        f"rounds ({account.steps:,} steps); quality {account.kept_share:.3f}, mean score {account.mean_score:.4g}"
    )
    if account.accuracies is not None:
        log.say("accuracy of the rounds: " + ", ".join(f"{accuracy:.3f}" for accuracy in account.accuracies))
    return EXIT_OK


def _add_columns(recipe: ColumnsRecipe, stop: Stop) -> int:
    done = 0

    def told(record: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        said = record.get("pending") or f"{record['made']:,} rows in {record['seconds']:.1f} s"
        log.say(f"{done:>6}  {record['url']}  {said}", done=done, url=record["url"])

    summary = add_columns(recipe, watch=told, stop=stop)
    _print(recipe, summary)
    return exit_code(summary.failures, summary.stopped)


def _print(recipe: ColumnsRecipe, summary: ColumnsSummary) -> None:
    print(
        f"{recipe.run}/columns/{recipe.column}: {summary.rows:,} rows in {summary.shards:,} shards, "
        f"{summary.made_now:,} of them made now in {summary.seconds:,.1f} s"
    )
    if summary.absent:
        print(f"{len(summary.absent):,} shards have left the pool and got no value, such as {summary.absent[0]}")
    if summary.missing:
        print(f"{summary.missing:,} rows have no value: their image can no longer be decoded")


if __name__ == "__main__":
    sys.exit(main())
