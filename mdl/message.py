"""An explanation as bytes, and back: its only way to the scorer.

A message is a sequence of sections. A section names the decoder that rebuilds it (its *kind*) and carries quantised
arrays: header arrays, paid with the first token, and part arrays, of which row i of every one makes up part i, paid
when the first token touches part i. Every number travels as an integer times a step 2^(e/4), e an integer that travels
too; the rows of an array may lie on a lattice, of integers as well (`mdl/codes/lattice.py`); there are no floats in a
message.

    bytes = magic, version | number of sections | for each: kind, header arrays, part arrays (one stream) | checksum

Decoding is total: any bytes give sections or one `MessageError`, in time and memory of the order of `work_limit` of
their number. What the sections' decoders make of them is theirs to check.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from mdl.codes.arrays import read_shortest, write_shortest
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.integers import read_count, read_signed_count, write_count, write_signed_count
from mdl.codes.lattice import Lattice
from mdl.codes.steps import LARGEST_EXPONENT, STEPS_PER_OCTAVE, grid_steps
from mdl.errors import CodeError, MessageError

MAGIC = b"MDL\x02"
NAME, VERSION = MAGIC[:3], MAGIC[3]
CHECKSUM_BYTES = 4  # CRC-32 (ISO 3309) of all before it: no flipped bit, no burst of up to 32 bits passes unnoticed
LARGEST_SYMBOL = 1 << 60
LARGEST_VALUE = (2.0 - 2.0**-23) * 2.0**127  # of float32
LONGEST_KIND = 64
STEPS_DIFFER, ON_LATTICE = 1, 2  # what there is of an array, added up: `_write_array`
# A certain symbol costs no bits, so that a few bytes could ask for any number of them. A message may hold so many
# elements whatever its length (8 MB; an affine map of 768 x 768 that rounds to zero passes), and so many more a byte:
# 1/32 bit each, far below what the arrays of an explanation cost, whose rows of zeros are not sent.
FREE_WORK, WORK_PER_BYTE, WORK_PER_ARRAY = 1 << 20, 256, 64


def work_limit(size: int) -> int:
    """How much work (`BitReader.spend`; each element is at least 1) decoding a message of `size` bytes may take."""
    return FREE_WORK + WORK_PER_BYTE * size


def sealed(body: bytes) -> bytes:
    """Magic and stream with their checksum behind them, little-endian: the whole message."""
    return body + zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "little")


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
        """float32 [rows, columns]: what the receiver gets."""
        if self.lattice is not None:
            return self.lattice.values(self.symbols, self.exponents).astype(np.float32)
        return (self.symbols * grid_steps(self.exponents)[:, None]).astype(np.float32)

    def vector(self, name: str) -> np.ndarray:
        """The values of the only row, float32 [columns]. **Raises:** `MessageError` if there is not one row."""
        if len(self.symbols) != 1:
            raise MessageError(f"{name} is one vector, not {len(self.symbols)} rows")
        return self.values()[0]

    @property
    def plain(self) -> bool:
        """Whether the values are the symbols."""
        return self.lattice is None and not self.exponents.any()

    def integer_arrays(self) -> tuple[np.ndarray, ...]:
        """All that was sent but the shape: symbols, exponents, and what there is of a lattice."""
        lattice = () if self.lattice is None else self.lattice.integer_arrays()
        return self.symbols, self.exponents, *lattice

    def integers(self, name: str, low: int, high: int, columns: int) -> np.ndarray:
        """The symbols of an array of plain integers, int64 [rows, columns].

        **Raises:** `MessageError` unless all lie in [low, high], there are so many columns, and the step is 1.
        """
        if self.symbols.shape[1] != columns:
            raise MessageError(f"{name} has {self.symbols.shape[1]} columns in place of {columns}")
        if not self.plain:
            raise MessageError(f"{name} holds integers, but has steps other than 1")
        if self.symbols.size and not low <= self.symbols.min() <= self.symbols.max() <= high:
            raise MessageError(
                f"{name} has values from {self.symbols.min()} to {self.symbols.max()}; they lie in [{low}, {high}]"
            )
        return self.symbols

    def check(self) -> None:
        """**Raises:** `MessageError` unless the shapes agree, and every step and value is a finite float32 number."""
        if self.symbols.ndim != 2 or self.exponents.shape != self.symbols.shape[:1]:
            raise MessageError(
                f"symbols {self.symbols.shape} need an exponent for each row, not {self.exponents.shape}"
            )
        if not self.symbols.size:
            return
        _check_exponents(self.exponents)
        largest = self._largest()
        if not largest <= LARGEST_VALUE:
            raise MessageError(f"values of up to {largest:.3g} are infinite in float32")

    def _largest(self) -> float:
        """No value is larger; without a lattice, one is as large."""
        if self.lattice is None:
            return float((np.abs(self.symbols).max(1) * grid_steps(self.exponents)).max())
        try:
            self.lattice.check(self.symbols.shape[1])
            return self.lattice.largest(self.symbols, self.exponents)
        except CodeError as error:
            raise MessageError(str(error)) from error

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
    """Serialise.

    **Raises:** `MessageError` for what the receiver would refuse: part arrays of different numbers of rows, a kind that
    is no short ASCII name, steps or values beyond float32, far more elements than bits.
    """
    writer = BitWriter()
    write_count(writer, len(sections))
    shares = []
    for section in sections:
        _write_kind(writer, section.kind)
        for arrays in (section.header, section.parts):
            write_count(writer, len(arrays))
            costs = [_write_array(writer, array) for array in arrays]
        if len({len(a.symbols) for a in section.parts}) > 1:
            rows = [len(a.symbols) for a in section.parts]
            raise MessageError(f"section {section.kind!r}: part arrays have {rows} rows; row i of each must be part i")
        shares.append(np.sum(costs, axis=0) if section.parts else np.zeros(0))
    data = sealed(MAGIC + writer.to_bytes())
    limit = work_limit(len(data))
    if writer.work > limit:
        raise MessageError(
            f"{writer.work} elements in a message of {len(data)} bytes, of which a receiver reads {limit} at most: "
            "nearly all of them are equal. Leave rows of zeros out, or take finer steps."
        )
    return Message(data, tuple(shares), 8.0 * (len(MAGIC) + CHECKSUM_BYTES) + writer.information_bits)


def decode_message(data: bytes) -> list[Section]:
    """The sections in `data`. **Raises:** `MessageError` if it is not a whole message of this version."""
    try:
        reader = BitReader(_stream(data), work_limit(len(data)))
        sections = [_read_section(reader) for _ in range(read_count(reader))]
        reader.finish()
    except CodeError as error:
        raise MessageError(f"damaged or truncated message of {len(data)} bytes: {error}") from error
    return sections


def _stream(data: bytes) -> bytes:
    """What lies between the magic and the checksum."""
    name, version = data[: len(NAME)], data[len(NAME) : len(MAGIC)]
    if name != NAME or not version:
        raise MessageError(f"not a message: begins with {data[:4]!r}, a message of this version with {MAGIC!r}")
    if version[0] != VERSION:
        raise MessageError(
            f"a message of version {version[0]}; this program reads version {VERSION}. Read it with the program that "
            "wrote it, or write it again (or the byte that says so was damaged)."
        )
    body = data[:-CHECKSUM_BYTES]
    if len(body) < len(MAGIC) or sealed(body) != data:
        raise MessageError(
            f"damaged or truncated message of {len(data)} bytes: its checksum is not that of its content. Fetch the "
            "file again."
        )
    return body[len(MAGIC) :]


def _read_section(reader: BitReader) -> Section:
    kind = _read_kind(reader)
    header, parts = (tuple(_read_array(reader) for _ in range(read_count(reader))) for _ in range(2))
    if len({len(a.symbols) for a in parts}) > 1:
        raise MessageError(f"section {kind!r}: part arrays of {[len(a.symbols) for a in parts]} rows")
    return Section(kind, header, parts)


def _write_kind(writer: BitWriter, text: str) -> None:
    if not text.isascii() or len(text) > LONGEST_KIND:
        raise MessageError(f"the kind {text!r} is no name of up to {LONGEST_KIND} ASCII characters")
    data = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64)
    write_count(writer, len(data))
    writer.uniform(data, 128)


def _read_kind(reader: BitReader) -> str:
    length = read_count(reader)
    if length > LONGEST_KIND:
        raise MessageError(f"a kind of {length} characters; at most {LONGEST_KIND} are allowed")
    return bytes(reader.uniform(length, 128).astype(np.uint8)).decode("ascii")


def _write_array(writer: BitWriter, array: QuantisedArray) -> np.ndarray:
    """Shape, row steps relative to the finest, then the symbols of each step class together, or of each class of the
    lattice. Returns bits a row."""
    array = _plain(array)
    array.check()
    rows, columns = array.symbols.shape
    writer.spend(_array_work(rows, columns))
    write_count(writer, rows)
    write_count(writer, columns)
    if array.symbols.size == 0:
        return np.zeros(rows)
    base = int(array.exponents.min())
    write_signed_count(writer, base)
    relative = array.exponents - base
    writer.uniform(np.array([STEPS_DIFFER * relative.any() + ON_LATTICE * (array.lattice is not None)]), 4)
    cost = write_shortest(writer, relative) if relative.any() else np.zeros(rows)
    if array.lattice is not None:
        return cost + array.lattice.write(writer, array.symbols, array.exponents)
    for level in np.unique(relative):
        chosen = relative == level
        bits = write_shortest(writer, array.symbols[chosen].ravel())
        cost[chosen] += bits.reshape(-1, columns).sum(1)
    return cost


def _check_exponents(exponents: np.ndarray) -> None:
    if np.abs(exponents).max() > LARGEST_EXPONENT:
        raise MessageError(
            f"steps from 2^({exponents.min()}/4) to 2^({exponents.max()}/4) leave 2^-126 to 2^126, which float32 has"
        )


def _array_work(rows: int, columns: int) -> int:
    return WORK_PER_ARRAY + max(rows * columns, rows, columns)


def _plain(array: QuantisedArray) -> QuantisedArray:
    """Plain arrays of the same integers. **Raises:** `MessageError` for what are no integers."""
    lattice = array.lattice
    if lattice is not None:
        columns, spreads, *prediction = (_plain_integers("lattice integers", a) for a in lattice.integer_arrays())
        lattice = Lattice(columns, spreads, prediction[0] if prediction else None)
    symbols, exponents = _plain_integers("symbols", array.symbols), _plain_integers("exponents", array.exponents)
    return QuantisedArray(symbols, exponents, lattice)


def _plain_integers(what: str, values: np.ndarray) -> np.ndarray:
    if not np.issubdtype(np.asarray(values).dtype, np.integer):
        raise MessageError(
            f"{what} of type {np.asarray(values).dtype}: a message carries integers and the step of each row, no "
            "floats whose mantissas would be a payload. Use QuantisedArray.from_values."
        )
    return np.array(values, np.int64)


def _read_array(reader: BitReader) -> QuantisedArray:
    array = _read_unchecked_array(reader)
    array.check()
    return array


def _read_unchecked_array(reader: BitReader) -> QuantisedArray:
    rows, columns = read_count(reader), read_count(reader)
    reader.spend(_array_work(rows, columns))
    if rows * columns == 0:
        return QuantisedArray(np.zeros((rows, columns), np.int64), np.zeros(rows, np.int64))
    base = read_signed_count(reader)
    form = int(reader.uniform(1, 4)[0])
    relative = read_shortest(reader, rows) if form & STEPS_DIFFER else np.zeros(rows, np.int64)
    if relative.min() != 0 or relative.max() > 2 * LARGEST_EXPONENT:
        raise MessageError(f"steps {relative.min()} to {relative.max()} quarter octaves above the finest")
    if form & ON_LATTICE:
        _check_exponents(relative + base)
        lattice, symbols = Lattice.read(reader, relative + base, columns)
        return QuantisedArray(symbols, relative + base, lattice)
    symbols = np.zeros((rows, columns), np.int64)
    for level in np.unique(relative):
        chosen = relative == level
        symbols[chosen] = read_shortest(reader, int(chosen.sum()) * columns).reshape(-1, columns)
    return QuantisedArray(symbols, relative + base)
