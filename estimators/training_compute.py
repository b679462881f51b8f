"""Training compute recovered: the compute at which the model's own loss curve has the explained model's loss, over the
model's own compute (as Gao et al. 2024, arXiv 2406.04093, have it for GPT-4).

The curve's loss is of other text than the held-out data. Both are put on one footing by the gap: the explained model's
cross-entropy less the model's, on the same held-out tokens, is added to the loss with which the curve ends.

A measured curve is smoothed (isotonic regression) and interpolated, not fitted: the explained model's loss lies inside
it, and no law with three parameters has the bend that a falling learning rate makes (of the embedded model's curve the
nearest misses 0.086 nats root mean square, the smoothed curve 0.013). It is one run with one schedule: a run that ended
early, with a decay of its own, would have needed less, so that what is printed is an upper bound where the rate falls
late.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy.optimize import isotonic_regression, least_squares

from mdl.errors import DataError
from mdl.training import LAW
from mdl.units import bits_to_nats


@runtime_checkable
class TrainingLoss(Protocol):
    """Loss against compute, of which the model is the end."""

    def fraction(self, gap_nats: float) -> float:
        """The share of the model's training compute at which the loss is `gap_nats` above its own; 1 at 0."""
        ...


@dataclass(frozen=True)
class MeasuredCurve:
    """A decreasing curve through measured points: `compute` from 0 (nothing learnt: ln V nats) to the model's own,
    increasing, `loss_nats` decreasing; straight between them."""

    compute: np.ndarray
    loss_nats: np.ndarray

    @classmethod
    def of(cls, compute: np.ndarray, loss_nats: np.ndarray, untrained_nats: float, final: float) -> MeasuredCurve:
        """From noisy points: the nearest curve that never rises (isotonic regression), each of its steps at the middle
        of its points, the last at `final`."""
        level = isotonic_regression(np.minimum(loss_nats, untrained_nats), increasing=False).x
        values, block = np.unique(-level, return_inverse=True)
        middle = np.bincount(block, compute) / np.bincount(block)
        middle[-1] = final
        known = -values < untrained_nats
        return cls(np.concatenate([[0.0], middle[known]]), np.concatenate([[untrained_nats], -values[known]]))

    def fraction(self, gap_nats: float) -> float:
        """1 also for losses below the model's, which the curve does not reach; 0 above ln V."""
        loss = self.loss_nats[-1] + gap_nats
        return float(np.interp(loss, self.loss_nats[::-1], self.compute[::-1]) / self.compute[-1])


@dataclass(frozen=True)
class ScalingLaw:
    """L(C) = E + A C^-alpha, nats a token, and the model's own compute C in floating-point operations."""

    irreducible_nats: float
    coefficient: float
    exponent: float
    flops: float

    def loss(self, compute: float | np.ndarray) -> np.ndarray:
        """Nats a token at some compute."""
        return np.asarray(self.irreducible_nats + self.coefficient * np.asarray(compute, float) ** -self.exponent)

    def fraction(self, gap_nats: float) -> float:
        """(1 + gap / (L(C) - E))^(-1/alpha); above 1 for a gap below 0, infinite where the loss is below E."""
        share = 1.0 + gap_nats / (float(self.loss(self.flops)) - self.irreducible_nats)
        return float(share ** (-1.0 / self.exponent)) if share > 0 else float("inf")


def fit_scaling_law(compute: np.ndarray, loss_nats: np.ndarray, flops: float) -> tuple[ScalingLaw, float]:
    """The law nearest to measured points (least squares of the loss), and its root mean square error in nats.

    Leave out the tail in which the learning rate falls: no power law has its bend.

    **Raises:** `DataError` for fewer points than a law with three parameters takes.
    """
    if len(compute) < 4:
        raise DataError(f"a scaling law of three parameters from {len(compute)} points: it takes four or more")
    scale = float(np.exp(np.mean(np.log(compute))))
    spread = float(np.ptp(loss_nats)) or 1.0

    def law(parameters: np.ndarray) -> ScalingLaw:
        irreducible, log_term, log_exponent = parameters
        exponent = float(np.exp(log_exponent))
        return ScalingLaw(float(irreducible), float(np.exp(log_term)) * scale**exponent, exponent, flops)

    def errors(parameters: np.ndarray) -> np.ndarray:
        return law(parameters).loss(compute) - loss_nats

    start = np.array([max(float(np.min(loss_nats)) - spread / 4, 0.0), np.log(spread / 2), np.log(0.5)])
    bounds = ([0.0, -30.0, np.log(1e-3)], [float(np.min(loss_nats)), 30.0, np.log(5.0)])
    found = least_squares(errors, start, bounds=bounds, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=5000)
    return law(found.x), float(np.sqrt(np.mean(found.fun**2)))


def training_loss(record: Mapping[str, Any]) -> TrainingLoss:
    """From a record of `mdl.training`."""
    if record["kind"] == LAW:
        return ScalingLaw(*(record[k] for k in ("irreducible_nats", "coefficient", "exponent", "flops")))
    compute, loss = np.array(record["compute"]), np.array(record["loss_nats"])
    return MeasuredCurve.of(compute, loss, record["untrained_nats"], float(record["final"]))


def compute_recovered(law: TrainingLoss, loss_increase_bits: float) -> float:
    """The share of training compute whose model is as good as one whose loss is so many bits a token higher."""
    return law.fraction(float(bits_to_nats(loss_increase_bits)))
