"""A circuit as an explanation, the receiver's side: kept edges, the weights they need, what stands in for the rest.

    header = mode, the edges (`mdl.codes.edges`), the blocks of weights (`decompositions.circuits.kept`);
             before these, where something stands in for dropped sources, constants and each destination's row of them

The receiver runs the region's architecture on these with every other edge ablated (`mdl.models.circuits.masked`). Every
token needs all of it: there are no parts. Where a norm comes behind attention (Gemma-2), a head's share of it is at the
scale of the heads that are kept: the receiver has no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decompositions.circuits.kept import EMBED, Block, Kept, circuit_config
from decompositions.circuits.layout import edge_layout
from decompositions.weights.curvature import BATCH_TOKENS, batches_of, device
from mdl.alphabets import NoAlphabet
from mdl.codes.edges import decode_edges
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section
from mdl.models.circuits.ablations import zero
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import masked_model, masked_run
from mdl.models.config import TransformerConfig
from mdl.models.networks import TransformerRegion
from mdl.protocols import Inputs
from mdl.state import State

KIND = "circuit"
BYTE = 256  # bytes are sent as 256 to 511: with one exponent, an adaptive code has nothing to learn but that
SUBSPACE, CONSTANTS, NEURONS = 1, 2, 4  # added up: the mode


@dataclass(frozen=True)
class CircuitDecoder:
    """`mode`: SUBSPACE + CONSTANTS + NEURONS; `edges`: their bytes; `arrays`: blocks, then constants."""

    mode: int
    edges: bytes
    arrays: tuple[QuantisedArray, ...]

    @classmethod
    def from_section(cls, section: Section) -> CircuitDecoder:
        """**Raises:** `MessageError` for what does not begin with a mode and a circuit's edges."""
        if section.parts or len(section.header) < 2:
            raise MessageError("a 'circuit' section is a mode, edges and blocks of weights, and has no parts")
        mode = section.header[0].integers("the mode of a 'circuit' section", 0, SUBSPACE + CONSTANTS + NEURONS, 1)
        rows, columns = section.header[1].symbols.shape
        if len(mode) != 1 or rows != 1:
            raise MessageError(f"'circuit': {len(mode)} modes and {rows} rows of edges, in place of one each")
        data = section.header[1].integers("the edges of a 'circuit' section", BYTE, 2 * BYTE - 1, columns)
        return cls(int(mode[0, 0]), bytes((data.ravel() - BYTE).astype(np.uint8)), section.header[2:])

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def touched(self, inputs: Inputs, state: State) -> None:
        return None

    def kept(self, network: TransformerRegion) -> Kept:
        """**Raises:** `MessageError` for edges of another graph; `ModelError` for a region that has no circuits."""
        graph = Graph.of(circuit_config(network), bool(self.mode & NEURONS))
        edges = decode_edges(self.edges, edge_layout(graph))
        return Kept(network, graph, edges, bool(self.mode & SUBSPACE), bool(self.mode & CONSTANTS))

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]."""
        network = inputs.network
        if not isinstance(network, TransformerRegion):
            raise MessageError("a 'circuit' of a region that is no transformer's: it cannot be run")
        kept = self.kept(network)
        weights, constants = unpacked(kept, list(self.arrays))
        return run_circuit(kept, weights, constants, inputs)

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        """Of the products with what is kept of matrices; attention's own and tables' look-ups left out."""
        assert isinstance(inputs.network, TransformerRegion)
        kept = self.kept(inputs.network)
        weights, _ = unpacked(kept, list(self.arrays))
        found = sum(2.0 * np.count_nonzero(weights[name]) for name in inputs.network.matrices)
        tied = inputs.network.config.tied and EMBED in weights and kept.config.tied
        return float(found + (2.0 * weights[EMBED].size if tied else 0.0))


def unpacked(kept: Kept, arrays: list[QuantisedArray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All tensors of the region (flat, by name; zeros where nothing was sent, norms' weights 1), and the constants that
    each destination reads [D, d].

    **Raises:** `MessageError` for arrays that do not fit the blocks.
    """
    blocks, rest = kept.blocks(), list(arrays)
    constants = np.zeros((len(kept.graph.destinations), kept.config.d_model), np.float32)
    if kept.constants:
        constants = _constants(constants, rest)
    if len(rest) != len(blocks):
        raise MessageError(f"'circuit': {len(rest)} arrays for the {len(blocks)} blocks that its edges ask for")
    weights = {name: np.full(s, float(name.endswith(".w")), np.float32) for name, s in kept.shapes.items()}
    for block, array in zip(blocks, rest, strict=True):
        place(kept, weights, constants, block, array.values())
    return weights, constants


