"""What streams cost under the codes that they are sent under, without running those.

A search compares settings by lengths under the independent codes, which are closed forms; codes that look at token ids
take seconds. How the two compare is measured now and then, and carried over to other settings in the way in which it
carries over: a support keeps the share of its bits that token ids tell, a number keeps the bits that they tell of it,
however fine its step (a finer one adds digits that nothing foretells).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mdl.state import DenseState, IndexState, JoinedState, SparseState, State
from mdl.streams import Coded, CodedJoined, CodedSparse


class Size(NamedTuple):
    """Bits of choices (supports, indices) and of numbers, and how many numbers are not zero."""

    choices: float
    numbers: float
    nonzero: int


def independent(state: State) -> Size:
    """Of a stream under the independent codes."""
    if isinstance(state, JoinedState):
        return _sum([independent(s) for s in state.streams])
    if isinstance(state, SparseState):
        return Size(state.support_bits(), state.value_bits(), len(state.values))
    if isinstance(state, DenseState):
        return Size(0.0, state.bits(), int(np.count_nonzero(state.values)))
    return Size(state.bits(), 0.0, 0)


def coded(stream: Coded) -> Size:
    """Of a stream under the codes that were chosen for it."""
    if isinstance(stream, CodedJoined):
        return _sum([coded(part) for part in stream.parts])
    if isinstance(stream, CodedSparse):
        return Size(stream.support_length.total, stream.value_length.total, len(stream.state.values))
    total = stream.length.total
    return Size(total, 0.0, 0) if isinstance(stream.state, IndexState) else Size(0.0, total, 0)


def _sum(sizes: list[Size]) -> Size:
    return Size(math.fsum(s.choices for s in sizes), math.fsum(s.numbers for s in sizes), sum(s.nonzero for s in sizes))


@dataclass(frozen=True)
class Price:
    r"""$$b = r \, b_{choices} + \max(b_{numbers} - t \, n, 0)$$ bits, n being the numbers that are not zero.

    The b's on the right are under the independent codes; `share` is r, and `told` is t: what the codes in force know of
    a number beforehand, in bits.
    """

    share: float = 1.0
    told: float = 0.0

    @classmethod
    def of(cls, stream: Coded) -> Price:
        """Measured on one stream."""
        before, after = independent(stream.state), coded(stream)
        share = after.choices / before.choices if before.choices > 0 else 1.0
        return cls(min(share, 1.0), max(before.numbers - after.numbers, 0.0) / max(before.nonzero, 1))

    def bits(self, size: Size) -> float:
        """Of a stream that has this size under the independent codes."""
        return self.share * size.choices + max(size.numbers - self.told * size.nonzero, 0.0)


@dataclass(frozen=True)
class Prices:
    """Of the state and of the residual coder's symbols."""

    state: Price = field(default_factory=Price)
    residual: Price = field(default_factory=Price)

    @classmethod
    def of(cls, state: Coded, codes: Coded | None) -> Prices:
        """Measured on one attempt's streams."""
        return cls(Price.of(state), Price() if codes is None else Price.of(codes))
