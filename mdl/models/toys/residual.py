"""Residual MLPs that learn y = x + relu(x), feature by feature, in a stream that features are embedded in.

    stream = x W_E,   stream += relu(stream W_in^l) W_out^l   for each layer l,   y = stream W_E^T

W_E [features, d_resid] has rows of unit norm, fixed by a seed: it is part of the architecture, known and not sent. What
enters the region is the embedded x. With "orthogonal" rows (a random choice of rows of a Hadamard matrix, with random
signs of columns) y = x + relu(x) can be reached exactly, and is, with a neuron for each feature. With "unit" rows, as
published (random, nearly orthogonal), the residual path alone gives x W_E W_E^T, and the layers learn to undo that
mixing as well: what was taken for computing 100 features by 50 neurons rests on it (Bhagat et al. 2026,
arXiv:2606.14673). With fewer neurons than features no decomposition is established as the truth.

Sources: Braun et al. 2025 (APD), section 4.2; Bushnaq et al. 2025 (SPD), for 2 and 3 layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from mdl.errors import ModelError
from mdl.models.operators import Weight, multiply
from mdl.models.toys.training import Recipe, Trained, Weights, drawn_features, fit, sparse_features, weight

EMBEDDINGS = ("orthogonal", "unit")
LEARNT = 0.05  # of E[relu(x)^2] for a feature alone: what a trained model may miss of any feature


@dataclass(frozen=True)
class ResidualMLP:
    """The architecture. `neurons`: of each layer; `embedding`: of EMBEDDINGS; `seed`: of W_E.

    Default sizes are small, with a neuron for each feature: for two layers neurons (10, 10), for three 21 features and
    (7, 7, 7). The published ones: 100 features, d_resid 1,000, "unit", neurons (50,), (25, 25), and, with 102 features,
    (17, 17, 17).
    """

    features: int = 20
    d_resid: int = 32
    neurons: tuple[int, ...] = (20,)
    embedding: str = "orthogonal"
    seed: int = 0

    def __post_init__(self) -> None:
        """**Raises:** `ModelError` for sizes that no embedding has."""
        if self.embedding not in EMBEDDINGS:
            raise ModelError(f"no embedding {self.embedding!r}; there is {', '.join(EMBEDDINGS)}")
        power = self.d_resid & (self.d_resid - 1) == 0
        if self.embedding == "orthogonal" and not (power and self.features <= self.d_resid):
            raise ModelError(
                f"{self.features} orthogonal rows of {self.d_resid} numbers: d_resid has to be a power of two, and at "
                "least the number of features"
            )

    @property
    def embed(self) -> np.ndarray:
        """W_E, float32 [features, d_resid]: the same on every machine."""
        return _embedding(self.features, self.d_resid, self.embedding, self.seed)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        shapes: dict[str, tuple[int, int]] = {}
        for layer, count in enumerate(self.neurons):
            shapes[f"layers.{layer}.W_in"] = (self.d_resid, count)
            shapes[f"layers.{layer}.W_out"] = (count, self.d_resid)
        return shapes

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        return {}

    @property
    def vectors(self) -> dict[str, int]:
        return {}

    def run(self, weights: Mapping[str, Weight], values: Array | None, tokens: Array) -> Array:
        """y [sequences, positions, features] of embedded features [sequences, positions, d_resid]."""
        with jax.default_matmul_precision("float32"):
            stream = jnp.asarray(values)
            for layer in range(len(self.neurons)):
                hidden = jax.nn.relu(multiply(stream, weight(weights, f"layers.{layer}.W_in")))
                stream = stream + multiply(hidden, weight(weights, f"layers.{layer}.W_out"))
            return stream @ self.embed.T

    def init(self, key: PRNGKeyArray) -> Weights:
        """Normal numbers, of variance 2 / (d_in + d_out) (Glorot and Bengio 2010)."""
        keys = jax.random.split(key, len(self.matrices))
        shapes = self.matrices.items()
        return {n: (2.0 / sum(s)) ** 0.5 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes, strict=True)}


@cache
def _embedding(features: int, width: int, kind: str, seed: int) -> np.ndarray:
    """Rows of unit norm from integers and IEEE-exact operations alone; read-only."""
    generator: Any = np.random.Philox(key=np.array([seed, 0], np.uint64))
    words = np.asarray(generator.random_raw(width * (features + 2)), np.uint64)
    if kind == "orthogonal":
        rows = np.argsort(words[:width], kind="stable")[:features]
        signs = 1 - 2 * (words[width : 2 * width] >> np.uint64(63)).astype(np.int64)
        parity = np.array([[(int(i) & j).bit_count() & 1 for j in range(width)] for i in rows])
        integers = (1 - 2 * parity) * signs
    else:  # sums of four 16-bit numbers, less their mean: nearly normal
        parts = (words[: width * features, None] >> (np.uint64(16) * np.arange(4, dtype=np.uint64))) & np.uint64(0xFFFF)
        integers = parts.astype(np.int64).sum(1).reshape(features, width) - 2 * 0xFFFF
    norms = np.sqrt(np.square(integers).sum(1, keepdims=True).astype(np.float64))
    embedding = (integers / norms).astype(np.float32)
    embedding.setflags(write=False)
    return embedding


def feature_probability(network: ResidualMLP) -> float:
    """Of a feature being on: one in a hundred of a hundred features, as published; one feature at a time for fewer."""
    return 1.0 / max(network.features, 20)


def train_residual(
    seed: int, network: ResidualMLP | None = None, recipe: Recipe | None = None, attempts: int = 5
) -> Trained:
    """Train on y = x + relu(x), initialisations in a fixed order until one has learnt every feature.

    With orthogonal rows of W_E the weights are kept in their span, W_in = W_E^T A and W_out = B W_E: outside of it no
    activation ever is, and what initialisation left there would be noise without a function.

    With as many neurons as features, a feature counts as learnt if, alone, it is answered with less than 5 % of
    E[relu(x)^2] missing; a model with fewer neurons is taken as it is. `loss`: mean squared error a number.

    **Raises:** `ModelError` if no attempt learns all features.
    """
    network = network or ResidualMLP()
    recipe = recipe or Recipe(4_000, 512, 1e-2)
    probability = feature_probability(network)
    for attempt in range(attempts):
        start, training = jax.random.split(jax.random.fold_in(jax.random.key(seed), attempt))

        def loss(weights: Weights, key: PRNGKeyArray) -> Array:
            x = sparse_features(key, (recipe.batch, network.features), probability, symmetric=True)
            out = network.run(_in_span(network, weights), (x @ network.embed)[:, None], jnp.zeros(0))[:, 0]
            return jnp.mean(jnp.square(out - x - jax.nn.relu(x)))

        learnt, final = fit(recipe, loss, _coordinates(network, network.init(start)), training)
        weights = {name: np.asarray(w) for name, w in _in_span(network, learnt).items()}
        missed = missing(network, weights)
        if sum(network.neurons) < network.features or missed.max() <= LEARNT:
            return Trained(network, weights, final, attempt + 1, {"most_missed": float(missed.max())})
    raise ModelError(
        f"none of {attempts} residual MLPs with {network.neurons} neurons from seed {seed} learnt all "
        f"{network.features} features (of the worst, {missed.max():.0%} is missing): give it more neurons or steps"
    )


def _coordinates(network: ResidualMLP, weights: Weights) -> Weights:
    """A and B of weights in the span of orthogonal rows of W_E; of others, the weights themselves."""
    if network.embedding != "orthogonal":
        return weights
    embed = jnp.asarray(network.embed)
    return {name: embed @ w if name.endswith("W_in") else w @ embed.T for name, w in weights.items()}


def _in_span(network: ResidualMLP, coordinates: Mapping[str, Any]) -> Weights:
    """The weights of `_coordinates`."""
    if network.embedding != "orthogonal":
        return dict(coordinates)
    embed = jnp.asarray(network.embed)
    return {name: embed.T @ w if name.endswith("W_in") else w @ embed for name, w in coordinates.items()}


def missing(network: ResidualMLP, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each feature alone, E[(y - x - relu(x))^2] / E[relu(x)^2] over x on [-1, 1], [features]."""
    grid = np.linspace(-1.0, 1.0, 41, dtype=np.float32)
    x = (np.eye(network.features, dtype=np.float32)[:, None] * grid[:, None]).astype(np.float32)
    own = {name: jnp.asarray(w) for name, w in weights.items()}
    out = np.asarray(network.run(own, jnp.asarray(x @ network.embed), jnp.zeros(0)))
    wanted = np.maximum(x, 0.0)
    return np.asarray(np.square(out - x - wanted).sum((1, 2)) / np.square(wanted).sum((1, 2)))


def residual_inputs(network: ResidualMLP, count: int, seed: int, probability: float | None = None) -> np.ndarray:
    """Embedded features to score on, float32 [count, d_resid], each of at least one feature.

    An input with none on is the zero vector, has the answer zero, and needs no part.
    """
    chance = feature_probability(network) if probability is None else probability
    return drawn_features(network.features, count, seed, chance, symmetric=True) @ network.embed
