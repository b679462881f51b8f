"""Transform coding: principal axes of a metric, one common step, a dead zone, an adaptive code for each axis.

The standard residual coder and PCA are this one code, so that neither has an edge over the other. Errors are measured
in a metric G (|e|_G^2 = e^T G e); the axes are the principal ones of u = G^(1/2) e. The receiver holds only the rows
that integers are multiplied with (each already times the step), a mean, and the reconstruction points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from mdl.alphabets import DenseAlphabet
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section
from mdl.protocols import Inputs, Settings
from mdl.state import DenseState, State
from mdl.static_rows import metric_rows

KIND = "components"
SHIFT_UNITS = 32  # reconstruction points are sent in 1/32 of a step
LARGEST_LEVEL = 1 << 30  # a step so fine that this is exceeded is far beyond float32 anyway
SHIFT_LEVELS = 3  # for |q| = 1, 2, and 3 or more
# -dD/dR of a uniform quantiser at high rate, in steps squared per bit: 2 ln 2 / 12. Thresholds spend bits at it.
PRICE = 2.0 * np.log(2.0) / 12.0


@dataclass(frozen=True)
class ComponentsDecoder:
    """mean + sum over components j of r(q_j) * row_j, with r(q) = sign(q) (|q| - shift of |q|)."""

    mean: np.ndarray
    rows: np.ndarray
    shifts: np.ndarray

    @classmethod
    def from_section(cls, section: Section) -> ComponentsDecoder:
        """Header: mean [1, d]. Parts: rows [r, d], shifts [r, 3] in 1/32."""
        if len(section.header) != 1 or len(section.parts) != 2:
            raise MessageError("a 'components' section has one header array (mean) and two part arrays (rows, shifts)")
        mean, rows = section.header[0].vector("the mean of a 'components' section"), section.parts[0].values()
        if rows.shape[1] != len(mean) or len(rows) != section.n_parts:
            raise MessageError(f"'components': rows {rows.shape} do not fit a mean of {len(mean)}")
        what = "the array of shifts of a 'components' section"
        shifts = section.parts[1].integers(what, -SHIFT_UNITS, SHIFT_UNITS, SHIFT_LEVELS)
        return cls(mean, rows, shifts.astype(np.float32) / np.float32(SHIFT_UNITS))

    @property
    def alphabet(self) -> DenseAlphabet:
        return DenseAlphabet(len(self.rows))

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        return self.mean + self._points(state) @ self.rows

    def _points(self, state: State) -> np.ndarray:
        """r(q), float32 [n, r]."""
        assert isinstance(state, DenseState)
        q = state.values
        level = np.minimum(np.abs(q), SHIFT_LEVELS)
        padded = np.concatenate([np.zeros((len(self.rows), 1), np.float32), self.shifts], 1)
        points = np.sign(q) * (np.abs(q) - padded[np.arange(len(self.rows)), level])
        return points.astype(np.float32)

    def terms(self, state: State) -> tuple[scipy.sparse.csr_array, np.ndarray]:
        """Coefficients r(q) [n, r] and rows [r, d]."""
        assert isinstance(state, DenseState)
        coefficients = scipy.sparse.csr_array(state.values).astype(np.float32)
        coefficients.data = self._points(state)[state.values != 0]
        return coefficients, self.rows

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        return state.touched()

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        return 2.0 * self.rows.size


@dataclass(frozen=True)
class Axes:
    """The sender's transform: u = (e - mean) @ analysis, in units of the metric; e = mean + u @ synthesis."""

    mean: np.ndarray
    analysis: np.ndarray
    synthesis: np.ndarray
    variances: np.ndarray

    def transform(self, errors: np.ndarray) -> np.ndarray:
        """Coordinates u [n, r] of errors [n, d]."""
        return ((errors - self.mean) @ self.analysis).astype(np.float32)

    def first(self, rank: int) -> Axes:
        """The `rank` axes of largest variance."""
        return Axes(self.mean, self.analysis[:, :rank], self.synthesis[:rank], self.variances[:rank])


