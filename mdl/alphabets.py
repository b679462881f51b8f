"""The receiver's side of a state: what symbols it expects, read from a bitstream, and nothing else accepted.

A decoder names its alphabet. The scorer takes a sender's symbols only through `accept`, which copies the integers into
a state of the expected kind: whatever else hangs on a sender's object (a subclass, an attribute, a float) is left
behind or refused, so that what a decoder is told is what the stream carries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse

from mdl.codes.bitstream import BitReader
from mdl.codes.integers import MAX_INTEGER
from mdl.errors import ExplanationError
from mdl.state import Context, DenseState, IndexState, JoinedState, NoState, SparseState, State
from mdl.streams import Coded, CodedDense, CodedIndex, CodedJoined, CodedNothing, CodedSparse


@runtime_checkable
class Alphabet(Protocol):
    """The symbols of one stream."""

    def accept(self, state: Any, n_tokens: int) -> State:
        """A copy of the sender's symbols. **Raises:** `ExplanationError` where they are not of this alphabet."""
        ...

    def read(self, reader: BitReader, context: Context) -> Coded:
        """The symbols of a stream, and the codes that it names. **Raises:** `CodeError` if it was cut or damaged."""
        ...


def _expect(state: Any, kind: Any, n_tokens: int) -> None:
    if type(state) is not kind:
        raise ExplanationError(
            f"the decoder reads a {kind.__name__}, the explanation's encode returned {type(state).__name__}: only what "
            "the state's own code carries may reach the decoder (no subclass, no error term beside it)"
        )
    if state.n_tokens != n_tokens:
        raise ExplanationError(f"a state of {state.n_tokens} tokens for a sample of {n_tokens}: one entry a token")


def _integers(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ExplanationError(f"{what} of type {array.dtype}: state symbols are integers; quantise them first")
    if array.size and max(int(array.max()), -int(array.min())) > MAX_INTEGER:
        raise ExplanationError(f"{what} from {array.min()} to {array.max()} leave +-(2**62 - 1)")
    return np.array(array, np.int64)


@dataclass(frozen=True)
class NoAlphabet:
    """Nothing is told."""

    def accept(self, state: Any, n_tokens: int) -> NoState:
        _expect(state, NoState, n_tokens)
        return NoState(n_tokens)

    def read(self, reader: BitReader, context: Context) -> CodedNothing:
        return CodedNothing(NoState(context.n_tokens))


@dataclass(frozen=True)
class DenseAlphabet:
    """`width` integers a token; with `parts`, column j uses part j where it is not zero."""

    width: int
    parts: bool = True

    def accept(self, state: Any, n_tokens: int) -> DenseState:
        _expect(state, DenseState, n_tokens)
        values = _integers(state.values, "coefficients")
        if values.shape != (n_tokens, self.width):
            raise ExplanationError(f"coefficients {values.shape}; the decoder reads {(n_tokens, self.width)}")
        return DenseState(values, self.parts)

    def read(self, reader: BitReader, context: Context) -> CodedDense:
        return CodedDense.read(reader, context, self.width, self.parts)


@dataclass(frozen=True)
class SparseAlphabet:
    """Features that are on, and their values: `classes` [n_parts] as in the message, `signed` or not."""

    classes: np.ndarray
    signed: bool

    def accept(self, state: Any, n_tokens: int) -> SparseState:
        _expect(state, SparseState, n_tokens)
        tokens, features = _integers(state.tokens, "tokens"), _integers(state.features, "features")
        values, shape = _integers(state.values, "values"), (n_tokens, len(self.classes))
        for name, index, size in (("tokens", tokens, shape[0]), ("features", features, shape[1])):
            if index.size and not 0 <= index.min() <= index.max() < size:
                raise ExplanationError(f"{name} from {index.min()} to {index.max()}; the decoder has {size}")
        if values.size and values.min() < 0 and not self.signed:
            raise ExplanationError(f"a value of {values.min()} for a decoder whose values are never negative")
        matrix = scipy.sparse.coo_array((values, (tokens, features)), shape=shape).tocsr()
        return SparseState.from_matrix(matrix, np.array(self.classes, np.int64), self.signed)

    def read(self, reader: BitReader, context: Context) -> CodedSparse:
        return CodedSparse.read(reader, context, self.classes, self.signed)


@dataclass(frozen=True)
class IndexAlphabet:
    """One of `n_parts` indices a token."""

    n_parts: int

    def accept(self, state: Any, n_tokens: int) -> IndexState:
        _expect(state, IndexState, n_tokens)
        indices = _integers(state.indices, "indices")
        if indices.size and not 0 <= indices.min() <= indices.max() < self.n_parts:
            raise ExplanationError(f"indices from {indices.min()} to {indices.max()}; the decoder has {self.n_parts}")
        return IndexState(indices, self.n_parts)

    def read(self, reader: BitReader, context: Context) -> CodedIndex:
        return CodedIndex.read(reader, context, self.n_parts)


@dataclass(frozen=True)
class JoinedAlphabet:
    """Several streams, one after the other."""

    alphabets: tuple[Alphabet, ...]

    def accept(self, state: Any, n_tokens: int) -> JoinedState:
        _expect(state, JoinedState, n_tokens)
        if len(state.streams) != len(self.alphabets):
            raise ExplanationError(f"{len(state.streams)} streams; the decoder reads {len(self.alphabets)}")
        pairs = zip(self.alphabets, state.streams, strict=True)
        return JoinedState(tuple(a.accept(s, n_tokens) for a, s in pairs))

    def read(self, reader: BitReader, context: Context) -> CodedJoined:
        return CodedJoined(tuple(a.read(reader, context) for a in self.alphabets))


KINDS = (NoAlphabet, DenseAlphabet, SparseAlphabet, IndexAlphabet, JoinedAlphabet)


def check_alphabet(alphabet: Any) -> Alphabet:
    """The alphabet that a decoder names, if it is one of this module's own.

    **Raises:** `ExplanationError` for any other: an alphabet prices the symbols, and a code that a decoder brings along
    could price them at nothing.
    """
    if type(alphabet) not in KINDS:
        known = ", ".join(k.__name__ for k in KINDS)
        raise ExplanationError(
            f"the decoder brings a code of its own, {type(alphabet).__name__}, to price its symbols by. Codes are "
            f"fixed beforehand and the same for everybody: {known}."
        )
    for inner in alphabet.alphabets if isinstance(alphabet, JoinedAlphabet) else ():
        check_alphabet(inner)
    if isinstance(alphabet, SparseAlphabet):
        classes = alphabet.classes
        if type(classes) is not np.ndarray or not np.issubdtype(classes.dtype, np.integer):
            raise ExplanationError(f"classes of values are a plain array of integers, not {type(classes).__name__}")
    return alphabet
