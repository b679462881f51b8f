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

import numpy as np

from mdl.codes.arrays import read_shortest, write_shortest
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.integers import MAX_INTEGER
from mdl.errors import CodeError

STEPS_PER_OCTAVE = 4
PREDICTION_UNITS = 16
FEWEST_LEVEL, MOST_LEVEL = -6, 60
"""Classes of expected magnitude, in half octaves: below an eighth of a step and beyond 2^30 steps they are one."""

BLOCK = 32  # columns rounded one by one before their errors reach all the others by one product
EXACT_BITS = 26  # of the basis: with integers below 2^19 its products add up exactly, in whatever order
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
    in sixteenths: column j is predicted as sum_k prediction[j, k] / 16 * (decoded column k).
    """

    columns: np.ndarray
    spreads: np.ndarray
    prediction: np.ndarray

    def basis(self) -> np.ndarray:
        """[d, d], float64: row j is what one step of column j adds to a row of exponent 0.

        Elementwise sums in a fixed order, rounded to 2^-26 of the largest entry, so that every machine has the same.
        **Raises:** `CodeError` where the prediction runs away beyond floating point.
        """
        share = self.prediction / PREDICTION_UNITS
        lower = np.eye(len(share))
        with np.errstate(over="ignore", invalid="ignore"):
            for j in range(1, len(share)):
                lower[j] += (share[j, :j, None] * lower[:j]).sum(0)
            basis = lower.T * np.exp2(self.columns / STEPS_PER_OCTAVE)[:, None]
        largest = np.abs(basis).max(initial=0.0)
        if not np.isfinite(largest) or largest == 0.0:
            raise CodeError(f"a lattice of {len(share)} columns with entries up to {largest}: it was damaged.")
        unit = np.exp2(np.ceil(np.log2(largest)) - EXACT_BITS)
        return np.rint(basis / unit) * unit

    def values(self, symbols: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Rows [n, d], float64, from integers [n, d] and the rows' exponents [n]."""
        return (symbols @ self.basis()) * np.exp2(exponents / STEPS_PER_OCTAVE)[:, None]

    def classes(self, exponents: np.ndarray) -> np.ndarray:
        """The class of every integer [n, d]: its expected magnitude in half octaves."""
        level = self.spreads[None, :] - exponents[:, None]
        return np.clip(level // 2, FEWEST_LEVEL, MOST_LEVEL)

    def write(self, writer: BitWriter, symbols: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Write columns and integers; the reader knows exponents and shape. Returns the bits of each row."""
        below = np.tril_indices(len(self.columns), -1)
        for values in (self.columns, self.spreads, self.prediction[below]):
            write_shortest(writer, values)
        return write_classes(writer, symbols, self.classes(exponents))

    @classmethod
    def read(cls, reader: BitReader, exponents: np.ndarray, width: int) -> tuple[Lattice, np.ndarray]:
        """The lattice and its integers [n, width]. **Raises:** `CodeError` for a stream that was cut or damaged."""
        columns, spreads = read_shortest(reader, width), read_shortest(reader, width)
        prediction = np.zeros((width, width), np.int64)
        prediction[np.tril_indices(width, -1)] = read_shortest(reader, width * (width - 1) // 2)
        if max(np.abs(a).max(initial=0) for a in (columns, spreads, prediction)) >= 1 << 20:
            raise CodeError(f"a lattice of {width} columns whose steps or prediction reach 2**20: it was damaged.")
        lattice = cls(columns, spreads, prediction)
        return lattice, read_classes(reader, lattice.classes(exponents))


def write_classes(writer: BitWriter, symbols: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Write integers [n, d], those of each class under one code of the menu. Returns the bits of each row."""
    cost = np.zeros(symbols.shape)
    for level in np.unique(classes):
        chosen = classes == level
        cost[chosen] = write_shortest(writer, symbols[chosen])
    return cost.sum(1)


def read_classes(reader: BitReader, classes: np.ndarray) -> np.ndarray:
    """Read what `write_classes` wrote."""
    symbols = np.zeros(classes.shape, np.int64)
    for level in np.unique(classes):
        chosen = classes == level
        symbols[chosen] = read_shortest(reader, int(chosen.sum()))
    return symbols


def no_prediction(width: int) -> np.ndarray:
    """Every column by itself."""
    return np.zeros((width, width), np.int64)


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
    prediction = no_prediction(width)
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
    def of(cls, rows: np.ndarray, root: np.ndarray, prediction: np.ndarray) -> Rounding:
        """For rows like `rows` [n, d]; `root` [d, d]: the metric's square root; `prediction` [d, d] in sixteenths."""
        still = np.zeros(len(root), np.int64)
        rotation, upper = np.linalg.qr((Lattice(still, still, prediction).basis() @ root).T)
        sign = np.where(np.diag(upper) < 0, -1.0, 1.0)
        columns = np.rint(-STEPS_PER_OCTAVE * np.log2(np.maximum(np.abs(np.diag(upper)), 1e-30))).astype(np.int64)
        scale = np.exp2(columns / STEPS_PER_OCTAVE)
        innovations = rows - rows @ (prediction / PREDICTION_UNITS).T
        spread = np.sqrt(np.mean(np.square(innovations), 0)) / scale
        spreads = np.rint(STEPS_PER_OCTAVE * np.log2(np.maximum(spread, 1e-30))).astype(np.int64)
        lattice = Lattice(columns, spreads, prediction)
        return cls(lattice, root @ (rotation * sign), scale[:, None] * upper.T * sign, spread)

    def symbols(self, rows: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Integers [n, d] for rows [n, d] of steps 2^(exponents / 4), such that |(rows - decoded) @ root| is small.

        A number that is expected to be small against its step needs more than half a step not to be zero.
        **Raises:** `CodeError` for steps so fine that the integers would leave 62 bits.
        """
        steps = np.exp2(exponents / STEPS_PER_OCTAVE)
        variance = np.square(np.maximum(self.spread[:, None] / steps, 1e-3))
        zero = np.minimum(0.5 + DEAD_ZONE / variance, WIDEST_ZERO)
        coordinates = np.ascontiguousarray((rows @ self.analysis / steps[:, None]).T)
        found = nearest_planes(coordinates, self.generator, zero).T
        if np.abs(found).max(initial=0.0) >= MAX_INTEGER:
            raise CodeError(f"rows of up to {np.abs(rows).max():.3g} need over 2**62 of their steps: take larger ones.")
        return np.ascontiguousarray(found).astype(np.int64)


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