def moments(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d] of errors [n, d]; float64, the products in float32 in blocks of 8,192 rows."""
    mean = errors.mean(0, dtype=np.float64)
    total = np.zeros((errors.shape[1],) * 2)
    for block in np.array_split((errors - mean).astype(np.float32), max(1, len(errors) // 8192)):
        total += block.T @ block
    return mean, total / len(errors)


def principal_axes(mean: np.ndarray, covariance: np.ndarray, root: np.ndarray) -> Axes:
    """Principal axes of a covariance in the metric G = root @ root (symmetric root), largest variance first."""
    variances, vectors = np.linalg.eigh(root @ covariance @ root)
    order = np.argsort(variances)[::-1]
    vectors = vectors[:, order]
    return Axes(mean, root @ vectors, vectors.T @ np.linalg.inv(root), np.maximum(variances[order], 0.0))


@dataclass(frozen=True)
class Quantiser:
    """The sender's rule for one step: thresholds [r] and the reconstruction points it implies.

    |u|/step below `zero` becomes 0; above, |q| = max(1, floor(|u|/step + rounding)). Only `shifts` is sent.
    """

    step: float
    zero: np.ndarray
    rounding: np.ndarray
    shifts: np.ndarray
    energy: np.ndarray

    def quantise(self, u: np.ndarray) -> np.ndarray:
        """Integers [n, r] for coordinates u [n, r]."""
        size = np.abs(u) / np.float32(self.step)
        return (np.sign(u) * _levels(size, self.zero, self.rounding)).astype(np.int32)


def fit_quantiser(u: np.ndarray, step: float, rounds: int = 3) -> Quantiser:
    r"""Entropy-constrained thresholds for a given step, from coordinates u [n, r] of tuning data.

    A value goes to the level that minimises (u - r(q))^2 + price * step^2 * bits(q): between 0 and 1 the threshold is
    1/2 + price/2 * (bits(1) - bits(0)), above it all levels shift by price/2 times the bits a level costs more than
    the one below (geometric tail). bits(.) follow from the histogram of each axis, so the rule is iterated. An axis of
    little variance drives its own threshold up and goes silent: reverse water-filling.
    """
    size = np.abs(u) / np.float32(step)
    n, width = u.shape
    zero, rounding = np.full(width, 0.6), np.full(width, 0.45)
    for _ in range(rounds):
        level = _levels(size, zero, rounding)
        on = np.count_nonzero(level, axis=0)
        ones = np.count_nonzero(level == 1, axis=0)
        total = level.sum(0)
        bits_zero = -np.log2((n - on + 0.5) / (n + 1))
        bits_one = 1.0 - np.log2((ones + 0.5) / (n + 1))
        # A geometric tail with mean total/on keeps a share 1 - on/total from each level to the next.
        tail = -np.log2(1.0 - (on + 0.5) / (total + 1.0))
        zero = np.clip(0.5 + PRICE / 2 * (bits_one - bits_zero), 0.5, None)
        rounding = np.clip(0.5 - PRICE / 2 * tail, 0.0, 0.5)
    level = _levels(size, zero, rounding)
    shifts = np.zeros((width, SHIFT_LEVELS), np.int64)
    for index in range(SHIFT_LEVELS):
        hit = level == index + 1 if index < SHIFT_LEVELS - 1 else level > index
        count = np.maximum(np.count_nonzero(hit, axis=0), 1)
        shifts[:, index] = np.rint(SHIFT_UNITS * np.where(hit, level - size, 0).sum(0) / count)
    energy = np.square(level, dtype=np.float64).mean(0)
    return Quantiser(step, zero, rounding, np.clip(shifts, -SHIFT_UNITS, SHIFT_UNITS), energy)


def _levels(size: np.ndarray, zero: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    level = np.clip(np.floor(size + rounding.astype(np.float32)), 1, np.float32(LARGEST_LEVEL))
    return np.where(size < zero, np.float32(0), level)


def components_section(axes: Axes, quantiser: Quantiser, settings: Settings) -> Section:
    """What the receiver needs: mean, rows times step, reconstruction points; quantised for the horizon."""
    rows = metric_rows(quantiser.step * axes.synthesis, np.maximum(quantiser.energy, 1e-6), settings)
    mean = QuantisedArray.from_values(axes.mean, settings.static_step(1.0))
    return Section(KIND, (mean,), (rows, QuantisedArray.from_integers(quantiser.shifts)))


@dataclass(frozen=True)
class TransformCoder:
    """The sender's side: axes and the quantiser of their coordinates. The receiver's is `ComponentsDecoder`."""

    axes: Axes
    quantiser: Quantiser

    @classmethod
    def fit(cls, axes: Axes, examples: np.ndarray, step: float) -> TransformCoder:
        """Thresholds and reconstruction points from examples [n, d] of what is going to be coded."""
        return cls(axes, fit_quantiser(axes.transform(examples), step))

    def encode(self, errors: np.ndarray) -> DenseState:
        """Symbols for errors [n, d]."""
        return DenseState(self.quantiser.quantise(self.axes.transform(errors)))

    def section(self, settings: Settings) -> Section:
        """What the receiver needs."""
        return components_section(self.axes, self.quantiser, settings)
