"""The bitstream: one asymmetric-numeral-system coder for a whole message, read back in the order of writing.

A stack coder (ANS) and not a range coder: constriction's range coder loses about 1e-4 bit at every decision, which is
0.7 % of a stream of decisions of probability 1e-3; the stack loses a hundredth of that. A stack is read last in, first
out, so the writer keeps its calls and encodes them backwards at the end.

Sources: Duda 2013 (arXiv:1311.2540); Bamler 2022, "constriction" (arXiv:2201.01741).
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import constriction
import numpy as np
from jaxtyping import Bool, Float, Int

from mdl.errors import CodeError

PROBABILITY_FLOOR = 2.0**-22
"""A probability outside [floor, 1 - floor] is refused: the coder resolves 2**-24."""

MAX_DIGIT = 1 << 12
"""The largest alphabet of one uniform digit: at this size the coder's rounding costs below 0.0004 bit."""

ONE_BY_ONE = 8
"""Units of work of a symbol that is decoded on its own; one of many that are decoded at a stroke is 1 unit."""

# Marks, in 16 and 8 bits: the first thing to be read, gone when a stream was cut, and the last.
_START_MARK, _START_SIZE = 0xC35A, 1 << 16
_END_MARK, _END_SIZE = 0xA5, 1 << 8
# The coder's state right after the end mark; it only ever grows from there while the writer encodes.
_END_STATE = _END_MARK << 16


