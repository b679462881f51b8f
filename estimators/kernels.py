"""The compiled evaluation: prefix and reference once, then each explanation's suffix, fused with its KL.

Nothing of the size tokens x vocabulary outlives a chunk: the reference is kept as the final hidden state [tokens, d]
and unembedded again inside the chunk, beside the explained one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mdl.models import AnyModel, Model, TorchModel, Vectors
from mdl.models.transformer import unembed
from mdl.task import Activations, Region
from mdl.units import nats_to_bits

FINAL = "unembed.hook_in"  # behind the final norm, with its scale and bias: what the unembedding multiplies
CHUNK_TOKENS = 512  # logits held at once: CHUNK_TOKENS x vocabulary, for the reference and for the explained model
BATCH_TOKENS = 4096  # tokens per call of the suffix


def kl_nats(reference: Float[Array, "*b v"], explained: Float[Array, "*b v"]) -> Float[Array, "*b"]:
    r"""KL(M || M_E) of rows of logits, nats, accurate in float32 down to rounding.

    $$KL = \sum_v p_v \, (e^{\delta_v} - 1 - \delta_v), \quad \delta = \log q - \log p$$

    which equals $-\sum p \delta$ because both sum to one, but has no negative terms: the first-order error of the two
    normalisers cancels. Below |delta| = 0.1 the bracket is summed as a series, to avoid its own cancellation.
    """
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(explained)
    delta = log_q - log_p
    p = jnp.exp(log_p)
    near = jnp.clip(delta, -0.1, 0.1)
    series = near * near * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near / 120)))
    exact = jnp.exp(log_q) - p - p * delta
    return jnp.sum(jnp.where(jnp.abs(delta) < 0.1, p * series, exact), -1)


def compare_chunked(
    head: Callable[[Array], Array],
    reference: Float[Array, "n d"],
    explained: Float[Array, "n d"],
    targets: Int[Array, " n"],
    chunk: int = CHUNK_TOKENS,
) -> Float[Array, "n 2"]:
    """KL against the reference, and cross-entropy of `targets` under the explained model: nats, a token a row.

    `head` maps hidden states to logits; logits exist for `chunk` tokens at a time.
    """

    def one_chunk(parts: tuple[Array, Array, Array]) -> Array:
        h_p, h_q, target = parts
        logits = head(h_q)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1)[:, 0]
        return jnp.stack([kl_nats(head(h_p), logits), loss], 1)

    n = len(targets)
    pad = -n % chunk
    padded = (
        jnp.pad(reference, ((0, pad), (0, 0))),
        jnp.pad(explained, ((0, pad), (0, 0))),
        jnp.pad(targets, (0, pad)),
    )
    split = jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), padded)
    return jax.lax.map(one_chunk, split).reshape(-1, 2)[:n]


@dataclass(frozen=True)
class Damage:
    """What replacing the region's outputs does to M's predictions, on each scored token.

    `kl_bits` [n]: KL(M || M_E), 0 where M's prediction is not asked for; `loss_bits` [n]: cross-entropy of the data's
    next token under M_E, NaN where a sequence ends, or where it is not asked for.
    """

    kl_bits: np.ndarray
    loss_bits: np.ndarray

    @classmethod
    def of_nats(cls, kl_and_loss: np.ndarray, activations: Activations) -> Damage:
        """From KL and cross-entropy in nats, [sequences, positions, 2], at the scored positions."""
        out = nats_to_bits(kl_and_loss.astype(np.float64))
        out[:, -1, 1] = np.nan
        out[~activations.asked] = (0.0, np.nan)
        return cls(out[..., 0][activations.scored], out[..., 1][activations.scored])


@runtime_checkable
class RegionEvaluator(Protocol):
    """A model cut at a region, ready to be evaluated; `notes` go into every score."""

    @property
    def notes(self) -> tuple[str, ...]: ...

    def reference(self, activations: Activations) -> np.ndarray:
        """What `damage` needs of M itself: computed once, used by every evaluation."""
        ...

    def damage(self, activations: Activations, reference: np.ndarray, values: np.ndarray) -> Damage:
        """Replace the region's outputs by `values` [sequences, positions, d] and compare with M, scored tokens only."""
        ...

    def score_gradients(self, activations: Activations, seed: int) -> np.ndarray:
        """d log p(y) / d output at the scored positions, nats per unit, [n, d]; y is sampled from M itself, where its
        predictions are asked for."""
        ...

    def logits(self, activations: Activations, reference: np.ndarray) -> np.ndarray:
        """Predictions from what `reference` returns (for M_E: of activations with its outputs), float32 [n, v].

        At the scored positions of a few sequences: all of them are held at once.
        """
        ...


def evaluator_for(model: AnyModel, region: Region) -> RegionEvaluator:
    """Compiled JAX kernels; the slower torch path for a module without an adapter; Gaussian or categorical outputs."""
    if isinstance(model, Vectors):
        from estimators.categorical_kernels import CategoricalEvaluator
        from estimators.gaussian_kernels import GaussianEvaluator

        return (CategoricalEvaluator if model.likelihood == "categorical" else GaussianEvaluator)(model, region)
    if isinstance(model, TorchModel):
        from estimators.torch_kernels import TorchEvaluator  # imports torch

        return TorchEvaluator(model, region)
    return Evaluator(model, region)


