"""The graph of a transformer: sources write into the residual stream, destinations read from it, edges join them.

Sources in the order in which they are computed: `input` (the embedding, positions included), then for each layer the
heads `a0.h0`, `a0.h1`, ... and the MLP `m0` (or its neurons `m0.n0`, `m0.n1`, ...). Destinations: for each layer the
heads' inputs `a0.h0<q>`, ..., `a0.h0<k>`, ..., `a0.h0<v>`, ..., then `m0`; at the end `logits`. Under grouped-query
attention there are as many key and value inputs as key-value heads. Biases of attention outputs are no node's: they are
constants of the stream, which everybody reads; so are those of MLP outputs where neurons are sources.

Names and order are those of EAP-IG (Hanna et al. 2024, arXiv:2403.17806), whose score matrices have these rows and
columns: 157 sources by 445 destinations with 32,491 edges for GPT-2 small.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mdl.errors import ModelError, did_you_mean
from mdl.models.config import TransformerConfig

INPUT, LOGITS = "input", "logits"
ARROW = "->"
LETTERS = "qkv"
_PLACE = re.compile(r"[am](\d+)")


@dataclass(frozen=True)
class Graph:
    """**Arguments:** `neurons`: of an MLP, each of them a source; 0: an MLP is one. `mlps`: whether layers have one;
    `parallel`: whether it reads what attention reads."""

    n_layers: int
    n_heads: int
    key_value_heads: int
    mlps: bool = True
    parallel: bool = False
    neurons: int = 0

    @classmethod
    def of(cls, config: TransformerConfig, neurons: bool = False) -> Graph:
        """The graph of a model; `neurons`: with every neuron of its MLPs a source."""
        each = config.d_mlp if neurons else 0
        mlps = config.d_mlp > 0
        return cls(config.n_layers, config.n_heads, config.key_value_heads, mlps, config.parallel, each)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names, in the order in which they are computed."""
        names = [INPUT]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            if self.mlps:
                names += [f"m{layer}.n{i}" for i in range(self.neurons)] or [f"m{layer}"]
        return tuple(names)

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """Names, in the order in which they are computed."""
        names = []
        for layer in range(self.n_layers):
            for letter, count in zip(LETTERS, (self.n_heads, *2 * (self.key_value_heads,)), strict=True):
                names += [f"a{layer}.h{head}<{letter}>" for head in range(count)]
            if self.mlps:
                names.append(f"m{layer}")
        return (*names, LOGITS)

    @cached_property
    def possible(self) -> np.ndarray:
        """Which edges there are, bool [sources, destinations], read-only."""
        written = np.array([self._written(name) for name in self.sources])
        read = np.array([self._read(name) for name in self.destinations])
        found: np.ndarray = written[:, None] < read[None]
        found.setflags(write=False)
        return found

    @cached_property
    def pieces(self) -> tuple[slice, ...]:
        """Sources that are written together, in order: `input`, then each layer's heads and its MLP or neurons."""
        widths = [self.n_heads, *([self.neurons or 1] if self.mlps else [])]
        ends = np.cumsum([1, *self.n_layers * widths]).tolist()
        return tuple(slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True))

    def written_before(self, layer: int, mlp: bool = False) -> int:
        """How many pieces there are when the heads of a layer read, or its MLP; `n_layers` for the logits."""
        per_layer = 2 if self.mlps else 1
        return 1 + per_layer * layer + int(mlp and not self.parallel)

    def inputs(self, layer: int, mlp: bool = False) -> slice:
        """The destinations of a layer's heads (queries, keys, values), or of its MLP; `n_layers` for the logits."""
        heads = self.n_heads + 2 * self.key_value_heads
        first = layer * (heads + int(self.mlps))
        if layer == self.n_layers:
            return slice(first, first + 1)
        return slice(first + heads, first + heads + 1) if mlp else slice(first, first + heads)

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.possible.sum())

    def edge_name(self, source: int, destination: int) -> str:
        """As EAP-IG writes it: `a0.h1->a2.h3<q>`."""
        return f"{self.sources[source]}{ARROW}{self.destinations[destination]}"

    def edge(self, name: str) -> tuple[int, int]:
        """Source and destination of an edge by its name.

        **Raises:** `ModelError` for a name of no node, or of two nodes that no edge joins.
        """
        first, arrow, second = name.partition(ARROW)
        if not arrow:
            raise ModelError(
                f"{name!r} is no edge: an edge is written source{ARROW}destination, as in 'a0.h1->a2.h3<q>'"
            )
        source = self._place(first, self._source_places, "source")
        destination = self._place(second, self._destination_places, "destination")
        if not self.possible[source, destination]:
            raise ModelError(f"{name!r}: {second} is computed before {first} or beside it, so that no edge joins them")
        return source, destination

    def mask(self, edges: Iterable[str]) -> np.ndarray:
        """The edges of these names, bool [sources, destinations]. **Raises:** as `edge`."""
        found = np.zeros(self.possible.shape, bool)
        for name in edges:
            found[self.edge(name)] = True
        return found

    def induced(self, nodes: np.ndarray) -> np.ndarray:
        """All edges between kept sources, and from them to the logits: [sources] -> [sources, destinations], bool.

        A destination is kept if its node is: the inputs of a head that is kept, of an MLP of which any neuron is.
        """
        owners = self.owners
        kept = np.array([owner is None or bool(nodes[list(owner)].any()) for owner in owners])
        return np.asarray(self.possible & nodes[:, None] & kept[None])

    @cached_property
    def owners(self) -> tuple[tuple[int, ...] | None, ...]:
        """Of every destination the sources that it is an input of; None for the logits."""
        found: list[tuple[int, ...] | None] = []
        group = self.n_heads // self.key_value_heads
        for name in self.destinations:
            if name == LOGITS:
                found.append(None)
            elif name.endswith("<q>"):
                found.append((self._source_places[name[:-3]],))
            elif name.endswith(">"):
                layer, head = name[:-3].split(".h")
                heads = range(int(head) * group, (int(head) + 1) * group)
                found.append(tuple(self._source_places[f"{layer}.h{h}"] for h in heads))
            else:
                found.append(tuple(i for i, s in enumerate(self.sources) if s.partition(".n")[0] == name))
        return tuple(found)

    def pruned(self, edges: np.ndarray, constant: bool = False) -> np.ndarray:
        """Without edges that lead nowhere, or that carry nothing of `input`'s: bool [sources, destinations].

        **Arguments:** `constant`: whether what stands in for ablated edges is the same at every position of every
        sequence. Then a head whose value reads nothing is a constant, whatever it looks at; otherwise not.
        """
        now = np.asarray(edges, bool) & self.possible
        while True:
            fed, read = now.any(0), now.any(1)
            alive = np.array([self._alive(name, fed, constant) for name in self.sources]) & read
            wanted = np.array([owner is None or bool(alive[list(owner)].any()) for owner in self.owners])
            left = now & alive[:, None] & wanted[None]
            if (left == now).all():
                return now
            now = left

    def _alive(self, source: str, fed: np.ndarray, constant: bool) -> bool:
        """Whether a source's output can depend on the tokens."""
        if source == INPUT:
            return True
        if source.startswith("a"):
            layer, head = source.split(".h")
            shared = int(head) // (self.n_heads // self.key_value_heads)
            inputs = [f"{layer}.h{shared}<v>"]
            if not constant:
                inputs += [f"{layer}.h{head}<q>", f"{layer}.h{shared}<k>"]
            return any(fed[self._destination_places[name]] for name in inputs)
        return bool(fed[self._destination_places[source.partition(".n")[0]]])

    @cached_property
    def _source_places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.sources)}

    @cached_property
    def _destination_places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.destinations)}

    def _place(self, name: str, places: dict[str, int], what: str) -> int:
        if name not in places:
            raise ModelError(
                f"the model has no {what} {name!r}.{did_you_mean(name, places)} It has {self.n_layers} layers of "
                f"{self.n_heads} heads ({self.key_value_heads} key-value), "
                f"{'with' if self.mlps else 'without'} MLPs: is this a circuit of another architecture?"
            )
        return places[name]

    def _written(self, name: str) -> int:
        """When a source's output is in the stream: twice the layer, one later behind an MLP that comes second."""
        if name == INPUT:
            return -1
        return 2 * _layer(name) + int(name.startswith("m") and not self.parallel)

    def _read(self, name: str) -> int:
        """When a destination reads."""
        if name == LOGITS:
            return 2 * self.n_layers
        return 2 * _layer(name) + int(name.startswith("m") and not self.parallel)


def _layer(name: str) -> int:
    match = _PLACE.match(name)
    assert match is not None, name
    return int(match[1])
