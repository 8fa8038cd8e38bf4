"""Numbers that tell a picture from no picture: how sharp it is, how plain, how dense its edges, how colourful.

Sharpness is the variance of the Laplacian of the grey values (Pech-Pacheco et al. 2000, doi:10.1109/ICPR.2000.903548):
low for what is out of focus or enlarged, high for fine texture and for noise. Plainness is the share of pixels within a
few levels of the commonest tone: 1 for a blank, near 1 for a placeholder or a line of text on white.

H, W height and width in pixels.
"""

from __future__ import annotations

import numpy as np

PLAIN_LEVELS = 4
"""Grey levels either side of the commonest that count as the same tone: more than JPEG's noise on a blank."""


def laplacian_variance(grey_HW: np.ndarray) -> float:
    """Variance of the 4-neighbour Laplacian inside the border, grey values in [0, 255]; 0 below 3 x 3 pixels."""
    if min(grey_HW.shape) < 3:
        return 0.0
    grey = grey_HW.astype(np.float32)
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    return float(laplacian.var(dtype=np.float64))


def plainness(grey_HW: np.ndarray) -> float:
    """Share of the pixels (uint8) within PLAIN_LEVELS of the commonest grey value, in (0, 1]."""
    counts = np.bincount(grey_HW.ravel(), minlength=256)
    tone = int(counts.argmax())
    return float(counts[max(0, tone - PLAIN_LEVELS) : tone + PLAIN_LEVELS + 1].sum() / grey_HW.size)


def colourfulness(image_HW3: np.ndarray) -> float:
    """Hasler and Susstrunk 2003 (doi:10.1117/12.477378), Eqs. 1 to 4: 0 for grey, about 109 for what people call
    extremely colourful. RGB values in [0, 255]."""
    red, green, blue = np.moveaxis(image_HW3.astype(np.float64), -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(), yellow_blue.std())
    return float(spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))


def edge_density(grey_HW: np.ndarray) -> float:
    """Mean absolute difference of neighbouring grey values, in [0, 1] for grey values in [0, 255]; 0 for one pixel."""
    grey = grey_HW.astype(np.float32) / 255
    steps = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1) if grey.shape[axis] > 1]
    return float(np.mean(steps)) if steps else 0.0
