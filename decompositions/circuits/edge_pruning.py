r"""Edge pruning: gates on edges (or nodes), learned by descent on the total itself.

A gate is z = clip(s (zeta - gamma) + gamma, 0, 1), s = sigmoid((log u - log(1 - u) + a) / beta) with u uniform: the
hard concrete distribution, which is open with probability p = sigmoid(a - beta log(-gamma / zeta)). Minimised is

$$E[\Delta(z)] + \lambda \Big( b \sum_d c_d w_d \min(r_d, d_{model}) + b \sum_s n_s w_s + \log_2 E \sum_e p_e \Big)$$

with Delta as in `subsets`; c_d the columns of reader d, r_d the expected number of rows that its sources write (all of
them, d_model, unless readers come on that span), n_s the numbers that source s writes by, w the probability that a node
is used, 1 - prod (1 - p) over its edges, and b = NUMBER bits. For gates of 0 and 1 this is `Searched.bits`, biases and
norms left out: no target sparsity is chosen by hand, the exchange rate lambda (ln 2 / N under behaviour) decides.

**Sources:** Bhaskar et al. 2024 (Edge Pruning), arXiv:2406.16778; Louizos et al. 2018, arXiv:1712.01312, equations 10
to 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from decompositions.circuits.paths import Path
from decompositions.circuits.searched import NUMBER, Searched
from decompositions.circuits.subsets import Objective, path_of
from mdl.models.circuits.graph import INPUT, LOGITS
from mdl.models.circuits.masked import MaskedModel, masked_run
from mdl.models.sites import LOGITS as LOGITS_SITE

BETA, GAMMA, ZETA = 2.0 / 3.0, -0.1, 1.1  # Louizos et al.
STEPS = 120  # at each exchange rate
RATE = 0.15  # of Adam
START = 2.5  # a at the beginning: gates are open with a probability of .99
SEED = 0


@dataclass(frozen=True, eq=False)
class Costs:
    """Sizes that do not depend on the gates: `rows` [S] that a source writes, `columns` [D] of what a reader reads by,
    `owned` [S, D] 1 where a destination is an input of a source."""

    rows: np.ndarray
    columns: np.ndarray
    owned: np.ndarray
    width: int
    subspace: bool
    edge: float

    @classmethod
    def of(cls, searched: Searched) -> Costs:
        """Of a region's graph."""
        config, graph = searched.model.config, searched.graph
        many = config.d_vocab + config.n_ctx  # rows of the embedding: it writes everywhere
        mlps = 1 if graph.neurons else config.d_mlp
        rows = [many if s == INPUT else config.d_head if s.startswith("a") else mlps for s in graph.sources]
        read = config.d_mlp * (2 if config.gated_mlp else 1)
        unembedding = 0 if config.tied or searched.network.output != LOGITS_SITE else config.n_logits
        columns = [
            unembedding if d == LOGITS else config.d_head if d.startswith("a") else read for d in graph.destinations
        ]
        owned = np.zeros(graph.possible.shape)
        for place, owner in enumerate(graph.owners):
            owned[list(owner or ()), place] = 1.0
        edge = float(np.log2(graph.n_edges))
        return cls(np.array(rows, float), np.array(columns, float), owned, config.d_model, searched.subspace, edge)

    def bits(self, opened: Array) -> Array:
        """Expected, from the probabilities [S, D] of edges."""
        used = 1.0 - jnp.exp(jnp.log1p(-jnp.clip(opened, 0.0, 1.0 - 1e-6)).sum(1))  # sources
        fed = 1.0 - jnp.exp(jnp.log1p(-jnp.clip(opened, 0.0, 1.0 - 1e-6)).sum(0))  # destinations
        needed = jnp.where(self.owned.any(0), 1.0 - jnp.prod(1.0 - self.owned * used[:, None], 0), 1.0)
        seen = jnp.minimum(self.rows @ opened, self.width) if self.subspace else self.width * fed
        written = jnp.where(jnp.arange(len(self.rows)) > 0, self.rows, 0.0)  # the embedding is sent in any case
        numbers = (self.columns * needed * seen).sum() + self.width * (written * used).sum()
        return NUMBER * numbers + self.edge * opened.sum()


def by_pruning(searched: Searched, nodes: bool) -> Path:
    """Gates that are more likely open than not, at each exchange rate; each rate goes on from the cheaper one's."""
    objective, learn, found = Objective(searched, nodes), _learner(searched, nodes), []
    count = len(searched.graph.sources) if nodes else searched.graph.n_edges
    logits, key = jnp.full(count, START), jax.random.key(SEED)
    for rate in reversed(objective.rates()):
        state = optax.adam(RATE).init(logits)
        for _ in range(STEPS):
            key, drawn = jax.random.split(key)
            logits, state = learn(searched.model, searched.plain, logits, state, drawn, jnp.asarray(rate))
        chosen = np.asarray(probability(logits)) > 0.5
        found.append(objective.circuit(chosen[1:] if nodes else chosen))
    return path_of(objective, found)


def probability(logits: Array) -> Array:
    """That a gate is not 0."""
    return jax.nn.sigmoid(logits - BETA * jnp.log(-GAMMA / ZETA))


def gates(logits: Array, key: Array) -> Array:
    """Samples of the hard concrete distribution."""
    uniform = jax.random.uniform(key, logits.shape, minval=1e-6, maxval=1.0 - 1e-6)
    soft = jax.nn.sigmoid((jnp.log(uniform) - jnp.log1p(-uniform) + logits) / BETA)
    return jnp.clip(soft * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def _learner(searched: Searched, nodes: bool) -> Callable[..., tuple[Array, Any]]:
    """One step of Adam: (model, plain outputs, logits, state, key, rate) to logits and state."""
    costs, possible = Costs.of(searched), jnp.asarray(searched.graph.possible, jnp.float32)
    edges = np.nonzero(searched.graph.possible)

    def table(values: Array) -> Array:
        """Of all edges [S, D], from gates of edges or of nodes; the input is always there."""
        if not nodes:
            return jnp.zeros_like(possible).at[edges].set(values)
        values = values.at[0].set(1.0)
        read = jnp.where(costs.owned.any(0), 1.0 - jnp.prod(1.0 - costs.owned * values[:, None], 0), 1.0)
        return possible * values[:, None] * read

    @jax.jit
    def step(model: MaskedModel, plain: Array, logits: Array, state: Any, key: Array, rate: Array) -> tuple[Array, Any]:
        def loss(current: Array) -> Array:
            change = searched.metric(masked_run(model, table(gates(current, key))), plain)
            return change + rate * costs.bits(table(probability(current)))

        updates, state = optax.adam(RATE).update(jax.grad(loss)(logits), state)
        return logits + updates, state

    return step
