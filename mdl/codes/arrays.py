"""Codes of static arrays of integers: a menu, out of which each array names the one that is shortest for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from mdl.codes.adaptive_integer import AdaptiveInteger
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.integers import floor_log2
from mdl.codes.tables import DiscretisedGaussian, DiscretisedLaplace, TableCode
from mdl.errors import CodeError

ADAPTIVE_LIMIT = 16384  # beyond this many symbols the adaptive code, read bit by bit, is not used
PARAMETRIC_LIMIT = 8192  # a longer array pays for its own table many times over: the families need not be tried
ONE_BUCKET = 64  # smaller magnitudes are buckets of their own
PARAMETRIC_LARGEST = 512  # magnitudes beyond it would take long tables in decimal arithmetic


@runtime_checkable
class ArrayCode(Protocol):
    """A code of an integer vector whose length the reader knows; lengths in bits."""

    def bits(self, values: np.ndarray) -> float: ...

    def symbol_bits(self, values: np.ndarray) -> np.ndarray: ...

    def write(self, writer: BitWriter, values: np.ndarray) -> None: ...

    def read(self, reader: BitReader, count: int) -> np.ndarray: ...


@dataclass(frozen=True)
class OneClassCode:
    """The adaptive integer code with a single class, for short arrays."""

    code: AdaptiveInteger = field(default_factory=AdaptiveInteger)

    def bits(self, values: np.ndarray) -> float:
        return float(self.code.bits(values, np.zeros(values.size, np.int64), 1)[0])

    def symbol_bits(self, values: np.ndarray) -> np.ndarray:
        return self.code.symbol_bits(values, np.zeros(values.size, np.int64), 1)

    def write(self, writer: BitWriter, values: np.ndarray) -> None:
        self.code.write(writer, values, np.zeros(values.size, np.int64), 1)

    def read(self, reader: BitReader, count: int) -> np.ndarray:
        if count > ADAPTIVE_LIMIT:
            raise CodeError(f"{count} symbols under the adaptive code, which carries {ADAPTIVE_LIMIT} at most")
        return self.code.read(reader, np.zeros(count, np.int64), 1)


@dataclass(frozen=True)
class BucketCode:
    """Integers of any range, outliers among them: the first six binary digits under a table, the others as they are.

    Buckets are |v| up to 63, then 32 an octave (as floating-point numbers with 5 bits of mantissa are), with the sign:
    3711 at most, which a table always covers.
    """

    table: TableCode = field(default_factory=TableCode)

    def _buckets(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Signed bucket, number of further digits, and these."""
        size = np.abs(values)
        digits = np.maximum(floor_log2(np.maximum(size, 1)) - 5, 0)
        return np.sign(values) * ((size >> digits) + 32 * digits), digits, size & ((1 << digits) - 1)

    def bits(self, values: np.ndarray) -> float:
        bucket, digits, _ = self._buckets(values)
        return self.table.bits(bucket) + float(digits.sum())

    def symbol_bits(self, values: np.ndarray) -> np.ndarray:
        bucket, digits, _ = self._buckets(values)
        return self.table.symbol_bits(bucket) + digits

    def write(self, writer: BitWriter, values: np.ndarray) -> None:
        bucket, digits, rest = self._buckets(values)
        self.table.write(writer, bucket)
        for n in np.unique(digits[digits > 0]):
            writer.uniform(rest[digits == n], 1 << int(n))

    def read(self, reader: BitReader, count: int) -> np.ndarray:
        bucket = self.table.read(reader, count)
        digits = np.maximum(np.abs(bucket) // 32 - 1, 0)
        if digits.max(initial=0) > 56:
            raise CodeError("an integer beyond 2**62; the stream was cut or damaged.")
        size = (np.abs(bucket) - 32 * digits) << digits
        for n in np.unique(digits[digits > 0]):
            here = digits == n
            size[here] += reader.uniform(int(here.sum()), 1 << int(n))
        return np.sign(bucket) * size


MENU: tuple[ArrayCode, ...] = (
    TableCode(),
    DiscretisedLaplace(),
    DiscretisedGaussian(),
    BucketCode(),
    OneClassCode(),
)


def write_shortest(writer: BitWriter, values: np.ndarray) -> np.ndarray:
    """Write integers with the shortest code of the menu, named first.

    **Returns:** the bits of each symbol, tables and the code's name left out.
    """
    best = int(np.argmin([_length(code, values) for code in MENU]))
    writer.uniform(np.array([best]), len(MENU))
    MENU[best].write(writer, values)
    return MENU[best].symbol_bits(values)


def read_shortest(reader: BitReader, count: int) -> np.ndarray:
    """Read `count` integers. **Raises:** `CodeError` for a stream that was cut or damaged."""
    return MENU[int(reader.uniform(1, len(MENU))[0])].read(reader, count)


def _length(code: ArrayCode, values: np.ndarray) -> float:
    """Bits, or infinity where the code is not tried: for its cost in time, or because its alphabet is too narrow."""
    if isinstance(code, DiscretisedLaplace | DiscretisedGaussian) and (
        values.size > PARAMETRIC_LIMIT or np.abs(values).max(initial=0) > PARAMETRIC_LARGEST
    ):
        return np.inf
    if values.size > ADAPTIVE_LIMIT and isinstance(code, OneClassCode):
        return np.inf
    if isinstance(code, BucketCode) and np.abs(values).max(initial=0) < ONE_BUCKET:
        return np.inf  # its table would be the plain one
    try:
        return code.bits(values)
    except CodeError:
        return np.inf
