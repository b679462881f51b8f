"""Networks of a few numbers, with and without a matrix that is used both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mdl.models.operators import Weight, multiply


@dataclass(frozen=True)
class Tied:
    """relu((x W) W^T + b)."""

    features: int
    hidden: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        return {"W": (self.features, self.hidden)}

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        return {}

    @property
    def vectors(self) -> dict[str, int]:
        return {"b": self.features}

    def run(self, weights: Mapping[str, Weight], values: Array | None, tokens: Array) -> Array:
        assert values is not None
        hidden = multiply(values, weights["W"])
        return jax.nn.relu(multiply(hidden, weights["W"], transposed=True) + weights["b"])


@dataclass(frozen=True)
class TwoLayers:
    """relu(x A) B."""

    sizes: tuple[int, int, int]

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        return {"A": self.sizes[:2], "B": self.sizes[1:]}

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        return {}

    @property
    def vectors(self) -> dict[str, int]:
        return {}

    def run(self, weights: Mapping[str, Weight], values: Array | None, tokens: Array) -> Array:
        assert values is not None
        return multiply(jax.nn.relu(multiply(values, weights["A"])), weights["B"])


def random_weights(network: Tied | TwoLayers, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {name: rng.standard_normal(shape) for name, shape in network.matrices.items()}
    found |= {name: 0.1 * rng.standard_normal(size) for name, size in network.vectors.items()}
    return {name: np.asarray(w, np.float32) for name, w in found.items()}


def inputs(network: Tied | TwoLayers, count: int, seed: int) -> tuple[Array, Array]:
    width = next(iter(network.matrices.values()))[0]
    values = np.random.default_rng(seed).standard_normal((count, 1, width)).astype(np.float32)
    return jnp.asarray(values), jnp.zeros((count, 1), jnp.int32)
