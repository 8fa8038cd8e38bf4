"""`python -m jobs.fit rater` and `python -m jobs.fit ratings`: Alchemist's rater, and what its ratings look like."""

from __future__ import annotations

import json

from curation.data import manifest, storage
from curation.data.rated_images import FACTS, rated_images
from curation.distributed.fit_rater import checked_rater, fit_rater
from curation.distributed.stopping import Stop
from curation.distributed.subset_study import checked_run
from curation.recipe.parts import Pool
from curation.recipe.rater import RaterRecipe, RatingsRecipe
from curation.report.ratings import PANELS, RANGES, correlations, draw_dynamics, of_range, sheet
from jobs import log
from jobs.command import EXIT_OK, Command
from jobs.recipes import RATER, RATINGS


def fit(arguments: list[str]) -> int:
    """Teach a rater; returns the exit code."""
    return Command("fit rater", __doc__).run(
        arguments, recipes=RATER, recipe_type=RaterRecipe, job=_fit, dry_run=_check
    )


def picture(arguments: list[str]) -> int:
    """Draw what the ratings of a run look like; returns the exit code."""
    return Command("fit ratings", __doc__).run(
        arguments, recipes=RATINGS, recipe_type=RatingsRecipe, job=_picture, dry_run=_check_run
    )


def _check(recipe: RaterRecipe) -> None:
    checked = checked_rater(recipe)
    print(f"a rater of {checked.features!r} of {checked.run}, in mode {checked.teach.mode}, to {checked.output}")


def _check_run(recipe: RatingsRecipe) -> None:
    print(f"ratings {recipe.percentile!r} of {checked_run(recipe.run)}")


def _fit(recipe: RaterRecipe, stop: Stop) -> int:
    told = fit_rater(recipe, stop=stop)
    last = told["last_epoch"]
    log.say(
        f"{recipe.output}/rater.pt after {told['steps']:,} steps on {told['rows']['train']:,} train and "
        f"{told['rows']['validation']:,} validation rows; losses: train {last['train_loss_at_end']:.4g}, validation "
        f"{last['validation_loss_at_end']:.4g}, test {last['test_loss_at_end']:.4g}; "
        f"{last['effective_rows']:.1f} of {recipe.teach.batch_size} rows share a batch's weight"
    )
    made = json.dumps([{"make": "rating", "rater": recipe.output}, {"make": "percentile"}])
    print(f"Next: python -m jobs.curate RECIPE --output {recipe.run} --columns '{made}'")
    return EXIT_OK


def _picture(recipe: RatingsRecipe, stop: Stop) -> int:
    run = checked_run(recipe.run)
    pool = Pool.model_validate(manifest.read(storage.join(run, "recipe.json"))["recipe"]["pool"])
    found = rated_images(
        run,
        recipe.percentile,
        limit=recipe.rows,
        side=recipe.side,
        rules=pool.read_rules(),
        max_pixels=pool.max_pixels,
    )
    folder = storage.join(run, "fit", recipe.percentile)
    shown = {name: of_range(found.percentile, name, limit=recipe.images) for name in RANGES}
    for name, places in shown.items():
        if len(places):
            with storage.write_atomic(storage.join(folder, f"{name}.png")) as file:
                sheet(found.images[places]).save(file, "PNG")
    facts = correlations(found.percentile, dict(zip(FACTS, found.facts.T, strict=True)))
    told = {
        "format_version": 1,
        "rows": len(found.percentile),
        "not_decoded": found.num_dropped,
        "facts": facts,
        "images": {name: found.addresses[places].tolist() for name, places in shown.items()},
    }
    storage.write_bytes(storage.join(folder, "correlations.json"), json.dumps(told, indent=1).encode())
    for name, of in facts.items():
        if of["spearman_with_rating"] is not None:
            log.say(f"rating and {name}: Spearman {of['spearman_with_rating']:.3f}")
    if recipe.rater:
        dynamics = manifest.read(storage.join(storage.absolute(recipe.rater), "fit", "dynamics.json"))
        if "loss" in dynamics:
            storage.write_bytes(storage.join(folder, "dynamics.json"), json.dumps(dynamics).encode())
            with storage.write_atomic(storage.join(folder, "dynamics.png")) as file:
                draw_dynamics({name: dynamics[name] for name in PANELS}, file)
    log.say(f"{folder}: images of {len(found.percentile):,} rows by range, and what ratings go with")
    return EXIT_OK
