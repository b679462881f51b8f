"""A hand-coded network of gated functions: control bits say which of K functions of x are added up.

    out = sum over i of  c_i f_i(x),   x in [0, 5],  c_i in {0, 1}

Each f_i is piecewise linear, a sum of ReLUs with knots of their own, and vanishes at 0; a neuron of function i is

    s_j relu(x - t_j + 10 (c_i - 1))

which is exactly zero wherever the control bit is, so that the functions do not touch one another. Nothing is trained,
and the truth is exact: component i is the rows of the control bit and of x towards its neurons, and what these write.

Source: Braun et al. 2025 (APD), appendix: K = 4 sums of two cosines, 10 neurons each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mdl.models.operators import Weight, multiply
from mdl.models.toys.training import Trained, vector, weight

RANGE = 5.0  # of x
CONTROL = 10.0  # what a control bit adds to its neurons' inputs: more than x can, so that without it they are off


@dataclass(frozen=True)
class GatedFunctions:
    """The architecture: inputs (x, c_1, ..., c_K), matrices "W_in" and "W_out", a bias "b_in" of the neurons."""

    functions: int = 4
    neurons: int = 10

    @property
    def hidden(self) -> int:
        """Neurons of all functions."""
        return self.functions * self.neurons

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        return {"W_in": (1 + self.functions, self.hidden), "W_out": (self.hidden, 1)}

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        return {}

    @property
    def vectors(self) -> dict[str, int]:
        return {"b_in": self.hidden}

    def run(self, weights: Mapping[str, Weight], values: Array | None, tokens: Array) -> Array:
        """The outputs [sequences, positions, 1] of inputs [sequences, positions, 1 + functions]."""
        with jax.default_matmul_precision("float32"):
            before = multiply(jnp.asarray(values), weight(weights, "W_in")) + vector(weights, "b_in")
            return multiply(jax.nn.relu(before), weight(weights, "W_out"))


def function_values(seed: int, x: np.ndarray, functions: int) -> np.ndarray:
    """What the network is to approximate at x [n]: f_i(x) - f_i(0), f_i a sum of two cosines of the seed, [n, K]."""
    rng = np.random.default_rng(seed)
    amplitude, phase = rng.uniform(0.5, 1.5, (2, functions)), rng.uniform(-np.pi, np.pi, (2, functions))
    slow, fast = rng.uniform(0.5, 1.5, functions), rng.uniform(1.5, 2.5, functions)

    def value(at: np.ndarray) -> np.ndarray:
        first = amplitude[0] * np.cos(slow * at[:, None] + phase[0])
        return np.asarray(first + amplitude[1] * np.cos(fast * at[:, None] + phase[1]))

    return value(np.asarray(x, np.float64)) - value(np.zeros(1))


def gated_functions(seed: int, network: GatedFunctions | None = None) -> Trained:
    """Weights by hand: each function interpolated linearly between its knots, one at 0 and the others random.

    `figures`: the largest difference to the cosines on [0, 5]; what is explained is the network, which has none.
    """
    network = network or GatedFunctions()
    rng = np.random.default_rng([seed, 1])
    k, m = network.functions, network.neurons
    w_in, w_out, bias = np.zeros((1 + k, k * m)), np.zeros((k * m, 1)), np.zeros(k * m)
    for i in range(k):
        own = slice(i * m, (i + 1) * m)
        knots = np.concatenate([[0.0], RANGE * (np.arange(1, m) + rng.uniform(-0.3, 0.3, m - 1)) / m])
        at = np.append(knots, RANGE)
        slopes = np.diff(function_values(seed, at, k)[:, i]) / np.diff(at)
        scales = rng.uniform(0.5, 2.0, m)
        w_in[0, own], w_in[1 + i, own] = scales, CONTROL * scales
        bias[own] = -(knots + CONTROL) * scales
        w_out[own, 0] = np.diff(slopes, prepend=0.0) / scales
    weights = {"W_in": w_in, "b_in": bias, "W_out": w_out}
    found = {name: array.astype(np.float32) for name, array in weights.items()}
    return Trained(network, found, 0.0, 1, {"interpolation_error": _error(seed, network, found)})


def _error(seed: int, network: GatedFunctions, weights: Mapping[str, np.ndarray]) -> float:
    """The largest difference between a function alone and its cosines, on a grid."""
    grid, k = np.linspace(0.0, RANGE, 201), network.functions
    inputs = np.concatenate([np.repeat(grid[:, None], k, 0), np.tile(np.eye(k), (len(grid), 1))], 1)
    out = network.run({n: jnp.asarray(w) for n, w in weights.items()}, jnp.asarray(inputs)[:, None], jnp.zeros(0))
    return float(np.abs(np.asarray(out).reshape(len(grid), k) - function_values(seed, grid, k)).max())


def gated_inputs(network: GatedFunctions, count: int, seed: int, probability: float | None = None) -> np.ndarray:
    """Inputs to score on, float32 [count, 1 + K]: x uniform on [0, 5], control bits independent, at least one of them.

    **Arguments:** `probability`: of a bit, 1 / K if not given. Inputs without a bit have one answer, zero.
    """
    rng = np.random.default_rng(seed)
    chance = 1.0 / network.functions if probability is None else probability
    bits = np.zeros((count, network.functions), bool)
    while (missing := ~bits.any(1)).any():
        bits[missing] = rng.random((int(missing.sum()), network.functions)) < chance
    x = rng.uniform(0.0, RANGE, (count, 1))
    return np.concatenate([x, bits], 1).astype(np.float32)
