"""State symbols as streams: every kind of state under the shorter of two codes, of which the stream names one.

The independent code uses nothing but the symbols before; the conditional one also what the receiver knows, token ids
above all. Both are adaptive: no table is sent. The residual coder's symbols have the same choice, for whatever a token
id tells must not help one column and not the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from mdl.codes.adaptive_integer import AdaptiveInteger
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.conditional_columns import ConditionalColumnCode
from mdl.codes.conditional_indices import ConditionalIndexCode
from mdl.codes.conditional_supports import ConditionalSupportCode
from mdl.codes.conditional_values import ConditionalValueCode
from mdl.codes.indices import IndexCode
from mdl.codes.supports import IntroductionCode
from mdl.errors import CodeError
from mdl.state import (
    Context,
    DenseState,
    IndexState,
    JoinedState,
    NoState,
    SparseState,
    State,
    StreamLength,
    joined_length,
)

FIT_TOKENS = 2048  # of a stream, on which a code's parameters are chosen
_OCTAVE_HALVES = (1.0, math.sqrt(2.0))


@runtime_checkable
class Coded(Protocol):
    """A state with the codes that its symbols are written under."""

    @property
    def state(self) -> State: ...

    @property
    def length(self) -> StreamLength:
        """The exact length in bits, its learning, its spread over tokens, the codes' names."""
        ...

    def write(self, writer: BitWriter) -> None: ...


def choose(state: State, context: Context, like: Coded | None = None) -> Coded:
    """The shorter codes for a state.

    **Arguments:** `like`: how a similar state was coded; parameters that are slow to fit are taken from there.
    """
    if isinstance(state, DenseState):
        return CodedDense.choose(state, context, like)
    if isinstance(state, SparseState):
        return CodedSparse.choose(state, context, like)
    if isinstance(state, IndexState):
        return CodedIndex.choose(state, context, like)
    if isinstance(state, JoinedState):
        known = like.parts if isinstance(like, CodedJoined) else (None,) * len(state.streams)
        return CodedJoined(tuple(choose(s, context, k) for s, k in zip(state.streams, known, strict=True)))
    assert isinstance(state, NoState)
    return CodedNothing(state)


def _write_flag(writer: BitWriter, conditional: bool) -> None:
    writer.uniform(np.array([int(conditional)]), 2)


def _read_flag(reader: BitReader) -> bool:
    return bool(reader.uniform(1, 2)[0])


def _check_parts(indices: np.ndarray, n_parts: int) -> None:
    if indices.size and indices.max() >= n_parts:
        raise CodeError(f"part {indices.max()} of {n_parts}; the stream belongs to another message")


@dataclass(frozen=True)
class CodedNothing:
    """No symbols."""

    state: NoState

    @cached_property
    def length(self) -> StreamLength:
        return StreamLength(0.0, 0.0, np.zeros(self.state.n_tokens), "none")

    def write(self, writer: BitWriter) -> None:
        """Nothing to write."""


@dataclass(frozen=True)
class CodedDense:
    """Columns, each under an adaptive code of its own, in contexts from what the token id leads to expect or in one."""

    state: DenseState
    context: Context
    code: ConditionalColumnCode | None

    @classmethod
    def choose(cls, state: DenseState, context: Context, like: Coded | None = None) -> CodedDense:
        if not state.values.size:
            return cls(state, context, None)
        code = like.code if isinstance(like, CodedDense) else None
        if code is None:
            some = slice(FIT_TOKENS)
            code = ConditionalColumnCode.fit(state.values[some], context.tokens[some], context.previous[some])
        found = cls(state, context, code)
        return found if found.length.total < 1.0 + state.bits() else cls(state, context, None)

    @classmethod
    def read(cls, reader: BitReader, context: Context, width: int, parts: bool) -> CodedDense:
        n = context.n_tokens
        if n * width == 0:
            return cls(DenseState(np.zeros((n, width), np.int64), parts), context, None)
        if _read_flag(reader):
            code, values = ConditionalColumnCode.read(reader, width, context.tokens, context.previous)
            return cls(DenseState(values, parts), context, code)
        values = AdaptiveInteger().read(reader, np.tile(np.arange(width), n), width)
        return cls(DenseState(values.reshape(n, width), parts), context, None)

    @cached_property
    def length(self) -> StreamLength:
        if self.code is None:
            return _with_flags(self.state.length(), int(self.state.values.size > 0))
        found = self.code.bits(self.state.values, self.context.tokens, self.context.previous)
        length = StreamLength(found.total, found.learning, found.per_token, "adaptive integer (KT) given token ids")
        return _with_flags(length, 1)

    def write(self, writer: BitWriter) -> None:
        if not self.state.values.size:
            return
        _write_flag(writer, self.code is not None)
        if self.code is None:
            self.state.write(writer)
        else:
            self.code.write(writer, self.state.values, self.context.tokens, self.context.previous)


