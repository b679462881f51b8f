"""static(N), paid on first use.

    static(N) = header + sum over parts of bits(part) * P(part is touched by N tokens)

Up to the n tokens at hand the probability is counted on the real stream: the share of its windows of N consecutive
tokens (taken cyclically, so that there are n of them) that touch the part. Beyond n, what was seen is paid, and a part
that was never seen is paid with probability 1 - (1 - f)^(N - n), f = 0.5 / (n + 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from estimators.prices import Outline
from mdl.ledger import StaticCurve
from mdl.message import Message

GRID = tuple(float(n) for n in np.unique(np.round(np.logspace(0, 10, 81), 0)))


def touched_share(touched: scipy.sparse.csr_array, grid: np.ndarray) -> np.ndarray:
    """P(part is touched by N consecutive tokens), [len(grid), n_parts], for every N of the grid up to n tokens.

    A cyclic window of N tokens misses a part iff it lies inside one of the part's runs of g untouched tokens, for which
    there are max(0, g - N + 1) places; a part that is never touched is missed by all n windows.
    """
    n, n_parts = touched.shape
    columns = scipy.sparse.csc_array(touched)
    columns.sort_indices()
    part = np.repeat(np.arange(n_parts), np.diff(columns.indptr))
    token = columns.indices.astype(np.int64)
    follower = np.roll(token, -1)
    last = np.flatnonzero(np.diff(part, append=-1))
    first = columns.indptr[:-1][np.diff(columns.indptr) > 0]
    follower[last] = token[first] + n
    gaps = follower - token - 1
    used = np.diff(columns.indptr) > 0
    share = np.zeros((len(grid), n_parts))
    for row, size in enumerate(grid):
        missed = np.bincount(part, np.maximum(gaps - min(size, n) + 1, 0), n_parts)
        share[row] = np.where(used, 1.0 - missed / n, 0.0)
    return share


def static_curve(message: Message, touched: Sequence[scipy.sparse.csr_array | None], n_tokens: int) -> StaticCurve:
    """static(N) in bits on a logarithmic grid of N; `touched` has one entry a section of the message.

    None means that every token needs every part of that section: they are paid at N = 1.
    """
    grid = np.array(sorted({*GRID, float(n_tokens)}))
    bits = static_bits(message, touched, n_tokens, grid)
    return StaticCurve(tuple(grid), tuple(bits), message.header_bits, message.whole_bits)


def static_bits(
    message: Message | Outline, touched: Sequence[scipy.sparse.csr_array | None], n_tokens: int, grid: np.ndarray
) -> np.ndarray:
    """static(N) in bits for the N of an increasing grid, from a stream of `n_tokens`."""
    inside = grid <= n_tokens
    bits = np.full(len(grid), message.header_bits)
    for part_bits, uses in zip(message.part_bits, touched, strict=True):
        if len(part_bits) == 0:
            continue
        if uses is None:
            bits += part_bits.sum()
            continue
        bits[inside] += touched_share(uses, grid[inside]) @ part_bits
        seen = np.bincount(uses.indices, minlength=len(part_bits)) > 0
        unseen = 1.0 - (1.0 - 0.5 / (n_tokens + 1)) ** (grid[~inside] - n_tokens)
        bits[~inside] += part_bits[seen].sum() + part_bits[~seen].sum() * unseen
    return bits
