"""What a run is: frozen, validated models. Nothing else configures a run, and a saved recipe runs it again.

Unknown names and values out of bounds are errors that name the field. A recipe round-trips through JSON; every run
saves its own, resolved, in its output.
"""

from curation.recipe.balance import Audit, Balance, Group
from curation.recipe.curate import (
    Compute,
    CurateRecipe,
    Embed,
    OneOf,
    Select,
    Step,
    Threshold,
    Write,
    parse_steps,
)
from curation.recipe.parts import Part, Pool
from curation.recipe.train import TrainRecipe

__all__ = [
    "Audit",
    "Balance",
    "Compute",
    "CurateRecipe",
    "Embed",
    "Group",
    "OneOf",
    "Part",
    "Pool",
    "Select",
    "Step",
    "Threshold",
    "TrainRecipe",
    "Write",
    "parse_steps",
]
