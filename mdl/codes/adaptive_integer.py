"""An adaptive code for integers of any size: a few binary decisions each, under Krichevsky-Trofimov contexts.

An integer is zero or not; negative or not; of magnitude m with exponent c = floor(log2 m), in unary, one context a
position; then up to three digits of m below its leading one, each in a tree context of its own given c; the digits
below those are raw, 1 bit each. Every class (an axis, a group of features) has contexts of its own, so that no table,
range or scale is ever sent, and the length is a closed form of how often each value occurs in each class.

Source: the binarisation is Elias gamma's (Elias 1975) with modelled decisions, as in adaptive binary entropy coders
(Marpe, Schwarz and Wiegand 2003, IEEE Trans. Circuits Syst. Video Technol. 13(7)); the contexts' lengths are
Krichevsky and Trofimov's (1981).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mdl.codes.bitstream import ONE_BY_ONE, BitReader, BitWriter
from mdl.codes.counts import kt_bits, kt_sequence_probabilities, plug_in_bits
from mdl.codes.integers import MAX_INTEGER, floor_log2
from mdl.errors import CodeError

ZERO, SIGN, FIRST_EXPONENT = 0, 1, 2
CONTEXTS_PER_EXPONENT = 8
"""The unary decision of an exponent, and the 1 + 2 + 4 tree contexts of its top three digits."""

MODELLED_DIGITS = 3
MAX_EXPONENT = 61
ALL_CONTEXTS = FIRST_EXPONENT + CONTEXTS_PER_EXPONENT * (MAX_EXPONENT + 1)
RAW = -1

WIDE_ROUND = 12
"""Rounds in which at least so many classes have a symbol are written decision by decision, others symbol by symbol."""

_DENSE_TABLE = 1 << 22


@dataclass(frozen=True)
class Histogram:
    """The distinct (class, value) pairs and how often each occurs; `inverse`, if asked for, is each symbol's pair."""

    classes: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    inverse: np.ndarray | None


@dataclass(frozen=True)
class Lengths:
    """In bits: each class's exact length [classes], the part of it that learning costs, each symbol's share [n]."""

    totals: np.ndarray
    learning: np.ndarray
    shares: np.ndarray


def _check_symbols(values: np.ndarray, classes: np.ndarray, n_classes: int) -> None:
    if values.shape != classes.shape:
        raise CodeError(f"{values.size} values need as many classes, not {classes.size}.")
    if values.size == 0:
        return
    if not np.issubdtype(values.dtype, np.integer):
        raise CodeError(f"{values.size} values of type {values.dtype}: symbols are integers; quantise them first.")
    if values.min() < -MAX_INTEGER or values.max() > MAX_INTEGER:
        raise CodeError(f"values from {values.min()} to {values.max()} leave the code's range of +-(2**62 - 1).")
    if classes.min() < 0 or classes.max() >= n_classes:
        raise CodeError(f"classes from {classes.min()} to {classes.max()} are not in [0, {n_classes}).")


