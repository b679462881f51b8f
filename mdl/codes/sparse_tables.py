"""Tables of numbers that are mostly zero and take few values: which places are on, and which value of a code book.

Tables are coded one after the other, row by row, all in one adaptive state, so that one learns from those before it:

- *Places*, as a two-level picture is coded: each possible place under the Krichevsky-Trofimov probability of a context,
  which is whether its neighbours left, above left, above and above right are on, and whether its row and its column
  have had one already. Diagonals (copies of a subspace), rows and columns, permutations and dense blocks are all cheap.
  Places that the reader knows to be zero are passed over, free.
- *Values*: whether it is that of a place before it (left, above left, above, above right; else the latest one), and if
  not, its rank by latest use, in adaptive unary. A value that is new is the last rank, and goes into the code book.
- *The code book* behind all tables: m 2^x for every value in the order of first use, m odd, as adaptive integers.

No table of frequencies is sent, and there are no floats: the length is a sum of closed forms (`kt_bits`), but for marks
and padding of the stream.

Sources: contexts of neighbours, Langdon and Rissanen 1981 (IEEE Trans. Commun. 29(6)), as in JBIG; rank by latest use,
Elias 1987 (IEEE Trans. Inf. Theory 33(1)) and Bentley et al. 1986; Krichevsky and Trofimov 1981.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mdl.codes.adaptive_integer import AdaptiveInteger
from mdl.codes.bitstream import ONE_BY_ONE, BitReader, BitWriter
from mdl.codes.counts import kt_bits, kt_sequence_probabilities
from mdl.errors import CodeError

MOST_PLACES = 1 << 20  # in one stream: an adaptive probability must stay above what the coder resolves
LARGEST_MANTISSA, LARGEST_SHIFT = 1 << 24, 100  # of values, which are float32 numbers
_NEIGHBOURS = ((0, -1), (-1, -1), (-1, 0), (-1, 1))  # left, above left, above, above right
_PLACES = 1 << 6  # contexts of places: the four neighbours and two bits more
_SAME = _PLACES  # whether a value is its neighbour's, by which neighbour that is; then contexts of ranks
_RANKS, _DEEPEST = _SAME + 5, 15
_CONTEXTS = _RANKS + _DEEPEST + 1

Table = Float[np.ndarray, "rows columns"]
Possible = Bool[np.ndarray, "rows columns"]


def rounded(values: Table, digits: int) -> Table:
    """Every number to `digits` binary digits behind its leading one: relative precision 2^-(digits + 1), zeros stay."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    unit = 2.0 ** (digits + 1)
    return np.ldexp(np.rint(mantissa * unit) / unit, exponent)


@dataclass
class SparseTablesWriter:
    """Collects tables; `finish` writes them with their code book. `decisions`: contexts and bits so far."""

    ranks: list[float] = field(default_factory=list)  # values by latest use
    book: list[float] = field(default_factory=list)  # by first use
    contexts: list[np.ndarray] = field(default_factory=list)
    flags: list[np.ndarray] = field(default_factory=list)
    places: int = 0

    def add(self, values: Table, possible: Possible) -> None:
        """One more table; its shape, and which places are possible, the reader knows.

        **Raises:** `CodeError` for a number where none is possible, for one that is no float32 number, and for more
        than MOST_PLACES places in a stream.
        """
        on = values != 0
        if (on & ~possible).any():
            raise CodeError(f"{(on & ~possible).sum()} numbers are in places that are said to be zero")
        self.places += int(possible.sum())
        if self.places > MOST_PLACES:
            raise CodeError(
                f"more than {MOST_PLACES} places in one stream of sparse tables: this code is for small models, or for "
                "circuits that leave most of a large one out"
            )
        contexts = _place_contexts(on)
        self.contexts.append(contexts[possible])
        self.flags.append(on[possible].astype(np.int64))
        found = [decision for place in np.argwhere(on) for decision in self._value(values, on, *place.tolist())]
        if found:
            self.contexts.append(np.array([c for c, _ in found]))
            self.flags.append(np.array([b for _, b in found]))

    def _value(self, values: Table, on: Possible, row: int, column: int) -> Iterator[tuple[int, int]]:
        """The decisions of one value."""
        value = float(values[row, column])
        which, guess = _guess(values, on, row, column, self.ranks)
        if guess is not None:
            yield _SAME + which, int(value == guess)
        if value != guess:
            others = [v for v in self.ranks if v != guess]
            rank = others.index(value) if value in others else len(others)
            yield from ((_RANKS + min(r, _DEEPEST), int(r < rank)) for r in range(min(rank + 1, len(others))))
        if value not in self.ranks:
            self.book.append(value)
        _latest(self.ranks, value)

    def bits(self) -> float:
        """The exact length of what `finish` writes, in bits."""
        return self._decision_bits() + float(_CODE.bits(*_book_symbols(self.book)).sum())

    def _decision_bits(self) -> float:
        contexts, flags = self._decisions()
        ones, all_ = np.bincount(contexts, flags, _CONTEXTS), np.bincount(contexts, minlength=_CONTEXTS)
        return float(kt_bits(ones, all_ - ones).sum())

    def _decisions(self) -> tuple[np.ndarray, np.ndarray]:
        empty = [np.zeros(0, np.int64)]
        return np.concatenate([*empty, *self.contexts]), np.concatenate([*empty, *self.flags])

    def finish(self, writer: BitWriter) -> None:
        """Write the tables, then the code book."""
        contexts, flags = self._decisions()
        writer.spend(ONE_BY_ONE * contexts.size)
        writer.bits(flags, kt_sequence_probabilities(contexts, flags))
        _CODE.write(writer, *_book_symbols(self.book))


