"""Universal codes for positive integers (Elias 1975; Rissanen 1983) and the counts that headers are made of.

Codewords are printed as Elias defined them, so that a length can be counted by eye. All lengths are in bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from mdl.codes.bitstream import BitReader, BitWriter
from mdl.errors import CodeError

MAX_INTEGER = (1 << 62) - 1


def floor_log2(values: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """floor(log2 n), exact for every n in [1, 2**62)."""
    exponent = np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
    # Near 2**k - 1 above 2**53 the conversion to float rounds up to the next power.
    return np.asarray(exponent - (np.left_shift(np.int64(1), exponent) > values))


def _positive(values: np.ndarray) -> np.ndarray:
    if values.size and (values.min() < 1 or values.max() > MAX_INTEGER):
        raise CodeError(
            f"integers from {values.min()} to {values.max()}: a universal code carries 1 to 2**62 - 1. "
            "Zero and negative numbers go through `zigzag` and `write_count`."
        )
    return values


def elias_gamma_bits(values: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Length of the gamma codeword, 2 floor(log2 n) + 1 bits.

    **Raises:** CodeError outside [1, 2**62). **Source:** Elias 1975, IEEE Trans. Inf. Theory 21(2), 194-203.
    """
    return np.asarray(2.0 * floor_log2(_positive(values)) + 1.0)


