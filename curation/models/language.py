"""The language of a caption, as fastText's language identification tells it.

Joulin et al. 2016 (arXiv:1607.01759, arXiv:1612.03651); the models lid.176.bin (DataComp's) and lid.176.ftz, its
compressed form, know 176 languages. A caption is one line: line feeds become spaces first, as in DataComp's
`apply_filter.py`.
40 microseconds a caption on one core.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = "__label__"
Identify = Callable[[Sequence[str]], tuple[list[str], np.ndarray]]


def load_language_model(path: str) -> Identify:
    """Captions (n) -> their likeliest languages (n) and the probabilities of these (n,) float32.

    ValueError if the file is none of fastText's, or the package that reads it is not installed.
    """
    try:
        import fasttext
    except ImportError as error:
        raise ValueError("language columns need fasttext-predict: pip install 'curation[language]'") from error
    if not Path(path).is_file():
        raise ValueError(f"{path!r} is not a file: name fastText's lid.176.bin or lid.176.ftz, on every node")
    try:
        model = fasttext.load_model(path)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no fastText model: {error}") from error

    def identify(captions: Sequence[str]) -> tuple[list[str], np.ndarray]:
        told: list[Any] = [model.predict(caption.replace("\n", " "), k=1) for caption in captions]
        names = [str(labels[0]).removeprefix(PREFIX) for labels, _ in told]
        return names, np.array([float(probabilities[0]) for _, probabilities in told], np.float32)

    return identify


def language_model_digest(path: str) -> str:
    """64 hex digits that name the model: its file's sha256. ValueError if there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"{path!r} is not a file: name fastText's lid.176.bin or lid.176.ftz")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
