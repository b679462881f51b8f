"""What the toy models share: the training loop, what it leaves, and a weight by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from mdl.errors import ModelError
from mdl.models.operators import Weight

Weights = dict[str, Array]
LAST = 0.02  # of the steps, over which the final loss is averaged


@dataclass(frozen=True)
class Trained:
    """A toy model with its weights, float32.

    **Arguments:** `loss`: mean training loss of the last steps, in the unit of the model's own training function;
    `attempts`: how many initialisations it took until the model represented all that it was to represent, this one
    included; `figures`: what else is known of it, by name.
    """

    network: Any
    weights: Mapping[str, np.ndarray]
    loss: float
    attempts: int = 1
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How a toy model is trained: AdamW, by default with a cosine schedule down to zero."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.01
    cosine: bool = True

    def optimiser(self) -> optax.GradientTransformation:
        rate = optax.cosine_decay_schedule(self.learning_rate, self.steps) if self.cosine else self.learning_rate
        return optax.adamw(rate, b2=0.999, weight_decay=self.weight_decay)


def fit(
    recipe: Recipe, loss: Callable[[Weights, PRNGKeyArray], Array], weights: Weights, key: PRNGKeyArray
) -> tuple[dict[str, np.ndarray], float]:
    """Minimise `loss(weights, key)`, a new key a step: the weights, and the mean loss of the last steps.

    **Raises:** `ModelError` if the loss ends as NaN or infinite.
    """
    optimiser = recipe.optimiser()

    def step(carry: tuple[Weights, Any], key: PRNGKeyArray) -> tuple[tuple[Weights, Any], Array]:
        current, state = carry
        value, gradient = jax.value_and_grad(loss)(current, key)
        updates, state = optimiser.update(gradient, state, current)
        return (jax.tree.map(jnp.add, current, updates), state), value

    @jax.jit
    def run(initial: Weights, key: PRNGKeyArray) -> tuple[Weights, Array]:
        (final, _), values = jax.lax.scan(step, (initial, optimiser.init(initial)), jax.random.split(key, recipe.steps))
        return final, values

    final, values = run(weights, key)
    last = float(np.mean(np.asarray(values, np.float64)[-max(1, int(LAST * recipe.steps)) :]))
    if not np.isfinite(last):
        raise ModelError(
            f"training ended with a loss of {last}: a learning rate of {recipe.learning_rate:g} is too large for it"
        )
    return {name: np.asarray(w, np.float32) for name, w in final.items()}, last


def sparse_features(key: PRNGKeyArray, shape: tuple[int, int], probability: float, symmetric: bool = False) -> Array:
    """Features that are on with some probability, independently, and then uniform on [0, 1] or [-1, 1]: [n, features].

    One draw decides of both, for what lies below `probability` is uniform there.
    """
    draw = jax.random.uniform(key, shape)
    value = draw / probability
    return jnp.where(draw < probability, 2.0 * value - 1.0 if symmetric else value, 0.0)


def drawn_features(features: int, count: int, seed: int, probability: float, symmetric: bool = False) -> np.ndarray:
    """Inputs to score on, float32 [count, features]: as `sparse_features`, but with at least one feature on.

    An input with no feature on needs no part of the model, and has one answer, the same for all such inputs.
    """
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while sum(map(len, found)) < count:
        on = rng.random((count, features)) < probability
        values = rng.uniform(-1.0 if symmetric else 0.0, 1.0, (count, features))
        found.append((on * values)[on.any(1)])
    return np.concatenate(found)[:count].astype(np.float32)


def weight(weights: Mapping[str, Weight], name: str) -> Weight:
    """One of the weights. **Raises:** `ModelError` if it is missing."""
    if name not in weights:
        raise ModelError(f"no weight {name!r} among {', '.join(weights) or 'none'}: the network needs it")
    return weights[name]


def vector(weights: Mapping[str, Weight], name: str) -> Array:
    """A weight that is no matrix. **Raises:** `ModelError` if it is missing."""
    return jnp.asarray(weight(weights, name))
