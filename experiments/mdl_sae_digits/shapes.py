r"""What a feature looks like, by figures that were fixed before any feature was looked at.

Of a feature's row a, seen as a picture:

    cosine      the largest cosine between a and an image of the fit data, less the mean image
    area        share of the picture's pixels at or above half of the row's maximum
    elongation  sqrt((l1 + 1/12) / (l2 + 1/12)), l1 >= l2 the second moments of the values of these pixels about their
                centre (1/12 is a pixel's own), so that a dot has 1 and a bar of 4 x 1 pixels 4
    positive    share of |a|^2 in positive entries: ink, as opposed to ink taken away

and of these a kind, the first that applies:

    digit       cosine at least tau: as near to an image of the fit data as every second new image is. tau is the median
                over tuning images of their own largest cosine
    fragment    area at most 3/64: three pixels of 8 x 8
    segment     these pixels hang together (diagonals count), elongation at least 2, positive at least 1/2
    other
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

KINDS = ("digit", "fragment", "segment", "other")
FRAGMENT_AREA = 3 / 64
SEGMENT_ELONGATION = 2.0
SEGMENT_POSITIVE = 0.5
PIXEL_MOMENT = 1 / 12


@dataclass(frozen=True)
class Shapes:
    """Of each of F features: the four figures, and the kind as an index into `KINDS`; arrays [F]."""

    cosine: np.ndarray
    area: np.ndarray
    elongation: np.ndarray
    positive: np.ndarray
    kind: np.ndarray

    def shares(self, weights: np.ndarray) -> dict[str, float]:
        """Share of each kind under weights [F]."""
        sums = np.bincount(self.kind, weights, len(KINDS)) / weights.sum()
        return dict(zip(KINDS, map(float, sums), strict=True))


def largest_cosines(rows: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The largest cosine of each row [F, d] with any of the images [n, d], [F]."""
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (rows, images)]
    return (unit[0] @ unit[1].T).max(1)


def digit_threshold(fit: np.ndarray, tune: np.ndarray) -> float:
    """tau: the median over tuning images of the largest cosine with a fit image, both less the fit data's mean."""
    return float(np.median(largest_cosines(tune - fit.mean(0), fit - fit.mean(0))))


def describe(rows: np.ndarray, fit: np.ndarray, threshold: float) -> Shapes:
    """The shapes of rows [F, side * side], against the fit images [n, side * side]."""
    side = int(np.sqrt(rows.shape[1]))
    cosine = largest_cosines(rows, fit - fit.mean(0))
    figures = np.array([_figures(row.reshape(side, side)) for row in rows], float).reshape(len(rows), 4)
    area, elongation, positive, connected = figures.T
    segment = (connected == 1) & (elongation >= SEGMENT_ELONGATION) & (positive >= SEGMENT_POSITIVE)
    kind = np.select([cosine >= threshold, area <= FRAGMENT_AREA, segment], [0, 1, 2], 3)
    return Shapes(cosine, area, elongation, positive, kind)


def _figures(picture: np.ndarray) -> tuple[float, float, float, int]:
    """Area, elongation, positive share, and whether the core hangs together."""
    if picture.max() <= 0:
        return 0.0, 1.0, 0.0, 0
    core = picture >= picture.max() / 2
    weights = picture[core] / picture[core].sum()
    places = np.argwhere(core).astype(float)
    centred = places - weights @ places
    moments = np.linalg.eigvalsh((centred * weights[:, None]).T @ centred) + PIXEL_MOMENT
    parts = ndimage.label(core, np.ones((3, 3)))[1]
    positive = np.square(picture[picture > 0]).sum() / np.square(picture).sum()
    return float(core.mean()), float(np.sqrt(moments[1] / moments[0])), float(positive), int(parts == 1)
