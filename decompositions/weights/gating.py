"""Gates as JAX functions: a small MLP for each subcomponent on one scalar, and the hard sigmoids behind it.

Source: Bushnaq et al. 2025 (SPD, arXiv:2506.20790), section 3.2 and appendix; the straight-through form is that of its
successor VPD ("Interpreting Language Model Parameters", 2026).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from decompositions.weights.factors import ScalarGates

LEAK = 0.01  # slope of a hard sigmoid where it is flat


class GateParameters(NamedTuple):
    """`ScalarGates` as arrays to be trained: `weight_in`, `bias_in`, `weight_out` [C, h]; `bias_out` [C]."""

    weight_in: Array
    bias_in: Array
    weight_out: Array
    bias_out: Array

    @classmethod
    def of(cls, gates: ScalarGates) -> GateParameters:
        return cls(*(jnp.asarray(getattr(gates, name), jnp.float32) for name in cls._fields))

    def numpy(self) -> ScalarGates:
        """As a decomposition carries them."""
        return ScalarGates(*(np.asarray(a, np.float32) for a in self))


def initial_gates(key: Array, count: int, hidden: int, one_sided: bool = False) -> GateParameters:
    """Random MLPs that begin near |v|, or near max(v, 0): hidden weights N(0, 1), or |N(0, 1)| if `one_sided`, output
    weights |N(0, 1)| * 4 / h, no biases.

    A subcomponent whose scalar is 0 contributes nothing; its gate begins closed there.
    """
    first, second = jax.random.split(key)
    into = jax.random.normal(first, (count, hidden))
    return GateParameters(
        jnp.abs(into) if one_sided else into,
        jnp.zeros((count, hidden)),
        jnp.abs(jax.random.normal(second, (count, hidden))) * (4.0 / hidden),
        jnp.zeros((count,)),
    )


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf(x * np.float32(np.sqrt(0.5))))


def _value(v: Array, weight_in: Array, bias_in: Array, weight_out: Array) -> Array:
    """sum_h w_out_h gelu(w_in_h v + b_h) for v [n, C]; never holds an array of [n, C, h], forward or backward."""

    def add(total: Array, weights: tuple[Array, Array, Array]) -> tuple[Array, None]:
        into, bias, out = weights
        x = v * into + bias
        return total + out * x * _normal_cdf(x), None

    return jax.lax.scan(add, jnp.zeros_like(v), (weight_in.T, bias_in.T, weight_out.T))[0]


def _forward(v: Array, weight_in: Array, bias_in: Array, weight_out: Array) -> tuple[Array, tuple[Array, ...]]:
    return _value(v, weight_in, bias_in, weight_out), (v, weight_in, bias_in, weight_out)


def _backward(kept: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    """gelu'(x) = Phi(x) + x phi(x), worked out again one hidden unit at a time."""
    v, weight_in, bias_in, weight_out = kept

    def add(total: Array, weights: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, ...]]:
        into, bias, out = weights
        x = v * into + bias
        cdf = _normal_cdf(x)
        slope = cotangent * (cdf + x * jnp.exp(-0.5 * x * x) * np.float32(1.0 / np.sqrt(2.0 * np.pi)))
        sums = (out * jnp.sum(slope * v, 0), out * jnp.sum(slope, 0), jnp.sum(cotangent * x * cdf, 0))
        return total + slope * (into * out), sums

    weights = (weight_in.T, bias_in.T, weight_out.T)
    to_v, (to_in, to_bias, to_out) = jax.lax.scan(add, jnp.zeros_like(v), weights)
    return to_v, to_in.T, to_bias.T, to_out.T


def _with_gradient(forward: Any, backward: Any) -> Any:
    """Gives a function of `jax.custom_vjp` its derivative."""

    def complete(function: Any) -> Any:
        function.defvjp(forward, backward)
        return function

    return complete


@_with_gradient(_forward, _backward)
@jax.custom_vjp
def _scalar_mlps(v: Array, weight_in: Array, bias_in: Array, weight_out: Array) -> Array:
    """`_value`, differentiated by `_backward`."""
    return _value(v, weight_in, bias_in, weight_out)


def gate_values(gates: GateParameters, scalars: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Before the hard sigmoid: w_out . gelu(w_in v + b_in) + b_out of each subcomponent's scalar v = V_c . x."""
    flat = scalars.reshape(-1, scalars.shape[-1])
    found = _scalar_mlps(flat, gates.weight_in, gates.bias_in, gates.weight_out) + gates.bias_out
    return found.reshape(scalars.shape)


def hard(x: Array) -> Array:
    """clip(x, 0, 1): what a decoder computes."""
    return jnp.clip(x, 0.0, 1.0)


def lower_leaky(x: Array) -> Array:
    """clip(x, 0, 1), with slope 0.01 below 0: masks of the paper, which can be negative."""
    return jnp.where(x < 0.0, LEAK * x, jnp.minimum(x, 1.0))


def upper_leaky(x: Array) -> Array:
    """clip(x, 0, 1), with slope 0.01 above 1: what is penalised, so that a gate above 1 still feels the penalty."""
    return jnp.where(x > 1.0, 1.0 + LEAK * (x - 1.0), jnp.maximum(x, 0.0))


def _straight_backward(x: Array, cotangent: Array) -> tuple[Array]:
    below = jnp.where(cotangent < 0.0, LEAK * cotangent, 0.0)
    return (jnp.where(x < 0.0, below, jnp.where(x <= 1.0, cotangent, 0.0)),)


def _straight_forward(x: Array) -> tuple[Array, Array]:
    return jnp.clip(x, 0.0, 1.0), x


@_with_gradient(_straight_forward, _straight_backward)
@jax.custom_vjp
def straight_through(x: Array) -> Array:
    """clip(x, 0, 1), whose derivative below 0 is 0.01 where descent would open the gate, and else 0."""
    return jnp.clip(x, 0.0, 1.0)
