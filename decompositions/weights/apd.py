r"""Attribution-based parameter decomposition, in its top-k form, for toy models.

    P_c,l = sum_m V_clm U_clm^T of any rank, c spanning all matrices l
    A_c(x) = sqrt(mean_o (sum_l <d f_o / d W_l, P_c,l>)^2)        one backward pass an output
    L = faithfulness |W - sum P|^2 + b |f_W(x) - f_{sum s_c P_c}(x)|^2 + a sum_c s_c sum_l,m (|V|^2 |U|^2)^(p/2)

s: the batch's top k * batch attributions of all components and inputs; constant in the derivative. Everything that is
no matrix (biases) is always on. Source: Braun et al. 2025 (APD, arXiv:2501.14926), sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from decompositions.weights.batches import Batches
from decompositions.weights.factors import Factors, TensorFactors
from mdl.errors import ExplanationError
from mdl.models.networks import Network
from mdl.models.operators import Masked, Weight, products

NORM_FLOOR = 1e-12  # under the Schatten norm's power: its derivative at 0 is finite
APD_LOSSES = ("total", "faithfulness", "reconstruction", "minimality")

APDParameters = Mapping[str, tuple[Array, Array]]  # of each matrix V [C, m, d_in] and U [C, m, d_out]


@dataclass(frozen=True)
class APDSettings:
    """What is decomposed and how; hashable.

    **Arguments:** `matrices`; `components`: C; `steps`, `rate`: of Adam, warmed up over 5 % and cosine down to 0;
    `top_k`: mean number of active components an input; `reconstruction`, `minimality`: b and a; `power`: p of the
    Schatten norm; `chunk`: steps between two reports.
    """

    matrices: tuple[str, ...]
    components: int
    steps: int
    rate: float = 1e-3
    top_k: float = 1.0
    faithfulness: float = 1.0
    reconstruction: float = 1.0
    minimality: float = 1.0
    power: float = 0.9
    chunk: int = 100

    def check(self, network: Network) -> None:
        """**Raises:** `ExplanationError` for a matrix that the network lacks, C < 1, or a k that is not in (0, C]."""
        if missing := [name for name in self.matrices if name not in network.matrices]:
            known = ", ".join(network.matrices) or "none"
            raise ExplanationError(f"no matrix {missing[0]!r} to decompose; the network's matrices are {known}")
        if not self.matrices or self.components < 1 or self.steps < 1 or self.chunk < 1:
            raise ExplanationError(
                f"{len(self.matrices)} matrices, {self.components} components, {self.steps} steps, chunks of "
                f"{self.chunk}: each has to be at least 1"
            )
        if not 0 < self.top_k <= self.components:
            raise ExplanationError(f"top k {self.top_k} of {self.components} components: it has to be in (0, C]")


@dataclass(frozen=True)
class APDResult:
    """A trained decomposition.

    `factors`: components whose ids span the matrices; `frequency` [C]: how often each is in the top k over 16 batches;
    `history`: means of every loss over each chunk, and "step".
    """

    factors: Factors
    frequency: np.ndarray
    history: Mapping[str, np.ndarray]


def start(settings: APDSettings, network: Network, seed: int) -> dict[str, tuple[Array, Array]]:
    """Full rank factors, N(0, 1) / sqrt(d_in m) each side, so that components begin small against the weights."""
    key, found = jax.random.key(seed), {}
    for number, name in enumerate(settings.matrices):
        d_in, d_out = network.matrices[name]
        rank = min(d_in, d_out)
        first, second = jax.random.split(jax.random.fold_in(key, number))
        shape = (settings.components, rank)
        scale = (d_in * rank) ** -0.5
        v = scale * jax.random.normal(first, (*shape, d_in))
        found[name] = (v, scale * jax.random.normal(second, (*shape, d_out)))
    return found


def attributions(parameters: APDParameters, weights: Mapping[str, Weight], batch: tuple, network: Network) -> Array:
    """A_c(x) [n, C]: how much the outputs would change, to first order, without the component.

    Gradients are those of the network's own weights; the positions of a sequence count together.
    """
    names = tuple(parameters)
    shape = jax.eval_shape(lambda w: network.run(w, *batch), weights).shape

    def of_output(cotangent: Array) -> Array:
        found = products(lambda w: network.run(w, *batch), weights, names, jnp.broadcast_to(cotangent, shape))
        total = jnp.zeros((shape[0], next(iter(parameters.values()))[0].shape[0]))
        for name, (v, u) in parameters.items():
            for use in found[name]:
                into, out = (u, v) if use.transposed else (v, u)
                total += jnp.einsum("ntcm,ntcm->nc", _onto(use.inputs, into), _onto(use.gradients, out))
        return total

    per_output = jax.lax.map(of_output, jnp.eye(shape[-1]))
    return jnp.sqrt(jnp.mean(per_output**2, 0))


def _onto(x: Array, factor: Array) -> Array:
    return jnp.einsum("nti,cmi->ntcm", x, factor)


def batch_top_k(scores: Array, k: float) -> Array:
    """1 for the k * n largest of all scores [n, C], else 0; never for a score of 0."""
    kept = max(round(k * scores.shape[0]), 1)
    least = jax.lax.top_k(scores.reshape(-1), min(kept, scores.size))[0][-1]
    return ((scores >= least) & (scores > 0)).astype(scores.dtype)


def _replaced(parameters: APDParameters, weights: Mapping[str, Weight], on: Array) -> dict[str, Weight]:
    """The weights with each matrix the sum of its active components [n, C], for each input."""
    found: dict[str, Weight] = dict(weights)
    for name, (v, u) in parameters.items():
        mask = jnp.repeat(on, v.shape[1], axis=1)[:, None]
        found[name] = Masked(v.reshape(-1, v.shape[-1]), u.reshape(-1, u.shape[-1]), mask)
    return found


def minimality(parameters: APDParameters, on: Array, power: float) -> Array:
    """Mean over inputs of sum over active components of (|V|^2 |U|^2)^(p/2), over matrices and rank-one terms."""
    size = jnp.zeros(on.shape[-1])
    for v, u in parameters.values():
        size += jnp.sum((jnp.sum(v**2, -1) * jnp.sum(u**2, -1) + NORM_FLOOR) ** (power / 2), -1)
    return jnp.mean(on @ size)


def apd_losses(
    parameters: APDParameters, weights: Mapping[str, Any], batch: tuple, network: Network, settings: APDSettings
) -> tuple[Array, dict[str, Array]]:
    """The total and its terms by the names in `APD_LOSSES`; errors are means over entries of matrices and outputs."""
    scores = attributions(jax.lax.stop_gradient(parameters), weights, batch, network)
    on = batch_top_k(scores, settings.top_k)
    outputs = network.run(_replaced(parameters, weights, on), *batch)
    left = [weights[n] - jnp.einsum("cmi,cmo->io", v, u) for n, (v, u) in parameters.items()]
    terms = {
        "faithfulness": sum((jnp.sum(d**2) for d in left), jnp.zeros(())) / sum(d.size for d in left),
        "reconstruction": jnp.mean((outputs - network.run(weights, *batch)) ** 2),
        "minimality": minimality(parameters, on, settings.power),
    }
    terms["total"] = sum((getattr(settings, name) * term for name, term in terms.items()), jnp.zeros(()))
    return terms["total"], terms


def _optimiser(settings: APDSettings) -> optax.GradientTransformation:
    warm = max(settings.steps // 20, 1)
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, settings.rate, warm, max(settings.steps, warm + 1)))


@partial(jax.jit, static_argnames=("network", "settings", "length"))
def _advance(
    state: tuple,
    weights: Mapping[str, Array],
    batches: Any,
    key: Array,
    network: Network,
    settings: APDSettings,
    length: int,
) -> tuple[tuple, dict[str, Array]]:
    optimiser = _optimiser(settings)

    def step(state: tuple, _: None) -> tuple[tuple, dict[str, Array]]:
        parameters, inner, number = state
        batch = batches.draw(jax.random.fold_in(key, number))
        gradient, terms = jax.grad(apd_losses, has_aux=True)(parameters, weights, batch, network, settings)
        updates, inner = optimiser.update(gradient, inner, parameters)
        return (optax.apply_updates(parameters, updates), inner, number + 1), terms

    state, terms = jax.lax.scan(step, state, length=length)
    return state, {name: jnp.mean(term) for name, term in terms.items()}


@partial(jax.jit, static_argnames=("network", "top_k"))
def _frequency(
    parameters: APDParameters, weights: Mapping[str, Array], batches: Any, key: Array, network: Network, top_k: float
) -> Array:
    return jnp.mean(batch_top_k(attributions(parameters, weights, batches.draw(key), network), top_k), 0)


def train_apd(
    network: Network,
    weights: Mapping[str, Any],
    batches: Batches,
    settings: APDSettings,
    *,
    seed: int,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> APDResult:
    """Decompose a network's matrices into components that span them.

    **Arguments:** `weights`: all weights of the network; `batches`: its inputs; `progress`: called with the steps done
    and the last chunk's losses. **Raises:** `ExplanationError` for settings that do not fit the network, before any
    work, and for a loss that is not finite.
    """
    settings.check(network)
    own = {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
    key = jax.random.key(seed)
    parameters = start(settings, network, seed)
    state = (parameters, _optimiser(settings).init(parameters), jnp.zeros((), jnp.int32))
    history = []
    while (done := int(state[2])) < settings.steps:
        length = min(settings.chunk, settings.steps - done)
        state, terms = _advance(state, own, batches, key, network, settings, length)
        row = {name: float(terms[name]) for name in APD_LOSSES}
        if not np.isfinite(list(row.values())).all():
            raise ExplanationError(
                f"training stopped: losses {row} are not finite by step {done + length} of {settings.steps}. The "
                f"likely cause is the learning rate, {settings.rate}: take a smaller one."
            )
        history.append([done + length, *row.values()])
        if progress is not None:
            progress(done + length, row)
    return _result(state[0], own, batches, network, settings, seed, np.array(history))


def _result(
    parameters: APDParameters,
    weights: Mapping[str, Array],
    batches: Batches,
    network: Network,
    settings: APDSettings,
    seed: int,
    history: np.ndarray,
) -> APDResult:
    """Components that some input of 16 batches has in its top k, numbered anew; ids span the matrices."""
    keys = [jax.random.fold_in(jax.random.key(seed), settings.steps + n) for n in range(16)]
    counted = [_frequency(parameters, weights, batches, key, network, settings.top_k) for key in keys]
    frequency = np.mean([np.asarray(c) for c in counted], 0)
    kept = np.flatnonzero(frequency > 0)
    tensors = {}
    for name, (v, u) in parameters.items():
        rank = v.shape[1]
        inputs, outputs = (np.asarray(a, np.float32)[kept].reshape(len(kept) * rank, -1) for a in (v, u))
        tensors[name] = TensorFactors(inputs, outputs, np.repeat(np.arange(len(kept)), rank))
    notes = (f"APD of {settings.steps} steps, seed {seed}: {len(kept)} of {settings.components} components in use",)
    columns = {"step": history[:, 0]} | {name: history[:, 1 + i] for i, name in enumerate(APD_LOSSES)}
    return APDResult(Factors(tensors, "apd", notes), frequency, columns)
