r"""What an error in a weight does to the region's outputs, to second order: moments of what goes in and comes out.

An error E in a matrix W changes the outputs so that, in the metric G, a token's expected squared error is about

    tr(A E B E^T),   A = E[x x^T],   B = E[g g^T],

with x what the matrix is multiplied with and g = d (output . G^(1/2) r) / d (x W) for random signs r of every output
number and token; where the outputs are logits, G is the Fisher information diag(p) - p p^T of each position's own
distribution, at every position that is asked for. A is what GPTQ calls the
Hessian; A and B are K-FAC's factors of the Gauss-Newton matrix (Martens and Grosse 2015, arXiv:1503.05671; Frantar et
al. 2023, arXiv:2210.17323).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdl.models.networks import Network, TransformerRegion
from mdl.models.operators import products
from mdl.models.sites import LOGITS
from mdl.protocols import Inputs
from mdl.task import Task, region_weights

BATCH_TOKENS = 2048
CURVATURE_TOKENS = 16384  # of fit data: more change little
RIDGE = 1e-5  # of the mean eigenvalue: a direction that no input takes still has a step


@dataclass(frozen=True)
class Curvature:
    """Second moments of one matrix, float64: `inputs` A [d_in, d_in], `outputs` B [d_out, d_out]."""

    inputs: np.ndarray
    outputs: np.ndarray
    known: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # of those who use it, to keep

    def __post_init__(self) -> None:
        for moment in (self.inputs, self.outputs):
            moment[np.diag_indices(len(moment))] += RIDGE * max(float(np.trace(moment)) / len(moment), 1e-30)

    @cached_property
    def left(self) -> np.ndarray:
        """A^(1/2), symmetric."""
        return square_root(self.inputs)

    @cached_property
    def right(self) -> np.ndarray:
        """B^(1/2), symmetric."""
        return square_root(self.outputs)

    @cached_property
    def cholesky(self) -> np.ndarray:
        """The lower triangular L of A = L L^T."""
        return np.linalg.cholesky(self.inputs)

    def through(self, first: np.ndarray, second: np.ndarray) -> tuple[Curvature, Curvature]:
        """Of both factors of a product [d_in, r] and [r, d_out] in the matrix's place."""
        return (
            Curvature(self.inputs.copy(), second @ self.outputs @ second.T),
            Curvature(first.T @ self.inputs @ first, self.outputs.copy()),
        )


@dataclass(frozen=True)
class Curvatures:
    """Of a region: `matrices` by name; for vectors and rows of tables the expected square of the derivative of the
    whole output, a token (an error in them acts on every token at once), of the weight's own shape."""

    matrices: Mapping[str, Curvature]
    others: Mapping[str, np.ndarray]


