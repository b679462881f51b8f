"""What an explanation is told about each input, as symbols: the state column's alphabet.

A sender turns activations into one of these; the receiver gets the same symbols back from the bitstream, and nothing
else. Tokens are numbered 0 .. n-1 over the scored positions in stream order. Every kind knows its exact length under a
named code, how that length spreads over tokens (for standard errors), which parts of the message each token touches
(for static bits paid on first use), and how to be written and read back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import scipy.sparse

from mdl.codes.adaptive_integer import AdaptiveInteger
from mdl.codes.bitstream import BitWriter
from mdl.codes.indices import IndexCode
from mdl.codes.supports import IntroductionCode
from mdl.errors import ExplanationError


@dataclass(frozen=True)
class Context:
    """What both ends know of each token while its symbols are read.

    **Arguments:** `tokens` [n]: token ids; `previous` [n]: the index of the position before it in the same sequence, -1
    where that is not one of the n.
    """

    tokens: np.ndarray
    previous: np.ndarray

    @property
    def n_tokens(self) -> int:
        """Number of tokens n."""
        return len(self.tokens)


@dataclass(frozen=True)
class StreamLength:
    """Bits of a stream: exact `total`; `learning`, the part that adaptive codes spend on learning their tables (it
    vanishes per token as N grows); `per_token` [n], an attribution that sums to `total`; the code's name."""

    total: float
    learning: float
    per_token: np.ndarray
    code: str


def joined_length(lengths: list[StreamLength]) -> StreamLength:
    """Of one stream after the other."""
    return StreamLength(
        math.fsum(x.total for x in lengths),
        math.fsum(x.learning for x in lengths),
        np.sum([x.per_token for x in lengths], axis=0),
        "; ".join(x.code for x in lengths),
    )


@runtime_checkable
class State(Protocol):
    """Symbols of one stream over n tokens. The kinds below are all there are: see `mdl.alphabets`."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens n."""
        ...

    def bits(self) -> float:
        """The exact length in bits under this kind's code."""
        ...

    def length(self) -> StreamLength:
        """The same length, with its share of learning and its spread over tokens."""
        ...

    def touched(self) -> scipy.sparse.csr_array | None:
        """[n_tokens, n_parts] with a non-zero where a token uses a part; None if the state does not decide it."""
        ...

    def write(self, writer: BitWriter) -> None: ...


def first_use_order(touched: scipy.sparse.csr_array) -> np.ndarray:
    """Parts in the order of their first use, then those never used: the order in which the receiver numbers them."""
    parts, first = np.unique(touched.indices, return_index=True)
    unused = np.setdiff1d(np.arange(touched.shape[1]), parts)
    return np.concatenate([parts[np.argsort(first)], unused]).astype(np.int64)


@dataclass(frozen=True)
class NoState:
    """Explanations that are functions of the inputs are told nothing."""

    n_tokens: int

    def bits(self) -> float:
        return 0.0

    def length(self) -> StreamLength:
        return StreamLength(0.0, 0.0, np.zeros(self.n_tokens), "none")

    def touched(self) -> None:
        return None

    def write(self, writer: BitWriter) -> None:
        """Nothing to write."""


@dataclass(frozen=True)
class DenseState:
    """A few integers for every token: quantised coefficients, per-token scales.

    `values` [n, r]; column j has its own adaptive code and, if `parts` is set, uses part j where it is non-zero.
    """

    values: np.ndarray
    parts: bool = True

    @property
    def n_tokens(self) -> int:
        return len(self.values)

    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        n, width = self.values.shape
        return self.values.ravel(), np.tile(np.arange(width), n)

    def bits(self) -> float:
        return float(np.sum(AdaptiveInteger().bits(*self._flat(), self.values.shape[1]))) if self.values.size else 0.0

    def length(self) -> StreamLength:
        values, classes = self._flat()
        width = self.values.shape[1]
        if not values.size:
            return StreamLength(0.0, 0.0, np.zeros(self.n_tokens), "none")
        found = AdaptiveInteger().measure(values, classes, width)
        shares = found.shares.reshape(self.values.shape).sum(1)
        return StreamLength(float(found.totals.sum()), float(found.learning.sum()), shares, "adaptive integer (KT)")

    def touched(self) -> scipy.sparse.csr_array | None:
        return scipy.sparse.csr_array(self.values != 0) if self.parts else None

    def write(self, writer: BitWriter) -> None:
        AdaptiveInteger().write(writer, *self._flat(), self.values.shape[1])


