r"""How few bits weights could take at all: the water-filling bound, an `estimate`, beside which real quantisers stand.

For a Gaussian source with the weights' own variance, under the error measure tr(A E B E^T) of each matrix, whose
eigenvalues are the products lambda_i mu_j of those of A and B:

    R(theta) = sum_ij max(0, 1/2 log2(sigma^2 lambda_i mu_j / theta)),
    D(theta) = sum_ij min(theta, sigma^2 lambda_i mu_j)

(Cover and Thomas 2006, 10.3.3; of weights, arXiv:2603.04956). A uniform quantiser with an ideal entropy coder is 0.25
bit a weight above it at high rate. Weights that are no independent Gaussians can be cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decompositions.weights.curvature import Curvature, Curvatures


@dataclass(frozen=True)
class WaterFilling:
    """A point of the bound: `bits` of all matrices, `kl_bits` a token that their error makes, to second order."""

    bits: float
    kl_bits: float


def water_filling(
    weights: Mapping[str, np.ndarray], curvatures: Curvatures, kl_bits: Sequence[float]
) -> list[WaterFilling]:
    """The bound at some KL, in bits a token. The curvature is in the Fisher metric, in which KL = D / 2 nats."""
    variances = np.concatenate([_variances(weights[name], c) for name, c in curvatures.matrices.items()])
    return [_at(variances, 2.0 * np.log(2.0) * float(kl)) for kl in kl_bits]


def _variances(matrix: np.ndarray, curvature: Curvature) -> np.ndarray:
    """sigma^2 lambda_i mu_j of one matrix."""
    left, right = (np.maximum(np.linalg.eigvalsh(side), 0.0) for side in (curvature.inputs, curvature.outputs))
    return np.asarray(np.mean(np.square(matrix, dtype=np.float64)) * np.outer(left, right)).ravel()


def _at(variances: np.ndarray, distortion: float) -> WaterFilling:
    """By bisection on the water level."""
    low, high = 0.0, float(variances.max())
    for _ in range(200):
        level = (low + high) / 2
        low, high = (low, level) if np.minimum(level, variances).sum() > distortion else (level, high)
    level = (low + high) / 2
    above = variances[variances > level]
    reached = float(np.minimum(level, variances).sum())
    return WaterFilling(float(0.5 * np.log2(above / level).sum()), reached / (2.0 * np.log(2.0)))