def histogram(values: np.ndarray, classes: np.ndarray, n_classes: int, inverse: bool = False) -> Histogram:
    """Count the distinct (class, value) pairs, by a dense table where it stays small, else by sorting."""
    if values.size == 0:
        empty = np.zeros(0, dtype=np.int64)
        return Histogram(empty, empty, empty, empty)
    low, span = int(values.min()), int(values.max()) - int(values.min()) + 1
    if span * n_classes > max(_DENSE_TABLE, 4 * values.size):
        distinct, rank = np.unique(values, return_inverse=True)
        key = classes.astype(np.int64) * distinct.size + rank
        pairs, back, counts = np.unique(key, return_inverse=True, return_counts=True)
        return Histogram(pairs // distinct.size, distinct[pairs % distinct.size].astype(np.int64), counts, back)
    key = classes.astype(np.int64) * span
    key += values
    key -= low
    table = np.bincount(key, minlength=span * n_classes)
    pairs = np.flatnonzero(table)
    found = (np.cumsum(table > 0) - 1)[key] if inverse else None
    return Histogram(pairs // span, pairs % span + low, table[pairs], found)


@dataclass(frozen=True)
class AdaptiveInteger:
    """The code. `signed=False` for values that are never negative, `with_zero=False` for values that are never zero.

    In every method `values` and `classes` are integer arrays of one dimension and one length, and classes lie in
    [0, n_classes). Lengths are in bits. All raise CodeError for a value that the code does not carry.
    """

    signed: bool = True
    with_zero: bool = True

    def decisions(
        self, values: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Int[np.ndarray, " m"]]]:
        """The layers of binary decisions, in order: which values take it, in which context (RAW: none), and the bit."""
        magnitude = np.abs(values.astype(np.int64))
        everyone = np.arange(values.size)
        if self.with_zero:
            yield everyone, np.full(values.size, ZERO), (magnitude > 0).astype(np.int64)
            everyone = np.flatnonzero(magnitude)
        elif values.size and magnitude.min() == 0:
            raise CodeError("a zero under AdaptiveInteger(with_zero=False); construct it with_zero=True.")
        if self.signed:
            yield everyone, np.full(everyone.size, SIGN), (values[everyone] < 0).astype(np.int64)
        elif values.size and values.min() < 0:
            raise CodeError(f"the value {values.min()} under AdaptiveInteger(signed=False); construct it signed=True.")
        magnitude = magnitude[everyone]
        yield from _magnitude_decisions(everyone, magnitude, floor_log2(magnitude))

    def context_counts(
        self, values: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"], n_classes: int
    ) -> tuple[
        Float[np.ndarray, "classes contexts"], Float[np.ndarray, "classes contexts"], Float[np.ndarray, " classes"]
    ]:
        """How often each context of each class saw a one and a zero, and each class's raw bits."""
        _check_symbols(values, classes, n_classes)
        return self._counts(histogram(values, classes, n_classes), n_classes)

    def _counts(self, seen: Histogram, n_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        top = int(floor_log2(np.maximum(np.abs(seen.values), 1)).max(initial=0))
        contexts = FIRST_EXPONENT + CONTEXTS_PER_EXPONENT * (top + 1)
        ones, totals = np.zeros(n_classes * contexts), np.zeros(n_classes * contexts)
        raw = np.zeros(n_classes)
        for index, context, bit in self.decisions(seen.values):
            weight, owner = seen.counts[index].astype(np.float64), seen.classes[index]
            if context.size and context[0] == RAW:
                raw += np.bincount(owner, weight, n_classes)
                continue
            cell = owner * contexts + context
            ones += np.bincount(cell, weight * bit, ones.size)
            totals += np.bincount(cell, weight, ones.size)
        shape = (n_classes, contexts)
        return ones.reshape(shape), (totals - ones).reshape(shape), raw

    def bits(
        self, values: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"], n_classes: int
    ) -> Float[np.ndarray, " classes"]:
        """The exact length of each class's symbols, sum over its contexts of `kt_bits`, and its raw bits."""
        ones, zeros, raw = self.context_counts(values, classes, n_classes)
        return kt_bits(ones, zeros).sum(axis=1) + raw

    def learning_bits(
        self, values: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"], n_classes: int
    ) -> Float[np.ndarray, " classes"]:
        """The part of `bits` that learning the probabilities costs: `kt_bits` minus `plug_in_bits`, for each class."""
        ones, zeros, _ = self.context_counts(values, classes, n_classes)
        return (kt_bits(ones, zeros) - plug_in_bits(ones, zeros)).sum(axis=1)

    def symbol_bits(
        self,
        values: Int[np.ndarray, " n"],
        classes: Int[np.ndarray, " n"],
        n_classes: int,
        totals: Float[np.ndarray, " classes"] | None = None,
    ) -> Float[np.ndarray, " n"]:
        """Each symbol's share of its class's length, for standard errors over sequences.

        -log2 p under the probabilities (n1 + 1/2) / (n + 1) at the end, plus the same amount for every symbol of a
        class, so that a class's shares sum to `totals` (`bits` where not given).
        """
        return self.measure(values, classes, n_classes, totals).shares

    def measure(
        self,
        values: Int[np.ndarray, " n"],
        classes: Int[np.ndarray, " n"],
        n_classes: int,
        totals: Float[np.ndarray, " classes"] | None = None,
    ) -> Lengths:
        """`bits`, `learning_bits` and `symbol_bits` (whose shares sum to `totals`) from one count of the symbols."""
        _check_symbols(values, classes, n_classes)
        seen = histogram(values, classes, n_classes, inverse=True)
        ones, zeros, raw = self._counts(seen, n_classes)
        mixture = kt_bits(ones, zeros)
        exact, learning = mixture.sum(axis=1) + raw, (mixture - plug_in_bits(ones, zeros)).sum(axis=1)
        wanted = exact if totals is None else totals
        probability = (ones + 0.5) / (ones + zeros + 1.0)
        cost = np.zeros(seen.values.size)
        for index, context, bit in self.decisions(seen.values):
            if context.size and context[0] == RAW:
                cost[index] += 1.0
                continue
            p = probability[seen.classes[index], context]
            cost[index] -= np.log2(np.where(bit == 1, p, 1.0 - p))
        uses = np.bincount(seen.classes, seen.counts, n_classes)
        gap = wanted - np.bincount(seen.classes, seen.counts * cost, n_classes)
        cost += (gap / np.maximum(uses, 1.0))[seen.classes]
        return Lengths(exact, learning, cost[seen.inverse])

    def write(
        self, writer: BitWriter, values: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"], n_classes: int
    ) -> None:
        """Write the symbols; the reader needs `classes` and gets `values`. The length is the sum of `bits`.

        The order is by rounds, the r-th symbol of every class being in round r, so that the reader can decode a round
        of many classes at a stroke: no two of them share a context.
        """
        _check_symbols(values, classes, n_classes)
        writer.spend(ONE_BY_ONE * values.size)
        if values.size == 0:
            return
        rounds = _rounds(classes, n_classes)
        wide = np.bincount(rounds)[rounds] >= WIDE_ROUND
        layers = list(self.decisions(values))
        index = np.concatenate([layer[0] for layer in layers])
        context = np.concatenate([layer[1] for layer in layers])
        bit = np.concatenate([layer[2] for layer in layers])
        depth = np.repeat(np.arange(len(layers)), [layer[0].size for layer in layers])
        owner = classes[index].astype(np.int64)
        inside = np.where(wide[index], depth * n_classes + owner, owner * len(layers) + depth)
        order = np.argsort(rounds[index] * (len(layers) * n_classes) + inside, kind="stable")
        context, bit, owner = context[order], bit[order], owner[order]
        probability = np.full(bit.size, 0.5)
        modelled = context != RAW
        cell = owner[modelled] * ALL_CONTEXTS + context[modelled]
        probability[modelled] = kt_sequence_probabilities(cell, bit[modelled])
        writer.bits(bit, probability)

    def read(self, reader: BitReader, classes: Int[np.ndarray, " n"], n_classes: int) -> Int[np.ndarray, " n"]:
        """Read the symbols of `classes`, in their order. Raises CodeError for a stream that was cut or damaged."""
        reader.spend(ONE_BY_ONE * classes.size)
        _check_symbols(np.zeros_like(classes), classes, n_classes)
        values = np.zeros(classes.size, dtype=np.int64)
        if classes.size == 0:
            return values
        slots = np.lexsort((classes, _rounds(classes, n_classes)))
        ends = np.cumsum(np.bincount(_rounds(classes, n_classes)))
        sizes = np.diff(np.r_[0, ends])
        wide = int((sizes >= WIDE_ROUND).sum())  # sizes never grow from one round to the next
        state = _Contexts(n_classes)
        for end, size in zip(ends[:wide], sizes[:wide], strict=True):
            slot = slots[end - size : end]
            values[slot] = self._read_round(reader, state, classes[slot].astype(np.int64))
        rest = slots[ends[wide - 1] if wide else 0 :]
        values[rest] = self._read_singly(reader, state, classes[rest])
        return values

    def _read_round(self, reader: BitReader, state: _Contexts, classes: np.ndarray) -> np.ndarray:
        base, size = classes * ALL_CONTEXTS, classes.size
        present, negative = np.ones(size, dtype=bool), np.zeros(size, dtype=bool)
        if self.with_zero:
            present = state.read(reader, base + ZERO) == 1
        alive = np.flatnonzero(present)
        if self.signed:
            negative[alive] = state.read(reader, base[alive] + SIGN) == 1
        exponent = np.zeros(size, dtype=np.int64)
        going, position = alive, 0
        while going.size:
            if position > MAX_EXPONENT:
                raise CodeError("an integer beyond 2**62; the stream was cut or damaged.")
            longer = state.read(reader, base[going] + FIRST_EXPONENT + CONTEXTS_PER_EXPONENT * position)
            going = going[longer == 1]
            exponent[going] += 1
            position += 1
        magnitude = present.astype(np.int64)
        for digit in range(int(exponent.max(initial=0))):
            open_ = np.flatnonzero(exponent > digit)
            if digit < MODELLED_DIGITS:
                place = FIRST_EXPONENT + CONTEXTS_PER_EXPONENT * exponent[open_] + magnitude[open_]
                bit = state.read(reader, base[open_] + place)
            else:
                bit = reader.bits(open_.size, 0.5)
            magnitude[open_] = 2 * magnitude[open_] + bit
        return np.where(negative, -magnitude, magnitude)

    def _read_singly(self, reader: BitReader, state: _Contexts, classes: np.ndarray) -> np.ndarray:
        values = np.zeros(classes.size, dtype=np.int64)
        tables = {int(c): state.lists(int(c)) for c in np.unique(classes)}
        for i, owner in enumerate(classes.tolist()):
            values[i] = self._read_one(reader, *tables[owner])
            if i % 4096 == 0:
                reader.check()
        reader.check()
        return values

    def _read_one(self, reader: BitReader, ones: list[float], totals: list[float]) -> int:
        decide = reader.adaptive_bit
        if self.with_zero and not decide(ones, totals, ZERO):
            return 0
        negative = self.signed and decide(ones, totals, SIGN)
        exponent = 0
        while decide(ones, totals, FIRST_EXPONENT + CONTEXTS_PER_EXPONENT * exponent):
            exponent += 1
            if exponent > MAX_EXPONENT:
                raise CodeError("an integer beyond 2**62; the stream was cut or damaged.")
        tree = FIRST_EXPONENT + CONTEXTS_PER_EXPONENT * exponent
        magnitude = 1
        for digit in range(exponent):
            bit = decide(ones, totals, tree + magnitude) if digit < MODELLED_DIGITS else reader.bit(0.5)
            magnitude = 2 * magnitude + bit
        return -magnitude if negative else magnitude


class _Contexts:
    """The reader's counts of every context, class after class."""

    def __init__(self, n_classes: int) -> None:
        self._ones = np.zeros(n_classes * ALL_CONTEXTS)
        self._totals = np.zeros(n_classes * ALL_CONTEXTS)

    def read(self, reader: BitReader, cells: np.ndarray) -> np.ndarray:
        """One decision in each of the cells, which are distinct."""
        ones, totals = self._ones[cells], self._totals[cells]
        bits = reader.bits(cells.size, (ones + 0.5) / (totals + 1.0))
        self._ones[cells] = ones + bits
        self._totals[cells] = totals + 1.0
        return bits

    def lists(self, owner: int) -> tuple[list[float], list[float]]:
        """One class's counts as lists, which are quicker a symbol at a time."""
        block = slice(owner * ALL_CONTEXTS, (owner + 1) * ALL_CONTEXTS)
        return self._ones[block].tolist(), self._totals[block].tolist()


def _magnitude_decisions(
    index: np.ndarray, magnitude: np.ndarray, exponent: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The exponent in unary, then the digits below the leading one, from the top."""
    top = int(exponent.max(initial=-1))
    for position in range(top + 1):
        keep = exponent >= position
        context = np.full(int(keep.sum()), FIRST_EXPONENT + CONTEXTS_PER_EXPONENT * position)
        yield index[keep], context, (exponent[keep] > position).astype(np.int64)
    for digit in range(top):
        keep = exponent > digit
        m, c = magnitude[keep], exponent[keep]
        prefix = m >> (c - digit)  # leading one and the digits above: the node of the tree
        place = FIRST_EXPONENT + CONTEXTS_PER_EXPONENT * c + prefix
        yield index[keep], place if digit < MODELLED_DIGITS else np.full(m.size, RAW), (m >> (c - digit - 1)) & 1


def _rounds(classes: np.ndarray, n_classes: int) -> np.ndarray:
    """How many symbols of its class come before each symbol."""
    order = np.argsort(classes, kind="stable")
    counts = np.bincount(classes, minlength=n_classes)
    rounds = np.empty(classes.size, dtype=np.int64)
    rounds[order] = np.arange(classes.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return rounds