@dataclass(frozen=True)
class SparseState:
    """Which of `n_parts` features are on, and their non-zero quantised values.

    `tokens`, `features`, `values` [nnz], sorted by token, then feature; `classes` [n_parts] puts features of like scale
    under one adaptive code of values (it is static, and part of each feature's part). Signed if any value is negative
    can occur (`signed`).
    """

    tokens: np.ndarray
    features: np.ndarray
    values: np.ndarray
    classes: np.ndarray
    n_tokens: int
    signed: bool

    @property
    def n_parts(self) -> int:
        return len(self.classes)

    def matrix(self) -> scipy.sparse.csr_array:
        """The symbols as a sparse integer matrix [n_tokens, n_parts]."""
        shape = (self.n_tokens, self.n_parts)
        return scipy.sparse.coo_array((self.values, (self.tokens, self.features)), shape=shape).tocsr()

    @classmethod
    def from_matrix(cls, matrix: scipy.sparse.csr_array, classes: np.ndarray, signed: bool) -> SparseState:
        """From integer symbols [n_tokens, n_parts]; explicit zeros are dropped."""
        matrix = scipy.sparse.csr_array(matrix)
        matrix.eliminate_zeros()
        matrix.sort_indices()
        tokens = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        values = matrix.data.astype(np.int64)
        return cls(tokens, matrix.indices.astype(np.int64), values, classes, matrix.shape[0], signed)

    def reordered(self, order: np.ndarray) -> SparseState:
        """The same symbols when the parts are sent in another order: the new part i is the old part order[i]."""
        return SparseState.from_matrix(self.matrix()[:, order], self.classes[order], self.signed)

    def bits(self) -> float:
        return self.support_bits() + self.value_bits()

    def support_bits(self) -> float:
        """Of which features are on."""
        return IntroductionCode().bits((self.tokens, self.features), self.n_tokens).total

    def value_bits(self) -> float:
        """Of the values alone."""
        if not self.values.size:
            return 0.0
        code = AdaptiveInteger(signed=self.signed, with_zero=False)
        return float(np.sum(code.bits(self.values, self.classes[self.features], int(self.classes.max()) + 1)))

    def length(self) -> StreamLength:
        support = IntroductionCode().bits((self.tokens, self.features), self.n_tokens)
        values, code = self.value_length(), "introduction + Bernoulli (KT), adaptive values"
        total, learning = support.total + values.total, support.learning + values.learning
        return StreamLength(total, learning, support.per_token + values.per_token, code)

    def value_length(self) -> StreamLength:
        """Of the values alone, features of a class under one code."""
        if not self.values.size:
            return StreamLength(0.0, 0.0, np.zeros(self.n_tokens), "none")
        code = AdaptiveInteger(signed=self.signed, with_zero=False)
        classes, groups = self.classes[self.features], int(self.classes.max()) + 1
        found = code.measure(self.values, classes, groups)
        shares = np.bincount(self.tokens, found.shares, self.n_tokens)
        return StreamLength(float(found.totals.sum()), float(found.learning.sum()), shares, "adaptive values")

    def touched(self) -> scipy.sparse.csr_array:
        return scipy.sparse.csr_array(self.matrix() != 0)

    def write(self, writer: BitWriter) -> None:
        IntroductionCode().write(writer, (self.tokens, self.features), self.n_tokens)
        self.write_values(writer)

    def write_values(self, writer: BitWriter) -> None:
        """The values alone, features of a class under one code."""
        groups = int(self.classes.max()) + 1 if len(self.classes) else 1
        code = AdaptiveInteger(signed=self.signed, with_zero=False)
        code.write(writer, self.values, self.classes[self.features], groups)


@dataclass(frozen=True)
class IndexState:
    """One of `n_parts` indices for every token, `indices` [n]."""

    indices: np.ndarray
    n_parts: int

    @property
    def n_tokens(self) -> int:
        return len(self.indices)

    def reordered(self, order: np.ndarray) -> IndexState:
        """The same symbols when the parts are sent in another order: the new part i is the old part order[i]."""
        return IndexState(np.argsort(order)[self.indices], self.n_parts)

    def bits(self) -> float:
        return IndexCode().bits(self.indices)[0]

    def length(self) -> StreamLength:
        total, per_token = IndexCode().bits(self.indices)
        return StreamLength(total, IndexCode().learning_bits(self.indices), per_token, "introduction + Polya urn")

    def touched(self) -> scipy.sparse.csr_array:
        n = self.n_tokens
        return scipy.sparse.csr_array((np.ones(n, bool), self.indices, np.arange(n + 1)), shape=(n, self.n_parts))

    def write(self, writer: BitWriter) -> None:
        IndexCode().write(writer, self.indices)


@dataclass(frozen=True)
class JoinedState:
    """Several streams, one written after the other; the first says which parts a token touches."""

    streams: tuple[State, ...]

    @property
    def n_tokens(self) -> int:
        return self.streams[0].n_tokens

    def reordered(self, order: np.ndarray) -> JoinedState:
        """The same symbols when the parts are sent in another order: the new part i is the old part order[i]."""
        first = self.streams[0]
        if isinstance(first, SparseState | IndexState):
            return JoinedState((first.reordered(order), *self.streams[1:]))
        raise ExplanationError(f"the parts of a {type(first).__name__} cannot be renumbered")

    def bits(self) -> float:
        return math.fsum(s.bits() for s in self.streams)

    def length(self) -> StreamLength:
        return joined_length([s.length() for s in self.streams])

    def touched(self) -> scipy.sparse.csr_array | None:
        return self.streams[0].touched()

    def write(self, writer: BitWriter) -> None:
        for stream in self.streams:
            stream.write(writer)
