"""Static tables for integers such as quantised reals: sent first, then all symbols at one stroke.

Tables are made of integers or of correctly rounded decimals, so that every machine builds the same one.
"""

from __future__ import annotations

import decimal
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from mdl.codes.adaptive_integer import AdaptiveInteger
from mdl.codes.bitstream import ONE_BY_ONE, BitReader, BitWriter
from mdl.codes.integers import (
    count_bits,
    read_count,
    read_signed_count,
    signed_count_bits,
    write_count,
    write_signed_count,
)
from mdl.errors import CodeError

MAX_SPAN = 4096
"""The most symbols, from the smallest to the largest, that a table covers."""

QUARTER_OCTAVES = (64, 76, 91, 108)
"""64 * 2**(i/4), rounded: the weights of a table's levels within an octave."""

COARSENESS = (1, 2, 4, 8)
"""What a table's levels are apart, in quarter octaves; a table says in 2 bits which of these it uses."""

MAX_QUARTERS = 176
"""Weights stay below 2**50, so that a full table adds up in 64 bits."""


def _check_span(low: int, span: int) -> None:
    if not 1 <= span <= MAX_SPAN or abs(low) >= 1 << 61:
        raise CodeError(
            f"symbols from {low} to {low + span - 1} are {span}, more than a table of {MAX_SPAN} covers: "
            "the step is too fine for the values. Take a larger step, or AdaptiveInteger."
        )


