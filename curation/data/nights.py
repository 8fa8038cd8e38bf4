"""The nights of a nightly run, and the pointer to the one that is in use.

OUTPUT/run is the curation that grows. OUTPUT/nights/NAME is one night's result, complete and never changed again; its
night.json is written last. OUTPUT/current.json names the promoted night, and those promoted before it: it is replaced
in one write, so a reader sees the old night whole or the new one. Going back is the same write.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage

NIGHT = "night.json"
FOLDERS = ("selection", "shards", "embeddings")
FILES = ("README.md", "recipe.json", "summary.json", "drops.parquet")


def run_url(output: str) -> str:
    """The curation that grows from night to night."""
    return storage.join(output, "run")


def night_url(output: str, name: str) -> str:
    """One night's folder."""
    return storage.join(output, "nights", name)


def current(output: str) -> str | None:
    """The promoted night; None before the first."""
    return _promoted(output)[-1] if _promoted(output) else None


def read(output: str, name: str) -> dict[str, Any]:
    """What a night says of itself. ValueError if there is no such night, or it is not complete."""
    url = storage.join(night_url(output, name), NIGHT)
    if not storage.exists(url):
        raise ValueError(f"no night {name!r} in {output}: known are {', '.join(complete(output)) or 'none'}")
    return manifest.read(url)


def complete(output: str) -> list[str]:
    """Names of all complete nights, oldest first."""
    folder = storage.join(output, "nights")
    names = storage.folders_in(folder)
    return [name for name in names if storage.exists(storage.join(folder, name, NIGHT))]


def new_name(output: str) -> str:
    """A name for a night that begins now: its time, and a number if that is taken."""
    now = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
    taken = storage.folders_in(storage.join(output, "nights"))
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def keep(output: str, name: str, about: dict[str, Any]) -> None:
    """Copy the run's result into the night's folder, and complete it with `about`."""
    run, night = run_url(output), night_url(output, name)
    for folder in FOLDERS:
        for file in _below(storage.join(run, folder)):
            storage.copy(storage.join(run, folder, file), storage.join(night, folder, file))
    for file in FILES:
        storage.copy(storage.join(run, file), storage.join(night, file))
    _write(storage.join(night, NIGHT), {**about, "night": name})


def promote(output: str, name: str) -> None:
    """Make a complete night the current one. ValueError if there is no such night."""
    read(output, name)
    _point(output, [*_promoted(output), name])


def roll_back(output: str) -> str:
    """Make the night that was current before the current one; its name. ValueError if there is none."""
    promoted = _promoted(output)
    if len(promoted) < 2:
        raise ValueError(f"{output}: no night was promoted before {promoted[-1] if promoted else 'any'}")
    read(output, promoted[-2])
    _point(output, promoted[:-1])
    return promoted[-2]


def _promoted(output: str) -> list[str]:
    url = storage.join(output, "current.json")
    return manifest.read(url)["promoted"] if storage.exists(url) else []


def _point(output: str, promoted: list[str]) -> None:
    _write(storage.join(output, "current.json"), {"night": promoted[-1], "promoted": promoted})


def _below(folder: str) -> list[str]:
    """Paths of all files below a folder, relative to it."""
    deeper = [f"{name}/{file}" for name in storage.folders_in(folder) for file in _below(storage.join(folder, name))]
    return [*storage.names_in(folder), *deeper]


def _write(url: str, value: dict[str, Any]) -> None:
    storage.write_bytes(url, json.dumps({"format_version": FORMAT_VERSION, **value}, indent=1).encode())
