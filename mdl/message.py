"""An explanation as bytes, and back: its only way to the scorer.

A message is a sequence of sections. A section names the decoder that rebuilds it (its *kind*) and carries quantised
arrays: header arrays, paid with the first token, and part arrays, of which row i of every one makes up part i, paid
when the first token touches part i. Every number travels as an integer times a step 2^(e/4), e an integer that travels
too; there are no floats in a message.

    bytes = magic, version | number of sections | for each: kind, header arrays, part arrays       (one stream)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mdl.codes.arrays import read_shortest, write_shortest
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.integers import read_count, read_signed_count, write_count, write_signed_count
from mdl.codes.lattice import STEPS_PER_OCTAVE, Lattice
from mdl.errors import CodeError, MessageError

MAGIC = b"MDL\x01"
LARGEST_SYMBOL = 1 << 60
MAX_ELEMENTS = 1 << 28  # an array larger than this is refused before anything is allocated


def step_exponent(step: float | np.ndarray) -> np.ndarray:
    """The integer e whose step 2^(e/4) is nearest to `step` (which must be positive) on the logarithmic grid."""
    return np.asarray(np.round(STEPS_PER_OCTAVE * np.log2(step)), np.int64)


@dataclass(frozen=True)
class QuantisedArray:
    """Integers and the step of each row: value[r, c] = symbols[r, c] * 2^(exponents[r] / 4).

    With a `lattice`, the row's step times (symbols[r] @ the lattice's basis).
    """

    symbols: np.ndarray
    exponents: np.ndarray
    lattice: Lattice | None = None

    @classmethod
    def from_values(cls, values: np.ndarray, steps: np.ndarray | float) -> QuantisedArray:
        """Round `values` [rows, columns] to multiples of a step for each row.

        The finest step is put on the grid 2^(e/4), the others whole octaves above it: rows of one octave share a table,
        and a step half an octave off its optimum costs under 0.1 bit a value.
        """
        values = np.atleast_2d(np.asarray(values, np.float64))
        if not np.isfinite(values).all():
            raise MessageError(f"{(~np.isfinite(values)).sum()} of {values.size} values to be sent are NaN or infinite")
        exponents = np.broadcast_to(step_exponent(steps), (len(values),)).astype(np.int64)
        base = exponents.min() if len(exponents) else 0
        octaves = np.rint((exponents - base) / STEPS_PER_OCTAVE).astype(np.int64)
        exponents = base + STEPS_PER_OCTAVE * octaves
        levels = np.rint(values / np.exp2(exponents / STEPS_PER_OCTAVE)[:, None])
        if np.abs(levels).max(initial=0) > LARGEST_SYMBOL:
            raise MessageError(
                f"values of up to {np.abs(values).max():.3g} in steps of down to {np.min(steps):.3g}: more than 2^60 "
                "steps. The step is far finer than float32; ask for a lower fidelity, or a shorter horizon."
            )
        return cls(levels.astype(np.int64), exponents)

    @classmethod
    def from_integers(cls, values: np.ndarray) -> QuantisedArray:
        """Integers as they are, step 1; a vector becomes one column."""
        values = np.asarray(values, np.int64)
        values = values[:, None] if values.ndim == 1 else values
        return cls(values, np.zeros(len(values), np.int64))

    def values(self) -> np.ndarray:
        """float32 [rows, columns]: what the receiver gets.

        **Raises:** `CodeError` for a lattice beyond floating point.
        """
        if self.lattice is not None:
            return self.lattice.values(self.symbols, self.exponents).astype(np.float32)
        return (self.symbols * np.exp2(self.exponents / STEPS_PER_OCTAVE)[:, None]).astype(np.float32)

    def rows(self, order: np.ndarray) -> QuantisedArray:
        """The rows that `order` names, by number or by a mask, in its order."""
        return QuantisedArray(self.symbols[order], self.exponents[order], self.lattice)


@dataclass(frozen=True)
class Section:
    """Arrays for one decoder. Part arrays have one row a part, all the same number of rows."""

    kind: str
    header: tuple[QuantisedArray, ...] = ()
    parts: tuple[QuantisedArray, ...] = ()

    @property
    def n_parts(self) -> int:
        return len(self.parts[0].symbols) if self.parts else 0

    def reordered(self, order: np.ndarray) -> Section:
        """The parts in another order: the new part i is the old part order[i]."""
        return Section(self.kind, self.header, tuple(a.rows(order) for a in self.parts))


@dataclass(frozen=True)
class Message:
    """Sections as bytes, with what each part contributes.

    `data`: the whole file; `part_bits[s]` [n_parts of section s]: what the first use of each part costs; all else
    (structure, tables, header arrays, padding) is `header_bits`, so that the sum is 8 * len(data); `information_bits`
    is the ideal length, sum of -log2 p.
    """

    data: bytes
    part_bits: tuple[np.ndarray, ...]
    information_bits: float

    @property
    def whole_bits(self) -> float:
        return 8.0 * len(self.data)

    @property
    def header_bits(self) -> float:
        return self.whole_bits - float(sum(p.sum() for p in self.part_bits))


def encode_message(sections: list[Section]) -> Message:
    """Serialise. **Raises:** `MessageError` where part arrays disagree in their number of rows."""
    writer = BitWriter()
    write_count(writer, len(sections))
    shares = []
    for section in sections:
        _write_text(writer, section.kind)
        for arrays in (section.header, section.parts):
            write_count(writer, len(arrays))
            costs = [_write_array(writer, array) for array in arrays]
        if len({len(a.symbols) for a in section.parts}) > 1:
            rows = [len(a.symbols) for a in section.parts]
            raise MessageError(f"section {section.kind!r}: part arrays have {rows} rows; row i of each must be part i")
        shares.append(np.sum(costs, axis=0) if section.parts else np.zeros(0))
    data = MAGIC + writer.to_bytes()
    return Message(data, tuple(shares), 8.0 * len(MAGIC) + writer.information_bits)


def decode_message(data: bytes) -> list[Section]:
    """The sections in `data`. **Raises:** `MessageError` if it is not a whole message of this version."""
    if data[: len(MAGIC)] != MAGIC:
        raise MessageError(f"not a message of this version: begins with {data[:4]!r}, expected {MAGIC!r}")
    try:
        reader = BitReader(data[len(MAGIC) :])
        sections = [_read_section(reader) for _ in range(read_count(reader))]
        reader.finish()
    except CodeError as error:
        raise MessageError(f"damaged or truncated message of {len(data)} bytes: {error}") from error
    return sections


def _read_section(reader: BitReader) -> Section:
    kind = _read_text(reader)
    header, parts = (tuple(_read_array(reader) for _ in range(read_count(reader))) for _ in range(2))
    if len({len(a.symbols) for a in parts}) > 1:
        raise MessageError(f"section {kind!r}: part arrays of {[len(a.symbols) for a in parts]} rows")
    return Section(kind, header, parts)


def _write_text(writer: BitWriter, text: str) -> None:
    data = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64)
    write_count(writer, len(data))
    writer.uniform(data, 128)


def _read_text(reader: BitReader) -> str:
    length = read_count(reader)
    if length > 64:
        raise MessageError(f"a name of {length} characters; at most 64 are allowed")
    return bytes(reader.uniform(length, 128).astype(np.uint8)).decode("ascii")


def _write_array(writer: BitWriter, array: QuantisedArray) -> np.ndarray:
    """Shape, row steps relative to the finest, then the symbols of each step class together, or of each class of the
    lattice. Returns bits a row."""
    rows, columns = array.symbols.shape
    write_count(writer, rows)
    write_count(writer, columns)
    if array.symbols.size == 0:
        return np.zeros(rows)
    base = int(array.exponents.min())
    write_signed_count(writer, base)
    relative = array.exponents - base
    writer.uniform(np.array([int(relative.any()) + 2 * (array.lattice is not None)]), 4)
    cost = write_shortest(writer, relative) if relative.any() else np.zeros(rows)
    if array.lattice is not None:
        return cost + array.lattice.write(writer, array.symbols, array.exponents)
    for level in np.unique(relative):
        chosen = relative == level
        bits = write_shortest(writer, array.symbols[chosen].ravel())
        cost[chosen] += bits.reshape(-1, columns).sum(1)
    return cost


def _read_array(reader: BitReader) -> QuantisedArray:
    rows, columns = read_count(reader), read_count(reader)
    if rows * columns > MAX_ELEMENTS or max(rows, columns) > MAX_ELEMENTS:
        raise MessageError(f"an array of {rows} x {columns}: larger than the {MAX_ELEMENTS} elements allowed")
    if rows * columns == 0:
        return QuantisedArray(np.zeros((rows, columns), np.int64), np.zeros(rows, np.int64))
    base = read_signed_count(reader)
    form = int(reader.uniform(1, 4)[0])
    relative = read_shortest(reader, rows) if form & 1 else np.zeros(rows, np.int64)
    if form & 2:
        lattice, symbols = Lattice.read(reader, relative + base, columns)
        return QuantisedArray(symbols, relative + base, lattice)
    symbols = np.zeros((rows, columns), np.int64)
    for level in np.unique(relative):
        chosen = relative == level
        symbols[chosen] = read_shortest(reader, int(chosen.sum()) * columns).reshape(-1, columns)
    return QuantisedArray(symbols, relative + base)
