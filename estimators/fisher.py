"""The metric of the rest of the model: how much each direction of the region's output matters to M's predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from estimators.kernels import RegionEvaluator
from mdl.task import Activations

RIDGE = 1e-4  # of the mean eigenvalue: directions that the rest of the model ignores still cost something to send


@dataclass(frozen=True)
class Metric:
    """G of |e|_G^2 = e^T G e, as its symmetric root [d, d]; `name` is "fisher" or "euclidean"."""

    name: str
    root: np.ndarray

    def distortion(self, errors: np.ndarray) -> float:
        """Mean of e^T G e over errors [n, d]."""
        return float(np.mean(np.sum(np.square(errors @ self.root, dtype=np.float64), 1)))

    def spread(self, outputs: np.ndarray) -> float:
        """Root mean square of outputs [n, d] about their mean, a dimension; 1 where they are all alike, so that it can
        begin a search for a step."""
        return math.sqrt(self.distortion(outputs - outputs.mean(0)) / len(self.root)) or 1.0


def fisher_metric(evaluator: RegionEvaluator, activations: Activations, seed: int, samples: int = 2) -> Metric:
    r"""Mean Fisher information of M's output with respect to the region's output at one position, nats per unit^2.

    $$G = E[g g^T], \quad g_t = \partial / \partial a_t \sum_{t'} \log p(y_{t'}), \quad y_{t'} \sim p_M$$

    An error e at one position then costs e^T G e / 2 nats of KL, summed over the positions it reaches, to second order
    (Kullback and Leibler 1951, section 6). Estimated from M's own samples on the given data, `samples` draws a token,
    plus a ridge of 1e-4 of the mean eigenvalue so that the root can be inverted.
    """
    width = activations.outputs.shape[-1]
    total, count = np.zeros((width, width)), 0
    for draw in range(samples):
        gradients = evaluator.score_gradients(activations, seed + 7919 * draw).astype(np.float64)
        total += gradients.T @ gradients
        count += len(gradients)
    values, vectors = np.linalg.eigh(total / count)
    values = np.maximum(values, 0.0)
    return Metric("fisher", (vectors * np.sqrt(values + RIDGE * values.mean())) @ vectors.T)


def euclidean_metric(width: int, noise: float = 1.0) -> Metric:
    """Every direction alike: I / noise^2, the Fisher metric of Gaussian outputs of that noise."""
    return Metric("euclidean", np.eye(width) / noise)