def square_root(moment: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(moment)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


def batches_of(inputs: Inputs, tokens: int) -> Iterator[Inputs]:
    """Sequences of equal number, about `tokens` tokens each; a smaller rest comes last."""
    sequences, positions = inputs.tokens.shape
    size = max(1, min(sequences, tokens // positions))
    for start in range(0, sequences, size):
        chosen = slice(start, start + size)
        values = None if inputs.values is None else inputs.values[chosen]
        yield Inputs(inputs.tokens[chosen], inputs.scored[chosen], values, inputs.network)


def leading(inputs: Inputs, tokens: int) -> Inputs:
    """The first sequences, in whole batches, with at least so many scored tokens, or all."""
    batches, count, seen = batches_of(inputs, BATCH_TOKENS), 0, 0
    while seen < tokens and (batch := next(batches, None)) is not None:
        count, seen = count + len(batch.tokens), seen + batch.n_tokens
    values = None if inputs.values is None else inputs.values[:count]
    return Inputs(inputs.tokens[:count], inputs.scored[:count], values, inputs.network)


def measure(
    network: Network,
    weights: Mapping[str, np.ndarray],
    inputs: Inputs,
    asked: np.ndarray,
    root: np.ndarray,
    seed: int = 0,
) -> Curvatures:
    """The curvature of every weight of a region, from `inputs`.

    **Arguments:** `asked` [sequences, positions]: where predictions are asked for, which counts where the outputs are
    logits; `root` [d, d]: the metric's root G^(1/2) in force, which counts elsewhere.
    """
    on_device = {name: jnp.asarray(w) for name, w in weights.items()}
    rooted, key, tokens = jnp.asarray(root, jnp.float32), jax.random.key(seed), 0
    sums: dict[str, np.ndarray] = {}
    seen = 0
    for number, batch in enumerate(batches_of(inputs, BATCH_TOKENS)):
        values, ids, scored = device(batch)
        here = jnp.asarray(asked[seen : (seen := seen + len(ids))]) & scored
        found = _batch(network, on_device, values, ids, scored, here, rooted, jax.random.fold_in(key, number))
        for name, moment in found.items():
            sums[name] = sums.get(name, 0.0) + np.asarray(moment, np.float64)
        tokens += batch.n_tokens
    means = {name: total / tokens for name, total in sums.items()}
    matrices = {name: _merged(name, means) for name in network.matrices}
    return Curvatures(matrices, {name: means[name] for name in (*network.tables, *network.vectors)})


def device(batch: Inputs) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Values, tokens and scored positions, for JAX."""
    values = None if batch.values is None else jnp.asarray(batch.values)
    return values, jnp.asarray(batch.tokens), jnp.asarray(batch.scored)


@partial(jax.jit, static_argnums=0)
def _batch(
    network: Network, weights: dict[str, Any], values: Any, tokens: Any, scored: Any, asked: Any, root: Any, key: Any
) -> dict[str, Any]:
    """Sums of moments over one batch: of use u of a matrix under "matrix:u:left" and ":right", of others by name."""

    def outputs(own: Mapping[str, Any]) -> Any:
        return network.run(own, values, tokens)

    if isinstance(network, TransformerRegion) and network.output == LOGITS:
        p = jax.nn.softmax(outputs(weights))
        signed = jnp.sqrt(p) * jax.random.rademacher(key, p.shape, p.dtype)
        # its square is diag(p) - p p^T in expectation; labels drawn from p would miss what a sure model finds unlikely
        cotangent = (signed - p * signed.sum(-1, keepdims=True)) * asked[..., None]
    else:
        shape = jax.eval_shape(outputs, weights).shape
        cotangent = (jax.random.rademacher(key, shape, root.dtype) @ root) * scored[..., None]
    found: dict[str, Any] = {}
    for name, uses in products(outputs, weights, tuple(network.matrices), cotangent).items():
        for number, use in enumerate(uses):
            sides = [a.reshape(-1, a.shape[-1]) for a in (use.inputs, use.gradients)]
            left, right = sides[::-1] if use.transposed else sides
            found[f"{name}:{number}:left"], found[f"{name}:{number}:right"] = left.T @ left, right.T @ right
    others = {name: weights[name] for name in (*network.tables, *network.vectors)}
    gradients = jax.grad(lambda some: jnp.vdot(outputs({**weights, **some}), cotangent))(others)
    return {**found, **{name: jnp.square(g) for name, g in gradients.items()}}


def _merged(name: str, means: Mapping[str, np.ndarray]) -> Curvature:
    """The uses of one matrix as one: sums of Kronecker products, by the nearest that keeps both marginals."""
    lefts = [m for key, m in means.items() if key.startswith(f"{name}:") and key.endswith(":left")]
    rights = [m for key, m in means.items() if key.startswith(f"{name}:") and key.endswith(":right")]
    if len(lefts) == 1:
        return Curvature(lefts[0], rights[0])
    sizes = [float(np.trace(a) * np.trace(b)) for a, b in zip(lefts, rights, strict=True)]
    left = sum(size * a / max(np.trace(a), 1e-30) for size, a in zip(sizes, lefts, strict=True))
    right = sum(size * b / max(np.trace(b), 1e-30) for size, b in zip(sizes, rights, strict=True))
    share = max(float(np.trace(lefts[0])), 1e-30) / max(sum(sizes), 1e-30)  # the first use's inputs keep their size
    return Curvature(np.asarray(left * share), np.asarray(right / max(share * sum(sizes), 1e-30)))


@dataclass
class MeasuredCurvature:
    """The region's curvature under whichever metric is in force, each measured once."""

    network: Network
    weights: Mapping[str, np.ndarray]
    inputs: Inputs
    asked: np.ndarray
    known: dict[bytes, Curvatures] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, task: Task) -> MeasuredCurvature:
        """**Raises:** `TaskError` for a region whose weights are not known."""
        weights, inputs = region_weights(task), leading(task.fit.inputs, CURVATURE_TOKENS)
        assert inputs.network is not None
        return cls(inputs.network, weights, inputs, task.fit_activations.asked[: len(inputs.tokens)])

    def under(self, root: np.ndarray) -> Curvatures:
        """In the metric with this root, [d, d]."""
        key = root.tobytes()
        if key not in self.known:
            self.known[key] = measure(self.network, self.weights, self.inputs, self.asked, root)
        return self.known[key]
