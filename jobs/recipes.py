"""Named recipes, as functions: where a run starts; the command line changes single fields.

`debug` runs on any pool on a CPU with a nano model of random weights, so its scores mean nothing; it proves the pipe.
The others name the models and sizes that DataComp's scales are filtered with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from curation.recipe import Compute, CurateRecipe, Embed, Select

CLIP_B32 = Embed(model="ViT-B-32", pretrained="laion2b_s34b_b79k", batch_size=512)
CLIP_L14 = Embed(model="ViT-L-14", pretrained="datacomp_xl_s13b_b90k", batch_size=256)


def debug() -> CurateRecipe:
    """Any pool, a CPU, a nano model with random weights: the scores mean nothing."""
    return CurateRecipe(name="debug", embed=Embed(model="nano", batch_size=64), compute=Compute(device="cpu"))


def small() -> CurateRecipe:
    """Up to ten million samples on one GPU: CLIP ViT-B/32, the top 30% by score."""
    return CurateRecipe(name="small", embed=CLIP_B32, compute=Compute(device="cuda", decode_threads=8))


def medium() -> CurateRecipe:
    """About a hundred million samples on a few GPUs: CLIP ViT-B/32, two actors per GPU."""
    return CurateRecipe(
        name="medium", embed=CLIP_B32, compute=Compute(device="cuda", gpus_per_actor=0.5, decode_threads=8)
    )


def large() -> CurateRecipe:
    """About a billion samples on a cluster: CLIP ViT-L/14."""
    return CurateRecipe(name="large", embed=CLIP_L14, compute=Compute(device="cuda", decode_threads=8))


def laion() -> CurateRecipe:
    """Pools of billions, cut as LAION-5B's English part was (arXiv:2210.08402): OpenAI's ViT-B/32, score >= 0.28."""
    return CurateRecipe(
        name="laion",
        embed=Embed(model="ViT-B-32-quickgelu", pretrained="openai", batch_size=512),
        compute=Compute(device="cuda", gpus_per_actor=0.5, decode_threads=8),
        selection=(Select(method={"name": "clip_score"}, min_score=0.28),),
    )


RECIPES: dict[str, Callable[[], CurateRecipe]] = {
    recipe.__name__: recipe for recipe in (debug, small, medium, large, laion)
}


def load_recipe(name: str) -> CurateRecipe:
    """A recipe by name, or from the JSON file of one (a run's recipe.json too). ValueError if there is none."""
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            return CurateRecipe.model_validate_json(_recipe_text(path))
        except ValueError as error:  # no JSON, or not of our fields
            raise ValueError(f"{name} is no recipe of ours: {error}") from error
    nearest = get_close_matches(name, RECIPES, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"no recipe {name!r}: known are {', '.join(RECIPES)}, or a .json file{hint}")


def _recipe_text(path: Path) -> str:
    """The recipe's JSON, out of a plain recipe file or a run's recipe.json, which holds versions beside it."""
    whole = json.loads(path.read_text())
    return json.dumps(whole.get("recipe", whole) if isinstance(whole, dict) else whole)
