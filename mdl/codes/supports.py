"""Sparse sets: which features are on, token after token, and whole sets at once.

`IntroductionCode` is the adaptive dictionary: a feature has no number and costs nothing before its first use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.special import gammaln

from mdl.codes.adaptive_integer import AdaptiveInteger
from mdl.codes.bitstream import PROBABILITY_FLOOR, BitReader, BitWriter
from mdl.codes.counts import kt_bits, plug_in_bits
from mdl.errors import CodeError
from mdl.units import nats_to_bits

BLOCK = 16
"""Features that share one flag on the stream; the flag changes the number of decisions, not the length."""

MAX_TOKENS = 1 << 21
"""Beyond this a Krichevsky-Trofimov probability leaves what the coder can resolve."""

Pairs = tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]


def kt_support_bits(n: Any, k: Any) -> Any:
    """Length of a set of k out of n, one decision for each, under one Krichevsky-Trofimov context; in bits."""
    return kt_bits(k, np.asarray(n) - np.asarray(k))


def enumerative_bits(n: Any, k: Any) -> Any:
    """log2 C(n, k), in bits, of a set of k out of n where k is known. Sending k besides is the caller's to charge."""
    size, chosen = np.asarray(n, dtype=np.float64), np.asarray(k, dtype=np.float64)
    return nats_to_bits(gammaln(size + 1.0) - gammaln(chosen + 1.0) - gammaln(size - chosen + 1.0))


def write_enumerative(writer: BitWriter, members: Int[np.ndarray, " k"], n: int) -> None:
    """Write a set of k members of [0, n), k and n being known to the reader.

    Its rank in the combinatorial number system goes out as ceil(log2 C(n, k)) raw bits: less than 1 bit above
    `enumerative_bits`. **Raises:** CodeError for members that repeat or leave [0, n). **Source:** Cover 1973, IEEE
    Trans. Inf. Theory 19(1), 73-77.
    """
    ordered = np.sort(members)
    if ordered.size and (ordered[0] < 0 or ordered[-1] >= n or (np.diff(ordered) == 0).any()):
        raise CodeError(f"a set of {members.size} members needs distinct members in [0, {n}).")
    rank = sum(math.comb(int(member), i) for i, member in enumerate(ordered.tolist(), start=1))
    width = (math.comb(n, members.size) - 1).bit_length()
    digits = np.frombuffer(f"{rank:0{width}b}".encode() if width else b"", dtype=np.uint8) - ord("0")
    writer.bits(digits.astype(np.int64), 0.5)


def read_enumerative(reader: BitReader, n: int, k: int) -> Int[np.ndarray, " k"]:
    """Read a set of k members of [0, n), ascending. Raises CodeError for a stream that was cut or damaged.

    One pass over [0, n) in big integers, so meant for n up to some hundred thousand.
    """
    if not 0 <= k <= n:
        raise CodeError(f"no set of {k} members in [0, {n}); the count was damaged.")
    number = math.comb(n, k)
    width = (number - 1).bit_length()
    rank = int("0" + "".join(map(str, reader.bits(width, 0.5).tolist())), 2)
    if rank >= number:
        raise CodeError(f"a rank beyond C({n}, {k}); the stream was cut or damaged.")
    members, left, candidate, below = [], k, n, number  # below = C(candidate, left)
    while left:
        below = below * (candidate - left) // candidate
        candidate -= 1
        if below <= rank:
            members.append(candidate)
            rank -= below
            # from C(candidate, left) to C(candidate, left - 1); they are 0 and 1 where candidate < left
            below = below * left // (candidate - left + 1) if candidate >= left else 1
            left -= 1
    return np.array(members[::-1], dtype=np.int64)


@dataclass(frozen=True)
class SupportBits:
    """The length of a support, in bits.

    `total`; `learning`, the part of it that learning the frequencies cost; `introductions`, the part that says how many
    features are new at each token; `per_token` [n_tokens], shares that sum to `total`.
    """

    total: float
    learning: float
    introductions: float
    per_token: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class _Uses:
    """A support sorted by token, its features numbered by first use."""

    tokens: np.ndarray
    ranks: np.ndarray
    order: np.ndarray  # the feature of each rank
    first: np.ndarray  # the token of each rank's first use
    uses: np.ndarray


