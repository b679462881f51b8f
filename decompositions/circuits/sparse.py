"""A circuit whose weights are sent as sparse tables under one code book: for models whose weights are sparse.

    header = one row of bits, a stream: whether there are constants, edges (`mdl.codes.edges`), then the constants and
             every block of weights as sparse tables (`mdl.codes.sparse_tables`), and their code book

Where a number can be at all follows from what came before it, and places where none can be are free. In a model without
norms a reader's row can be non-zero only for a coordinate that one of its sources writes (or constants do): an edge
says where the weights are that it needs, and leaving one out saves the places of those. A key's column can be non-zero
only where the query has one, a row of W_O only where W_V has the column, a row of W_out only where W_in does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decompositions.circuits.decoder import run_circuit
from decompositions.circuits.kept import EMBED, POSITIONS, UNEMBED, Block, Kept, circuit_config
from decompositions.circuits.layout import edge_layout
from mdl.alphabets import NoAlphabet
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.edges import read_edges, write_edges
from mdl.codes.sparse_tables import SparseTablesReader, SparseTablesWriter
from mdl.errors import CodeError, MessageError
from mdl.message import QuantisedArray, Section
from mdl.models.circuits.graph import INPUT, LOGITS, Graph
from mdl.models.networks import TransformerRegion
from mdl.protocols import Inputs
from mdl.state import State

KIND = "sparse"
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class SparseCircuitDecoder:
    """`data`: the stream."""

    data: bytes
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_section(cls, section: Section) -> SparseCircuitDecoder:
        """**Raises:** `MessageError` for what is not one row of bits, whole bytes of them."""
        if section.parts or len(section.header) != 1 or len(section.header[0].symbols) != 1:
            raise MessageError("a 'sparse' section is one row of bits, and has no parts")
        columns = section.header[0].symbols.shape[1]
        bits = section.header[0].integers("the bits of a 'sparse' section", 0, 1, columns)[0]
        if columns % 8:
            raise MessageError(f"'sparse': {columns} bits are no whole bytes")
        return cls(np.packbits(bits.astype(np.uint8)).tobytes())

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def touched(self, inputs: Inputs, state: State) -> None:
        return None

    def received(self, inputs: Inputs) -> tuple[Kept, Weights, np.ndarray]:
        """Edges and what they keep, weights (flat, by name), constants [D, d].

        **Raises:** `MessageError` for a stream that is damaged, or of another architecture.
        """
        network = inputs.network
        if not isinstance(network, TransformerRegion):
            raise MessageError("a 'sparse' of a region that is no transformer's: it cannot be run")
        if network not in self.known:
            try:
                self.known[network] = _read(self.data, network)
            except CodeError as error:
                raise MessageError(
                    f"a damaged circuit, or that of another model, in {len(self.data)} bytes: {error}"
                ) from error
        found: tuple[Kept, Weights, np.ndarray] = self.known[network]
        return found

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]."""
        return run_circuit(*self.received(inputs), inputs)

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        """Of the products with what is not zero; attention's own and tables' look-ups left out."""
        kept, weights, _ = self.received(inputs)
        return float(sum(2.0 * np.count_nonzero(weights[name]) for name in kept.network.matrices))


def _read(data: bytes, network: TransformerRegion) -> tuple[Kept, Weights, np.ndarray]:
    reader = BitReader(data)
    constant = bool(reader.uniform(1, 2)[0])
    graph = Graph.of(circuit_config(network))
    kept = Kept(network, graph, read_edges(reader, edge_layout(graph)), False, constant)
    tables = SparseTablesReader(reader)
    places, numbers = Places.of(kept), []
    if constant:
        numbers.append(tables.table(places.constant_places()))
        places.constants = numbers[-1] > 0
    blocks = whole_blocks(kept)
    for block in blocks:
        numbers.append(tables.table(places.possible(block)))
        places.put(block, numbers[-1] > 0)
    book = tables.book()
    reader.finish()
    constants = np.zeros(places.constants.shape, np.float32)
    if constant:
        constants = book[numbers.pop(0)].astype(np.float32)
    weights = {name: np.full(s, float(name.endswith(".w")), np.float32) for name, s in kept.shapes.items()}
    for block, table in zip(blocks, numbers, strict=True):
        weights[block.name][np.ix_(block.rows, block.columns)] = book[table]
    return kept, weights, constants


def write_sparse(kept: Kept, weights: Weights, constants: np.ndarray) -> tuple[BitWriter, float]:
    """The stream of a circuit, and its exact length in bits but for marks and padding. Weights and constants are zero
    wherever `Places` says so (`only_possible`)."""
    writer, tables, places = BitWriter(), SparseTablesWriter(), Places.of(kept)
    writer.uniform(np.array([int(kept.constants)]), 2)
    write_edges(writer, kept.edges, edge_layout(kept.graph))
    before = writer.information_bits
    if kept.constants:
        tables.add(constants, places.constant_places())
        places.constants = constants != 0
    for block in whole_blocks(kept):
        values = weights[block.name][np.ix_(block.rows, block.columns)]
        tables.add(values, places.possible(block))
        places.put(block, values != 0)
    bits = before + tables.bits()
    tables.finish(writer)
    return writer, bits


