"""Lengths of streams that begin where another ended: adaptive codes that have already seen symbols both ends know.

An adaptive code's length is a sum over the stream, each symbol under what came before. So the length of symbols that
follow others, which the receiver holds, is

    L(others, symbols) - L(others)

under one and the same code: nothing is learnt twice, and nothing has to be sent of what was learnt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mdl.errors import ExplanationError
from mdl.state import Context, DenseState, IndexState, JoinedState, NoState, SparseState, State
from mdl.streams import Coded, CodedDense, CodedIndex, CodedSparse, choose

CODE_BITS = 32.0  # a stream's names and parameters of codes: 1 + 2 bits (columns), 1 + 9 (indices), 2 + 18 (supports)


def follow(before: Context, after: Context) -> Context:
    """The context of one stream behind another."""
    moved = np.where(after.previous < 0, after.previous, after.previous + before.n_tokens)
    return Context(np.concatenate([before.tokens, after.tokens]), np.concatenate([before.previous, moved]))


def concatenated(before: State, after: State) -> State:
    """One stream behind another of the same alphabet. **Raises:** `ExplanationError` for streams that do not fit."""
    if isinstance(before, DenseState) and isinstance(after, DenseState):
        return DenseState(np.concatenate([before.values, after.values]), after.parts)
    if isinstance(before, IndexState) and isinstance(after, IndexState):
        return IndexState(np.concatenate([before.indices, after.indices]), after.n_parts)
    if isinstance(before, SparseState) and isinstance(after, SparseState):
        return SparseState(
            np.concatenate([before.tokens, after.tokens + before.n_tokens]),
            np.concatenate([before.features, after.features]),
            np.concatenate([before.values, after.values]),
            after.classes,
            before.n_tokens + after.n_tokens,
            after.signed,
        )
    raise ExplanationError(f"a {type(after).__name__} cannot follow a {type(before).__name__}")


def primed_bits(state: State, context: Context, before: State | None, known: Context | None) -> float:
    """The shorter of two lengths of a stream, in bits: from nothing, or behind symbols that both ends know.

    **Arguments:** `before`, `known`: those symbols and their context, or None. **Returns:** with `naming_bits`, 1 bit
    that names the start, and `CODE_BITS` for the codes chosen; 0 for a stream without symbols.
    """
    if isinstance(state, NoState):
        return 0.0
    if isinstance(state, JoinedState):
        first = before.streams if isinstance(before, JoinedState) else (None,) * len(state.streams)
        return sum(primed_bits(s, context, b, known) for s, b in zip(state.streams, first, strict=True))
    lengths = [choose(state, context).length.total + naming_bits(state, None)]
    if before is not None and known is not None:
        whole = choose(concatenated(before, state), follow(known, context))
        own = whole.length.total - _same_codes(whole, before, known).length.total
        lengths.append(own + naming_bits(state, before))
    return min(lengths) + 1.0 + CODE_BITS


def naming_bits(state: State, before: State | None) -> float:
    r"""What it takes to say which part it is that a stream introduces: sum over new parts of log2 (parts not yet met).

    Parts that are sent are sent in the order of their first use, so that their streams need not name them. Parts that
    the receiver has learnt itself are in an order of its own.
    """
    if not isinstance(state, IndexState | SparseState):
        return 0.0
    met = np.unique(_parts(before)) if before is not None else np.zeros(0, np.int64)
    new = np.setdiff1d(_parts(state), met).size
    return float(np.log2(state.n_parts - met.size - np.arange(new)).sum())


def _parts(state: State) -> np.ndarray:
    """The part of each symbol."""
    if isinstance(state, IndexState):
        return state.indices
    assert isinstance(state, SparseState)
    return state.features


def carried_bits(values: np.ndarray, before: np.ndarray) -> float:
    """Columns [n, width] under independent adaptive codes that have seen those `before` [m, width]; bits."""
    return DenseState(np.concatenate([before, values])).bits() - DenseState(before).bits()


def _same_codes(coded: Coded, state: State, context: Context) -> Coded:
    """Another stream under the codes and parameters of `coded`."""
    if isinstance(coded, CodedDense | CodedIndex | CodedSparse):
        return replace(coded, state=state, context=context)  # type: ignore[arg-type]
    raise ExplanationError(f"streams of kind {type(coded).__name__} have no codes to carry over")
