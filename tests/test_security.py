"""What no line of ours may do: load code from data, or open Ray without a token."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}
FORBIDDEN = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CODE_LOADERS = {"load", "loads", "Unpickler", "open"}


def unsafe(source: str) -> Iterator[str]:
    """What is unsafe in a module, by line."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module in FORBIDDEN
            and {a.name for a in node.names} & CODE_LOADERS
        ):
            yield f"{node.lineno}: imports from {node.module}"
        # Its errors may be named: weights_only raises them.
        if isinstance(node, ast.Attribute) and node.attr in CODE_LOADERS and ast.unparse(node.value) in FORBIDDEN:
            yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and (wanted := SAFE.get(ast.unparse(node.func))):
            name, value = wanted
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            # A map of a file cannot hold objects, so numpy needs no word there.
            if given.get(name) != str(value) and "mmap_mode" not in given:
                yield f"{node.lineno}: {ast.unparse(node.func)} without {name}={value}"


@pytest.mark.parametrize("folder", ["curation", "jobs", "cluster"])
def test_nothing_of_ours_loads_code_from_data(folder: str) -> None:
    found = {str(path): list(unsafe(path.read_text())) for path in (ROOT / folder).rglob("*.py")}
    assert not {path: lines for path, lines in found.items() if lines} and found


@pytest.mark.parametrize("source", ["pickle.loads(b)", "from dill import load", "torch.load(f)", "np.load(f, None)"])
def test_what_would_load_code_is_found(source: str) -> None:
    assert list(unsafe(source))


def test_no_file_of_ours_switches_rays_authentication_off() -> None:
    files = [path for folder in ("curation", "jobs", "cluster") for path in (ROOT / folder).rglob("*")]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".yaml", ".sh") and path.is_file()}
    assert [path for path, text in texts.items() if "RAY_AUTH_MODE=disabled" in text or '"disabled"' in text] == []
    assert len(texts) > 100