@dataclass(frozen=True)
class CodedSparse:
    """Features that are on, then their values; each under the independent or the conditional code."""

    state: SparseState
    context: Context
    support: ConditionalSupportCode | None
    values: bool

    @classmethod
    def choose(cls, state: SparseState, context: Context, like: Coded | None) -> CodedSparse:
        pairs, side = (state.tokens, state.features), (context.tokens, context.previous)
        known = like.support if isinstance(like, CodedSparse) else None
        support: ConditionalSupportCode | None = ConditionalSupportCode.fit(pairs, *side) if known is None else known
        conditional, independent = cls(state, context, support, True), cls(state, context, None, False)
        if conditional.support_length.total >= independent.support_length.total:
            support = None
        values = conditional.value_length.total < independent.value_length.total
        found = cls(state, context, support, values)
        # What was just worked out for one of the two is its length.
        found.__dict__["support_length"] = (conditional if support else independent).support_length
        found.__dict__["value_length"] = (conditional if values else independent).value_length
        return found

    @classmethod
    def read(cls, reader: BitReader, context: Context, classes: np.ndarray, signed: bool) -> CodedSparse:
        side, support = (context.tokens, context.previous), None
        if _read_flag(reader):
            support, pairs = ConditionalSupportCode.read(reader, *side)
        else:
            pairs = IntroductionCode().read(reader, context.n_tokens)
        tokens, features = pairs
        _check_parts(features, len(classes))
        conditional = _read_flag(reader)
        if conditional:
            scales = typical_magnitudes(classes[features])
            values = ConditionalValueCode(signed).read(reader, pairs, scales, *side)
        else:
            groups = int(classes.max()) + 1 if len(classes) else 1
            values = AdaptiveInteger(signed=signed, with_zero=False).read(reader, classes[features], groups)
        state = SparseState(tokens, features, values, classes, context.n_tokens, signed)
        return cls(state, context, support, conditional)

    @cached_property
    def support_length(self) -> StreamLength:
        """Of which features are on."""
        state, context = self.state, self.context
        pairs = (state.tokens, state.features)
        if self.support is None:
            found = IntroductionCode().bits(pairs, state.n_tokens)
            return StreamLength(found.total, found.learning, found.per_token, "introduction + Bernoulli (KT)")
        found = self.support.bits(pairs, context.tokens, context.previous)
        code = "introduction + Bernoulli given token ids and supports"
        return StreamLength(found.total, found.learning, found.per_token, code)

    @cached_property
    def value_length(self) -> StreamLength:
        """Of their values."""
        state = self.state
        if not self.values:
            return state.value_length()
        pairs, side = (state.tokens, state.features), (self.context.tokens, self.context.previous)
        scales = typical_magnitudes(state.classes[state.features])
        found = ConditionalValueCode(state.signed).bits(pairs, state.values, scales, *side)
        return StreamLength(found.total, found.learning, found.per_token, "adaptive values given token ids")

    @cached_property
    def length(self) -> StreamLength:
        return _with_flags(joined_length([self.support_length, self.value_length]), 2)

    def write(self, writer: BitWriter) -> None:
        state, side = self.state, (self.context.tokens, self.context.previous)
        pairs = (state.tokens, state.features)
        _write_flag(writer, self.support is not None)
        if self.support is None:
            IntroductionCode().write(writer, pairs, state.n_tokens)
        else:
            self.support.write(writer, pairs, *side)
        _write_flag(writer, self.values)
        if not self.values:
            state.write_values(writer)
            return
        scales = typical_magnitudes(state.classes[state.features])
        ConditionalValueCode(state.signed).write(writer, pairs, state.values, scales, *side)


@dataclass(frozen=True)
class CodedIndex:
    """One index a token."""

    state: IndexState
    context: Context
    code: ConditionalIndexCode | None

    @classmethod
    def choose(cls, state: IndexState, context: Context, like: Coded | None = None) -> CodedIndex:
        code = like.code if isinstance(like, CodedIndex) else None
        if code is None:
            some = slice(FIT_TOKENS)
            code = ConditionalIndexCode.fit(state.indices[some], context.tokens[some], context.previous[some])
        found = cls(state, context, code)
        return found if found.length.total < 1.0 + state.bits() else cls(state, context, None)

    @classmethod
    def read(cls, reader: BitReader, context: Context, n_parts: int) -> CodedIndex:
        code = None
        if _read_flag(reader):
            code, indices = ConditionalIndexCode.read(reader, context.tokens, context.previous)
        else:
            indices = IndexCode().read(reader, context.n_tokens)
        _check_parts(indices, n_parts)
        return cls(IndexState(indices, n_parts), context, code)

    @cached_property
    def length(self) -> StreamLength:
        if self.code is None:
            return _with_flags(self.state.length(), 1)
        found = self.code.bits(self.state.indices, self.context.tokens, self.context.previous)
        length = StreamLength(found.total, found.learning, found.per_token, "introduction + urn given token ids")
        return _with_flags(length, 1)

    def write(self, writer: BitWriter) -> None:
        _write_flag(writer, self.code is not None)
        if self.code is None:
            self.state.write(writer)
        else:
            self.code.write(writer, self.state.indices, self.context.tokens, self.context.previous)


@dataclass(frozen=True)
class CodedJoined:
    """Several streams, one after the other."""

    parts: tuple[Coded, ...]

    @cached_property
    def state(self) -> JoinedState:
        return JoinedState(tuple(part.state for part in self.parts))

    @cached_property
    def length(self) -> StreamLength:
        return joined_length([part.length for part in self.parts])

    def write(self, writer: BitWriter) -> None:
        for part in self.parts:
            part.write(writer)


def typical_magnitudes(classes: np.ndarray) -> np.ndarray:
    """2^(c/2) for classes c of half octaves, without an exponential: the same on every machine."""
    return np.ldexp(np.asarray(_OCTAVE_HALVES)[classes % 2], classes // 2)


def _with_flags(length: StreamLength, flags: int) -> StreamLength:
    """With the bits that name the codes."""
    n = max(len(length.per_token), 1)
    return StreamLength(length.total + flags, length.learning, length.per_token + flags / n, length.code)