def elias_delta_bits(values: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Length of the delta codeword, floor(log2 n) + 2 floor(log2(floor(log2 n) + 1)) + 1 bits.

    **Raises:** CodeError outside [1, 2**62). **Source:** Elias 1975.
    """
    exponent = floor_log2(_positive(values))
    return np.asarray(exponent + elias_gamma_bits(np.asarray(exponent + 1)))


def elias_omega_bits(values: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Length of the omega codeword: the recursive groups n, floor(log2 n), ... down to 1, and a closing zero; in bits.

    **Raises:** CodeError outside [1, 2**62). **Source:** Elias 1975.
    """
    group = _positive(values).astype(np.int64)
    bits = np.ones(values.shape)
    while (group > 1).any():
        exponent = floor_log2(group)
        bits += np.where(group > 1, exponent + 1, 0)
        group = np.asarray(np.maximum(exponent, 1))
    return bits


def _log_star(value: float) -> float:
    total, term = 0.0, math.log2(value)
    while term > 0:
        total, term = total + term, math.log2(term)
    return total


@lru_cache(maxsize=1)
def rissanen_sum() -> float:
    r"""The sum over n >= 1 of $2^{-\log^* n}$, by which Rissanen's lengths are normalised.

    The head to N = 2**16 is added up. The tail is an integral and Euler and Maclaurin's corrections -f(N)/2 - f'(N)/12:
    between the towers 2, 4, 16, 65536, ... the integral of f(x) = 1/(x log2 x log2 log2 x ...) grows by one factor
    ln 2 at each step, so that beyond 65536 it is (ln 2)^5 / (1 - ln 2).
    """
    limit, ln2 = 1 << 16, math.log(2.0)
    head = math.fsum(2.0 ** -_log_star(float(n)) for n in range(1, limit + 1))
    edge = 2.0 ** -_log_star(float(limit))
    # d/dx log f at 65536, where the iterated logarithms are 16, 4, 2 and 1.
    slope, product = 1.0, 1.0
    for iterate in (16.0, 4.0, 2.0, 1.0):
        product *= iterate * ln2
        slope += 1.0 / product
    derivative = -edge * slope / limit
    return head + ln2**5 / (1.0 - ln2) - edge / 2.0 - derivative / 12.0


def rissanen_bits(values: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Rissanen's ideal length, log2 n + log2 log2 n + ... (positive terms) + log2 of `rissanen_sum`, in bits.

    Fractional and without a codeword of its own: a yardstick, Elias's omega is its realisation.

    **Raises:** CodeError outside [1, 2**62). **Source:** Rissanen 1983, Annals of Statistics 11(2), 416-431; the
    constant, often printed as 2.865064, is derived and comes to 2.865108.
    """
    term = np.log2(_positive(values).astype(np.float64))
    bits = np.full(values.shape, math.log2(rissanen_sum()))
    while (term > 0).any():
        positive = term > 0
        bits += np.where(positive, term, 0.0)
        term = np.log2(term, out=np.zeros(values.shape), where=positive)
    return bits


def elias_gamma_codeword(value: int) -> str:
    """The gamma codeword as a string of 0 and 1: floor(log2 n) zeros, then n in binary."""
    return "0" * (value.bit_length() - 1) + f"{value:b}"


def elias_delta_codeword(value: int) -> str:
    """The delta codeword as a string of 0 and 1: gamma of the number of binary digits, then n without its first one."""
    return elias_gamma_codeword(value.bit_length()) + f"{value:b}"[1:]


def elias_omega_codeword(value: int) -> str:
    """The omega codeword as a string of 0 and 1."""
    word = "0"
    while value > 1:
        word = f"{value:b}" + word
        value = value.bit_length() - 1
    return word


def _write_codewords(writer: BitWriter, values: np.ndarray, codeword: Callable[[int], str]) -> None:
    word = "".join(codeword(value) for value in _positive(values).tolist())
    writer.bits((np.frombuffer(word.encode(), dtype=np.uint8) - ord("0")).astype(np.int64), 0.5)


def _read_binary(reader: BitReader, digits: int) -> int:
    """A leading one, which is not in the stream, followed by `digits` bits of it."""
    value = 1
    for bit in reader.bits(digits, 0.5).tolist():
        value = 2 * value + bit
    return value


def _read_gamma(reader: BitReader) -> int:
    zeros = 0
    while reader.bit(0.5) == 0:
        zeros += 1
        if zeros > 61:
            raise CodeError("an Elias codeword of more than 61 leading zeros; the stream was cut or damaged.")
    return _read_binary(reader, zeros)


def _read_delta(reader: BitReader) -> int:
    length = _read_gamma(reader)
    if length > 62:
        raise CodeError(f"an Elias delta codeword of an integer of {length} bits; the stream was cut or damaged.")
    return _read_binary(reader, length - 1)


def _read_omega(reader: BitReader) -> int:
    value = 1
    while reader.bit(0.5) == 1:
        if value > 61:
            raise CodeError(f"an Elias omega group of {value + 1} bits; the stream was cut or damaged.")
        value = _read_binary(reader, value)
    return value


def _read_codewords(reader: BitReader, count: int, read_one: Callable[[BitReader], int]) -> np.ndarray:
    values = np.empty(count, dtype=np.int64)
    for i in range(count):
        values[i] = read_one(reader)
        reader.check()
    return values


def write_elias_gamma(writer: BitWriter, values: Int[np.ndarray, " n"]) -> None:
    """Write each integer's gamma codeword. Raises CodeError outside [1, 2**62)."""
    _write_codewords(writer, values, elias_gamma_codeword)


def read_elias_gamma(reader: BitReader, count: int) -> Int[np.ndarray, " n"]:
    """Read `count` gamma codewords. Raises CodeError for a damaged stream."""
    return _read_codewords(reader, count, _read_gamma)


def write_elias_delta(writer: BitWriter, values: Int[np.ndarray, " n"]) -> None:
    """Write each integer's delta codeword. Raises CodeError outside [1, 2**62)."""
    _write_codewords(writer, values, elias_delta_codeword)


def read_elias_delta(reader: BitReader, count: int) -> Int[np.ndarray, " n"]:
    """Read `count` delta codewords. Raises CodeError for a damaged stream."""
    return _read_codewords(reader, count, _read_delta)


def write_elias_omega(writer: BitWriter, values: Int[np.ndarray, " n"]) -> None:
    """Write each integer's omega codeword. Raises CodeError outside [1, 2**62)."""
    _write_codewords(writer, values, elias_omega_codeword)


def read_elias_omega(reader: BitReader, count: int) -> Int[np.ndarray, " n"]:
    """Read `count` omega codewords. Raises CodeError for a damaged stream."""
    return _read_codewords(reader, count, _read_omega)


def zigzag(values: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """Signed to non-negative: 0, -1, 1, -2, 2 become 0, 1, 2, 3, 4."""
    wide = values.astype(np.int64)
    return np.where(wide < 0, -2 * wide - 1, 2 * wide)


def unzigzag(values: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """The inverse of `zigzag`."""
    return np.where(values % 2 == 1, -(values // 2) - 1, values // 2)


def count_bits(n: int) -> float:
    """Length of a count n >= 0 as `write_count` sends it: Elias delta of n + 1, in bits."""
    return float(elias_delta_bits(np.array(n + 1)))


def write_count(writer: BitWriter, n: int) -> None:
    """Write a count n >= 0 as Elias delta of n + 1. Raises CodeError for n < 0 or n >= 2**62 - 1."""
    write_elias_delta(writer, np.array([n + 1]))


def read_count(reader: BitReader) -> int:
    """Read a count. Raises CodeError for a damaged stream."""
    return int(read_elias_delta(reader, 1)[0]) - 1


def signed_count_bits(n: int) -> float:
    """Length of a signed integer: `count_bits` of its zigzag image, in bits."""
    return count_bits(int(zigzag(np.array(n))))


def write_signed_count(writer: BitWriter, n: int) -> None:
    """Write a signed integer through `zigzag` and `write_count`."""
    write_count(writer, int(zigzag(np.array(n))))


def read_signed_count(reader: BitReader) -> int:
    """Read a signed integer. Raises CodeError for a damaged stream."""
    return int(unzigzag(np.array(read_count(reader))))
