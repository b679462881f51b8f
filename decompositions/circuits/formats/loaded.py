"""What every reader of circuits returns, and the gathering of edges by name that leads to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mdl.errors import ExplanationError, ModelError
from mdl.models.circuits.graph import ARROW, Graph


@dataclass(frozen=True)
class LoadedCircuit:
    """A circuit from a file, or the scores from which one is chosen.

    **Arguments:** `edges`: bool [sources, destinations], those in the circuit; None where the file only scores them.
    `scores`: float64, of the same shape, NaN where there is none; None where the file has no scores. `format`: its
    name. `notes`: what was dropped, joined or taken for granted.

    **Raises:** `ExplanationError` for shapes that are not the graph's, edges that it does not have, a circuit without
    edges.
    """

    graph: Graph
    format: str
    edges: np.ndarray | None = None
    scores: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        possible = self.graph.possible
        for table in (self.edges, self.scores):
            if table is not None and table.shape != possible.shape:
                raise ExplanationError(f"{self.format}: a table {table.shape} for a graph {possible.shape}")
        if self.edges is not None and (self.edges & ~possible).any():
            raise ExplanationError(f"{self.format}: {int((self.edges & ~possible).sum())} edges that the graph lacks")
        if self.scores is None and (self.edges is None or not self.edges.any()):
            raise ExplanationError(
                f"{self.format}: an empty circuit, of {self.graph.n_edges} edges none is in it and none has a score. "
                "Was it saved before edges were chosen, or pruned away for want of a path from input to logits?"
            )

    def chosen(self) -> np.ndarray:
        """The edges, bool [sources, destinations]. **Raises:** `ExplanationError` if the file only scores them."""
        if self.edges is None:
            raise ExplanationError(
                f"{self.format}: the file scores edges and chooses none. Say how many to take: `top(n)`."
            )
        return self.edges

    def top(self, n: int, prune: bool = True) -> np.ndarray:
        """The n edges of largest |score|, then without dead ends (`Graph.pruned`): bool [sources, destinations].

        Edges of equal score are taken in the graph's order; those without a score come last.

        **Raises:** `ExplanationError` without scores, for n beyond the graph's edges, if nothing is left.
        """
        if self.scores is None:
            raise ExplanationError(f"{self.format}: the file has edges and no scores; `chosen()` gives them")
        if not 0 < n <= self.graph.n_edges:
            raise ExplanationError(f"{n} edges of a graph that has {self.graph.n_edges}")
        possible = self.graph.possible
        size = np.abs(self.scores[possible])
        first = np.argsort(-np.where(np.isnan(size), -1.0, size), kind="stable")[:n]
        flags = np.zeros(size.size, bool)
        flags[first] = True
        edges = np.zeros(possible.shape, bool)
        edges[possible] = flags
        edges = self.graph.pruned(edges) if prune else edges
        if not edges.any():
            raise ExplanationError(f"{self.format}: of the top {n} edges none lies on a path from input to logits")
        return edges


@dataclass
class Gathering:
    """Edges and scores by name, added one after the other.

    Under grouped-query attention a file may name an input of keys or values for every head; those of a group are one
    of ours: it is in the circuit if one of them is, and their scores add up.
    """

    graph: Graph
    format: str
    edges: np.ndarray = field(init=False)
    scores: np.ndarray = field(init=False)
    named: np.ndarray = field(init=False)
    dropped: Counter[str] = field(default_factory=Counter)
    _cache: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.edges = np.zeros(self.graph.possible.shape, bool)
        self.scores = np.full(self.graph.possible.shape, np.nan)
        self.named = np.zeros(self.graph.possible.shape, bool)

    def add(self, source: str, destination: str, kept: bool, score: float | None = None) -> None:
        """**Raises:** `ModelError` for nodes that the graph lacks, or that no edge joins."""
        try:
            place = self.graph.edge(f"{source}{ARROW}{self.grouped(destination)}")
        except ModelError as error:
            raise ModelError(f"{self.format}: {error}") from error
        self.edges[place] |= kept
        self.named[place] = True
        if score is not None:
            before = self.scores[place]
            self.scores[place] = score if np.isnan(before) else before + score

    def check_all_named(self) -> None:
        """**Raises:** `ModelError` if the file is silent about edges of the graph, in a format that names them all."""
        if missing := int((self.graph.possible & ~self.named).sum()):
            raise ModelError(
                f"{self.format}: the file names {int(self.named.sum())} of the model's {self.graph.n_edges} edges, and "
                f"is silent about {missing}, where this format says of each whether it is in the circuit: it is "
                "probably of a smaller model, or of another region"
            )

    def drop(self, why: str, count: int = 1) -> None:
        """Count what is left out."""
        self.dropped[why] += count

    def done(self, notes: Sequence[str] = (), decided: bool = True) -> LoadedCircuit:
        """The circuit; `decided`: whether the file says which edges are in it."""
        scores = None if np.isnan(self.scores).all() else self.scores
        edges = self.edges if decided and (self.edges.any() or scores is None) else None
        counted = tuple(f"{count} {why}" for why, count in self.dropped.items())
        if decided and edges is None:
            counted = ("no edge is marked as in the circuit: scores only", *counted)
        return LoadedCircuit(self.graph, self.format, edges, scores, (*notes, *counted))

    def grouped(self, destination: str) -> str:
        """The name of a key's or value's input: of its group of heads."""
        if destination not in self._cache:
            self._cache[destination] = self._group_of(destination)
        return self._cache[destination]

    def _group_of(self, destination: str) -> str:
        group = self.graph.n_heads // self.graph.key_value_heads
        layer, dot, head = destination[:-3].partition(".h")
        if group == 1 or not destination.endswith(("<k>", "<v>")) or not dot or not head.isdigit():
            return destination
        if int(head) >= self.graph.n_heads:
            return destination
        return f"{layer}.h{int(head) // group}{destination[-3:]}"


def plain_graph(graph: Graph, what: str) -> None:
    """**Raises:** `ModelError` unless heads have keys and values of their own and MLPs are single nodes."""
    if graph.key_value_heads != graph.n_heads or graph.neurons:
        raise ModelError(
            f"{what} has no way to write grouped keys and values ({graph.key_value_heads} for {graph.n_heads} heads) "
            f"or single neurons ({graph.neurons}); write EAP-IG's names as your own json in its place"
        )
