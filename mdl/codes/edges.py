"""The edges of a circuit: a set of places in a table of sources by destinations whose possible places are known.

A menu of codes, the choice charged at log2 of their number:

| code | what it sends |
| --- | --- |
| list | how many edges, then which: log2 C(E, k) |
| sources, destinations | every possible edge, adaptively within its source or its destination |
| nodes | which sources and destinations have an edge, then the edges between these under one adaptive probability |
| gated | the same, adaptively within each destination |
| rates | the same, by the product of three adaptive rates: of the source, of the destination, of the edge's class |

Every one is a prefix code that decodes to the same table. Their lengths fall again when more than half of the edges
are there: a table that is nearly full is cheap to name, rightly, for what is dear about a nearly full circuit is the
weights that it keeps, and these are charged elsewhere. Where edges alone are charged (a pointer into a model that is
known), a length that only grows with k is `list_bits`.

Probabilities come from additions, multiplications and divisions alone, so that every machine gets the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.special import gammaln

from mdl.codes.bitstream import ONE_BY_ONE, BitReader, BitWriter
from mdl.codes.counts import kt_bits, kt_sequence_probabilities
from mdl.codes.edge_layout import EdgeLayout
from mdl.codes.integers import count_bits, read_count, write_count
from mdl.codes.supports import enumerative_bits
from mdl.errors import CodeError, MessageError
from mdl.units import nats_to_bits

_PRIOR = 0.5  # how many expected edges a source's or a destination's rate takes before it moves half the way
_FLOOR = 2.0**-14  # of a product of rates: its costliest surprise is 14 bits


def list_bits(possible: Any, edges: Any) -> Any:
    r"""k log2 E - log2 k!, in bits: k edges out of E named one after the other, their order not paid for.

    Grows with k up to k = E, unlike log2 C(E, k), which it exceeds (at k much below E by little): so it is the length
    of a decodable code once k is known. Sending k is the caller's to charge. Numbers or arrays that broadcast.
    """
    size, chosen = np.asarray(possible, np.float64), np.asarray(edges, np.float64)
    return chosen * np.log2(size) - nats_to_bits(gammaln(chosen + 1.0))


def edge_code_bits(edges: np.ndarray, layout: EdgeLayout) -> dict[str, float]:
    """The exact length under every code of the menu, by its name; the choice is not in it; bits.

    **Raises:** `MessageError` as `EdgeLayout.check`.
    """
    layout.check(edges)
    return {name: code.bits(edges, layout) for name, code in MENU.items()}


def edge_bits(edges: np.ndarray, layout: EdgeLayout, quick: bool = False) -> float:
    """The exact length of what `write_edges` writes, log2 of the menu's size included, in bits.

    **Arguments:** `quick`: without `rates`, the one code whose length takes a pass over the edges and not a closed
    form; an upper bound then.

    **Raises:** `MessageError` as `EdgeLayout.check`.
    """
    layout.check(edges)
    lengths = [code.bits(edges, layout) for name, code in MENU.items() if not (quick and name == RATES)]
    return math.log2(len(MENU)) + min(lengths)


def write_edges(writer: BitWriter, edges: np.ndarray, layout: EdgeLayout) -> str:
    """Write edges with the shortest code of the menu, named first; returns its name.

    **Raises:** `MessageError` as `EdgeLayout.check`.
    """
    lengths = edge_code_bits(edges, layout)
    best = min(lengths, key=lambda name: lengths[name])
    writer.uniform(np.array([list(MENU).index(best)]), len(MENU))
    writer.spend(_work(layout))
    MENU[best].write(writer, edges, layout)
    return best


def read_edges(reader: BitReader, layout: EdgeLayout) -> np.ndarray:
    """Read edges, bool [sources, destinations]. **Raises:** `CodeError` for a stream that was cut or damaged."""
    code = list(MENU.values())[int(reader.uniform(1, len(MENU))[0])]
    reader.spend(_work(layout))
    edges = code.read(reader, layout)
    reader.check()
    return edges


def encode_edges(edges: np.ndarray, layout: EdgeLayout) -> bytes:
    """A stream of its own: `edge_bits` long but for the marks and padding of a stream, below 64 bits.

    **Raises:** `MessageError` as `EdgeLayout.check`.
    """
    writer = BitWriter()
    write_edges(writer, edges, layout)
    return writer.to_bytes()


def decode_edges(data: bytes, layout: EdgeLayout) -> np.ndarray:
    """What `encode_edges` wrote, bool [sources, destinations].

    **Raises:** `MessageError` for bytes that are cut, damaged, longer than the edges, or of another layout.
    """
    try:
        reader = BitReader(data)
        edges = read_edges(reader, layout)
        reader.finish()
    except CodeError as error:
        raise MessageError(f"damaged edges, or those of another graph, in {len(data)} bytes: {error}") from error
    return edges


def edge_symbols(edges: np.ndarray, layout: EdgeLayout) -> np.ndarray:
    """The bits of `encode_edges`, int64 zeros and ones: edges as an array of a message, 1 bit a symbol.

    **Raises:** `MessageError` as `EdgeLayout.check`.
    """
    return np.unpackbits(np.frombuffer(encode_edges(edges, layout), np.uint8)).astype(np.int64)


def edges_of_symbols(symbols: np.ndarray, layout: EdgeLayout) -> np.ndarray:
    """What `edge_symbols` made, bool [sources, destinations]. **Raises:** `MessageError` as `decode_edges`."""
    if symbols.size % 8 or not np.isin(symbols, (0, 1)).all():
        raise MessageError(f"{symbols.size} symbols up to {symbols.max(initial=0)} are not the bits of edges, 8 a byte")
    return decode_edges(np.packbits(symbols.ravel().astype(bool)).tobytes(), layout)


class EdgeCode(Protocol):
    """A code of edges within a layout that the reader knows; lengths in bits."""

    def bits(self, edges: np.ndarray, layout: EdgeLayout) -> float: ...

    def write(self, writer: BitWriter, edges: np.ndarray, layout: EdgeLayout) -> None: ...

    def read(self, reader: BitReader, layout: EdgeLayout) -> np.ndarray: ...


class ListCode:
    """How many, then which: log2 C(E, k), each place with the chance of what is left, (k - met) / (E - passed)."""

    def bits(self, edges: np.ndarray, layout: EdgeLayout) -> float:
        k = int(edges.sum())
        return count_bits(k) + float(enumerative_bits(layout.n_possible, k))

    def write(self, writer: BitWriter, edges: np.ndarray, layout: EdgeLayout) -> None:
        flags = edges[_places(layout.possible)]
        k, n = int(flags.sum()), flags.size
        write_count(writer, k)
        left, places = k - (np.cumsum(flags) - flags), n - np.arange(n)
        open_ = (left > 0) & (left < places)
        writer.bits(flags[open_], left[open_] / places[open_])

    def read(self, reader: BitReader, layout: EdgeLayout) -> np.ndarray:
        left, n = read_count(reader), layout.n_possible
        if left > n:
            raise CodeError(f"{left} edges where {n} are possible")
        flags = np.zeros(n, bool)
        for place in range(n):
            remaining = n - place
            flags[place] = bool(reader.bit(left / remaining)) if 0 < left < remaining else left > 0
            left -= int(flags[place])
        return _table(layout.possible, flags)


@dataclass(frozen=True)
class RowCode:
    """Every possible edge under the Krichevsky-Trofimov probability of its source, or of its destination."""

    destinations: bool

    def bits(self, edges: np.ndarray, layout: EdgeLayout) -> float:
        axis = 0 if self.destinations else 1
        ones = edges.sum(axis)
        return float(kt_bits(ones, layout.possible.sum(axis) - ones).sum())

    def write(self, writer: BitWriter, edges: np.ndarray, layout: EdgeLayout) -> None:
        places = _places(layout.possible)
        _write_adaptive(writer, places[1 if self.destinations else 0], edges[places])

    def read(self, reader: BitReader, layout: EdgeLayout) -> np.ndarray:
        contexts = _places(layout.possible)[1 if self.destinations else 0]
        return _table(layout.possible, _read_adaptive(reader, contexts))


@dataclass(frozen=True)
class GatedCode:
    """Which sources and destinations have an edge, then the edges among them, of which each has one or more.

    **Arguments:** `within`: what probabilities are learned from: all edges (`nodes`), or a destination's (`gated`).
    """

    within: str

    def bits(self, edges: np.ndarray, layout: EdgeLayout) -> float:
        kept = _Gates.of(edges, layout)
        axis = 0 if self.within == GATED else None
        ones = edges.sum(axis)
        return kept.bits() + float(np.sum(kt_bits(ones, kept.possible.sum(axis) - ones)))

    def write(self, writer: BitWriter, edges: np.ndarray, layout: EdgeLayout) -> None:
        kept = _Gates.of(edges, layout)
        kept.write(writer)
        places = _places(kept.possible)
        _write_adaptive(writer, self._contexts(places), edges[places])

    def read(self, reader: BitReader, layout: EdgeLayout) -> np.ndarray:
        kept = _Gates.read(reader, layout)
        flags = _read_adaptive(reader, self._contexts(_places(kept.possible)))
        return kept.checked(_table(kept.possible, flags))

    def _contexts(self, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return places[1] if self.within == GATED else np.zeros_like(places[1])


class RatesCode:
    r"""Gates, then each edge with odds o(class) r(source) r(destination), destination by destination.

    o = p / (1 - p) with p the adaptive frequency of the class, drawn to that of all edges; r = (met + 1/2) /
    (expected + 1/2), how many edges the source (the destination) was found to have over what its classes promised.
    """

    def bits(self, edges: np.ndarray, layout: EdgeLayout) -> float:
        kept = _Gates.of(edges, layout)
        flags, p = edges[_places(kept.possible)], self._probabilities(edges, kept)
        return kept.bits() - float(np.log2(np.where(flags, p, 1.0 - p)).sum())

    def write(self, writer: BitWriter, edges: np.ndarray, layout: EdgeLayout) -> None:
        kept = _Gates.of(edges, layout)
        kept.write(writer)
        writer.bits(edges[_places(kept.possible)], self._probabilities(edges, kept))

    def read(self, reader: BitReader, layout: EdgeLayout) -> np.ndarray:
        kept = _Gates.read(reader, layout)
        rates, flags = _Rates(kept), []
        for source, destination, group in kept.walk():
            flags.append(bool(reader.bit(rates.probability(source, destination, group))))
            rates.update(flags[-1], source, destination, group)
        return kept.checked(_table(kept.possible, np.array(flags, bool)))

    def _probabilities(self, edges: np.ndarray, kept: _Gates) -> np.ndarray:
        rates, flags = _Rates(kept), edges[_places(kept.possible)].tolist()
        p = np.empty(len(flags))
        for i, ((source, destination, group), on) in enumerate(zip(kept.walk(), flags, strict=True)):
            p[i] = rates.probability(source, destination, group)
            rates.update(on, source, destination, group)
        return p


GATED, RATES = "gated", "rates"
MENU: Mapping[str, EdgeCode] = {
    "list": ListCode(),
    "sources": RowCode(destinations=False),
    "destinations": RowCode(destinations=True),
    "nodes": GatedCode("nodes"),
    GATED: GatedCode(GATED),
    RATES: RatesCode(),
}


@dataclass(frozen=True)
class _Gates:
    """Sources and destinations with an edge, and the possible edges between them."""

    sources: np.ndarray
    destinations: np.ndarray
    layout: EdgeLayout

    @classmethod
    def of(cls, edges: np.ndarray, layout: EdgeLayout) -> _Gates:
        return cls(np.asarray(edges.any(1)), np.asarray(edges.any(0)), layout)

    @property
    def possible(self) -> np.ndarray:
        return np.asarray(self.layout.possible & self.sources[:, None] & self.destinations[None])

    def walk(self) -> Iterator[tuple[int, int, int]]:
        """Source, destination and class of every place between kept nodes, destination by destination."""
        sources, destinations = _places(self.possible)
        classes = self.layout.classes[sources, destinations]
        return zip(sources.tolist(), destinations.tolist(), classes.tolist(), strict=True)

    def checked(self, edges: np.ndarray) -> np.ndarray:
        """**Raises:** `CodeError` if a kept node has no edge: no sender writes that."""
        if not (edges.any(1) == self.sources).all() or not (edges.any(0) == self.destinations).all():
            raise CodeError("a node that was said to have an edge has none; the stream was damaged")
        return edges

    def bits(self) -> float:
        flags = np.r_[self.sources, self.destinations]
        contexts = np.r_[np.zeros(self.sources.size, np.int64), self._owned(self.sources, self.layout)]
        ones = np.bincount(contexts, flags)
        return float(kt_bits(ones, np.bincount(contexts) - ones).sum())

    def write(self, writer: BitWriter) -> None:
        _write_adaptive(writer, np.zeros(self.sources.size, np.int64), self.sources)
        _write_adaptive(writer, self._owned(self.sources, self.layout), self.destinations)

    @classmethod
    def read(cls, reader: BitReader, layout: EdgeLayout) -> _Gates:
        sources = _read_adaptive(reader, np.zeros(layout.possible.shape[0], np.int64))
        return cls(sources, _read_adaptive(reader, cls._owned(sources, layout)), layout)

    @staticmethod
    def _owned(sources: np.ndarray, layout: EdgeLayout) -> np.ndarray:
        """The context of each destination's gate: 1 no owner is kept, 2 one is, 3 it has none."""
        return np.array([3 if o is None else 1 + int(sources[list(o)].any()) for o in layout.owners], np.int64)