def level_weights(levels: Int[np.ndarray, " k"], coarseness: int) -> Int[np.ndarray, " k"]:
    """Integer weights: 0 for level 0, about 64 * 2**((l - 1) * coarseness / 4) for a level l."""
    quarter = np.maximum(levels - 1, 0) * coarseness
    weight = np.array(QUARTER_OCTAVES)[quarter % 4] << (quarter // 4)
    return np.where(levels > 0, weight, 0)


@dataclass(frozen=True)
class FrequencyTable:
    """A table as it is sent: the smallest symbol, each symbol's level (0: absent), the levels' coarseness."""

    low: int
    levels: np.ndarray
    coarseness: int

    def frequencies(self) -> Int[np.ndarray, " k"]:
        """The integer weights of the symbols low, low + 1, ..."""
        return level_weights(self.levels, self.coarseness)

    def lengths(self) -> Float[np.ndarray, " k"]:
        """-log2(weight / sum of the weights) of each symbol, in bits; infinite where absent."""
        weights = self.frequencies()
        with np.errstate(divide="ignore"):
            return -np.log2(weights / weights.sum())

    def bits(self) -> float:
        """The exact length of the table itself, in bits."""
        steps = _level_steps(self.levels)
        coded = _LEVELS.bits(steps, np.zeros(steps.size, dtype=np.int64), 1)[0]
        return (
            signed_count_bits(self.low) + count_bits(self.levels.size - 1) + math.log2(len(COARSENESS)) + float(coded)
        )


_LEVELS = AdaptiveInteger()


def _level_steps(levels: np.ndarray) -> np.ndarray:
    return np.diff(levels, prepend=0)


class TableCode:
    """A semi-adaptive code: a table of quantised log-frequencies, then every symbol under it.

    The table holds the smallest symbol, the number of symbols up to the largest, and for each a level: 0 for one that
    does not occur, l >= 1 for a weight of about 2**((l - 1) c / 4), c being the one of COARSENESS that makes table and
    symbols shortest together. Levels go out as differences, under AdaptiveInteger. The number of values is the
    reader's to know. Lengths are in bits. All methods raise CodeError where the values span more than MAX_SPAN.
    """

    def table(self, values: Int[np.ndarray, " n"]) -> FrequencyTable:
        """The table that makes table and symbols shortest together; `values` are not empty."""
        low, counts = _count_span(values)
        tables = [FrequencyTable(low, _nearest_levels(counts, c), c) for c in COARSENESS]
        return min(tables, key=lambda table: table.bits() + _total(counts, table.lengths()))

    def bits(self, values: Int[np.ndarray, " n"]) -> float:
        """The exact length of table and symbols."""
        if values.size == 0:
            return 0.0
        table = self.table(values)
        return table.bits() + _total(_count_span(values)[1], table.lengths())

    def table_bits(self, values: Int[np.ndarray, " n"]) -> float:
        """The exact length of the table."""
        return self.table(values).bits() if values.size else 0.0

    def symbol_bits(self, values: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The length of each symbol, without the table."""
        if values.size == 0:
            return np.zeros(0)
        table = self.table(values)
        return table.lengths()[values - table.low]

    def write(self, writer: BitWriter, values: Int[np.ndarray, " n"]) -> None:
        """Write table and symbols; the reader needs their number."""
        if values.size == 0:
            return
        table = self.table(values)
        write_signed_count(writer, table.low)
        write_count(writer, table.levels.size - 1)
        writer.uniform(np.array([COARSENESS.index(table.coarseness)]), len(COARSENESS))
        steps = _level_steps(table.levels)
        _LEVELS.write(writer, steps, np.zeros(steps.size, dtype=np.int64), 1)
        writer.categorical(values - table.low, table.frequencies())

    def read(self, reader: BitReader, count: int) -> Int[np.ndarray, " n"]:
        """Read `count` symbols and their table. Raises CodeError for a stream that was cut or damaged."""
        if count == 0:
            return np.zeros(0, dtype=np.int64)
        low, span = read_signed_count(reader), read_count(reader) + 1
        _check_span(low, span)
        coarseness = COARSENESS[int(reader.uniform(1, len(COARSENESS))[0])]
        levels = np.cumsum(_LEVELS.read(reader, np.zeros(span, dtype=np.int64), 1))
        # Divided, not multiplied: a damaged level can be as large as 2**62.
        if levels.min() < 0 or levels.max() - 1 > MAX_QUARTERS // coarseness or levels.max() == 0:
            raise CodeError(f"a table of levels from {levels.min()} to {levels.max()}; the stream was cut or damaged.")
        return reader.categorical(count, FrequencyTable(low, levels, coarseness).frequencies()) + low


def _count_span(values: np.ndarray) -> tuple[int, np.ndarray]:
    low, high = int(values.min()), int(values.max())
    _check_span(low, high - low + 1)
    return low, np.bincount(values - low)


def _nearest_levels(counts: np.ndarray, coarseness: int) -> np.ndarray:
    level = 1 + np.rint(np.log2(np.maximum(counts, 1)) * 4.0 / coarseness).astype(np.int64)
    return np.where(counts > 0, level, 0)


def _total(counts: np.ndarray, lengths: np.ndarray) -> float:
    present = counts > 0
    return float((counts[present] * lengths[present]).sum())


SCALE_GRID = 256
"""Scales are 2**((g - 64) / 8) for g in [0, 256): from 2**-8 to 2**23.875, in eighths of an octave, 8 bits."""

_PEAK = 1 << 24


def parametric_weights(family: Literal["laplace", "gaussian"], grid: int, largest: int) -> tuple[int, ...]:
    """8 ceil(b) + floor(2**24 f(k)) for |k| = 0 ... `largest`, with f(k) = exp(-k / b) or exp(-k**2 / (2 b**2)).

    b is the scale of `grid`; the first term keeps every probability above some 2**-23, within what the coder resolves.
    Computed in decimal arithmetic of 50 and 60 digits, and so the same everywhere.
    """
    size = max(64, 1 << largest.bit_length())  # whole powers of two, so that few tables are ever computed
    return _weights(family, grid, size)[: largest + 1]


@lru_cache(maxsize=256)
def _weights(family: Literal["laplace", "gaussian"], grid: int, size: int) -> tuple[int, ...]:
    """By ratios: f(k + 1) = f(k) q(k), where q is exp(-1/b) for ever, or exp(-1/(2 b^2)) times exp(-1/b^2) a step."""
    with decimal.localcontext(decimal.Context(prec=50)):
        scale = (decimal.Decimal(grid - 64) / 8 * decimal.Decimal(2).ln()).exp()
    with decimal.localcontext(decimal.Context(prec=60)):  # ten more, for the errors of thousands of products
        tail = 8 * math.ceil(scale)
        laplace = family == "laplace"
        ratio = (-1 / scale if laplace else -1 / (2 * scale * scale)).exp()
        change = decimal.Decimal(1) if laplace else ratio * ratio
        weights: list[int] = []
        body = decimal.Decimal(_PEAK)
        while len(weights) < size and body >= 1:
            weights.append(tail + int(body))
            body, ratio = body * ratio, ratio * change
    return (*weights, *[tail] * (size - len(weights)))


class _Parametric:
    """What the two parametric codes share; `family` is theirs to say."""

    family: Literal["laplace", "gaussian"]

    def parameters(self, values: Int[np.ndarray, " n"]) -> tuple[int, int]:
        """The scale's place on the grid (the shortest) and the largest magnitude; `values` are not empty."""
        largest = max(abs(int(values.min())), abs(int(values.max())))
        _check_span(-largest, 2 * largest + 1)
        counts = np.bincount(np.abs(values), minlength=largest + 1)
        k = np.arange(largest + 1.0)
        scales = 2.0 ** ((np.arange(SCALE_GRID)[:, None] - 64.0) / 8.0)
        ratio = k / scales
        # The sender's search may be in floating point: the reader is told the result.
        weights = 8.0 * np.ceil(scales) + _PEAK * np.exp(-(ratio if self.family == "laplace" else ratio**2 / 2.0))
        normaliser = 2.0 * weights.sum(axis=1) - weights[:, 0]
        nats = values.size * np.log(normaliser) - np.log(weights) @ counts
        return int(nats.argmin()), largest

    def _frequencies(self, grid: int, largest: int) -> np.ndarray:
        half = np.array(parametric_weights(self.family, grid, largest), dtype=np.int64)
        return np.concatenate([half[:0:-1], half])

    def bits(self, values: Int[np.ndarray, " n"]) -> float:
        """The exact length of parameters and symbols, in bits."""
        if values.size == 0:
            return 0.0
        return self.parameter_bits(values) + float(self.symbol_bits(values).sum())

    def parameter_bits(self, values: Int[np.ndarray, " n"]) -> float:
        """8 bits of scale, and the largest magnitude as a count."""
        return math.log2(SCALE_GRID) + count_bits(self.parameters(values)[1]) if values.size else 0.0

    def symbol_bits(self, values: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The length of each symbol, in bits, without the parameters."""
        if values.size == 0:
            return np.zeros(0)
        grid, largest = self.parameters(values)
        frequencies = self._frequencies(grid, largest)
        return -np.log2(frequencies / frequencies.sum())[values + largest]

    def write(self, writer: BitWriter, values: Int[np.ndarray, " n"]) -> None:
        """Write parameters and symbols; the reader needs their number."""
        if values.size == 0:
            return
        grid, largest = self.parameters(values)
        writer.spend(ONE_BY_ONE * largest)
        writer.uniform(np.array([grid]), SCALE_GRID)
        write_count(writer, largest)
        writer.categorical(values + largest, self._frequencies(grid, largest))

    def read(self, reader: BitReader, count: int) -> Int[np.ndarray, " n"]:
        """Read `count` symbols. Raises CodeError for a stream that was cut or damaged."""
        if count == 0:
            return np.zeros(0, dtype=np.int64)
        grid, largest = int(reader.uniform(1, SCALE_GRID)[0]), read_count(reader)
        _check_span(-largest, 2 * largest + 1)
        reader.spend(ONE_BY_ONE * largest)
        return reader.categorical(count, self._frequencies(grid, largest)) - largest


class DiscretisedLaplace(_Parametric):
    """Integers of probability in proportion to exp(-|k| / b), b on a grid; centred on zero.

    Weights are those of `parametric_weights`, for |k| up to the largest magnitude, which is sent. The number of values
    is the reader's to know. Lengths are in bits. Methods raise CodeError for magnitudes from MAX_SPAN / 2 on.
    """

    family = "laplace"


class DiscretisedGaussian(_Parametric):
    """Integers of probability in proportion to exp(-k**2 / (2 b**2)), b on a grid; otherwise as DiscretisedLaplace."""

    family = "gaussian"
