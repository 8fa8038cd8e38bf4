"""`python -m jobs.evaluate KIND RECIPE --run RUN --output DIR`: what selections are worth.

    subset      the selected images themselves against their pool: distance, precision, recall, density, coverage
    diffusion   one generative model per selection and seed, trained side by side; its samples, and a page to look at
    correlation SEED [SEED ...]: do the scores of a pool's samples agree?

RUN is the pool, a run of `jobs.curate`; --arms names the selections: random, full, a method, another run, a file of
uids. What is done is not done again: the same command goes on after a crash, and with more seeds or arms adds those.

Exit codes as in `jobs.train`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from curation.data import storage
from curation.distributed.arms import columns_of
from curation.distributed.diffusion_study import samples_of, study_diffusion
from curation.distributed.stopping import Stop
from curation.distributed.subset_study import checked_run, judge_subsets, table_of
from curation.recipe.evaluate import DiffusionRecipe, Judged, SubsetRecipe
from curation.report.samples_page import page
from jobs import correlation
from jobs.command import EXIT_OK, EXIT_USAGE, Command
from jobs.recipes import DIFFUSION, SUBSET


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in KINDS:
        print(f"usage: python -m jobs.evaluate {'|'.join(KINDS)} RECIPE [--dry-run] [fields]", file=sys.stderr)
        return EXIT_USAGE
    return KINDS[arguments[0]](arguments[1:])


def _subset(arguments: list[str]) -> int:
    return Command("evaluate subset", __doc__).run(
        arguments, recipes=SUBSET, recipe_type=SubsetRecipe, job=_judge_subsets, dry_run=_check
    )


def _diffusion(arguments: list[str]) -> int:
    return Command("evaluate diffusion", __doc__).run(
        arguments, recipes=DIFFUSION, recipe_type=DiffusionRecipe, job=_study_diffusion, dry_run=_check
    )


KINDS: dict[str, Callable[[list[str]], int]] = {
    "subset": _subset,
    "diffusion": _diffusion,
    "correlation": correlation.main,
}


def _check(recipe: Judged) -> None:
    """ValueError if the run or an arm is none."""
    needed = columns_of(recipe.all_arms(), selected_on=recipe.selected_on)
    print(f"arms {', '.join(recipe.arms)} of {checked_run(recipe.run)}; of the pool are read: {', '.join(needed)}")


def _judge_subsets(recipe: SubsetRecipe, stop: Stop) -> int:
    study = judge_subsets(recipe, told=_say)
    print(f"features {study.features}, {study.rows:,} rows an arm, mean and deviation over {recipe.seeds} seeds")
    _print(table_of(study.arms))
    return EXIT_OK


def _study_diffusion(recipe: DiffusionRecipe, stop: Stop) -> int:
    study = study_diffusion(recipe, told=_say)
    note = f"features {study.features}; {study.samples:,} samples a model; mean and deviation over {recipe.seeds} seeds"
    print(note)
    table = table_of(study.arms)
    _print(table)
    told = page(
        f"Diffusion study: {recipe.name}",
        samples_of(recipe),
        table=table,
        notes=[note, f"{recipe.steps:,} steps each, but for arms with steps of their own: {', '.join(recipe.arms)}"],
        warnings=study.warnings,
    )
    url = storage.join(storage.absolute(recipe.output), "samples.html")
    storage.write_bytes(url, told.encode())
    print(f"samples side by side: {url}")
    return EXIT_OK


def _say(overlap: Mapping[str, Mapping[str, int]], warnings: Sequence[str]) -> None:
    """First of all: what of the samples that are measured against the selection itself holds."""
    for arm, told in overlap.items():
        share = told["held_by_the_selection"] / told["evaluated"]
        print(
            f"{arm}: the selection holds {told['held_by_the_selection']:,} of the {told['evaluated']:,} images that it "
            f"is measured against ({share:.1%}, equal bytes)"
        )
    for warning in warnings:
        print(f"WARNING: {warning}")


def _print(table: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
