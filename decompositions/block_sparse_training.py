"""Training of block-sparse features in JAX: groups of atoms that are on and off together.

    z_g = E_g (x - mean),    the `active` groups of largest |z_g| are kept,    reconstruction = mean + sum_g z_g D_g

Loss: mean squared error, and, for groups that have not been on for a while, how well they explain what is left (the
auxiliary loss of Gao et al. 2024, arXiv:2406.04093, for groups). Source of the blocks: arXiv:2606.25234.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

AUXILIARY = 1.0 / 32.0  # weight of the auxiliary loss
PATIENCE = 50  # steps after which a group that was never on counts as dead
WARM_UP = 0.05  # of the steps; the last fifth comes down to zero
NORM_FLOOR = 1e-12


@dataclass(frozen=True)
class Blocks:
    """Encoder and decoder [G, b, d] of centred tokens, and how many groups each token gets."""

    encoder: np.ndarray
    decoder: np.ndarray
    active: int


@dataclass(frozen=True)
class Schedule:
    """How long to train: `steps` of `batch` tokens, at a peak `rate` of Adam."""

    steps: int
    batch: int = 512
    rate: float = 2e-3


def group_norms(codes: Float[Array, "n g b"]) -> Float[Array, "n g"]:
    """Euclidean norm of each group's code, differentiable at zero."""
    return jnp.sqrt(jnp.sum(codes**2, -1) + NORM_FLOOR)


def top_groups(codes: Float[Array, "n g b"], active: int) -> Int[Array, "n l"]:
    """The groups of largest norm of each token."""
    return jax.lax.top_k(group_norms(codes), active)[1]


def _kept(codes: Array, chosen: Array) -> Array:
    mask = jnp.zeros(codes.shape[:2]).at[jnp.arange(len(codes))[:, None], chosen].set(1.0)
    return codes * mask[:, :, None]


def _codes(encoder: Array, x: Array) -> Array:
    return (x @ encoder.reshape(-1, encoder.shape[-1]).T).reshape(len(x), *encoder.shape[:2])


def _decoded(decoder: Array, codes: Array) -> Array:
    return codes.reshape(len(codes), -1) @ decoder.reshape(-1, decoder.shape[-1])


def _unit(decoder: Array) -> Array:
    return decoder / jnp.maximum(jnp.linalg.norm(decoder, axis=-1, keepdims=True), NORM_FLOOR)


def loss(parameters: Any, x: Array, idle: Array, active: int) -> tuple[Array, Array]:
    """Mean squared error with the auxiliary loss, and which groups were on; `idle` [G]: steps since each was."""
    encoder, decoder = parameters
    codes = _codes(encoder, x)
    chosen = top_groups(codes, active)
    left = x - _decoded(decoder, _kept(codes, chosen))
    on = jnp.zeros(len(encoder), bool).at[chosen.ravel()].set(True)
    dead = (idle > PATIENCE) & ~on
    # Dead groups alone compete for what is left.
    sleeping = codes * dead[None, :, None]
    extra = _decoded(decoder, _kept(sleeping, top_groups(sleeping, active)))
    auxiliary = jnp.mean((jax.lax.stop_gradient(left) - extra) ** 2) * jnp.any(dead)
    return jnp.mean(left**2) + AUXILIARY * auxiliary, on


@partial(jax.jit, static_argnames=("active", "optimiser"))
def _step(parameters: Any, state: Any, idle: Array, x: Array, active: int, optimiser: Any) -> tuple[Any, Any, Array]:
    (_, on), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, x, idle, active)
    updates, state = optimiser.update(gradients, state, parameters)
    encoder, decoder = optax.apply_updates(parameters, updates)
    return (encoder, _unit(decoder)), state, jnp.where(on, 0, idle + 1)


def train(points: np.ndarray, groups: int, size: int, active: int, schedule: Schedule, seed: int) -> Blocks:
    """Train on centred tokens [n, d]; the same seed gives the same blocks on the same machine.

    Atoms begin as random tokens, the encoder as the decoder.
    """
    rng = np.random.default_rng(seed)
    scale = np.float32(np.sqrt(np.mean(np.square(points, dtype=np.float64))) + NORM_FLOOR)
    data = (points / scale).astype(np.float32)
    first = data[rng.integers(0, len(data), groups * size)].reshape(groups, size, -1)
    first = first + 0.01 * rng.standard_normal(first.shape).astype(np.float32)
    decoder = _unit(jnp.asarray(first))
    warm = max(int(WARM_UP * schedule.steps), 1)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, schedule.rate, warm),
            optax.linear_schedule(schedule.rate, 0.0, schedule.steps // 5 + 1, max(schedule.steps * 4 // 5 - warm, 0)),
        ],
        [warm],
    )
    optimiser = optax.adam(rate)
    # An encoder that is the decoder sees every atom of a token that overlaps; it starts smaller.
    parameters = (decoder / size, decoder)
    state, idle = optimiser.init(parameters), jnp.zeros(groups, jnp.int32)
    for _ in range(schedule.steps):
        batch = jnp.asarray(data[rng.integers(0, len(data), schedule.batch)])
        parameters, state, idle = _step(parameters, state, idle, batch, active, optimiser)
    encoder, trained = (np.asarray(p, np.float32) for p in parameters)
    return Blocks(encoder, trained, active)


def encode_groups(blocks: Blocks, points: np.ndarray, chunk: int = 1024) -> np.ndarray:
    """The active groups of each centred token, [n, active], ascending."""
    encoder = jnp.asarray(blocks.encoder)
    choose = jax.jit(lambda x: top_groups(_codes(encoder, x), blocks.active))
    found = [np.zeros((0, blocks.active), np.int64)]
    for start in range(0, len(points), chunk):
        some = points[start : start + chunk].astype(np.float32)
        padded = np.pad(some, ((0, chunk - len(some)), (0, 0)))
        found.append(np.asarray(choose(jnp.asarray(padded)))[: len(some)].astype(np.int64))
    return np.sort(np.concatenate(found), 1)
