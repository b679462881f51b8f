r"""Which components a token needs: chosen by the sender, one by one, for the fewest bits.

For a token and a set of components that is on, the bits are about

    J = sum_c b_c [c is on]  +  sum_k 1/2 log2(1 + (u_k / Delta)^2),

b_c being what it takes to say that c is on (its index, and its share of a part that is paid on first use), and u the
error of the outputs in the metric's axes against the residual coder's step Delta. Components are switched on from none
while that saves bits, then off; and off from all, then on; the better of the two is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decompositions.weights.gated import run_masked
from mdl.models.networks import Network
from mdl.protocols import Inputs

ROWS = 512  # tokens at once
MOST_FROM_ALL = 64  # components: with more, only the way from none is taken
MOST_STEPS = 48  # components switched in a row
LEAST_SAVING = 1e-3  # bits


@dataclass(frozen=True)
class Selector:
    """The receiver's matrices, and what the error of a token costs. `prices` [C]: bits of each component that is on."""

    network: Network
    matrices: dict[str, Any]
    others: dict[str, Any]
    root: np.ndarray
    step: float
    prices: np.ndarray

    def choose(self, inputs: Inputs, outputs: np.ndarray) -> np.ndarray:
        """The components of every scored token, bool [n, C]; each token by itself (`mdl.task`: no sequences).

        **Arguments:** `outputs` [n, d]: what is to be reproduced.
        """
        values = inputs.scored_values()
        chosen = []
        for start in range(0, len(values), ROWS):
            rows = slice(start, start + ROWS)
            size = len(values[rows])
            padded = [np.concatenate([a[rows], np.repeat(a[:1], ROWS - size, 0)]) for a in (values, outputs)]
            chosen.append(self._chosen(*(jnp.asarray(a) for a in padded))[:size])
        return np.concatenate(chosen)

    def _chosen(self, values: Any, outputs: Any) -> np.ndarray:
        count = len(self.prices)
        arguments = (self.network, self.matrices, self.others, jnp.asarray(self.root / self.step, jnp.float32))
        prices = jnp.asarray(self.prices, jnp.float32)

        def bits(mask: Any) -> Any:
            return _flips(*arguments, prices, mask, values, outputs)

        best = self._walk(bits, jnp.zeros((ROWS, count), bool), (True, False))
        if count <= MOST_FROM_ALL:
            other = self._walk(bits, jnp.ones((ROWS, count), bool), (False, True))
            best = (np.where((other[1] < best[1])[:, None], other[0], best[0]), np.minimum(other[1], best[1]))
        return np.asarray(best[0])

    def _walk(self, bits: Callable[[Any], Any], mask: Any, directions: tuple[bool, ...]) -> tuple[Any, Any]:
        """Switch the component that saves most, in one direction, then in the other. Returns masks and bits."""
        now = None
        for on in directions:
            for _ in range(MOST_STEPS):
                now, flipped = bits(mask)
                allowed = jnp.where(mask == on, jnp.inf, flipped)
                which = jnp.argmin(allowed, 1)
                saves = jnp.take_along_axis(allowed, which[:, None], 1)[:, 0] < now - LEAST_SAVING
                if not bool(saves.any()):
                    break
                rows = jnp.arange(len(mask))
                mask = mask.at[rows, which].set(jnp.where(saves, on, mask[rows, which]))
        now, _ = bits(mask)
        return np.asarray(mask), np.asarray(now)


@partial(jax.jit, static_argnums=0)
def _flips(
    network: Network, matrices: Any, others: Any, root: Any, prices: Any, mask: Any, values: Any, outputs: Any
) -> tuple[Any, Any]:
    """Bits of each token as it is [n], and with each component flipped [n, C]."""
    tokens = jnp.zeros((len(values), 1), jnp.int32)

    def bits(chosen: Any) -> Any:
        out, _ = run_masked(network, matrices, others, chosen[:, None].astype(jnp.float32), values[:, None], tokens)
        error = out[:, 0] - outputs
        return (chosen * prices).sum(1) + 0.5 * jnp.log2(1.0 + jnp.square(error @ root.T)).sum(-1)

    every = jnp.eye(mask.shape[1], dtype=bool)
    return bits(mask), jax.lax.map(lambda flip: bits(mask ^ flip), every).T
