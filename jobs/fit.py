"""`python -m jobs.fit reference RECIPE --data.run RUN --output DIR`: what a method has to know before it can score.

`reference`: a model trained on every row of a small, strongly curated set, for JEST and RHO to compare a learner with.
RUN is a `jobs.curate` run of that set. It leaves `DIR/train/learner.pt`; cache its embeddings over the large pool with
`python -m jobs.curate RECIPE --embed.checkpoint DIR/train/learner.pt`, and train on that run with `jobs.train`.

Exit codes as in `jobs.train`.
"""

from __future__ import annotations

import sys

from curation.recipe import TrainRecipe
from jobs.command import EXIT_USAGE, Command
from jobs.recipes import REFERENCE
from jobs.train import print_plan, run_training

KINDS = ("reference",)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in KINDS:
        print(f"usage: python -m jobs.fit {'|'.join(KINDS)} RECIPE [--dry-run] [fields]", file=sys.stderr)
        return EXIT_USAGE
    return Command("fit reference", __doc__).run(
        arguments[1:], recipes=REFERENCE, recipe_type=TrainRecipe, job=_fit_reference, dry_run=print_plan
    )


def _fit_reference(recipe: TrainRecipe) -> int:
    if recipe.method != {"name": "uniform"} or recipe.train.filter_ratio:
        raise ValueError(
            f"a reference is trained on every row: method must be uniform and train.filter_ratio 0, got "
            f"{recipe.method['name']} and {recipe.train.filter_ratio}"
        )
    code = run_training(recipe)
    if not code:
        print(
            f"Next: python -m jobs.curate RECIPE --embed.model {recipe.learner.model} "
            f"--embed.pretrained None --embed.checkpoint {recipe.output}/train/learner.pt "
            "--pool.shards 'PATTERN' --output RUN"
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
