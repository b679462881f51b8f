"""Addition modulo a prime: one hidden layer that has grokked c = a + b mod p, and does it by Fourier components.

    logits = f([onehot(a), onehot(b)] W_in) W_out,   f(h) = h^2 or relu(h)

The label's distribution is the phenomenon (`likelihood` "categorical"). Of the p^2 inputs each occurs once in the data
to score on: there are no others. Some of them are trained on; that the model is right on the others is what grokking
means.

Sources: Power et al. 2022 (grokking); Nanda et al. 2023 (Fourier components); Gromov 2023 (one quadratic layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from mdl.errors import ModelError
from mdl.models.operators import Weight, multiply
from mdl.models.toys.training import Recipe, Trained, Weights, fit, weight

ACTIVATIONS = ("quadratic", "relu")
GROKKED = 0.99  # accuracy on pairs that were not trained on


@dataclass(frozen=True)
class ModularAddition:
    """The architecture: matrices "W_in" [2 p, hidden] and "W_out" [hidden, p], no bias."""

    p: int = 31
    hidden: int = 48
    activation: str = "quadratic"

    def __post_init__(self) -> None:
        """**Raises:** `ModelError` for an even p, which has a frequency of its own kind, or an unknown activation."""
        if self.p < 3 or self.p % 2 == 0 or self.activation not in ACTIVATIONS:
            raise ModelError(f"addition modulo {self.p} with {self.activation!r}: p is odd, f one of {ACTIVATIONS}")

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        return {"W_in": (2 * self.p, self.hidden), "W_out": (self.hidden, self.p)}

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        return {}

    @property
    def vectors(self) -> dict[str, int]:
        return {}

    def run(self, weights: Mapping[str, Weight], values: Array | None, tokens: Array) -> Array:
        """Logits [sequences, positions, p] of inputs [sequences, positions, 2 p]."""
        with jax.default_matmul_precision("float32"):
            before = multiply(jnp.asarray(values), weight(weights, "W_in"))
            after = jnp.square(before) if self.activation == "quadratic" else jax.nn.relu(before)
            return multiply(after, weight(weights, "W_out"))

    def init(self, key: PRNGKeyArray) -> Weights:
        """Normal numbers, of variance 1 / d_in."""
        keys = jax.random.split(key, 2)
        shapes = self.matrices.items()
        return {n: s[0] ** -0.5 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes, strict=True)}


def pairs(p: int) -> tuple[np.ndarray, np.ndarray]:
    """a and b of every input, [p^2]."""
    a, b = np.divmod(np.arange(p * p), p)
    return a, b


def modular_inputs(network: ModularAddition) -> np.ndarray:
    """All p^2 inputs, float32 [p^2, 2 p]: each pair once."""
    a, b = pairs(network.p)
    eye = np.eye(network.p, dtype=np.float32)
    return np.concatenate([eye[a], eye[b]], 1)


def modular_recipe(network: ModularAddition) -> Recipe:
    """Full batches, 6,000 steps from a rate of 5e-3 down, and a weight decay of 1, which does the grokking."""
    return Recipe(6_000, network.p**2, 5e-3, 1.0)


def train_modular(
    seed: int,
    network: ModularAddition | None = None,
    recipe: Recipe | None = None,
    fraction: float = 0.8,
    attempts: int = 3,
) -> Trained:
    """Train on a random share of all pairs, until an attempt is right on at least 99 % of the others.

    `loss`: mean cross-entropy on the pairs trained on, nats; `figures`: accuracy and cross-entropy (nats) on the
    others.

    **Raises:** `ModelError` if no attempt groks.
    """
    network = network or ModularAddition()
    recipe = recipe or modular_recipe(network)
    a, b = pairs(network.p)
    labels, inputs = jnp.asarray((a + b) % network.p), jnp.asarray(modular_inputs(network))[:, None]
    for attempt in range(attempts):
        start, training, split = jax.random.split(jax.random.fold_in(jax.random.key(seed), attempt), 3)
        order = np.asarray(jax.random.permutation(split, network.p**2))
        known, new = np.split(order, [round(fraction * len(order))])

        def losses(weights: Weights, chosen: np.ndarray) -> tuple[Array, Array]:
            logits = network.run(weights, inputs[chosen], jnp.zeros(0))[:, 0]
            wanted = labels[chosen]
            loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[:, None], 1).mean()
            return loss, jnp.mean(logits.argmax(1) == wanted)

        def loss(weights: Weights, key: PRNGKeyArray, known: np.ndarray = known) -> Array:
            return losses(weights, known)[0]

        weights, final = fit(recipe, loss, network.init(start), training)
        nats, accuracy = losses({name: jnp.asarray(w) for name, w in weights.items()}, new)
        if accuracy >= GROKKED:
            return Trained(network, weights, final, attempt + 1, {"accuracy": float(accuracy), "nats": float(nats)})
    raise ModelError(
        f"none of {attempts} networks of {network.hidden} neurons from seed {seed} grokked addition mod {network.p}: "
        f"the last one is right on {float(accuracy):.0%} of the pairs it was not trained on. Train for more steps, or "
        "on more pairs."
    )
