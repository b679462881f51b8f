"""What a set of edges keeps of a region's weights: which blocks of which tensors a receiver needs to run it.

An edge earns its keep through the weights. A head is kept if an edge leaves it; what it reads by (W_Q, W_K, W_V) comes
after what the edges to it bring: a reader needs its matrix on the span of what its sources write alone. So a matrix W
comes either whole, [d, e], or, where that is fewer numbers, as Y = R W, [r, e], R being the rows that can be in the
reader's input: of its sources' output matrices (embeddings, W_O, W_out and b_out), behind the norm's weights, and the
constants. The receiver holds R, and takes W' = R^+ Y: on everything that the reader ever sees, W' is W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mdl.errors import ModelError
from mdl.models.circuits.graph import INPUT, LETTERS, LOGITS, Graph
from mdl.models.config import TransformerConfig
from mdl.models.networks import TransformerRegion
from mdl.models.sites import LOGITS as LOGITS_SITE
from mdl.models.sites import TOKENS

EMBED, POSITIONS, UNEMBED = "embed.W_E", "pos_embed.W_pos", "unembed.W_U"


def circuit_config(network: TransformerRegion) -> TransformerConfig:
    """The architecture up to the region's end; where that is a residual stream, it is read without norm or unembedding.

    **Raises:** `ModelError` for a region that does not begin at the tokens, or ends within a block.
    """
    config, (_, _, end) = network.config, network.output.partition("blocks.")
    if network.input == TOKENS and network.output == LOGITS_SITE:
        return config
    layer, _, site = end.partition(".")
    if network.input != TOKENS or site != "hook_resid_pre":
        raise ModelError(
            f"circuits explain the whole model, or everything upstream of a hook_resid_pre; this region goes from "
            f"{network.input} to {network.output}. For one MLP, take neurons."
        )
    windows = None if config.windows is None else config.windows[: int(layer)]
    width = config.d_model
    return replace(
        config,
        n_layers=int(layer),
        windows=windows,
        final_norm="none",
        tied=False,
        d_vocab_out=width,
        logit_softcap=None,
    )


@dataclass(frozen=True)
class Block:
    """Part of one tensor: all of `rows` by `columns`; or, with a `destination`, R W in the columns of that reader."""

    name: str
    rows: np.ndarray
    columns: np.ndarray
    destination: int | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """**Arguments:** `edges`: bool [sources, destinations], without dead ends; `subspace`: whether readers may come as
    R W; `constants`: whether something stands in for what is dropped."""

    network: TransformerRegion
    graph: Graph
    edges: np.ndarray
    subspace: bool
    constants: bool

    @cached_property
    def config(self) -> TransformerConfig:
        return circuit_config(self.network)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of all tensors of the region, vectors as one row."""
        vectors = {name: (1, size) for name, size in self.network.vectors.items()}
        return {**self.network.matrices, **self.network.tables, **vectors}

    @cached_property
    def writes(self) -> np.ndarray:
        """Which sources an edge leaves, [sources]."""
        return np.asarray(self.edges.any(1))

    @cached_property
    def needed(self) -> np.ndarray:
        """Destinations that are inputs of such a source, and the logits, [destinations]."""
        return np.array([o is None or bool(self.writes[list(o)].any()) for o in self.graph.owners])

    def heads(self, layer: int) -> list[int]:
        """Heads of a layer that an edge leaves."""
        return [h for h in range(self.graph.n_heads) if self.writes[self.source(f"a{layer}.h{h}")]]

    def neurons(self, layer: int) -> np.ndarray:
        """Neurons of a layer's MLP that are kept: all or none, where neurons are no sources."""
        if not self.graph.mlps:
            return np.arange(0)
        if self.graph.neurons:
            flags = [self.writes[self.source(f"m{layer}.n{i}")] for i in range(self.graph.neurons)]
            return np.flatnonzero(flags)
        return np.arange(self.config.d_mlp) if self.writes[self.source(f"m{layer}")] else np.arange(0)

    def source(self, name: str) -> int:
        """Its number."""
        return self.graph.sources.index(name) if name == INPUT else self._sources[name]

    def destination(self, name: str) -> int:
        """Its number."""
        return self._destinations[name]

    @cached_property
    def _sources(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.graph.sources)}

    @cached_property
    def _destinations(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.graph.destinations)}

    # -- what a reader can see ---------------------------------------------------------------------------------------

    def in_rows(self, destination: int) -> bool:
        """Whether a reader's matrices come as R W."""
        sources = np.flatnonzero(self.edges[:, destination])
        if not len(sources):
            return True  # it reads constants alone
        return self.subspace and not self.config.post_norms and self.n_rows(destination) < self.config.d_model

    def n_rows(self, destination: int) -> int:
        """The number of rows of R."""
        seen = sum(self._size(int(s)) for s in np.flatnonzero(self.edges[:, destination]))
        return seen + self._has_offset(destination) + (self._norm_of(destination, "b") is not None)

    def _size(self, source: int) -> int:
        name, config = self.graph.sources[source], self.config
        if name == INPUT:
            return config.d_vocab + (config.n_ctx if config.positions == "learned" else 0)
        if name.startswith("a"):
            return config.d_head
        return 1 if ".n" in name else config.d_mlp + (f"blocks.{_layer(name)}.mlp.b_out" in self.shapes)

    def _has_offset(self, destination: int) -> bool:
        """Whether the stream has a constant there: what stands in for dropped sources, or a bias."""
        return self.constants or bool(self.biases(destination))

    def biases(self, destination: int | None = None) -> list[str]:
        """Biases that are constants of the stream, of no source: those written before a reader, or all."""
        place = None if destination is None else self.graph.destinations[destination]
        ends = self.graph.n_layers if place in (None, LOGITS) else _layer(place)
        own = place not in (None, LOGITS) and place.startswith("m") and not self.graph.parallel
        names = [f"blocks.{layer}.attn.b_O" for layer in range(ends + own)]
        names += [f"blocks.{layer}.mlp.b_out" for layer in range(ends)] if self.graph.neurons else []
        return [name for name in names if name in self.shapes]

    def _norm_of(self, destination: int, key: str) -> str | None:
        """Name of the weights ("w") or the bias ("b") of the norm before a reader; None where there is none."""
        name = self.graph.destinations[destination]
        norm = "ln_final" if name == LOGITS else f"blocks.{_layer(name)}.{'ln1' if name.startswith('a') else 'ln2'}"
        found = f"{norm}.{key}"
        return found if found in self.shapes and self._kind(destination) != "none" else None

    def _kind(self, destination: int) -> str:
        last = self.graph.destinations[destination] == LOGITS
        return self.config.norm_before_unembedding if last else self.config.norm

    def span(self, destination: int, weights: dict[str, np.ndarray], constants: np.ndarray) -> np.ndarray:
        """R [r, d], float64, from decoded weights (flat, by name) and what stands in for dropped sources, [D, d]."""
        parts = [self._rows_of(int(s), weights) for s in np.flatnonzero(self.edges[:, destination])]
        if self._has_offset(destination):
            parts.append(sum((weights[name] for name in self.biases(destination)), constants[[destination]]))
        rows = np.concatenate([np.zeros((0, self.config.d_model)), *parts]).astype(np.float64)
        if self._kind(destination) == "layer":
            rows = rows - rows.mean(1, keepdims=True)
        scale, shift = (self._norm_of(destination, key) for key in "wb")
        rows = rows if scale is None else rows * weights[scale]
        return rows if shift is None else np.concatenate([rows, weights[shift]])

    def _rows_of(self, source: int, weights: dict[str, np.ndarray]) -> np.ndarray:
        name, config = self.graph.sources[source], self.config
        if name == INPUT:
            tables = [config.embedding_scale * weights[EMBED]]
            return np.concatenate([*tables, weights[POSITIONS]] if POSITIONS in weights else tables)
        layer = _layer(name)
        if name.startswith("a"):
            head = int(name.split(".h")[1])
            return weights[f"blocks.{layer}.attn.W_O"][head * config.d_head : (head + 1) * config.d_head]
        out = weights[f"blocks.{layer}.mlp.W_out"]
        if ".n" in name:
            return out[[int(name.split(".n")[1])]]
        bias = f"blocks.{layer}.mlp.b_out"
        return np.concatenate([out, weights[bias]]) if bias in self.shapes else out

    # -- what is sent ------------------------------------------------------------------------------------------------

    def blocks(self) -> list[Block]:
        """In the order in which they are sent: whatever R is made of comes before the Y that need it."""
        found = [self._whole(name) for name in self.network.tables]
        for layer in range(self.graph.n_layers):
            found += [*self._attention(layer), *self._mlp(layer)]
        found += [self._whole(name) for name in self.shapes if name.startswith("ln_final.")]
        found += self._reader("unembed.W_U", [LOGITS], lambda d: np.arange(self.shapes[UNEMBED][1]))
        found += [self._whole(name) for name in self.shapes if name == "unembed.b_U"]
        return found

    def _attention(self, layer: int) -> Iterator[Block]:
        """Of a layer: norms, readers, biases, outputs."""
        heads, size = self.heads(layer), self.config.d_head
        prefix, group = f"blocks.{layer}.", self.graph.n_heads // self.graph.key_value_heads
        for key in ("attn.b_O", "mlp.b_out"):  # constants of the stream: everybody reads them
            if f"{prefix}{key}" in self.biases():
                yield self._whole(f"{prefix}{key}")
        if not heads:
            return
        yield from (self._whole(n) for n in self.shapes if n.startswith((f"{prefix}ln1.", f"{prefix}ln1_post.")))
        groups = sorted({h // group for h in heads})
        for letter, readers in zip(LETTERS, (heads, groups, groups), strict=True):
            names = [f"a{layer}.h{h}<{letter}>" for h in readers]
            columns = {name: _span(h, size) for name, h in zip(names, readers, strict=True)}
            yield from self._reader(f"{prefix}attn.W_{letter.upper()}", names, columns.__getitem__)
            bias = f"{prefix}attn.b_{letter.upper()}"
            if bias in self.shapes:
                yield Block(bias, np.arange(1), np.concatenate([columns[n] for n in names]))
        rows = np.concatenate([_span(h, size) for h in heads])
        yield Block(f"{prefix}attn.W_O", rows, np.arange(self.config.d_model))

    def _mlp(self, layer: int) -> Iterator[Block]:
        neurons, prefix = self.neurons(layer), f"blocks.{layer}."
        if not len(neurons):
            return
        yield from (self._whole(n) for n in self.shapes if n.startswith((f"{prefix}ln2.", f"{prefix}ln2_post.")))
        for key in ("W_in", "W_gate"):
            if f"{prefix}mlp.{key}" in self.shapes:
                yield from self._reader(f"{prefix}mlp.{key}", [f"m{layer}"], lambda _: neurons)
        for key in ("b_in", "b_gate"):
            if f"{prefix}mlp.{key}" in self.shapes:
                yield Block(f"{prefix}mlp.{key}", np.arange(1), neurons)
        yield Block(f"{prefix}mlp.W_out", neurons, np.arange(self.config.d_model))
        if f"{prefix}mlp.b_out" in self.shapes and not self.graph.neurons:
            yield self._whole(f"{prefix}mlp.b_out")

    def _reader(self, name: str, readers: list[str], columns: Callable[[str], np.ndarray]) -> Iterator[Block]:
        """Those that come whole together, then the others one by one."""
        if name not in self.shapes:
            return
        rows = {r: self.in_rows(self.destination(r)) for r in readers}
        whole = [columns(r) for r in readers if not rows[r]]
        if whole:
            yield Block(name, np.arange(self.shapes[name][0]), np.concatenate(whole))
        for r in readers:
            place = self.destination(r)
            if rows[r] and self.n_rows(place):  # with no row, it reads zeros
                yield Block(name, np.arange(self.n_rows(place)), columns(r), place)

    def _whole(self, name: str) -> Block:
        rows, columns = self.shapes[name]
        return Block(name, np.arange(rows), np.arange(columns))


def _span(head: int, size: int) -> np.ndarray:
    return np.arange(head * size, (head + 1) * size)


def _layer(name: str) -> int:
    return int(name[1:].partition(".")[0])
