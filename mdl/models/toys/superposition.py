"""Toy models of superposition: more features than hidden channels, which are read back through a ReLU.

    out = relu((x W) W^T + b),   W [features, hidden]

Optionally an identity matrix lies between the two, a weight of the region like any other; and inputs may be rotated,
x' = x R with an orthogonal R: then W_in = R^T W and W_out = W^T are two matrices, and a feature is no input channel.

Sources: Elhage et al. 2022 (Toy Models of Superposition); Braun et al. 2025 (APD) and Bushnaq et al. 2025 (SPD) for
the sizes 5-2 and 40-10, the identity layer and the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from mdl.errors import ModelError
from mdl.models.operators import Weight, multiply
from mdl.models.toys.training import Recipe, Trained, Weights, drawn_features, fit, sparse_features, vector, weight

PROBABILITY = 0.05  # of a feature being on
REPRESENTED = 0.5  # of a feature alone at 1: what the model has to answer at least, for it counts as represented


@dataclass(frozen=True)
class Superposition:
    """The architecture. `tied`: one matrix "W" used both ways; otherwise "W_in" and "W_out", for rotated inputs."""

    features: int = 5
    hidden: int = 2
    identity: bool = False
    tied: bool = True

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        outer, inner = (self.features, self.hidden), (self.hidden, self.features)
        middle = {"identity": (self.hidden, self.hidden)} if self.identity else {}
        return {"W": outer, **middle} if self.tied else {"W_in": outer, **middle, "W_out": inner}

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        return {}

    @property
    def vectors(self) -> dict[str, int]:
        return {"b": self.features}

    def run(self, weights: Mapping[str, Weight], values: Array | None, tokens: Array) -> Array:
        """The outputs [sequences, positions, features] of inputs [sequences, positions, features]."""
        with jax.default_matmul_precision("float32"):
            hidden = multiply(jnp.asarray(values), weight(weights, "W" if self.tied else "W_in"))
            hidden = multiply(hidden, weight(weights, "identity")) if self.identity else hidden
            back = multiply(hidden, weight(weights, "W" if self.tied else "W_out"), transposed=self.tied)
            return jax.nn.relu(back + vector(weights, "b"))

    def init(self, key: PRNGKeyArray) -> Weights:
        """Glorot's normal initialisation (as published), no bias, the identity where there is one. Tied only."""
        if not self.tied:
            raise ModelError("a model of rotated inputs is not trained as such: train a tied one, and use `rotated`")
        scale = (2.0 / (self.features + self.hidden)) ** 0.5
        middle = {"identity": jnp.eye(self.hidden)} if self.identity else {}
        zero = jnp.zeros(self.features)
        return {"W": scale * jax.random.normal(key, (self.features, self.hidden)), **middle, "b": zero}


def superposition_recipe(network: Superposition) -> Recipe:
    """10,000 steps at 5e-3 and a weight decay of 0.01, as published; batches of 1,024, or 2,048 for more than ten
    features (published: 8,192, which changes the loss by little and takes four times as long)."""
    return Recipe(10_000, 1024 if network.features <= 10 else 2048, 5e-3)


def train_superposition(
    seed: int,
    network: Superposition | None = None,
    recipe: Recipe | None = None,
    probability: float = PROBABILITY,
    attempts: int = 10,
) -> Trained:
    """A model that represents every feature: initialisations are tried, in a fixed order, until one ends as such.

    A feature counts as represented if the model answers it, alone and at 1, with at least 0.5: a criterion of the
    model, not of any score. The identity is not trained. `loss`: mean squared error a number.

    **Raises:** `ModelError` if no attempt represents all features.
    """
    network = network or Superposition()
    recipe = recipe or superposition_recipe(network)
    for attempt in range(attempts):
        start, training = jax.random.split(jax.random.fold_in(jax.random.key(seed), attempt))
        initial = network.init(start)
        fixed = {name: w for name, w in initial.items() if name == "identity"}

        def loss(weights: Weights, key: PRNGKeyArray, fixed: Weights = fixed) -> Array:
            x = sparse_features(key, (recipe.batch, network.features), probability)[:, None]
            return jnp.mean(jnp.square(network.run({**weights, **fixed}, x, jnp.zeros(0)) - x))

        learnt = {name: w for name, w in initial.items() if name not in fixed}
        weights, final = fit(recipe, loss, learnt, training)
        weights |= {name: np.asarray(w, np.float32) for name, w in fixed.items()}
        answers = represented(network, weights)
        if answers.min() >= REPRESENTED:
            return Trained(network, weights, final, attempt + 1, {"least_answer": float(answers.min())})
    raise ModelError(
        f"none of {attempts} models of {network.features} features in {network.hidden} channels from seed {seed} "
        f"represents them all (the last one answers the weakest with {answers.min():.2f}): train for more steps, or on "
        "sparser features"
    )


def represented(network: Superposition, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the model answers for each feature alone and at 1, [features]. Inputs are not rotated."""
    inputs = jnp.eye(network.features)[:, None]
    out = network.run({name: jnp.asarray(w) for name, w in weights.items()}, inputs, jnp.zeros(0))
    return np.diagonal(np.asarray(out)[:, 0])


def superposition_inputs(
    network: Superposition, count: int, seed: int, probability: float = PROBABILITY, rotation: np.ndarray | None = None
) -> np.ndarray:
    """Inputs to score on, float32 [count, features], each with at least one feature on; rotated, x R, where R is given.

    Inputs with none on are left out: they need no part of the model, and all have one answer.
    """
    features = drawn_features(network.features, count, seed, probability)
    return features if rotation is None else (features.astype(np.float64) @ rotation).astype(np.float32)


def random_rotation(features: int, seed: int) -> np.ndarray:
    """A uniformly distributed orthogonal matrix, float64 [features, features]."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((features, features)))
    return np.asarray(q * np.sign(np.diagonal(r)))


def rotated(trained: Trained, rotation: np.ndarray) -> Trained:
    """The same function of rotated inputs x R: two matrices, R^T W and W^T. **Raises:** `ModelError` if not tied."""
    if not isinstance(trained.network, Superposition) or not trained.network.tied:
        raise ModelError("only a tied model of superposition can be rotated, and only once")
    w = trained.weights["W"].astype(np.float64)
    two = {"W_in": (rotation.T @ w).astype(np.float32), "W_out": np.ascontiguousarray(trained.weights["W"].T)}
    rest = {name: weight for name, weight in trained.weights.items() if name != "W"}
    return replace(trained, network=replace(trained.network, tied=False), weights={**two, **rest})
