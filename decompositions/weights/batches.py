"""Where a decomposition's training inputs come from: pure functions of a key, so that training resumes exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mdl.errors import DataError

Batch = tuple[Array | None, Array]  # values [n, t, d] or None, token ids [n, t]


@runtime_checkable
class Batches(Protocol):
    """A source of region inputs; a pytree, so that its arrays are arguments of a compiled step."""

    def draw(self, key: Array) -> Batch:
        """A random batch: what enters the region [n, t, d] (None for token ids alone), and the token ids [n, t]."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseUniform:
    """Features that are on with a probability each, independently, uniform in [low, high] when they are.

    Inputs [batch, 1, features], of superposition toys (0 to 1) and residual MLPs (-1 to 1). `rotation` [features,
    features], if any, multiplies them from the right.
    """

    features: int = field(metadata={"static": True})
    batch: int = field(metadata={"static": True})
    probability: float = field(default=0.05, metadata={"static": True})
    low: float = field(default=0.0, metadata={"static": True})
    high: float = field(default=1.0, metadata={"static": True})
    rotation: Array | None = None

    def draw(self, key: Array) -> Batch:
        on, value = jax.random.split(key)
        shape = (self.batch, 1, self.features)
        values = jax.random.uniform(value, shape, minval=self.low, maxval=self.high)
        values = values * jax.random.bernoulli(on, self.probability, shape)
        if self.rotation is not None:
            values = values @ self.rotation
        return values, jnp.zeros((self.batch, 1), jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Random sequences of those given: `values` [N, t, d] or None, `tokens` [N, t], drawn with replacement."""

    values: Array | None
    tokens: Array
    batch: int = field(metadata={"static": True})

    def draw(self, key: Array) -> Batch:
        chosen = jax.random.randint(key, (self.batch,), 0, self.tokens.shape[0])
        return None if self.values is None else self.values[chosen], self.tokens[chosen]

    @classmethod
    def of_positions(cls, values: np.ndarray, tokens: np.ndarray, scored: np.ndarray, batch: int) -> Rows:
        """Every scored position as a sequence of its own: for regions that look at one position at a time (MLPs).

        **Arguments:** `values` [n, t, d]; `tokens`, `scored` [n, t]. **Raises:** `DataError` if none is scored.
        """
        if not scored.any():
            raise DataError(f"none of {scored.size} positions is scored: there is nothing to train on")
        return cls(jnp.asarray(values[scored][:, None]), jnp.asarray(tokens[scored][:, None]), batch)