def _pairs(support: sparse.csr_array | Pairs, n_tokens: int) -> Pairs:
    if isinstance(support, tuple):
        tokens, features = support
    else:
        if support.shape[0] != n_tokens:
            raise CodeError(f"a support of {support.shape[0]} rows for {n_tokens} tokens.")
        rows = np.repeat(np.arange(n_tokens), np.diff(support.indptr))
        present = support.data != 0
        tokens, features = rows[present], support.indices[present]
    if tokens.shape != features.shape:
        raise CodeError(f"{tokens.size} token indices for {features.size} feature indices; they go in pairs.")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= n_tokens or features.min() < 0):
        raise CodeError(
            f"token indices from {tokens.min()} to {tokens.max()} and feature indices from {features.min()}, "
            f"for {n_tokens} tokens and features from 0."
        )
    if n_tokens > MAX_TOKENS:
        raise CodeError(f"{n_tokens} tokens in one support; at most {MAX_TOKENS}: split the data.")
    return tokens.astype(np.int64), features.astype(np.int64)


def _uses(support: sparse.csr_array | Pairs, n_tokens: int) -> _Uses:
    tokens, features = _pairs(support, n_tokens)
    order = np.lexsort((features, tokens))
    tokens, features = tokens[order], features[order]
    if ((np.diff(tokens) == 0) & (np.diff(features) == 0)).any():
        raise CodeError("a feature is listed twice at one token; sum the duplicates first.")
    distinct, first, dense, uses = np.unique(features, return_index=True, return_inverse=True, return_counts=True)
    by_first_use = np.argsort(first)
    rank = np.empty(distinct.size, dtype=np.int64)
    rank[by_first_use] = np.arange(distinct.size)
    return _Uses(tokens, rank[dense], distinct[by_first_use], tokens[first[by_first_use]], uses[by_first_use])


class IntroductionCode:
    """Features on at each token, as an adaptive dictionary.

    At each token: how many features are new (an adaptive integer); then, for each feature met before, whether it is
    on, under the feature's own Krichevsky-Trofimov context, which starts at the token after its first use. Features
    are numbered by first use, so that no index is sent, a feature that is never on costs nothing, and the length does
    not depend on how the sender numbered them:

        sum over features i of kt_bits(k_i - 1, (n - 1 - t_i) - (k_i - 1)) + bits(new features at each token)

    with k_i uses, the first at token t_i of n. A support is a sparse matrix [n_tokens, features] or a pair of arrays,
    token indices and feature indices. All methods raise CodeError for a support that does not fit.
    """

    _new = AdaptiveInteger(signed=False)

    def bits(self, support: sparse.csr_array | Pairs, n_tokens: int) -> SupportBits:
        """The exact length, and each token's share of it for standard errors over sequences; in bits."""
        seen = _uses(support, n_tokens)
        later, chances = seen.uses - 1, n_tokens - 1 - seen.first
        feature_bits = kt_bits(later, chances - later)
        new = np.bincount(seen.first, minlength=n_tokens)
        one_class = np.zeros(n_tokens, dtype=np.int64)
        introductions = float(self._new.bits(new, one_class, 1)[0])
        learning = math.fsum(feature_bits - plug_in_bits(later, chances - later))
        return SupportBits(
            total=math.fsum(feature_bits) + introductions,
            learning=learning + float(self._new.learning_bits(new, one_class, 1)[0]),
            introductions=introductions,
            per_token=self._shares(seen, feature_bits, n_tokens) + self._new.symbol_bits(new, one_class, 1),
        )

    def _shares(self, seen: _Uses, feature_bits: np.ndarray, n_tokens: int) -> np.ndarray:
        """A feature's cost over the tokens after its first use: -log2 p at the end, shifted evenly to the exact sum."""
        later, chances = seen.uses - 1, n_tokens - 1 - seen.first
        p = (later + 0.5) / (chances + 1.0)
        off, on = -np.log2(1.0 - p), -np.log2(p)
        shift = (feature_bits - later * on - (chances - later) * off) / np.maximum(chances, 1)
        running = np.bincount(seen.first + 1, off + shift, n_tokens + 1)[:n_tokens]
        repeat = seen.tokens > seen.first[seen.ranks]
        extra = np.bincount(seen.tokens[repeat], (on - off)[seen.ranks[repeat]], n_tokens)
        return np.cumsum(running) + extra

    def write(self, writer: BitWriter, support: sparse.csr_array | Pairs, n_tokens: int) -> Int[np.ndarray, " used"]:
        """Write the support; the reader needs `n_tokens`.

        **Returns:** `order`: the sender's feature of each rank. The reader knows features by rank alone, so what
        belongs to a feature (its dictionary row) is to be sent in this order. Features new at one token are ranked by
        ascending sender's index.
        """
        seen = _uses(support, n_tokens)
        new = np.bincount(seen.first, minlength=n_tokens)
        self._new.write(writer, new, np.zeros(n_tokens, dtype=np.int64), 1)
        bounds = np.searchsorted(seen.tokens, np.arange(n_tokens + 1))
        state = _Features(seen.first)
        for token in range(n_tokens):
            p = state.probabilities(token)
            on = np.zeros(p.size, dtype=bool)
            ranks = seen.ranks[bounds[token] : bounds[token + 1]]
            on[ranks[ranks < p.size]] = True
            write_flags(writer, on, p)
            state.update(on)
        return seen.order

    def read(self, reader: BitReader, n_tokens: int) -> Pairs:
        """Read a support: token indices and feature ranks, ascending by token, then rank."""
        new = self._new.read(reader, np.zeros(n_tokens, dtype=np.int64), 1)
        if new.max(initial=0) > 1 << 32 or new.sum() > 1 << 26:
            raise CodeError(f"{new.sum()} features; the stream was cut or damaged.")
        state = _Features(np.repeat(np.arange(n_tokens), new))
        met = np.cumsum(new)
        tokens, ranks = [], []
        for token in range(n_tokens):
            on = read_flags(reader, state.probabilities(token))
            state.update(on)
            here = np.r_[np.flatnonzero(on), np.arange(met[token] - new[token], met[token])]
            ranks.append(here)
            tokens.append(np.full(here.size, token))
        if not ranks:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate(tokens), np.concatenate(ranks)


