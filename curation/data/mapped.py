"""Arrays that any process of a machine maps into its memory: of a large file only the pages that are touched."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence

import numpy as np

from curation.data import storage

_COPIES = contextlib.ExitStack()
"""Folders of arrays that came from a bucket; they go when the process does."""


def mapped_arrays(folder: str, names: Sequence[str]) -> list[np.ndarray]:
    """The .npy files `names` of a folder, mapped; those in a bucket are first copied to this machine's disk.

    The caller keeps what it was given: each call to a bucket copies.
    """
    if not storage.is_local(folder):
        copies = _COPIES.enter_context(tempfile.TemporaryDirectory(prefix="curation-mapped-"))
        for name in names:
            storage.copy(storage.join(folder, name), storage.join(copies, name))
        folder = copies
    return [np.load(storage.join(folder, name), mmap_mode="r", allow_pickle=False) for name in names]
