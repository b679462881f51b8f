"""What a change of the logits is measured by: functions of logits and of the plain model's logits."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

Metric = Callable[[Array, Array], Array]


def kl_divergence(logits: Float[Array, "*b v"], reference: Float[Array, "*b v"]) -> Float[Array, "*b"]:
    r"""$KL(p \| q) = \sum_v p_v (\log p_v - \log q_v)$ in nats, p from `reference` and q from `logits`."""
    p, q = jax.nn.log_softmax(reference, -1), jax.nn.log_softmax(logits, -1)
    return (jax.numpy.exp(p) * (p - q)).sum(-1)


def mean_kl(logits: Float[Array, "*b v"], reference: Float[Array, "*b v"]) -> Float[Array, ""]:
    """The mean of `kl_divergence` over sequences and positions, nats a position."""
    return kl_divergence(logits, reference).mean()
