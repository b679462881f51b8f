"""What stands in for the output of an ablated source.

| kind | values | what it costs a receiver |
| --- | --- | --- |
| zero | 0 | nothing |
| mean, optimal | a constant of each source [S, d] | the constants |
| positional-mean | a constant of each source and position [S, T, d] | the constants |
| resample | the source's own output on another sequence of the batch [B, S, T, d] | nothing, by a public seed |
| counterfactual | its output on a given other sequence [B, S, T, d] | the tokens, unless declared known |

Of neurons, constants are activations, one number each (`Outputs`). Scores under different kinds are not comparable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from mdl.errors import ModelError
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import masked_model, masked_run
from mdl.models.circuits.metrics import mean_kl
from mdl.models.circuits.outputs import Outputs, Values, source_outputs
from mdl.models.config import TransformerConfig
from mdl.models.transformer import Params, run

SEQUENCES = 4  # that are run at once where means are taken


@runtime_checkable
class Ablation(Protocol):
    """A way to fill in for ablated sources."""

    @property
    def kind(self) -> str:
        """Its name in the table above."""
        ...

    def values(self, config: TransformerConfig, params: Params, tokens: Int[ArrayLike, "b t"], graph: Graph) -> Values:
        """What stands in for each source on a batch: [S, d], [S, T, d] or [B, S, T, d]."""
        ...


@dataclass(frozen=True, eq=False)
class Constants:
    """Values that do not depend on the batch, made by `zero`, `mean` or `optimal`."""

    kind: str
    fixed: Values

    def values(self, config: TransformerConfig, params: Params, tokens: Any, graph: Graph) -> Values:
        """The constants."""
        return self.fixed


@dataclass(frozen=True)
class Resample:
    """Another sequence of the same batch, by `donors`: never a sequence itself.

    **Raises:** `ModelError` for a batch of one sequence.
    """

    seed: int = 0
    kind: str = "resample"

    def values(self, config: TransformerConfig, params: Params, tokens: Any, graph: Graph) -> Values:
        """Outputs of all sources on the donors."""
        tokens = jnp.asarray(tokens)
        return source_outputs(config, params, tokens[donors(len(tokens), self.seed)], graph)


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Given tokens [B, T], one sequence for each of the batch (corrupted prompts).

    **Raises:** `ModelError` for tokens of another shape than the batch.
    """

    tokens: np.ndarray
    kind: str = "counterfactual"

    def values(self, config: TransformerConfig, params: Params, tokens: Any, graph: Graph) -> Values:
        """Outputs of all sources on the counterfactual tokens."""
        if self.tokens.shape != np.shape(tokens):
            raise ModelError(
                f"counterfactual tokens of shape {self.tokens.shape} for a batch of {np.shape(tokens)}: they come in "
                "pairs, sequence by sequence and position by position"
            )
        return source_outputs(config, params, self.tokens, graph)


def donors(count: int, seed: int) -> np.ndarray:
    """For each of `count` sequences the one that stands in for it: all in one cycle, in the order of hashed numbers.

    The order is that of SHA-256 of "seed index", so that it is the same everywhere.

    **Raises:** `ModelError` for fewer than two.
    """
    if count < 2:
        raise ModelError(f"{count} sequence(s) cannot stand in for each other: resample among two or more")
    order = sorted(range(count), key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())
    found = np.empty(count, int)
    found[order] = np.roll(order, 1)
    return found


def zero(config: TransformerConfig, graph: Graph) -> Constants:
    """Nothing in the place of every source."""
    nodes = jnp.zeros((1 + graph.n_layers * graph.n_heads, config.d_model))
    if graph.neurons:
        return Constants("zero", Outputs(nodes, jnp.zeros(graph.n_layers * graph.neurons)))
    return Constants("zero", jnp.zeros((len(graph.sources), config.d_model)))


def mean(
    config: TransformerConfig,
    params: Params,
    tokens: Int[ArrayLike, "b t"],
    graph: Graph,
    positional: bool = False,
) -> Constants:
    """Means of the plain model's outputs over sequences and positions, or (`positional`) over sequences at each
    position; summed in float64."""
    outputs = jax.jit(partial(source_outputs, config, graph=graph))
    tokens = jnp.asarray(tokens)
    parts = [jax.tree.map(np.asarray, outputs(params, part)) for part in _batches(tokens)]
    axes = (0,) if positional else (0, 2)

    def over(*arrays: np.ndarray) -> Array:
        total = sum(a.sum(axes, dtype=np.float64) for a in arrays)
        return jnp.asarray(total / (len(tokens) * (1 if positional else tokens.shape[1])), jnp.float32)

    return Constants("positional-mean" if positional else "mean", jax.tree.map(over, *parts))


def _batches(tokens: Array) -> list[Array]:
    return [tokens[i : i + SEQUENCES] for i in range(0, len(tokens), SEQUENCES)]


@dataclass(frozen=True)
class Fitting:
    """How constants are fitted: Adam with a cosine schedule to zero, `batch` sequences a step drawn by `seed`."""

    steps: int = 200
    rate: float = 0.01
    batch: int = 4
    seed: int = 0

    def optimiser(self) -> optax.GradientTransformation:
        """Adam with this schedule."""
        return optax.adam(optax.cosine_decay_schedule(self.rate, self.steps))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _step(
    config: TransformerConfig,
    graph: Graph,
    fitting: Fitting,
    values: Values,
    state: Any,
    params: Params,
    data: tuple[Array, Array, Array],
) -> tuple[Values, Any, Array]:
    """One step on some sequences, scored positions and a mask: new values, state, and the mean KL before it in nats."""
    tokens, places, kept = data
    reference = jnp.take_along_axis(run(config, params, tokens, ["logits"])["logits"], places[..., None], 1)

    def loss(current: Values) -> Array:
        return mean_kl(masked_run(masked_model(config, params, tokens, current, graph, places), kept), reference)

    kl, gradient = jax.value_and_grad(loss)(values)
    updates, state = fitting.optimiser().update(gradient, state, values)
    return jax.tree.map(jnp.add, values, updates), state, kl


def optimal(
    config: TransformerConfig,
    params: Params,
    tokens: Int[ArrayLike, "b t"],
    graph: Graph,
    mask: ArrayLike,
    *,
    start: Constants | None = None,
    scored: Int[ArrayLike, "b k"] | None = None,
    fitting: Fitting | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Constants:
    """The constants [S, d] that minimise the mean KL of the masked model, for one mask of edges.

    **Arguments:** `start`: constants to start from, by default the means over `tokens`; `scored` [B, K]: positions that
    count, by default all; `progress`: is told the step and its KL in nats a position.

    **Raises:** `ModelError` if the KL ends as NaN or infinite.

    **Source:** Li and Janson 2024, "Optimal ablation for interpretability".
    """
    fitting, tokens = fitting or Fitting(), np.asarray(tokens)
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if scored is None else np.asarray(scored)
    values = (mean(config, params, tokens, graph) if start is None else start).fixed
    state, rng, kept = (
        fitting.optimiser().init(values),
        np.random.default_rng(fitting.seed),
        jnp.asarray(mask, jnp.float32),
    )
    for number in range(fitting.steps):
        rows = rng.choice(len(tokens), min(fitting.batch, len(tokens)), replace=False)
        values, state, kl = _step(config, graph, fitting, values, state, params, (tokens[rows], places[rows], kept))
        if progress is not None:
            progress(number, float(kl))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values)):
        raise ModelError(
            f"fitted constants are not finite after {fitting.steps} steps: a rate of {fitting.rate:g} is too large, or "
            "those that it started from were not finite either"
        )
    return Constants("optimal", values)
