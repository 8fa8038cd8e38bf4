"""`python -m jobs.nightly RECIPE --pool.shards 'PATTERN' --output DIR`: curate what is new, compare, promote.

DIR/current.json names the night that is in use; DIR/nights/NAME is its result. A night whose figures moved beyond
`--drift.*` is written, and held back.

    python -m jobs.nightly --rollback DIR          the night before is in use again, until another kept set comes
    python -m jobs.nightly --promote NIGHT DIR     a night that was held back, or rolled back, is in use after all

Exit codes as in `jobs.curate`, and 5: the night was held back.
"""

from __future__ import annotations

import argparse
import sys

from curation.data import nights, storage
from curation.data.drift import Change
from curation.distributed.nightly import nightly
from curation.distributed.pipeline import make_plan
from curation.distributed.stopping import Stop
from curation.recipe import CurateRecipe
from curation.recipe.nightly import NightlyRecipe
from jobs import log
from jobs.command import EXIT_FAILED, EXIT_OK, EXIT_USAGE, Command, exit_code
from jobs.curate import Progress, print_plan, print_summary
from jobs.recipes import NIGHTLY

EXIT_HELD_BACK = 5


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.partition("=")[0] in ("--rollback", "--promote") for argument in arguments):
        return _point(arguments)
    return Command("nightly", __doc__).run(
        arguments, recipes=NIGHTLY, recipe_type=NightlyRecipe, job=_nightly, dry_run=_dry_run
    )


def _point(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m jobs.nightly", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rollback", action="store_true")
    what.add_argument("--promote", metavar="NIGHT")
    parser.add_argument("output", metavar="DIR")
    given = parser.parse_args(arguments)
    output = storage.absolute(given.output)
    try:
        if given.rollback:
            nights.roll_back(output)
        else:
            nights.promote(output, given.promote)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED
    print(f"{output}: current is {nights.current(output)}")
    return EXIT_OK


def _run_of(recipe: NightlyRecipe) -> CurateRecipe:
    """The curation that grows from night to night, in its own folder."""
    return recipe.curate.model_copy(update={"output": nights.run_url(recipe.curate.output)})


def _dry_run(recipe: NightlyRecipe) -> None:
    run = _run_of(recipe)
    print_plan(run, make_plan(run))


def _nightly(recipe: NightlyRecipe, stop: Stop) -> int:
    night = nightly(recipe, watch=Progress(), stop=stop)
    print_summary(_run_of(recipe), night.summary)
    if code := exit_code(night.summary.failures, night.summary.stopped):
        return code
    if night.rolled_back:
        log.say(
            f"nothing promoted: {night.rolled_back}, with the same kept set, was rolled back; {night.against} stays. "
            f"python -m jobs.nightly --promote {night.rolled_back} {recipe.curate.output} promotes it after all",
            night=night.against,
        )
        return EXIT_OK
    if night.name is None:
        log.say(f"nothing changed: {night.against} stays", night=night.against)
        return EXIT_OK
    log.say(f"night {night.name}, against {night.against or 'none before'}", night=night.name, against=night.against)
    for change in night.changes:
        mark = "  HELD BACK" if change in night.held_back else ""
        log.say(f"  {_told(change)}{mark}", **change._asdict())
    if night.held_back:
        log.say(
            f"held back: {len(night.held_back)} figures moved beyond --drift.*; {night.against} stays. "
            f"python -m jobs.nightly --promote {night.name} {recipe.curate.output} promotes it after all"
        )
        return EXIT_HELD_BACK
    log.say(f"promoted: {night.name} is current")
    return EXIT_OK


def _told(change: Change) -> str:
    values = "" if change.then is None else f"{change.then:,.4g} -> {change.now:,.4g}"
    return f"{change.name:<44} {values:>22}  {change.distance:.4f}"


if __name__ == "__main__":
    sys.exit(main())