@dataclass(frozen=True)
class Evaluator:
    """A model cut at a region, compiled once: suffix plus KL, and the score gradients that the Fisher metric needs."""

    model: Model
    region: Region
    notes: tuple[str, ...] = ()

    def _suffix(self, params: Any, value: Array, boundary: Array | None) -> Array:
        if self.region.output == "logits":
            return value
        return self.model.run_suffix(params, self.region.output, value, boundary, [FINAL])[FINAL]

    def _head(self, params: Any, hidden: Array) -> Array:
        return hidden if self.region.output == "logits" else unembed(self.model.config, params, hidden)

    @cached_property
    def _compare(self) -> Callable[..., Array]:
        def compare(params: Any, hidden: Array, reference: Array, targets: Array) -> Array:
            before, after = (a.reshape(-1, a.shape[-1]) for a in (reference, hidden))
            out = compare_chunked(lambda h: self._head(params, h), before, after, targets.reshape(-1))
            return out.reshape(*targets.shape, 2)

        return jax.jit(compare)

    @cached_property
    def _damage(self) -> Callable[..., Array]:
        def damage(params: Any, value: Array, boundary: Array | None, reference: Array, targets: Array) -> Array:
            return self._compare(params, self._suffix(params, value, boundary), reference, targets)

        return jax.jit(damage)

    @cached_property
    def _hidden(self) -> Callable[..., Array]:
        return jax.jit(self._suffix)

    @cached_property
    def _gradient(self) -> Callable[..., Array]:
        def log_likelihood(value: Array, params: Any, boundary: Array | None, key: Array, asked: Array) -> Array:
            logits = self._head(params, self._suffix(params, value, boundary))
            sampled = jax.random.categorical(key, jax.lax.stop_gradient(logits))
            found = jnp.take_along_axis(jax.nn.log_softmax(logits), sampled[..., None], -1)
            return jnp.sum(jnp.where(asked[..., None], found, 0.0))

        return jax.jit(jax.grad(log_likelihood))

    @cached_property
    def _logits(self) -> Callable[..., Array]:
        return jax.jit(lambda params, hidden: self._head(params, hidden).astype(jnp.float32))

    def reference(self, activations: Activations) -> np.ndarray:
        """M's own final hidden states, [sequences, positions, d]: computed once, used by every evaluation."""
        return self.hidden(activations, activations.outputs)

    def hidden(self, activations: Activations, values: np.ndarray) -> np.ndarray:
        """Final hidden states [sequences, positions, d] with the region's outputs replaced by `values`."""
        parts = [
            np.asarray(self._hidden(self.model.params, values[s], activations.boundary_of(s)))
            for s in batches(activations)
        ]
        return np.concatenate(parts)

    def compare(self, activations: Activations, reference: np.ndarray, hidden: np.ndarray) -> Damage:
        """Final hidden states `hidden` [sequences, positions, d] against M's own, scored tokens only."""
        targets = next_tokens(activations.tokens)
        parts = [
            np.asarray(self._compare(self.model.params, hidden[s], reference[s], jnp.asarray(targets[s])))
            for s in batches(activations)
        ]
        return Damage.of_nats(np.concatenate(parts), activations)

    def damage(self, activations: Activations, reference: np.ndarray, values: np.ndarray) -> Damage:
        """Replace the region's outputs by `values` [sequences, positions, d] and compare with M, scored tokens only."""
        targets = next_tokens(activations.tokens)
        parts = [
            np.asarray(
                self._damage(
                    self.model.params, values[s], activations.boundary_of(s), reference[s], jnp.asarray(targets[s])
                )
            )
            for s in batches(activations)
        ]
        return Damage.of_nats(np.concatenate(parts), activations)

    def score_gradients(self, activations: Activations, seed: int) -> np.ndarray:
        """d log p(y) / d output at the scored positions, nats per unit, [n, d]; y is sampled from M itself, where its
        predictions are asked for."""
        keys, asked = jax.random.split(jax.random.key(seed), len(activations.tokens)), activations.asked
        parts = [
            np.asarray(
                self._gradient(
                    jnp.asarray(activations.outputs[s]),
                    self.model.params,
                    activations.boundary_of(s),
                    keys[s.start],
                    jnp.asarray(asked[s]),
                )
            )
            for s in batches(activations)
        ]
        return np.concatenate(parts)[activations.scored]

    def logits(self, activations: Activations, reference: np.ndarray) -> np.ndarray:
        """Predictions from final hidden states [sequences, positions, d], scored tokens only, float32 [n, v]."""
        parts = [
            np.asarray(self._logits(self.model.params, reference[s]))[activations.scored[s]]
            for s in batches(activations, CHUNK_TOKENS)
        ]
        return np.concatenate(parts)


def next_tokens(tokens: np.ndarray) -> np.ndarray:
    """What each position predicts, int32; 0 where a sequence ends."""
    return np.concatenate([tokens[:, 1:], np.zeros_like(tokens[:, :1])], 1).astype(np.int32)


def batches(activations: Activations, tokens: int = BATCH_TOKENS) -> Iterator[slice]:
    """Slices of sequences, of about `tokens` tokens each."""
    sequences, positions = activations.tokens.shape
    size = max(1, min(sequences, tokens // positions))
    while sequences % size:  # equal batches, so that nothing is compiled twice
        size -= 1
    return (slice(start, start + size) for start in range(0, sequences, size))
