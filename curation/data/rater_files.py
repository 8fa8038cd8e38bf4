"""A taught rater on disk: `rater.pt`, its weights, and `rater.json`, what it is and which features it takes.

The json bears the digest of the weights, so that a column made by a rater is known by it, and a node that reads another
file is told so.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage

WEIGHTS, ABOUT = "rater.pt", "rater.json"


class StoredRater(NamedTuple):
    """Weights by name, and what is told of them: `features` (the column), `mode`, the network's shape, `sha256`."""

    state: dict[str, Tensor]
    about: dict[str, Any]


def save_rater(folder: str, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write both files; the json last, for it says that the weights are whole."""
    out = io.BytesIO()
    torch.save(dict(state), out)
    storage.write_bytes(storage.join(folder, WEIGHTS), out.getvalue())
    told = {"format_version": FORMAT_VERSION, **about, "sha256": hashlib.sha256(out.getvalue()).hexdigest()}
    storage.write_bytes(storage.join(folder, ABOUT), json.dumps(told, indent=1).encode())


def rater_about(folder: str) -> dict[str, Any]:
    """What is told of a rater. ValueError if there is none."""
    url = storage.join(folder, ABOUT)
    if not storage.exists(url):
        raise ValueError(f"rater: {folder!r} holds no taught rater; finish `python -m jobs.fit rater --output` it")
    return manifest.read(url)


def load_rater(folder: str) -> StoredRater:
    """Both. ValueError if the weights are not those that the json tells of."""
    about, data = rater_about(folder), storage.read_bytes(storage.join(folder, WEIGHTS))
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise ValueError(
            f"{storage.join(folder, WEIGHTS)} is not the file that {ABOUT} tells of: teach the rater again"
        )
    return StoredRater(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), about)
