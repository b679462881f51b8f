"""Rows of reals as integers on a lattice that fits both what they are and what their errors do.

Two things make a row of d numbers shorter than d numbers by themselves. Its columns depend on one another: each is
predicted, linearly, from the decoded columns before it, and what is sent is the rest. And errors in some directions
matter less than in others: with |error @ root| as the measure, an error that is made in one column is made good in the
others, and every column has a step of its own. Both are one lattice, of which the reader is told the columns' steps and
the prediction, in sixteenths; the metric stays with the sender.

    row = (step of the row) * (integers * steps of the columns) @ inverse(1 - prediction)^T

Sources: linear prediction in closed loop, Jayant and Noll 1984 ("Digital Coding of Waveforms", 6); rounding with error
feedback, the nearest-plane algorithm, Babai 1986 (Combinatorica 6), for weights Frantar et al. 2023 (arXiv:2210.17323).
At high rate the gain over equal, independent columns is half the logarithm of arithmetic over geometric mean of the
eigenvalues of the metric, and of the columns' variances over their innovations', in bits a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mdl.codes.arrays import read_shortest, write_shortest
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.integers import MAX_INTEGER
from mdl.codes.steps import LARGEST_EXPONENT, STEPS_PER_OCTAVE, grid_steps
from mdl.errors import CodeError

PREDICTION_UNITS = 16
LARGEST_COEFFICIENT = 1 << 20  # of a prediction, in sixteenths
LARGEST_SPREAD = 2 * LARGEST_EXPONENT
MOST_PREDICTED = 1024  # columns: of more, a prediction would take longer than it is worth
FEWEST_LEVEL, MOST_LEVEL = -6, 60
"""Classes of expected magnitude, in half octaves: below an eighth of a step and beyond 2^30 steps they are one."""

BLOCK = 32  # columns rounded one by one before their errors reach all the others by one product
EXACT_BITS = 26  # of the basis
EXACT_SUM = 1 << (53 - EXACT_BITS)  # of the magnitudes of integers: their products with the basis add up exactly
PRODUCTS_PER_WORK, ONE_BY_ONE_PER_WORK = 256, 32  # multiplications a unit of `BitReader.spend`, in bulk or row by row
COARSEST = 2.0**-12  # the finest column's step over the coarsest one's
RIDGE = 1e-6
# -dD/dR of a uniform quantiser at high rate is 2 ln 2 / 12 steps squared a bit. A level of one instead of zero costs
# (log2 e) / (2 v) bits for a Gaussian of variance v: the threshold of zero moves by half the product of the two.
DEAD_ZONE = 1.0 / 24.0
WIDEST_ZERO = 0.8


@dataclass(frozen=True)
class Lattice:
    """What the reader is told of the columns, beside each row's own exponent.

    **Arguments:** `columns` [d]: exponents of their steps, in quarter octaves; `spreads` [d]: the magnitude to expect
    of a column's integers in a row of exponent 0, in quarter octaves; `prediction` [d, d]: strictly lower triangular,
    in sixteenths: column j is predicted as sum_k prediction[j, k] / 16 * (decoded column k); None: there is none.
    """

    columns: np.ndarray
    spreads: np.ndarray
    prediction: np.ndarray | None = None

    @cached_property
    def basis(self) -> np.ndarray:
        """[d, d], float64, upper triangular: row j is what one step of column j adds to a row of exponent 0.

        Products and sums in a fixed order, each column rounded to 2^-26 of its largest entry, so that every machine
        has the same. **Raises:** `CodeError` where the prediction runs away beyond floating point.
        """
        steps = grid_steps(self.columns)
        if self.prediction is None:
            return np.diag(steps)
        share = self.prediction / PREDICTION_UNITS
        lower = np.eye(len(share))
        with np.errstate(over="ignore", invalid="ignore"):
            # Row k is complete when it is added to those below.
            for k in range(len(share) - 1):
                lower[k + 1 :, : k + 1] += share[k + 1 :, k, None] * lower[k, : k + 1]
            basis = lower.T * steps[:, None]
        largest = np.abs(basis).max(0, initial=0.0)
        if not np.isfinite(largest).all():
            raise CodeError(f"a prediction of {len(share)} columns that grows beyond floating point: it was damaged.")
        unit = np.ldexp(1.0, np.frexp(largest)[1] - EXACT_BITS)
        return np.asarray(np.rint(basis / unit) * unit)

    def integer_arrays(self) -> tuple[np.ndarray, ...]:
        """All that is sent."""
        predicted = () if self.prediction is None else (self.prediction,)
        return self.columns, self.spreads, *predicted

    def check(self, width: int) -> None:
        """**Raises:** `CodeError` unless this is a lattice of `width` columns within the limits of the format."""
        shapes = {self.columns.shape, self.spreads.shape}
        if shapes != {(width,)} or (self.prediction is not None and self.prediction.shape != (width, width)):
            raise CodeError(f"a lattice whose columns {self.columns.shape} do not fit a width of {width}.")
        for name, values, limit in (
            ("steps", self.columns, LARGEST_EXPONENT),
            ("spreads", self.spreads, LARGEST_SPREAD),
            ("coefficients", np.zeros(0) if self.prediction is None else self.prediction, LARGEST_COEFFICIENT),
        ):
            largest = max(values.max(initial=0), -values.min(initial=0))
            if largest > limit:
                raise CodeError(f"a lattice with {name} of up to {largest} where {limit} is the most: it was damaged.")
        _check_predicted(self.prediction is not None, width)

    def largest(self, symbols: np.ndarray, exponents: np.ndarray) -> float:
        """No value of these rows is larger. **Raises:** `CodeError` as `basis`."""
        each = grid_steps(self.columns) if self.prediction is None else self.basis
        sizes = np.abs(symbols).max(1, initial=0) * grid_steps(exponents)
        return float(sizes.max(initial=0.0) * len(self.columns) * np.abs(each).max(initial=0.0))

    def points(self, symbols: np.ndarray) -> np.ndarray:
        """Rows [n, d], float64, of exponent 0, from integers [n, d]: the same on every machine."""
        if self.prediction is None:
            return np.asarray(symbols * grid_steps(self.columns))
        found = symbols @ self.basis
        large = _large(symbols)
        if large.any():  # whose sums are not exact: they are taken in a fixed order
            sums, factors = np.zeros((int(large.sum()), len(self.columns))), symbols[large]
            for j, row in enumerate(self.basis):
                sums += factors[:, j, None] * row
            found[large] = sums
        return np.asarray(found)

    def values(self, symbols: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Rows [n, d], float64, from integers [n, d] and the rows' exponents [n]."""
        return self.points(symbols) * grid_steps(exponents)[:, None]

    def classes(self, exponents: np.ndarray) -> np.ndarray:
        """The class of every integer [n, d]: its expected magnitude in half octaves."""
        level = self.spreads[None, :] - exponents[:, None]
        return np.clip(level // 2, FEWEST_LEVEL, MOST_LEVEL)

    def write(self, writer: BitWriter, symbols: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Write columns and integers; the reader knows exponents and shape. Returns the bits of each row."""
        width, predicted = len(self.columns), self.prediction is not None
        writer.uniform(np.array([int(predicted)]), 2)
        writer.spend(_work(len(symbols), width, predicted))
        write_shortest(writer, self.columns)
        write_shortest(writer, self.spreads)
        if self.prediction is not None and width > 1:
            write_shortest(writer, self.prediction[np.tril_indices(width, -1)])
        cost = write_classes(writer, symbols, self.classes(exponents))
        writer.spend(_large_work(symbols, predicted))
        return cost

    @classmethod
    def read(cls, reader: BitReader, exponents: np.ndarray, width: int) -> tuple[Lattice, np.ndarray]:
        """The lattice and its integers [n, width]. **Raises:** `CodeError` for a stream that was cut or damaged."""
        predicted = bool(reader.uniform(1, 2)[0])
        _check_predicted(predicted, width)
        reader.spend(_work(len(exponents), width, predicted))
        columns, spreads = read_shortest(reader, width), read_shortest(reader, width)
        prediction = None
        if predicted:
            prediction = np.zeros((width, width), np.int64)
            if width > 1:
                prediction[np.tril_indices(width, -1)] = read_shortest(reader, width * (width - 1) // 2)
        lattice = cls(columns, spreads, prediction)
        lattice.check(width)
        symbols = read_classes(reader, lattice.classes(exponents))
        reader.spend(_large_work(symbols, predicted))
        return lattice, symbols


def _check_predicted(predicted: bool, width: int) -> None:
    if predicted and width > MOST_PREDICTED:
        raise CodeError(f"a prediction of {width} columns; {MOST_PREDICTED} are the most.")


def _work(rows: int, width: int, predicted: bool) -> int:
    """Of building the basis and multiplying with it, in units of `BitReader.spend`."""
    return width * width * (1 + (rows + width) // PRODUCTS_PER_WORK) if predicted else 2 * width


def _large(symbols: np.ndarray) -> np.ndarray:
    """Rows [n] whose products with the basis may not add up exactly."""
    return np.asarray(np.abs(symbols).max(1, initial=0) > EXACT_SUM // max(symbols.shape[1], 1))


def _large_work(symbols: np.ndarray, predicted: bool) -> int:
    large = int(np.count_nonzero(_large(symbols))) if predicted else 0
    return large * symbols.shape[1] ** 2 // ONE_BY_ONE_PER_WORK


def write_classes(writer: BitWriter, symbols: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Write integers [n, d], those of each class under one code of the menu. Returns the bits of each row."""
    cost = np.zeros(symbols.shape)
    for level in _present(classes):
        chosen = classes == level
        cost[chosen] = write_shortest(writer, symbols[chosen])
    return cost.sum(1)


def read_classes(reader: BitReader, classes: np.ndarray) -> np.ndarray:
    """Read what `write_classes` wrote."""
    symbols = np.zeros(classes.shape, np.int64)
    for level in _present(classes):
        chosen = classes == level
        symbols[chosen] = read_shortest(reader, int(chosen.sum()))
    return symbols


def _present(classes: np.ndarray) -> list[int]:
    """The classes that occur, ascending."""
    return [int(i) + FEWEST_LEVEL for i in np.flatnonzero(np.bincount(classes.ravel() - FEWEST_LEVEL))]


def fit_prediction(rows: np.ndarray) -> np.ndarray:
    """Coefficients, in sixteenths, that predict each column of rows [n, d] from those before it.

    Least squares, rounded one coefficient after the other, the later ones making good what rounding did to the earlier:
    of all roundings near the optimum, about the one whose predictions are best.
    """
    width = rows.shape[1]
    covariance = rows.T @ rows / max(len(rows), 1)
    covariance[np.diag_indices(width)] += RIDGE * max(float(np.trace(covariance)) / max(width, 1), 1e-30)
    # covariance = lower lower^T: its leading blocks are those of the leading columns.
    lower = np.linalg.cholesky(covariance)
    feedback = (lower / np.diag(lower)).T
    exact = np.eye(width) - np.linalg.inv(lower / np.diag(lower))
    prediction = np.zeros((width, width), np.int64)
    errors = np.zeros((width, width))
    # Coefficient k of every column j > k at once, from the last k to the first.
    for k in range(width - 2, -1, -1):
        target = exact[k + 1 :, k] + errors[k + 1 :, k + 1 :] @ feedback[k, k + 1 :]
        prediction[k + 1 :, k] = np.rint(PREDICTION_UNITS * target)
        errors[k + 1 :, k] = exact[k + 1 :, k] - prediction[k + 1 :, k] / PREDICTION_UNITS
    return prediction


@dataclass(frozen=True)
class Rounding:
    """The sender's side: a lattice, and how targets are measured against it.

    `analysis` [d, d] takes a row to the coordinates in which `generator` [d, d], lower triangular, spans the lattice;
    `spread` [d]: root mean square of each column's innovations, in its steps, for a row of exponent 0.
    """

    lattice: Lattice
    analysis: np.ndarray
    generator: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, root: np.ndarray, prediction: np.ndarray | None = None) -> Rounding:
        """For rows like `rows` [n, d]; `root` [d, d]: the metric's square root; `prediction` [d, d] in sixteenths."""
        rest = np.eye(len(root)) if prediction is None else np.eye(len(root)) - prediction / PREDICTION_UNITS
        rotation, upper = np.linalg.qr(np.linalg.solve(rest.T, root).T)
        heights = np.abs(np.diag(upper))
        sign = np.where(np.diag(upper) < 0, -1.0, 1.0)
        # A direction to which the metric is blind needs no step so coarse that the others drown in it.
        heights = np.maximum(heights, max(COARSEST * heights.max(initial=0.0), 1e-30))
        columns = _exponents(1.0 / heights, LARGEST_EXPONENT)
        scale = grid_steps(columns)
        spread = np.sqrt(np.mean(np.square(rows @ rest.T), 0)) / scale
        lattice = Lattice(columns, _exponents(spread, LARGEST_SPREAD), prediction)
        return cls(lattice, root @ (rotation * sign), scale[:, None] * upper.T * sign, spread)

    def symbols(self, rows: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Integers [n, d] for rows [n, d] of steps 2^(exponents / 4), such that |(rows - decoded) @ root| is small.

        A number that is expected to be small against its step needs more than half a step not to be zero.
        **Raises:** `CodeError` for steps so fine that the integers would leave 62 bits.
        """
        steps = grid_steps(exponents)
        variance = np.square(np.maximum(self.spread[:, None] / steps, 1e-3))
        zero = np.minimum(0.5 + DEAD_ZONE / variance, WIDEST_ZERO)
        coordinates = np.ascontiguousarray((rows @ self.analysis / steps[:, None]).T)
        found = nearest_planes(coordinates, self.generator, zero).T
        if np.abs(found).max(initial=0.0) >= MAX_INTEGER:
            raise CodeError(f"rows of up to {np.abs(rows).max():.3g} need over 2**62 of their steps: take larger ones.")
        return np.ascontiguousarray(found).astype(np.int64)


def _exponents(steps: np.ndarray, limit: int) -> np.ndarray:
    """The nearest on the grid, within +-limit."""
    found = np.rint(STEPS_PER_OCTAVE * np.log2(np.maximum(steps, 1e-300)))
    return np.clip(found, -limit, limit).astype(np.int64)


def nearest_planes(targets: np.ndarray, generator: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Integers [d, n] whose lattice points, integers^T @ generator, are near the targets [d, n].

    **Arguments:** `generator` [d, d], lower triangular; `zero` [d, n]: magnitudes below it become zero. Integers are
    chosen from the last column to the first, each with what the later ones left over (Babai 1986).
    """
    rest, symbols = targets.copy(), np.zeros_like(targets)
    for stop in range(len(targets), 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        for j in range(stop - 1, start - 1, -1):
            wanted = rest[j] / generator[j, j]
            found = np.rint(wanted)
            size = np.abs(wanted)
            found = np.where(size < zero[j], 0.0, np.where(size < 1.0, np.sign(wanted), found))
            symbols[j] = found
            rest[start:j] -= generator[j, start:j, None] * found
        rest[:start] -= generator[start:stop, :start].T @ symbols[start:stop]
    return symbols
