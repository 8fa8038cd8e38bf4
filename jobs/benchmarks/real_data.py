"""Where the real data is, and how its tars are read; nothing here needs Ray."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TFLITE = Path("weights") / "mobilenet_v1_1.0_224_quant_embedding_extractor.tflite"
RESNET20 = Path("weights") / "resnet20-12fca82f.th"


def tar_samples(folder: Path, *, limit: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Image bytes and json fields of img2dataset's tars, in order."""
    num_seen = 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            image = b""
            for member in tar:
                content = tar.extractfile(member)
                if content is None or num_seen == limit:
                    continue
                if member.name.endswith((".jpg", ".png")):
                    image = content.read()
                elif member.name.endswith(".json"):
                    num_seen += 1
                    yield image, json.loads(content.read())


def real_data() -> Path:
    """The folder of real data. ValueError if it is not there."""
    named = os.environ.get("CURATION_TEST_DATA")
    folder = Path(named) if named else Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        raise ValueError(f"no real data in {folder}: set CURATION_TEST_DATA")
    return folder