@dataclass
class SparseTablesReader:
    """Reads tables in their order; `book` reads what the values are, at the end."""

    reader: BitReader
    ones: list[float] = field(default_factory=lambda: [0.0] * _CONTEXTS)
    totals: list[float] = field(default_factory=lambda: [0.0] * _CONTEXTS)
    ranks: list[int] = field(default_factory=list)
    places: int = 0

    def table(self, possible: Possible) -> Int[np.ndarray, "rows columns"]:
        """Numbers of the code book from 1 on, 0 where nothing is.

        **Raises:** `CodeError` for more than MOST_PLACES, and for a stream that was cut or damaged.
        """
        self.places += int(possible.sum())
        if self.places > MOST_PLACES:
            raise CodeError(f"more than {MOST_PLACES} places in one stream of sparse tables")
        self.reader.spend(ONE_BY_ONE * int(possible.sum()))
        on = self._places(possible)
        self.reader.check()
        found = np.zeros(possible.shape, np.int64)
        for number, (row, column) in enumerate(np.argwhere(on).tolist()):
            found[row, column] = self._value(found, on, row, column)
            if number % 4096 == 0:
                self.reader.check()
        self.reader.check()
        return found

    def _places(self, possible: Possible) -> Possible:
        rows, columns = possible.shape
        decide, ones, totals = self.reader.adaptive_bit, self.ones, self.totals
        above, in_column, found = [0] * (columns + 2), [0] * columns, []
        for row in possible.tolist():
            here, any_ = [0] * (columns + 2), 0
            for i, open_ in enumerate(row):
                if open_:
                    near = here[i] + 2 * above[i] + 4 * above[i + 1] + 8 * above[i + 2]
                    if decide(ones, totals, near + 16 * any_ + 32 * in_column[i]):
                        here[i + 1] = any_ = in_column[i] = 1
            found.append(here[1:-1])
            above = here
        return np.array(found, bool).reshape(rows, columns)

    def _value(self, found: np.ndarray, on: Possible, row: int, column: int) -> int:
        which, guess = _guess(found, on, row, column, self.ranks)
        if guess is not None and self._decide(_SAME + which):
            value = int(guess)
        else:
            others = [v for v in self.ranks if v != guess]
            rank = 0
            while rank < len(others) and self._decide(_RANKS + min(rank, _DEEPEST)):
                rank += 1
            value = others[rank] if rank < len(others) else len(self.ranks) + 1
        _latest(self.ranks, value)
        return value

    def _decide(self, context: int) -> int:
        return self.reader.adaptive_bit(self.ones, self.totals, context)

    def book(self) -> Float[np.ndarray, " n"]:
        """The values by their numbers, float64, 0 first. **Raises:** `CodeError` for what is no float32 number."""
        classes = np.repeat([0, 1], len(self.ranks))
        symbols = _CODE.read(self.reader, classes, 2)
        mantissas, shifts = symbols[: len(self.ranks)], symbols[len(self.ranks) :]
        if np.abs(mantissas).max(initial=0) > LARGEST_MANTISSA or np.abs(shifts).max(initial=0) > LARGEST_SHIFT:
            raise CodeError("a code book of values that float32 does not have; the stream was cut or damaged.")
        if (mantissas % 2 == 0).any() or len(set(zip(mantissas.tolist(), shifts.tolist(), strict=True))) < len(shifts):
            raise CodeError("a code book with a value twice, or one that is not odd; the stream was damaged.")
        return np.concatenate([[0.0], np.ldexp(mantissas.astype(np.float64), shifts)])


_CODE = AdaptiveInteger()


def _place_contexts(on: Possible) -> np.ndarray:
    """Of every place, [rows, columns]."""
    padded = np.pad(on.astype(np.int64), ((1, 0), (1, 1)))
    rows, columns = on.shape
    found = np.zeros(on.shape, np.int64)
    for i, (down, right) in enumerate(_NEIGHBOURS):
        found += padded[1 + down : 1 + down + rows, 1 + right : 1 + right + columns] << i
    in_row = (np.cumsum(on, 1) - on > 0).astype(np.int64)
    in_column = (np.cumsum(on, 0) - on > 0).astype(np.int64)
    return found + 16 * in_row + 32 * in_column


def _guess(values: np.ndarray, on: Possible, row: int, column: int, ranks: list[Any]) -> tuple[int, Any]:
    """Which neighbour is on, and its value; else the latest value, or None where there has been none."""
    for which, (down, right) in enumerate(_NEIGHBOURS):
        r, c = row + down, column + right
        if r >= 0 and 0 <= c < on.shape[1] and on[r, c]:
            return which, values[r, c].item()
    return len(_NEIGHBOURS), ranks[0] if ranks else None


def _latest(ranks: list[Any], value: Any) -> None:
    if value in ranks:
        ranks.remove(value)
    ranks.insert(0, value)


def _book_symbols(book: list[float]) -> tuple[np.ndarray, np.ndarray, int]:
    """Odd mantissas, then powers of two; their classes. **Raises:** `CodeError` for what is no float32 number."""
    mantissas, shifts = [], []
    for value in book:
        mantissa, exponent = np.frexp(value)
        scaled = int(mantissa * 2.0**24) if np.isfinite(value) else 0
        if scaled == 0 or scaled != mantissa * 2.0**24 or abs(int(exponent) - 24) > LARGEST_SHIFT - 24:
            raise CodeError(f"{value!r} in a code book: values have at most 24 binary digits, and float32's range")
        low = (scaled & -scaled).bit_length() - 1
        mantissas.append(scaled >> low)
        shifts.append(int(exponent) - 24 + low)
    return np.array([*mantissas, *shifts], np.int64), np.repeat([0, 1], len(book)), 2
