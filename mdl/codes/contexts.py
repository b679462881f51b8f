"""What conditional codes share: the receiver's side knowledge, and arithmetic that is the same on every machine.

Both ends of a conditional code compute probabilities and contexts from what they have in common. Only + - * /, sqrt,
exponents of floating-point numbers and integers occur here, each element by itself, so that no machine, library
version or number of threads can change a bit of the result.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

from mdl.errors import CodeError

START = -1
"""What precedes the first position of a sequence, in place of a token id."""

_FOURTH_ROOTS = (1.0, math.sqrt(math.sqrt(2.0)), math.sqrt(2.0), math.sqrt(2.0) * math.sqrt(math.sqrt(2.0)))


def check_side(tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"], n_tokens: int) -> None:
    """Refuse side knowledge that does not fit.

    **Arguments:** `tokens`: token ids, at least 0; `previous`: for each position the one before it in its sequence, or
    -1 at a sequence's start. Positions are in stream order, so that it is the position's index less one, or -1.

    **Raises:** CodeError.
    """
    if tokens.shape != (n_tokens,) or previous.shape != (n_tokens,):
        raise CodeError(f"{tokens.size} token ids and {previous.size} previous positions for {n_tokens} tokens.")
    if n_tokens and tokens.min() < 0:
        raise CodeError(f"a token id {tokens.min()}: ids are numbered from 0.")
    wrong = np.flatnonzero((previous != START) & (previous != np.arange(n_tokens) - 1))
    if wrong.size or (n_tokens and previous[0] != START):
        where = int(wrong[0]) if wrong.size else 0
        raise CodeError(
            f"position {where} follows {previous[where]}: in stream order it follows {where - 1}, or -1 where a "
            "sequence starts. The positions were probably reordered; keep each sequence together."
        )


def preceding_ids(tokens: Int[np.ndarray, " n"], previous: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The token id at the previous position, START (-1) where a sequence starts."""
    return np.where(previous == START, START, tokens[np.maximum(previous, 0)]) if tokens.size else tokens


def quarter_power(x: Float[np.ndarray, "*shape"], quarters: int) -> Float[np.ndarray, "*shape"] | float:
    """x ** (quarters / 4) for x > 0 and quarters in [0, 8), by square roots."""
    if quarters == 0:
        return 1.0
    whole, rest = divmod(quarters, 4)
    result = x if whole else 1.0
    if rest:
        half = np.sqrt(x)
        if rest & 2:
            result = result * half
        if rest & 1:
            result = result * np.sqrt(half)
    return result


def quarter_octave(x: Float[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """floor(4 log2 x) for x > 0, by the floating-point exponent and three comparisons."""
    mantissa, exponent = np.frexp(x)
    mantissa = mantissa * 2.0
    level = 4 * (exponent.astype(np.int64) - 1)
    for root in _FOURTH_ROOTS[1:]:
        level = level + (mantissa >= root)
    return np.asarray(level)


def running_sums(
    keys: Int[np.ndarray, " n"], values: Float[np.ndarray, " n *width"]
) -> tuple[Float[np.ndarray, " n *width"], Int[np.ndarray, " n"]]:
    """For each row, the sum of the rows before it that have its key, and their number.

    Exact where values are integers and sums stay below 2**53.
    """
    if keys.size == 0:
        return np.zeros_like(values), np.zeros(0, dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    grouped = keys[order]
    starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
    lengths = np.diff(np.r_[starts, grouped.size])
    before = np.cumsum(values[order], axis=0) - values[order]
    sums, counts = np.empty_like(before), np.empty(keys.size, dtype=np.int64)
    sums[order] = before - np.repeat(before[starts], lengths, axis=0)
    counts[order] = np.arange(keys.size) - np.repeat(starts, lengths)
    return sums, counts
