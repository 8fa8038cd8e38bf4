"""Which code and which packages a run was made with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path

PACKAGES = ("curation", "ray", "torch", "torchvision", "open_clip_torch", "pyarrow", "numpy", "pillow", "simplejpeg")


@cache
def packages() -> dict[str, str]:
    """Versions of Python and of the packages that can change a run's results; "none" for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


@cache
def code() -> str:
    """sha256 of this package's own source files, so that a run tells code apart that no release has a number for."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
