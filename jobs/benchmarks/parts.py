"""Parts of a study, each written when it is done and not done again: a study may be cut short and gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` found, now or when it was done, as JSON has it. The file is there whole or not at all."""
    if not path.exists():
        print(f"{path.stem} ...", flush=True)
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.part")
        unfinished.write_text(json.dumps(found))
        os.replace(unfinished, path)
    return json.loads(path.read_text())
