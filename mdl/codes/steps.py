"""The grid on which steps lie: quarter octaves, 2^(e/4), the same floating-point numbers on every machine."""

from __future__ import annotations

import numpy as np

STEPS_PER_OCTAVE = 4
LARGEST_EXPONENT = 126 * STEPS_PER_OCTAVE  # steps are normal float32 numbers, from 2^-126 to 2^126
_QUARTERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)  # 2^(i/4), the nearest of float64


def grid_steps(exponents: np.ndarray) -> np.ndarray:
    """2^(e/4), float64, for integers e: a constant times a power of two, which is exact."""
    return np.asarray(np.ldexp(np.array(_QUARTERS)[exponents % STEPS_PER_OCTAVE], exponents // STEPS_PER_OCTAVE))
