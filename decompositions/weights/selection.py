r"""Which components a token needs: chosen by the sender, one by one, for the fewest bits.

For a token and a set of components that is on, the bits are about

    J = sum_c b_c [c is on]  +  sum_k 1/2 log2(1 + (u_k / Delta)^2),

b_c being what it takes to say that c is on (its index, and its share of a part that is paid on first use), and u the
error of the outputs in the metric's axes against the residual coder's step Delta; where nothing mends the error, its KL
|u|^2 / (2 ln 2) takes the second term's place. Components are switched on from none
while that saves bits, then off; and off from all, then on; the better of the two is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decompositions.weights.gated import run_masked
from mdl.models.networks import Network
from mdl.protocols import Inputs

ROWS = 128  # tokens at once
LEAST_SAVING = 1e-3  # bits


@dataclass(frozen=True)
class Selector:
    """The receiver's matrices, and what the error of a token costs.

    `step`: the residual coder's, None where there is none; `prices` [C]: bits of each component that is on.
    """

    network: Network
    matrices: dict[str, Any]
    others: dict[str, Any]
    root: np.ndarray
    step: float | None
    prices: np.ndarray

    def choose(self, inputs: Inputs, outputs: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """The components of every scored token, bool [n, C]; each token by itself (`mdl.task`: no sequences).

        **Arguments:** `outputs` [n, d]: what is to be reproduced; `start` [n, C]: where the way down begins, by default
        with all components on.
        """
        values = inputs.scored_values()
        begin = np.ones((len(values), len(self.prices)), bool) if start is None else start
        chosen = []
        for first in range(0, len(values), ROWS):
            rows = slice(first, first + ROWS)
            size = len(values[rows])
            padded = [np.concatenate([a[rows], np.repeat(a[:1], ROWS - size, 0)]) for a in (values, outputs, begin)]
            chosen.append(self._chosen(*(jnp.asarray(a) for a in padded))[:size])
        return np.concatenate(chosen)

    def _chosen(self, values: Any, outputs: Any, begin: Any) -> np.ndarray:
        root = jnp.asarray(self.root / (self.step or 1.0), jnp.float32)
        costs = (self.matrices, self.others, root, jnp.asarray(self.prices, jnp.float32))
        walk = partial(_walk, self.network, costs, values, outputs, jnp.asarray(self.step is None))
        up = walk(jnp.asarray([True, False]), jnp.zeros_like(begin))
        down = walk(jnp.asarray([False, True]), begin)
        return np.asarray(jnp.where((down[1] < up[1])[:, None], down[0], up[0]))


@partial(jax.jit, static_argnums=0)
def _walk(
    network: Network, costs: Any, values: Any, outputs: Any, as_kl: Any, directions: Any, mask: Any
) -> tuple[Any, Any]:
    """For each token switch the component that saves most in one direction, while any saves, then in the other.

    **Returns:** masks [n, C], and bits [n].
    """
    matrices, others, root, prices = costs
    tokens, every = jnp.zeros((len(values), 1), jnp.int32), jnp.eye(len(prices), dtype=bool)

    def bits(chosen: Any) -> Any:
        out, _ = run_masked(network, matrices, others, chosen[:, None].astype(jnp.float32), values[:, None], tokens)
        squares = jnp.square((out[:, 0] - outputs) @ root.T)
        left = jnp.where(as_kl, squares / (2.0 * jnp.log(2.0)), 0.5 * jnp.log2(1.0 + squares))
        return (chosen * prices).sum(1) + left.sum(-1)

    def step(on: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        chosen, now, _ = state
        flipped = jax.lax.map(lambda flip: bits(chosen ^ flip), every).T
        allowed = jnp.where(chosen == on, jnp.inf, flipped)
        which, best = jnp.argmin(allowed, 1), allowed.min(1)
        saves = best < now - LEAST_SAVING
        return chosen ^ (every[which] & saves[:, None]), jnp.where(saves, best, now), saves.any()

    def direction(state: tuple[Any, Any], on: Any) -> tuple[tuple[Any, Any], None]:
        found = jax.lax.while_loop(lambda s: s[2], partial(step, on), (*state, jnp.asarray(True)))
        return found[:2], None

    return jax.lax.scan(direction, (mask, bits(mask)), directions)[0]
