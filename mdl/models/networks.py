"""A region as a function of its weights: what a receiver, knowing the architecture, makes of weights that it is sent.

A network names its weights and has one function, `run(weights, values, tokens)`. Matrices are [d_in, d_out] and
multiply from the right, heads and their channels in one axis; a table is looked up, a row for a position or a token id;
all else is a vector. Names are TransformerLens's (`blocks.1.mlp.W_in`); toy models have their own (`mdl.models.toys`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mdl.errors import ModelError
from mdl.models.config import TransformerConfig
from mdl.models.model import Model, named_weights
from mdl.models.operators import Operator, Recorder, Weight
from mdl.models.outside import region_weights
from mdl.models.sites import LOGITS, TOKENS, Sites
from mdl.models.transformer import behind_norm, rescale, run

TABLES = ("embed.W_E", "pos_embed.W_pos")
GIVEN = 1  # sequences and positions of inputs, where only shapes are looked at


@runtime_checkable
class Network(Protocol):
    """The architecture of a region: hashable, without any weight."""

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """d_in and d_out of every matrix that multiplies activations, in the order of use."""
        ...

    @property
    def tables(self) -> Mapping[str, tuple[int, int]]:
        """Rows and width of every weight that is looked up."""
        ...

    @property
    def vectors(self) -> Mapping[str, int]:
        """Sizes of all other weights."""
        ...

    def run(self, weights: Mapping[str, Weight], values: Array | None, tokens: Array) -> Array:
        """The region's outputs [sequences, positions, d].

        **Arguments:** `values` [sequences, positions, d_in]: what enters, None where that is token ids alone; `tokens`
        [sequences, positions]. A pure function, to be traced by JAX.
        """
        ...


def network_flops(network: Network, width: int) -> int:
    """FLOPs of one input [width] to one output: 2 d_in d_out for every use of a matrix, biases and ReLUs left out."""
    recorders = {name: Recorder(jnp.zeros(shape)) for name, shape in network.matrices.items()}
    plain = {name: jnp.zeros(shape) for name, shape in {**network.tables, **network.vectors}.items()}
    values, tokens = jnp.zeros((GIVEN, GIVEN, width)), jnp.zeros((GIVEN, GIVEN), jnp.int32)
    jax.eval_shape(lambda: network.run({**plain, **recorders}, values, tokens))  # traced, so that every use is noted
    return sum(2 * prod(shape) * len(recorders[name].seen) for name, shape in network.matrices.items())


@dataclass(frozen=True)
class TransformerRegion:
    """Any region of a transformer. `shapes`: name and native shape of each of its weights."""

    config: TransformerConfig
    input: str
    output: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, model: Model, region_input: str, region_output: str) -> TransformerRegion:
        """The region of a model between two boundaries (`mdl.task.Region`)."""
        inside = region_weights(model, region_input, region_output)
        shapes = [(name, tuple(weight.shape)) for name, weight in named_weights(model.params) if name in inside]
        return cls(model.config, region_input, region_output, tuple(shapes))

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        found = {name: flat_shape(name, shape) for name, shape in self.shapes if name not in TABLES}
        return {name: (s[0], s[1]) for name, s in found.items() if len(s) == 2}

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        return {name: (shape[0], shape[1]) for name, shape in self.shapes if name in TABLES}

    @property
    def vectors(self) -> dict[str, int]:
        known = {**self.matrices, **self.tables}
        return {name: prod(shape) for name, shape in self.shapes if name not in known}

    def weights(self, model: Model) -> dict[str, np.ndarray]:
        """The model's own weights of the region, float32, heads and channels in one axis."""
        own = dict(named_weights(model.params))
        return {name: _flat(name, np.asarray(own[name], np.float32)) for name, _ in self.shapes}

    def run(self, weights: Mapping[str, Weight], values: Array | None, tokens: Array) -> Array:
        """The region's outputs [sequences, positions, d]. **Raises:** `ModelError` for weights that are missing."""
        params = self.params(weights)
        with jax.default_matmul_precision("float32"):
            if self.input != TOKENS:
                return self._half(params, values)
            if self.output == LOGITS:
                return run(self.config, params, tokens, [LOGITS])[LOGITS]
            embedding = jnp.asarray(weights["embed.W_E"])[tokens] if values is None else values
            stream = embedding * self.config.embedding_scale
            if self.config.positions == "learned":
                stream = stream + jnp.asarray(weights["pos_embed.W_pos"])[: stream.shape[1]]
            return run(self.config, params, stream, [self.output], layer=0)[self.output]

    def _half(self, params: dict[str, Any], values: Array | None) -> Array:
        """One block's MLP or attention, from the normalised stream before the norm's scale and bias."""
        layer, which = int(self.output.split(".")[1]), "mlp" if self.output.endswith("mlp_out") else "attn"
        block = params["blocks"][layer]
        normed = rescale(block.get("ln2" if which == "mlp" else "ln1", {}), jnp.asarray(values))
        return behind_norm(self.config, block, layer, normed, Sites((), {}), which)

    def params(self, weights: Mapping[str, Weight]) -> dict[str, Any]:
        """The tree that the transformer's functions take."""
        tree: dict[str, Any] = {"blocks": [{} for _ in range(self.config.n_layers)]}
        for name, shape in self.shapes:
            if name not in weights:
                raise ModelError(f"no weight {name!r} of {shape}: the region {self.input} to {self.output} needs it")
            weight = weights[name]
            *path, last = name.split(".")
            place = tree["blocks"][int(path[1])] if path[0] == "blocks" else tree
            for key in path[2:] if path[0] == "blocks" else path:
                place = place.setdefault(key, {})
            place[last] = weight if isinstance(weight, Operator) else _native(name, weight, shape)
        return tree


def flat_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[d_in, d_out] of a matrix of heads, the size of biases of heads; any other shape as it is."""
    if len(shape) == 3:
        heads, first, second = shape
        return (heads * first, second) if name.endswith("W_O") else (first, heads * second)
    return (prod(shape),) if len(shape) == 2 and name.rpartition(".")[2].startswith("b_") else shape


def _flat(name: str, weight: np.ndarray) -> np.ndarray:
    """Heads and their channels in one axis."""
    shape = flat_shape(name, weight.shape)
    if weight.ndim == 3 and not name.endswith("W_O"):
        weight = weight.transpose(1, 0, 2)
    return np.ascontiguousarray(weight.reshape(shape))


def _native(name: str, weight: Any, shape: tuple[int, ...]) -> Array:
    """From heads and channels in one axis to the transformer's own shape."""
    weight = jnp.asarray(weight)
    if len(shape) == 3 and not name.endswith("W_O"):
        heads, first, second = shape
        return weight.reshape(first, heads, second).transpose(1, 0, 2)
    return weight.reshape(shape)
