"""Quantised reals: the quantisers, and what theory says of their steps and rates. The codes are in `tables`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mdl.errors import CodeError

_MAX_LEVEL = 2.0**62


def _levels(values: np.ndarray, step: float, rounding: float) -> np.ndarray:
    if not (math.isfinite(step) and step > 0):
        raise CodeError(f"a quantiser's step must be positive and finite, not {step}.")
    levels = np.floor(np.abs(values.astype(np.float64)) / step + rounding)
    if levels.size and not levels.max() < _MAX_LEVEL:
        raise CodeError(
            f"step {step} puts the largest of {values.size} values at level {levels.max()}; there is a NaN or an "
            "infinity among the values, or the step is too fine for them."
        )
    return (np.sign(values) * levels).astype(np.int64)


def uniform_quantise(values: Float[np.ndarray, "*shape"], step: float) -> Int[np.ndarray, "*shape"]:
    """sign(v) floor(|v| / step + 1/2): the nearest level, halves away from zero.

    **Raises:** CodeError for a step that is not positive, or values that are not finite.
    """
    return _levels(values, step, 0.5)


def dequantise(levels: Int[np.ndarray, "*shape"], step: float) -> Float[np.ndarray, "*shape"]:
    """levels * step, float64: the midpoints."""
    return np.asarray(levels * float(step))


def dead_zone_quantise(values: Float[np.ndarray, "*shape"], step: float, rounding: float) -> Int[np.ndarray, "*shape"]:
    """sign(v) floor(|v| / step + rounding), with rounding in (0, 1/2]; below 1/2 the cell around zero is the widest.

    **Raises:** CodeError for a rounding outside (0, 1/2], a step that is not positive, or values that are not finite.

    **Source:** Sullivan 1996, IEEE Trans. Inf. Theory 42(5), 1365-1374.
    """
    if not 0.0 < rounding <= 0.5:
        raise CodeError(f"a dead zone's rounding lies in (0, 0.5], not {rounding}; 0.5 is the uniform quantiser.")
    return _levels(values, step, rounding)


def dead_zone_dequantise(
    levels: Int[np.ndarray, "*shape"], step: float, shifts: Float[np.ndarray, " s"]
) -> Float[np.ndarray, "*shape"]:
    """sign(q) (|q| + shift(|q|)) step, where shift(m) = shifts[min(m, s) - 1], and zero stays zero.

    With three shifts: one for |q| = 1, one for |q| = 2, one for the rest. Raises CodeError without any shift.
    """
    if shifts.size == 0:
        raise CodeError("a dead-zone reconstruction needs at least one shift; pass zeros for the midpoints.")
    magnitude = np.abs(levels)
    shift = shifts[np.minimum(np.maximum(magnitude, 1), shifts.size) - 1]
    return np.asarray(np.sign(levels) * (magnitude + shift) * float(step))


def centroid_shifts(
    values: Float[np.ndarray, " n"], levels: Int[np.ndarray, " n"], step: float, count: int = 3
) -> Float[np.ndarray, " count"]:
    """The shifts for `dead_zone_dequantise` of least squared error: mean of |v| / step - |q| in each group; else 0."""
    magnitude = np.abs(levels)
    offset = np.where(levels < 0, -values, values) / step - magnitude
    group = np.minimum(magnitude, count)
    uses = np.bincount(group, minlength=count + 1)[1:]
    return np.bincount(group, offset, count + 1)[1:] / np.maximum(uses, 1)


def reverse_water_filling(
    variances: Float[np.ndarray, " n"], distortion: float
) -> tuple[float, Float[np.ndarray, " n"]]:
    r"""Rate and distortions of independent Gaussian components at a total mean squared error D.

    $$R = \sum_i \max(0, \tfrac12 \log_2(\lambda_i / \theta)), \qquad D = \sum_i \min(\lambda_i, \theta)$$

    **Arguments:** `variances`: lambda, each at least 0; `distortion`: D, positive.

    **Returns:** bits a vector, and each component's distortion min(lambda, theta).

    **Raises:** CodeError for a negative variance or a distortion that is not positive.

    **Source:** Cover and Thomas, Elements of Information Theory, theorem 10.3.3.
    """
    if distortion <= 0 or (variances.size and variances.min() < 0):
        raise CodeError(f"reverse water-filling needs D > 0 (it is {distortion}) and variances of at least 0.")
    ascending = np.sort(variances.astype(np.float64))
    if distortion >= ascending.sum():
        return 0.0, variances.astype(np.float64)
    below = np.r_[0.0, np.cumsum(ascending)[:-1]]
    # theta if exactly the components from i on lie above it; the first i for which that comes true is right.
    theta = (distortion - below) / np.arange(ascending.size, 0, -1)
    water = float(theta[np.flatnonzero(theta <= ascending)[0]])
    rate = 0.5 * np.log2(np.maximum(variances / water, 1.0)).sum()
    return float(rate), np.minimum(variances.astype(np.float64), water)


def optimal_step(fisher_nats_per_use: Any, uses: Any) -> Any:
    r"""The step of a parameter at which its bits and the loss they cause are least together, sqrt(12 / (n h)).

    The loss is n h s^2 / 24 nats for a uniform error of variance s^2 / 12; the bits are log2(range / s).

    **Arguments:** `fisher_nats_per_use` (h): the second derivative of the loss, in nats a use; `uses` (n).

    **Source:** Rissanen 1978, Automatica 14, 465-471; with the variance of a uniform error.
    """
    return np.sqrt(12.0 / (np.asarray(uses) * np.asarray(fisher_nats_per_use)))


def two_part_bits(value_range: Any, fisher_nats_per_use: Any, uses: Any) -> Any:
    """log2(range / s*) + (1/2) log2 e: a parameter at its optimal step, and the loss that it causes; in bits."""
    return np.log2(np.asarray(value_range) / optimal_step(fisher_nats_per_use, uses)) + 0.5 * math.log2(math.e)