def section_of(writer: BitWriter) -> Section:
    """A stream as a section."""
    bits = np.unpackbits(np.frombuffer(writer.to_bytes(), np.uint8)).astype(np.int64)
    return Section(KIND, (QuantisedArray.from_integers(bits[None]),))


def whole_blocks(kept: Kept) -> list[Block]:
    """Blocks in the order of sending: of readers that see constants alone the columns of their matrix too."""
    return [
        Block(b.name, np.arange(kept.shapes[b.name][0]), b.columns) if b.destination is not None else b
        for b in kept.blocks()
    ]


@dataclass
class Places:
    """Where numbers can be: `on`: of every tensor that came already, by name, which are not zero; `constants` [D, d]:
    where these are not zero. Both ends work it out from what was sent."""

    kept: Kept
    on: dict[str, np.ndarray]
    constants: np.ndarray

    @classmethod
    def of(cls, kept: Kept) -> Places:
        """Before anything came."""
        constants = np.zeros((len(kept.graph.destinations), kept.config.d_model), bool)
        return cls(kept, {name: np.zeros(shape, bool) for name, shape in kept.shapes.items()}, constants)

    def put(self, block: Block, on: np.ndarray) -> None:
        """A block came."""
        self.on[block.name][np.ix_(block.rows, block.columns)] = on

    def constant_places(self) -> np.ndarray:
        """Constants are for destinations that are needed and have dropped sources, [D, d]."""
        dropped = (self.kept.graph.possible & ~self.kept.edges).any(0)
        return np.broadcast_to((dropped & self.kept.needed)[:, None], self.constants.shape).copy()

    def possible(self, block: Block) -> np.ndarray:
        """Of a block, [rows, columns]."""
        kept, (layer, part) = self.kept, _place(block.name)
        shape = kept.shapes[block.name]
        found, prefix = np.ones(shape, bool), f"blocks.{layer}."
        plain = (kept.config.norm, kept.config.norm_before_unembedding) == ("none", "none")
        if part in ("W_Q", "W_K", "W_V") and plain:
            found &= self._heads(layer, part, shape)
        if part == "W_K" and kept.config.positions != "rotary" and f"{prefix}attn.b_Q" not in kept.shapes:
            found &= self._queried(layer)
        if part == "W_O" and f"{prefix}attn.b_V" not in kept.shapes:
            size, groups = kept.config.d_head, kept.config.n_heads // kept.config.key_value_heads
            columns = np.asarray(self.on[f"{prefix}attn.W_V"].any(0)).reshape(-1, size)
            found &= np.repeat(columns, groups, 0).reshape(-1, 1)
        if part in ("W_in", "W_gate") and plain:
            found &= self.seen(kept.destination(f"m{layer}"))[:, None]
        if part == "W_out" and not {f"{prefix}mlp.{b}" for b in ("b_in", "b_gate", "b_post", "W_gate")} & set(
            kept.shapes
        ):
            found &= np.asarray(self.on[f"{prefix}mlp.W_in"].any(0))[:, None]
        if block.name == UNEMBED and plain:
            found &= self.seen(kept.destination(LOGITS))[:, None]
        return found[np.ix_(block.rows, block.columns)]

    def _heads(self, layer: str, part: str, shape: tuple[int, int]) -> np.ndarray:
        """Rows that each head reads, [d, heads x d_head]."""
        size = self.kept.config.d_head
        names = [f"a{layer}.h{h}<{part[-1].lower()}>" for h in range(shape[1] // size)]
        return np.repeat(np.stack([self.seen(self.kept.destination(n)) for n in names], 1), size, 1)

    def _queried(self, layer: str) -> np.ndarray:
        """Columns of keys that some query has, [heads x d_head]."""
        heads, size = self.kept.config.key_value_heads, self.kept.config.d_head
        columns = np.asarray(self.on[f"blocks.{layer}.attn.W_Q"].any(0))
        return np.asarray(columns.reshape(heads, -1, size).any(1).ravel())

    def seen(self, destination: int) -> np.ndarray:
        """Coordinates that can be non-zero in what a destination reads, [d]."""
        found = self.constants[destination].copy()
        for source in np.flatnonzero(self.kept.edges[:, destination]):
            found |= self.written(self.kept.graph.sources[source])
        for name in self.kept.biases(destination):
            found |= self.on[name][0]
        return found

    def written(self, source: str) -> np.ndarray:
        """Coordinates that a source writes, [d]."""
        if source == INPUT:
            if EMBED not in self.on:  # a tied embedding, which the receiver knows
                return np.ones(self.kept.config.d_model, bool)
            positions = self.on[POSITIONS].any(0) if POSITIONS in self.on else np.array(False)
            return np.asarray(self.on[EMBED].any(0) | positions)
        layer, _, head = source[1:].partition(".h")
        if head:
            size = self.kept.config.d_head
            rows = self.on[f"blocks.{layer}.attn.W_O"]
            return np.asarray(rows[int(head) * size : (int(head) + 1) * size].any(0))
        bias = f"blocks.{layer}.mlp.b_out"
        found = np.asarray(self.on[f"blocks.{layer}.mlp.W_out"].any(0))
        return found | self.on[bias][0] if bias in self.on else found


def _place(name: str) -> tuple[str, str]:
    """Layer and last part of a tensor's name."""
    parts = name.split(".")
    return parts[1], parts[-1]
