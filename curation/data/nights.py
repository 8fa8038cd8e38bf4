"""The nights of a nightly run, and the pointer to the one that is in use.

OUTPUT/run is the curation that grows. OUTPUT/nights/NAME is one night's result, complete and never changed again; its
night.json is written last. OUTPUT/current.json names the promoted night, those promoted before it, and those that were
taken back: it is replaced in one write, so a reader sees the old night whole or the new one. Going back is the same
write.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any, NamedTuple

from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage

NIGHT = "night.json"
FOLDERS = ("selection", "shards", "embeddings")
FILES = ("README.md", "recipe.json", "summary.json", "drops.parquet")
OUTCOME = ("kept_sha256", "against", "last_shard", "held_back")
"""What of a night's `about` makes it the same as another: equal nights need one folder."""


class Pointer(NamedTuple):
    """Names of the nights that were promoted, the current one last, and of those that were taken back since."""

    promoted: list[str]
    rolled_back: list[str]


def run_url(output: str) -> str:
    """The curation that grows from night to night."""
    return storage.join(output, "run")


def night_url(output: str, name: str) -> str:
    """One night's folder."""
    return storage.join(output, "nights", name)


def current(output: str) -> str | None:
    """The promoted night; None before the first."""
    return next(reversed(_pointer(output).promoted), None)


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


def waiting(output: str, about: dict[str, Any]) -> str | None:
    """The newest complete night that came to the same as `about` says and is not promoted; None if there is none."""
    promoted, outcome = _pointer(output).promoted, {name: about[name] for name in OUTCOME}
    there = (name for name in reversed(complete(output)) if name not in promoted)
    return next((name for name in there if outcome.items() <= read(output, name).items()), None)


def rolled_back(output: str, kept_sha256: str) -> str | None:
    """The night with this kept set that was taken back and not promoted since; None if there is none."""
    there = set(complete(output))
    taken_back = (name for name in _pointer(output).rolled_back if name in there)
    return next((name for name in taken_back if read(output, name)["kept_sha256"] == kept_sha256), None)


def promote(output: str, name: str) -> None:
    """Make a complete night the current one, if it is not. ValueError if there is no such night."""
    read(output, name)
    promoted, taken_back = _pointer(output)
    others = promoted[:-1] if promoted[-1:] == [name] else promoted
    _point(output, Pointer([*others, name], [other for other in taken_back if other != name]))


def roll_back(output: str) -> str:
    """Make the night that was current before the current one; its name. ValueError if there is none.

    One whose folder was deleted is passed over. What was current is not promoted again by itself.
    """
    promoted, taken_back = _pointer(output)
    there = set(complete(output))
    before = [name for name in promoted[:-1] if name in there]
    if not before:
        raise ValueError(f"{output}: no night was promoted before {promoted[-1] if promoted else 'any'}")
    left = [*taken_back, promoted[-1]]
    _point(output, Pointer(before, [name for name in left if name != before[-1]]))
    return before[-1]


def _pointer(output: str) -> Pointer:
    url = storage.join(output, "current.json")
    told = manifest.read(url) if storage.exists(url) else {}
    return Pointer(told.get("promoted", []), told.get("rolled_back", []))


def _point(output: str, pointer: Pointer) -> None:
    _write(storage.join(output, "current.json"), {"night": pointer.promoted[-1], **pointer._asdict()})


def _below(folder: str) -> list[str]:
    """Paths of all files below a folder, relative to it."""
    deeper = [f"{name}/{file}" for name in storage.folders_in(folder) for file in _below(storage.join(folder, name))]
    return [*storage.names_in(folder), *deeper]


def _write(url: str, value: dict[str, Any]) -> None:
    storage.write_bytes(url, json.dumps({"format_version": FORMAT_VERSION, **value}, indent=1).encode())
