"""`python -m jobs.evaluate KIND RECIPE --run RUN --output DIR`: what selections are worth.

    subset      the selected images themselves against their pool: distance, precision, recall, density, coverage
    held-out    a model's embeddings and features of held-out samples: retrieval, zero-shot classes, linear probes
    diffusion   one generative model per selection and seed, trained side by side; its samples, and a page to look at
    correlation SEED [SEED ...]: do the scores of a pool's samples agree?

RUN is the pool (held-out: the held-out samples), a run of `jobs.curate`; --arms names the selections: random, full, a
method, a straw man, another run, a file of uids. What is done is not done again: the same command goes on after a
crash, and with more seeds or arms adds those.

Exit codes as in `jobs.train`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from curation.data import storage
from curation.distributed.arms import columns_of, with_straw_men
from curation.distributed.diffusion_study import real_images, samples_of, study_diffusion
from curation.distributed.held_out_study import judge_held_out
from curation.distributed.stopping import Stop
from curation.distributed.subset_study import checked_run, judge_subsets, table_of
from curation.recipe.evaluate import DiffusionRecipe, HeldOutRecipe, Judged, SubsetRecipe
from curation.report.samples_page import page
from jobs import correlation
from jobs.command import EXIT_OK, EXIT_USAGE, Command
from jobs.recipes import DIFFUSION, HELD_OUT, SUBSET

REAL = "real images of the pool"
LEGEND = {
    "distance": "squared Fréchet distance of the samples to the pool; 0 is best",
    "distance_infinity": "the same of an endless number of such samples, read off a line through 15 sizes",
    "precision": "share of the samples that lie where the pool does",
    "recall": "share of the pool that the samples reach",
    "density": "how crowded the samples are where the pool is; may exceed 1",
    "coverage": "share of the pool's neighbourhoods that hold a sample",
    "median_ratio": "distance to the nearest training image over that to the second: 0 for a copy",
    "memorised_share": "share of the samples whose ratio is below 1/3",
    "authentic_share": "AuthPct: share of the samples that are farther from their training image than another is",
    "distance_of_training_rows": "the control: the distance of the images that the arm was trained on",
    "distance_unmemorised": "distance of the samples that are not memorised, as many of each arm",
}
"""What a diffusion study's columns mean, for those who read its page."""


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


def _held_out(arguments: list[str]) -> int:
    return Command("evaluate held-out", __doc__).run(
        arguments, recipes=HELD_OUT, recipe_type=HeldOutRecipe, job=_judge_held_out, dry_run=_check_held_out
    )


def _diffusion(arguments: list[str]) -> int:
    return Command("evaluate diffusion", __doc__).run(
        arguments, recipes=DIFFUSION, recipe_type=DiffusionRecipe, job=_study_diffusion, dry_run=_check
    )


KINDS: dict[str, Callable[[list[str]], int]] = {
    "subset": _subset,
    "held-out": _held_out,
    "diffusion": _diffusion,
    "correlation": correlation.main,
}


def _check(recipe: Judged) -> None:
    """ValueError if the run or an arm is none."""
    whole, notes = with_straw_men(recipe.model_copy(update={"run": checked_run(recipe.run)}))
    needed = columns_of(whole.all_arms(), selected_on=whole.selected_on)
    print(f"arms {', '.join(whole.arms)} of {whole.run}; of the pool are read: {', '.join(needed)}")
    print("\n".join(notes))


def _judge_subsets(recipe: SubsetRecipe, stop: Stop) -> int:
    study = judge_subsets(recipe, told=_say, stop=stop)
    print(f"features {study.features}, {study.rows:,} rows an arm, mean and deviation over {recipe.seeds} seeds")
    _print(table_of(study.arms))
    print("\n".join(study.notes))
    return EXIT_OK


def _check_held_out(recipe: HeldOutRecipe) -> None:
    print(f"samples of {checked_run(recipe.run)}")


def _judge_held_out(recipe: HeldOutRecipe, stop: Stop) -> int:
    study = judge_held_out(recipe, told=_say_held_out, stop=stop)
    for note in study.notes:
        print(note)
    if study.without_value:
        print(f"{study.without_value:,} samples are not measured on: a column has no value for them")
    for name, value in study.figures.items():
        print(f"  {name:<32} {value:.4g}")
    return EXIT_OK


def _say_held_out(overlap: Mapping[str, int]) -> None:
    if not overlap:
        print("what the model was trained on is not known: name it, as in --selection runs/first")
        return
    held, evaluated = overlap["held_by_the_selection"], overlap["evaluated"]
    print(f"the selection holds {held:,} of the {evaluated:,} held-out samples ({held / evaluated:.1%})")


def _study_diffusion(recipe: DiffusionRecipe, stop: Stop) -> int:
    study = study_diffusion(recipe, told=_say, stop=stop)
    note = f"features {study.features}; {study.samples:,} samples a model; mean and deviation over {recipe.seeds} seeds"
    print(note)
    table = table_of(study.arms)
    _print(table)
    steps = [f"{recipe.steps:,} steps", *(f"{arm.name} {arm.steps:,}" for arm in recipe.all_arms() if arm.steps)]
    told = page(
        f"Diffusion study: {recipe.name}",
        {**samples_of(recipe, study.arms), REAL: real_images(recipe)},
        table=table,
        legend=LEGEND,
        notes=[note, "; ".join(steps)],
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
