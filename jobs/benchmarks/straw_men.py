"""One number alone, by which a selection could be made without any method: clarity, match, aesthetic.

What users take for the last two, CLIP's weights and LAION's aesthetic head, could not be had here, so these are
stand-ins, and figures of theirs are told as such:

    clarity     variance of the Laplacian of the grey image, as `jobs.fit quality` has it
    match       cosine of an image's features with what its caption predicts of them: a ridge regression from hashed
                words, fitted on the pairs of the study's other pools. A linear text tower, for want of CLIP's
    aesthetic   colourfulness (Hasler and Susstrunk 2003), which people's ratings follow somewhat; no head was trained

n images, F features, W hashed words.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from curation.numerics.picture import colourfulness, laplacian_variance

CLARITY, MATCH, AESTHETIC = "clarity", "match", "aesthetic"
WORDS = 1024
RIDGE = 1.0
"""Added to the words' counts: a word that was seen once predicts half of what was seen."""


def measured(image: Image.Image) -> tuple[float, float]:
    """Clarity and colourfulness of an RGB image."""
    return laplacian_variance(np.asarray(image.convert("L"))), colourfulness(np.asarray(image))


def match(
    captions: Sequence[str], features_nF: np.ndarray, *, known_captions: Sequence[str], known_mF: np.ndarray
) -> np.ndarray:
    """(n,) in [-1, 1]; 0 for a caption without a known word. Both sets of features are of unit norm."""
    mean_F = known_mF.mean(axis=0)
    words_mW = np.stack([_words(caption) for caption in known_captions])
    normal_WW = words_mW.T @ words_mW + RIDGE * np.eye(WORDS)
    weights_WF = np.linalg.solve(normal_WW, words_mW.T @ (known_mF - mean_F))
    predicted_nF = np.stack([_words(caption) for caption in captions]) @ weights_WF
    found_nF = features_nF - mean_F
    norms = np.linalg.norm(predicted_nF, axis=1) * np.linalg.norm(found_nF, axis=1)
    return np.einsum("nf,nf->n", predicted_nF, found_nF) / np.maximum(norms, 1e-12)


def _words(caption: str) -> np.ndarray:
    """(W,): 1 for each word that it has, by its CRC."""
    present = np.zeros(WORDS)
    for word in re.findall(r"\w+", caption.lower()):
        present[zlib.crc32(word.encode()) % WORDS] = 1.0
    return present