class _Rates:
    """What both ends have counted so far."""

    def __init__(self, kept: _Gates) -> None:
        n_sources, n_destinations = kept.layout.possible.shape
        self._met = [0.0] * n_sources, [0.0] * n_destinations
        self._expected = [0.0] * n_sources, [0.0] * n_destinations
        self._classes: dict[int, tuple[float, float]] = {}
        self._all = 0.0, 0.0
        self._promised = 0.0

    def probability(self, source: int, destination: int, group: int) -> float:
        ones, total = self._classes.get(group, (0.0, 0.0))
        among = (self._all[0] + 0.5) / (self._all[1] + 1.0)
        self._promised = (ones + among) / (total + 1.0)
        odds = self._promised / (1.0 - self._promised)
        for met, expected, at in zip(self._met, self._expected, (source, destination), strict=True):
            odds *= (met[at] + _PRIOR) / (expected[at] + _PRIOR)
        return min(max(odds / (1.0 + odds), _FLOOR), 1.0 - _FLOOR)

    def update(self, on: bool, source: int, destination: int, group: int) -> None:
        """Count one edge; `probability` of the same one has been asked just before."""
        one = 1.0 if on else 0.0
        ones, total = self._classes.get(group, (0.0, 0.0))
        self._classes[group] = ones + one, total + 1.0
        self._all = self._all[0] + one, self._all[1] + 1.0
        for met, expected, at in zip(self._met, self._expected, (source, destination), strict=True):
            met[at] += one
            expected[at] += self._promised


def _places(possible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sources and destinations of the possible edges, destination by destination."""
    destinations, sources = np.nonzero(possible.T)
    return sources, destinations


def _table(possible: np.ndarray, flags: np.ndarray) -> np.ndarray:
    edges = np.zeros(possible.shape, bool)
    edges[_places(possible)] = flags
    return edges


def _work(layout: EdgeLayout) -> int:
    return ONE_BY_ONE * (layout.n_possible + sum(layout.possible.shape))


def _write_adaptive(writer: BitWriter, contexts: np.ndarray, flags: np.ndarray) -> None:
    writer.bits(flags, kt_sequence_probabilities(contexts, flags.astype(np.int64)))


def _read_adaptive(reader: BitReader, contexts: np.ndarray) -> np.ndarray:
    size = int(contexts.max(initial=-1)) + 1
    ones, totals = [0.0] * size, [0.0] * size
    found = [reader.adaptive_bit(ones, totals, context) for context in contexts.tolist()]
    return np.array(found, bool)
