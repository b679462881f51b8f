"""What is sent costs so many bits, about: known without running the codes that it is sent under.

A search compares settings by closed forms: streams under the independent codes, static arrays under a two-sided
geometric distribution; codes that look at token ids take seconds, a message half of one. How the two compare is
measured now and then, and carried over to other settings in the way in which it carries over: a support keeps the share
of its bits that token ids tell, a number keeps the bits that they tell of it, however fine its step (a finer one adds
digits that nothing foretells).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mdl.codes.lattice import Lattice
from mdl.message import QuantisedArray, Section
from mdl.state import DenseState, IndexState, JoinedState, SparseState, State
from mdl.static_rows import COEFFICIENT_BITS
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
class Outline:
    """What a message would hold, about: bits of each part of each section, and of all else."""

    header_bits: float
    part_bits: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, sections: Sequence[Section]) -> Outline:
        """Of what is to be sent."""
        header = math.fsum(array_bits(a).sum() + table_bits(a.lattice) for s in sections for a in s.header)
        header += math.fsum(table_bits(a.lattice) for s in sections for a in s.parts)
        return cls(header, tuple(sum((array_bits(a) for a in s.parts), np.zeros(s.n_parts)) for s in sections))

    @property
    def whole_bits(self) -> float:
        """Of all of it."""
        return self.header_bits + math.fsum(float(p.sum()) for p in self.part_bits)


def array_bits(array: QuantisedArray) -> np.ndarray:
    r"""Bits of each row [n] of an array.

    $$\sum_j (1 + k_{ij} ) \log_2 (1 + m_{ij}) - k_{ij} \log_2 m_{ij} + [k_{ij} > 0]$$ for magnitudes k of mean
    $m_{ij} = r_i c_j / \bar k$: geometric, with a sign; r and c are the means of rows and columns.
    """
    size = np.abs(array.symbols).astype(np.float64)
    if not size.size:
        return np.zeros(len(size))
    mean = size.mean(1, keepdims=True) * size.mean(0) / max(float(size.mean()), 1e-12) + 1e-3
    return ((1.0 + size) * np.log2(1.0 + mean) - size * np.log2(mean) + (size > 0)).sum(1)


def table_bits(lattice: Lattice | None) -> float:
    """Of the prediction that goes with an array on a lattice."""
    if lattice is None or lattice.prediction is None:
        return 0.0
    return COEFFICIENT_BITS * len(lattice.prediction) * (len(lattice.prediction) - 1) / 2


@dataclass(frozen=True)
class Prices:
    """Of the state, of the residual coder's symbols, and of static bits over those of an `Outline`."""

    state: Price = field(default_factory=Price)
    residual: Price = field(default_factory=Price)
    static: float = 1.0

    @classmethod
    def of(cls, state: Coded, codes: Coded | None, static: float) -> Prices:
        """Measured on one attempt's streams and message."""
        return cls(Price.of(state), Price() if codes is None else Price.of(codes), static)