class _Features:
    """What both ends know of the features met so far: uses after the first, and the tokens since."""

    def __init__(self, first: np.ndarray) -> None:
        self._first = first
        self._ones = np.zeros(first.size)

    def probabilities(self, token: int) -> np.ndarray:
        """The Krichevsky-Trofimov probability of each feature met before this token, by rank."""
        met = int(np.searchsorted(self._first, token))
        return (self._ones[:met] + 0.5) / (token - self._first[:met])

    def update(self, on: np.ndarray) -> None:
        """Count one token."""
        self._ones[: on.size] += on


def _blocks(p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [BLOCK, blocks] (0 where padded), of each place being a block's first on, and of any being on.

    Multiplied one place at a time, so that every machine gets the same floating-point numbers.
    """
    padded = np.zeros((BLOCK, -(-p.size // BLOCK)))
    padded.reshape(-1)[: p.size] = p
    first, off = np.empty_like(padded), np.ones(padded.shape[1])
    for place in range(BLOCK):
        first[place] = padded[place] * off
        off = off * (1.0 - padded[place])
    return padded, first, np.clip(1.0 - off, PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)


def write_flags(writer: BitWriter, on: Bool[np.ndarray, " n"], p: Float[np.ndarray, " n"]) -> None:
    """Write independent decisions of given probabilities, most of them off, at the length of -log2 p each.

    A flag for every block of features, the place of the first one on in a flagged block, and the rest of that block:
    by the chain rule the same length as decision by decision (but for a flag's clipping to the coder's floor, below
    1e-6 bit a flag), with some fifteenth of the decisions.
    """
    if on.size == 0:
        return
    padded, first, any_on = _blocks(p)
    grid = np.zeros(padded.shape, dtype=bool)
    grid.reshape(-1)[: on.size] = on
    flags = np.asarray(grid.any(axis=0))
    writer.bits(flags, any_on)
    chosen = np.flatnonzero(flags)
    place = grid[:, chosen].argmax(axis=0)
    writer.choices(place, np.ascontiguousarray(first[:, chosen].T))
    row, column = np.nonzero((np.arange(BLOCK)[:, None] > place) & (padded[:, chosen] > 0))
    writer.bits(grid[row, chosen[column]], padded[row, chosen[column]])


def read_flags(reader: BitReader, p: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Read what `write_flags` wrote, given the same probabilities."""
    if p.size == 0:
        return np.zeros(0, dtype=bool)
    padded, first, any_on = _blocks(p)
    chosen = np.flatnonzero(reader.bits(any_on.size, any_on))
    grid = np.zeros(padded.shape, dtype=bool)
    if chosen.size:
        place = reader.choices(np.ascontiguousarray(first[:, chosen].T))
        grid[place, chosen] = True
        row, column = np.nonzero((np.arange(BLOCK)[:, None] > place) & (padded[:, chosen] > 0))
        grid[row, chosen[column]] = reader.bits(row.size, padded[row, chosen[column]])
    if grid.reshape(-1)[p.size :].any():
        raise CodeError("a feature that does not exist is on; the stream was cut or damaged.")
    return grid.reshape(-1)[: p.size]
