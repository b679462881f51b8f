"""Weights as anything that can be multiplied with: a matrix, or what a decomposition puts in its place.

The models here multiply activations by a weight only through `multiply`, so that a quantised matrix, a chain of
factors, or a sum of components under a mask of each token runs through the same code as the model's own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class Operator(Protocol):
    """A linear map of activations, [*batch, d_in] -> [*batch, d_out], in the place of a matrix [d_in, d_out].

    It may depend on the token (a mask of components), so that it is linear for each token, not over all of them.
    """

    def __call__(self, x: Array) -> Array:
        """x @ W."""
        ...

    def transposed(self, x: Array) -> Array:
        """x @ W^T, where a model uses one matrix both ways."""
        ...


Weight = Array | Operator


def multiply(x: Float[Array, "*b i"], weight: Weight, transposed: bool = False) -> Float[Array, "*b o"]:
    """x @ W, or x @ W^T."""
    if isinstance(weight, Operator):
        return weight.transposed(x) if transposed else weight(x)
    return x @ (weight.T if transposed else weight)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chain:
    """A product of two matrices, [d_in, r] and [r, d_out]: rank r at most."""

    first: Array
    second: Array

    def __call__(self, x: Array) -> Array:
        return (x @ self.first) @ self.second

    def transposed(self, x: Array) -> Array:
        return (x @ self.second.T) @ self.first.T


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masked:
    r"""Components under a mask: $W = \sum_c m_c \, V_c U_c^T + m_\Delta \Delta$.

    **Arguments:** `inputs` [C, d_in]: the V_c; `outputs` [C, d_out]: the U_c; `mask` [*batch, C]: of each token;
    `rest` [d_in, d_out]: Delta, or None; `rest_mask` [*batch, 1]: its own, by default always on.
    """

    inputs: Array
    outputs: Array
    mask: Array
    rest: Array | None = None
    rest_mask: Array | float = 1.0

    def __call__(self, x: Array) -> Array:
        out = ((x @ self.inputs.T) * self.mask) @ self.outputs
        return out if self.rest is None else out + self.rest_mask * (x @ self.rest)

    def transposed(self, x: Array) -> Array:
        out = ((x @ self.outputs.T) * self.mask) @ self.inputs
        return out if self.rest is None else out + self.rest_mask * (x @ self.rest.T)


@dataclass(frozen=True)
class Recorder:
    """A weight that notes what it is multiplied with, and whose products can be shifted (for derivatives).

    `seen` collects, for each use in order, the input and the direction; `shifts` are added to the products, one a use.
    """

    weight: Weight
    seen: list[tuple[Array, bool]] = field(default_factory=list)
    shifts: tuple[Array, ...] = ()

    def _shifted(self, x: Array, transposed: bool) -> Array:
        out = multiply(x, self.weight, transposed)
        number = len(self.seen)
        self.seen.append((x, transposed))
        return out + self.shifts[number] if self.shifts else out

    def __call__(self, x: Array) -> Array:
        return self._shifted(x, False)

    def transposed(self, x: Array) -> Array:
        return self._shifted(x, True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Product:
    """One use of a matrix: its input x [*batch, d] and the derivative of some scalar with respect to the product."""

    inputs: Array
    gradients: Array
    transposed: bool = field(metadata={"static": True}, default=False)


def products(
    run: Callable[[Mapping[str, Weight]], Array],
    weights: Mapping[str, Weight],
    names: tuple[str, ...],
    cotangent: Array,
) -> dict[str, tuple[Product, ...]]:
    """Every use of some matrices while `run(weights)` is computed: inputs, and d (output . cotangent) / d product.

    **Arguments:** `run`: a function of the weights alone; `names`: those that are watched; `cotangent`: of the output's
    shape.
    """
    watched = {name: Recorder(weights[name]) for name in names}
    jax.eval_shape(lambda: run({**weights, **watched}))  # fills `seen` with the shapes of every use
    uses = {name: tuple((x.shape, t) for x, t in recorder.seen) for name, recorder in watched.items()}

    def shifted(shifts: dict[str, tuple[Array, ...]]) -> tuple[Array, dict[str, tuple[Array, ...]]]:
        recorders = {name: Recorder(weights[name], [], shifts[name]) for name in names}
        out = run({**weights, **recorders})
        return out, {name: tuple(x for x, _ in r.seen) for name, r in recorders.items()}

    zeros = {
        name: tuple(jnp.zeros((*shape[:-1], _width(weights[name], t))) for shape, t in uses[name]) for name in names
    }
    _, back, inputs = jax.vjp(shifted, zeros, has_aux=True)
    (gradients,) = back(cotangent)
    return {
        name: tuple(Product(x, g, t) for x, g, (_, t) in zip(inputs[name], gradients[name], uses[name], strict=True))
        for name in names
    }


def _width(weight: Weight, transposed: bool) -> int:
    """Numbers of a product with a matrix."""
    if isinstance(weight, Operator):
        raise TypeError("products are watched of plain matrices; expand an operator into the matrices it is made of")
    return int(weight.shape[0] if transposed else weight.shape[1])