def uniform_digits(size: int) -> list[int]:
    """Alphabet sizes, most significant first, of the digits that carry a value in [0, size).

    Their product is at least `size` and within a factor 1 + 2**-11 of it. Raises CodeError unless 1 <= size < 2**62.
    """
    if not 1 <= size < 1 << 62:
        raise CodeError(f"a uniform alphabet has between 1 and 2**62 symbols, not {size}.")
    if size <= MAX_DIGIT:
        return [size]
    high = -(-size // MAX_DIGIT)
    return [*uniform_digits(high), -(-size // high)]


def _check_probabilities(probability: Any) -> None:
    array = np.asarray(probability)
    if array.size and not (array.min() >= PROBABILITY_FLOOR and array.max() <= 1.0 - PROBABILITY_FLOOR):
        raise CodeError(
            f"probabilities of one from {array.min()} to {array.max()} leave [2**-22, 1 - 2**-22], which is what the "
            "coder can resolve. An adaptive probability gets there after two million symbols: split the stream."
        )


def _used_symbols(frequencies: np.ndarray) -> np.ndarray:
    if frequencies.size == 0 or frequencies.min() < 0 or frequencies.max() == 0:
        raise CodeError("a frequency table needs non-negative integers that are not all zero.")
    return np.flatnonzero(frequencies)


class BitWriter:
    """Collects symbols in order; `to_bytes` encodes them.

    `information_bits` is the sum of -log2 p of all that was written so far, the length that the stream approaches.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[np.ndarray, Any, tuple[np.ndarray, ...]]] = []
        self.information_bits = 0.0
        self.work = 0

    def spend(self, work: int) -> None:
        """Note the work that reading what follows takes, in units of `BitReader.spend`; `work` is their sum."""
        self.work += work

    def bits(
        self,
        values: Int[np.ndarray, " n"] | Bool[np.ndarray, " n"],
        probability_of_one: float | Float[np.ndarray, " n"],
    ) -> None:
        """Write decisions 0 or 1; each costs -log2 of its probability, in bits.

        **Raises:** CodeError for a value that is not 0 or 1, or a probability beyond PROBABILITY_FLOOR.
        """
        _check_probabilities(probability_of_one)
        if values.size == 0:
            return
        if values.dtype != bool and (values.min() < 0 or values.max() > 1):
            raise CodeError(f"a decision is 0 or 1, not {values.min() if values.min() < 0 else values.max()}.")
        ones = values.astype(bool)
        bernoulli = constriction.stream.model.Bernoulli
        if isinstance(probability_of_one, float):
            self._add(ones, bernoulli(probability_of_one, perfect=False))
        else:
            self._add(ones, bernoulli(perfect=False), np.array(probability_of_one, dtype=np.float64))
        self.information_bits -= float(np.log2(np.where(ones, probability_of_one, 1.0 - probability_of_one)).sum())

    def uniform(self, values: Int[np.ndarray, " n"], size: int) -> None:
        """Write values of [0, size), log2(size) bits each. Raises CodeError for a value outside."""
        digits = uniform_digits(size)
        if values.size == 0:
            return
        if values.min() < 0 or values.max() >= size:
            raise CodeError(f"uniform values from {values.min()} to {values.max()} do not fit [0, {size}).")
        rest, columns = values.astype(np.int64), []
        for base in reversed(digits):
            rest, digit = np.divmod(rest, base)
            columns.append((digit, base))
        for digit, base in reversed(columns):
            if base > 1:
                self._add(digit, constriction.stream.model.Uniform(base))
        self.information_bits += values.size * math.log2(size)

    def categorical(self, values: Int[np.ndarray, " n"], frequencies: Int[np.ndarray, " k"]) -> None:
        """Write symbols of one static table; a symbol costs -log2(frequency / sum), in bits.

        **Raises:** CodeError for a symbol outside the table or of frequency zero.
        """
        used = _used_symbols(frequencies)
        if values.size == 0:
            return
        if values.min() < 0 or values.max() >= frequencies.size or frequencies[values].min() == 0:
            raise CodeError(f"a symbol from {values.min()} to {values.max()} has no frequency among {used.size}.")
        probabilities = frequencies / frequencies.sum(dtype=np.int64)
        if used.size > 1:
            rank = np.cumsum(frequencies > 0) - 1
            self._add(rank[values], constriction.stream.model.Categorical(probabilities[used], perfect=False))
        self.information_bits -= float(np.log2(probabilities[values]).sum())

    def choices(self, values: Int[np.ndarray, " n"], weights: Float[np.ndarray, "n k"]) -> None:
        """Write symbols, each under its own row of weights (not normalised); -log2(weight / row sum) bits each."""
        if values.size == 0:
            return
        chosen = weights[np.arange(values.size), values]
        self._add(values, constriction.stream.model.Categorical(perfect=False), np.ascontiguousarray(weights))
        self.information_bits -= float(np.log2(chosen / weights.sum(axis=1)).sum())

    def _add(self, values: np.ndarray, model: Any, *parameters: np.ndarray) -> None:
        self._calls.append((values.astype(np.int32), model, parameters))

    def to_bytes(self) -> bytes:
        """The stream: little-endian 32-bit words without the last one's zero bytes.

        Some 30 bits above the information (24 of them marks), and about 1e-5 of it.
        """
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(np.array([_END_MARK], dtype=np.int32), constriction.stream.model.Uniform(_END_SIZE))
        for values, model, parameters in reversed(self._calls):
            coder.encode_reverse(values, model, *parameters)
        coder.encode_reverse(np.array([_START_MARK], dtype=np.int32), constriction.stream.model.Uniform(_START_SIZE))
        return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


class BitReader:
    """Reads what a BitWriter wrote: the same verbs, in the same order, with the same sizes and probabilities.

    `work_limit`: how much work (see `spend`) the reader is good for; None where it knows itself how much it reads.

    **Raises:** CodeError when the bytes are not a stream, at a read past its end, and in `finish` if it is not used up.
    """

    def __init__(self, data: bytes, work_limit: int | None = None) -> None:
        self._work_limit, self._work = work_limit, 0
        if not data or data[-1] == 0:
            raise CodeError(f"{len(data)} bytes are not a stream; they are empty, or padded with zeros.")
        words = np.frombuffer(data + bytes(-len(data) % 4), dtype="<u4")
        self._coder = constriction.stream.stack.AnsCoder(words.astype(np.uint32))
        self._bernoulli = constriction.stream.model.Bernoulli
        self._each_bernoulli = self._bernoulli(perfect=False)
        if self._coder.decode(constriction.stream.model.Uniform(_START_SIZE)) != _START_MARK:
            raise CodeError(f"{len(data)} bytes do not start as a stream does; they were cut or damaged.")

    def spend(self, work: int) -> None:
        """Account for work before it is done: 1 for a symbol read at a stroke, ONE_BY_ONE for one read on its own.

        A symbol that is certain costs no bits, so that bits alone bound neither time nor memory. **Raises:** CodeError
        beyond the limit.
        """
        self._work += work
        if self._work_limit is not None and self._work > self._work_limit:
            raise CodeError(
                f"{self._work} units of work asked of a reader that allows {self._work_limit}: far more symbols than "
                "bits. The stream was damaged, or forged to exhaust its reader."
            )

    def check(self) -> None:
        """Raise CodeError if the end of the stream has been passed."""
        words, state = self._coder.pos()
        if words == 0 and state < _END_STATE:
            raise CodeError("read past the end of the stream; it was cut, damaged, or written by another code.")

    def _require(self, bits: float) -> None:
        """Refuse a read that cannot fit, before memory is taken for it."""
        self.check()
        words, state = self._coder.pos()
        left = 32 * words + int(state).bit_length()
        if 0.9 * bits > left + 64:
            raise CodeError(f"a read of {bits:.0f} bits where {left} are left; the stream was cut or damaged.")

    # These two are called once a decision: a run-time check of their types would take far longer than they do.
    @no_type_check
    def bit(self, probability_of_one: float) -> int:
        """One decision, without the check for the end: the loop that calls this calls `check` after it."""
        return int(self._coder.decode(self._bernoulli(probability_of_one, perfect=False)))

    @no_type_check
    def adaptive_bit(self, ones: list[float], totals: list[float], context: int) -> int:
        """One decision under (ones + 1/2) / (total + 1) of its context, which is updated; `check` is the caller's."""
        total = totals[context]
        bit = self._coder.decode(self._bernoulli((ones[context] + 0.5) / (total + 1.0), perfect=False))
        totals[context] = total + 1.0
        if bit:
            ones[context] += 1.0
        return bit

    def bits(self, count: int, probability_of_one: float | Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """`count` decisions, 0 or 1; an array of probabilities has that length."""
        _check_probabilities(probability_of_one)
        if not isinstance(probability_of_one, float):
            if probability_of_one.size != count:
                raise CodeError(f"{count} decisions need as many probabilities, not {probability_of_one.size}.")
            self.check()
            found = self._coder.decode(self._each_bernoulli, np.ascontiguousarray(probability_of_one))
            return found.astype(np.int64)
        self._require(-count * math.log2(max(probability_of_one, 1.0 - probability_of_one)))
        return self._coder.decode(self._bernoulli(probability_of_one, perfect=False), count).astype(np.int64)

    def uniform(self, count: int, size: int) -> Int[np.ndarray, " n"]:
        """`count` values of [0, size)."""
        digits = uniform_digits(size)
        self._require(count * math.log2(size))
        values = np.zeros(count, dtype=np.int64)
        for base in digits:
            if base > 1:
                digit = self._coder.decode(constriction.stream.model.Uniform(base), count)
                values = values * base + digit
        if count and values.max() >= size:
            raise CodeError(f"a value {values.max()} outside [0, {size}); the stream was cut or damaged.")
        return values

    def categorical(self, count: int, frequencies: Int[np.ndarray, " k"]) -> Int[np.ndarray, " n"]:
        """`count` symbols of one static table."""
        used = _used_symbols(frequencies)
        if used.size == 1:
            return np.full(count, used[0], dtype=np.int64)
        probabilities = frequencies[used] / frequencies.sum(dtype=np.int64)
        self._require(-count * math.log2(float(probabilities.max())))
        return used[self._coder.decode(constriction.stream.model.Categorical(probabilities, perfect=False), count)]

    def choices(self, weights: Float[np.ndarray, "n k"]) -> Int[np.ndarray, " n"]:
        """One symbol for each row of weights."""
        self.check()
        model = constriction.stream.model.Categorical(perfect=False)
        return self._coder.decode(model, np.ascontiguousarray(weights)).astype(np.int64)

    def finish(self) -> None:
        """Raise CodeError unless exactly what was written has been read."""
        self.check()
        mark = self._coder.decode(constriction.stream.model.Uniform(_END_SIZE))
        if mark != _END_MARK or not self._coder.is_empty():
            raise CodeError("the stream goes on after the last symbol; it was damaged, or written by another code.")
