"""Three pools for one question (J-10): is selecting from raw data worse than from filtered, better than curated alone?

raw: the demo's pool as it is. filtered: what the demo's CLIP filter kept of it. curated: the clean pairs that the
reference was trained on, and nothing else. All three hold the same reference's embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from curation.data import manifest
from curation.distributed.pipeline import curate
from curation.recipe import CurateRecipe, TrainRecipe
from jobs.benchmarks.tracks import Pair, write_pairs
from jobs.command import ended
from jobs.demo_scenes import make_pairs


def raw(recipe: TrainRecipe, folder: Path, *, num_pairs: int) -> TrainRecipe:
    """The recipe as it is."""
    del folder, num_pairs
    return recipe


def filtered(recipe: TrainRecipe, folder: Path, *, num_pairs: int) -> TrainRecipe:
    """The recipe on what the demo's filter kept; the log still knows which of it is junk."""
    del num_pairs
    return _on(recipe, f"{recipe.data.run}/shards/*.tar", folder / "filtered-run", truth=recipe.data.truth)


def curated(recipe: TrainRecipe, folder: Path, *, num_pairs: int) -> TrainRecipe:
    """The recipe on the reference's own pairs, of which none is junk."""
    pairs, truth = folder / "curated", folder / "curated" / "mismatched.parquet"
    if not truth.exists():  # written last
        clean = (Pair(pair.image, pair.caption, False, {}) for pair in make_pairs(num_pairs, stream="reference"))
        write_pairs(pairs, clean, name="curated")
    return _on(recipe, str(pairs), folder / "curated-run", truth=str(truth))


POOLS: dict[str, Callable[..., TrainRecipe]] = {"raw": raw, "filtered": filtered, "curated": curated}


def _on(recipe: TrainRecipe, shards: str, run: Path, *, truth: str | None) -> TrainRecipe:
    """The recipe on other shards, embedded as its own pool was; what is embedded already is not embedded again."""
    own = CurateRecipe.model_validate(manifest.read(f"{recipe.data.run}/recipe.json")["recipe"])
    changed = {
        "name": run.name,
        "pool": own.pool.model_copy(update={"shards": shards}),
        "selection": (),
        "write": own.write.model_copy(update={"tars": False}),
        "output": str(run),
    }
    ended(curate(own.model_copy(update=changed)), of=run.name)
    data = recipe.data.model_copy(update={"run": str(run), "truth": truth})
    return recipe.model_copy(update={"data": data})
