"""The floors of ARCHITECTURE.md: an import never points up, and rooms on one floor do not import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS: dict[str, int] = {
    **dict.fromkeys(["numerics", "models", "selector", "columns", "addresses"], 1),
    **dict.fromkeys(["methods", "training", "evaluation", "data", "ledger"], 2),
    "recipe": 3,
    **dict.fromkeys(["distributed", "report", "rating"], 4),
    "jobs": 5,
}
OPEN_ON_THE_GROUND = {"columns", "addresses"}
"""Rooms of the ground floor that the others there may use."""

ONLY_IN = {"ray": ("curation/distributed/", "jobs/"), "faiss": ("curation/numerics/neighbors.py",)}
"""Package -> the only places that import it."""


def room_of(module: str) -> str | None:
    """The room of a dotted module: 'jobs', or the part after 'curation.'; None if it is not ours or is `curation`."""
    head, *rest = module.split(".")
    if head == "jobs":
        return "jobs"
    return rest[0] if head == "curation" and rest else None


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever it stands; `package` is what a relative import starts from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from curation import data` names a room in its alias.
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function in {"importlib.import_module", "import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def violations(root: Path) -> list[str]:
    """'file:line: what is wrong' for every import under curation/ and jobs/ that breaks a rule."""
    wrong: list[str] = []
    for path in sorted([*root.glob("curation/**/*.py"), *root.glob("jobs/**/*.py")]):
        file = path.relative_to(root).as_posix()
        parts = path.relative_to(root).with_suffix("").parts
        own = room_of(".".join(part for part in parts if part != "__init__"))
        if own is not None and own not in FLOORS:
            wrong.append(f"{file}:1: the room {own!r} has no floor")
            continue
        for line, module in imported_modules(ast.parse(path.read_text(), file), ".".join(parts[:-1])):
            if problem := problem_with(own, file, module):
                wrong.append(f"{file}:{line}: {problem}")
    return wrong


def problem_with(own: str | None, file: str, module: str) -> str | None:
    package = module.split(".")[0]
    if package in ONLY_IN and not file.startswith(ONLY_IN[package]):
        return f"{package} may be imported in {' and '.join(ONLY_IN[package])} only"
    room = room_of(module)
    if room is None or room == own:
        return None
    if own is None:
        return f"the package itself imports {room}"
    if room not in FLOORS:
        return f"imports {room!r}, which has no floor"
    if FLOORS[room] > FLOORS[own]:
        return f"{own} (floor {FLOORS[own]}) imports {room} (floor {FLOORS[room]}), which is above it"
    if FLOORS[room] == FLOORS[own] and not (FLOORS[own] == 1 and room in OPEN_ON_THE_GROUND):
        return f"{own} and {room} share floor {FLOORS[own]} and may not import each other"
    return None


def test_no_import_points_up_or_sideways_and_ray_stays_in_its_rooms():
    assert violations(ROOT) == []


def test_the_whole_tree_was_read():
    assert len(list(ROOT.glob("curation/**/*.py"))) >= 10


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("curation/numerics/a.py", "from curation.methods.jest import Jest", "numerics .* imports methods .* above"),
        ("curation/data/a.py", "from curation import recipe", "data .* imports recipe"),
        ("curation/recipe.py", "import jobs.curate", "recipe .* imports jobs"),
        ("curation/distributed/a.py", "from jobs import curate", "distributed .* imports jobs"),
        ("curation/data/a.py", "from ..training import step", "data and training share floor 2"),
        ("curation/numerics/a.py", "from curation import selector", "numerics and selector share floor 1"),
        ("curation/report/a.py", "import curation.distributed.embed", "report and distributed share floor 4"),
        ("curation/data/a.py", "def f():\n    import ray.data", "a.py:2: ray may be imported in"),
        ("curation/report/a.py", "from ray import get", "ray may be imported in curation/distributed/ and jobs/ only"),
        ("curation/data/a.py", "__import__('ray')", "ray may be imported in"),
        ("curation/methods/a.py", "import faiss", "faiss may be imported in curation/numerics/neighbors.py only"),
        ("curation/utils.py", "import os", "the room 'utils' has no floor"),
        ("curation/data/a.py", "from curation.utils import x", "imports 'utils', which has no floor"),
        ("curation/__init__.py", "from curation.selector import Rows", "the package itself imports selector"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, line, complaint):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line)
    (found,) = violations(tmp_path)
    assert re.search(complaint, found), found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("curation/selector.py", "from curation.columns import is_run_value"),
        ("curation/data/a.py", "from . import b\nfrom curation.data.b import c\nimport numpy"),
        ("curation/methods/a.py", "from curation.numerics.sampling import exact_top"),
        ("curation/distributed/a.py", "import ray\nfrom curation.recipe import Recipe"),
        ("jobs/a.py", "import ray\nfrom curation.distributed import embed\nfrom jobs import recipes"),
        ("curation/numerics/neighbors.py", "import faiss"),
    ],
)
def test_a_right_import_passes(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line)
    assert violations(tmp_path) == []