def _constants(like: np.ndarray, rest: list[QuantisedArray]) -> np.ndarray:
    if len(rest) < 2:
        raise MessageError("'circuit': the constants of its destinations are missing")
    rows, which = rest.pop(0).values(), rest.pop(0)
    places = which.integers("the constants' rows of a 'circuit' section", 0, max(len(rows), 1), len(like))
    if rows.shape[1:] != like.shape[1:] or len(places) != 1:
        raise MessageError(f"'circuit': constants of {rows.shape} for destinations of {like.shape}")
    return np.concatenate([np.zeros_like(like[:1]), rows])[places[0]]


def place(kept: Kept, weights: dict[str, np.ndarray], constants: np.ndarray, block: Block, values: np.ndarray) -> None:
    """Put one block where it belongs. **Raises:** `MessageError` if it does not fit."""
    if values.shape != (len(block.rows), len(block.columns)):
        wanted = (len(block.rows), len(block.columns))
        raise MessageError(f"'circuit': a block of {block.name} is {wanted}; the message has {values.shape}")
    if block.destination is None:
        weights[block.name][np.ix_(block.rows, block.columns)] = values
        return
    span = kept.span(block.destination, weights, constants)
    try:
        weights[block.name][:, block.columns] = np.linalg.pinv(span) @ values
    except np.linalg.LinAlgError as error:
        raise MessageError(f"'circuit': what a reader of {block.name} can see is of no finite size") from error


def run_circuit(kept: Kept, weights: dict[str, np.ndarray], constants: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The region's outputs at the scored positions with all other edges ablated, float32 [n, d]."""
    flat = {name: w[0] if name in kept.network.vectors else w for name, w in weights.items()}
    mask, nudges = jnp.asarray(kept.edges, jnp.float32), jnp.asarray(constants)[:, None, None]
    rows = []
    for batch in batches_of(inputs, BATCH_TOKENS):
        values, tokens, _ = device(batch)
        params, tokens = embedded(kept.network, kept.config, flat, values, tokens)
        out = _run(kept.config, kept.graph, params, tokens, mask, nudges)
        rows.append(np.asarray(out, np.float32)[batch.scored])
    return np.concatenate(rows)


def embedded(
    network: TransformerRegion, config: TransformerConfig, weights: dict[str, Any], values: Any, tokens: Any
) -> tuple[dict[str, Any], Any]:
    """Parameters of the truncated model, and its tokens. Where the embedding is known to the receiver it comes as
    `values` [b, t, d]: a table of their own, looked up in order."""
    params = network.params({name: jnp.asarray(w) for name, w in weights.items()})
    if values is not None:
        params["embed"] = {"W_E": jnp.reshape(values, (-1, values.shape[-1]))}
        tokens = jnp.arange(tokens.size, dtype=jnp.int32).reshape(tokens.shape)
    if config != network.config:
        params["unembed"] = {"W_U": jnp.eye(config.d_model)}
    return {**params, "blocks": params["blocks"][: config.n_layers]}, tokens


@partial(jax.jit, static_argnums=(0, 1))
def _run(config: TransformerConfig, graph: Graph, params: Any, tokens: Any, mask: Any, nudges: Any) -> Any:
    nothing = zero(config, graph).fixed
    return masked_run(masked_model(config, params, tokens, nothing, graph), mask, nudges=nudges)
