r"""Scores of all edges of a model: by how much a metric of the logits grows when an edge is ablated.

Write e = o - a for what a source s writes in the plain run less what stands in for it, and g_d for the derivative of
the metric with respect to what destination d reads. Then

| name | score of s -> d | runs |
| --- | --- | --- |
| exact | metric without the edge - metric | one an edge |
| EAP (Syed et al. 2023) | -e_s . g_d in the plain run | 2 |
| clean-corrupted (Hanna et al. 2024) | the mean of that and of g_d on the corrupted input | 3 |
| EAP-IG on inputs (Hanna et al. 2024) | -e_s . mean of g_d over inputs on the line from corrupted to plain | m + 1 |
| EAP-IG on activations | minus the mean of d metric / d m_sd at masks of alpha everywhere, alpha from 0 to 1 | m |

The sign is that of a loss: a high score says that the edge is needed. (The published code of EAP-IG ranks by absolute
values.) "Corrupted" is what stands in for `input`: another sequence's embedding, the mean embedding, or zero. The last
one interpolates all edges at once along the mask, so that its scores add up to the metric with nothing kept less the
metric with everything (the published code instead interpolates the outputs of one layer at a time, and averages).

The KL to the plain model has a derivative of zero in the plain run, so that EAP says nothing of it and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mdl.errors import ModelError
from mdl.models.circuits.masked import MaskedModel, Written, masked_run, write
from mdl.models.circuits.metrics import Metric
from mdl.models.circuits.outputs import neuron_rows

FLAT = 1e-3  # a metric is flat where its derivative is this much smaller than on the corrupted input

Scores = Float[np.ndarray, "s d"]


def exact(
    model: MaskedModel, metric: Metric, chunk: int = 1, progress: Callable[[int, int], None] | None = None
) -> Scores:
    """Exact edge patching: the metric without each edge, less the metric; 0 where there is no edge.

    Runs start at the layer that the edge leads to, `chunk` side by side. **Arguments:** `metric`: of logits [B, K, V]
    and the plain run's; a function that is the same object each time; `progress`: is told edges done and all edges.
    """
    ones = jnp.asarray(model.graph.possible, jnp.float32)
    plain, written = _plain(model, ones)
    scores = np.zeros(ones.shape)
    edges, done = np.argwhere(model.graph.possible), 0
    base = float(metric(plain, plain))
    for layer in range(model.graph.n_layers + 1):
        last = model.graph.inputs(layer, mlp=model.graph.mlps).stop if layer < model.graph.n_layers else ones.shape[1]
        here = edges[(edges[:, 1] >= model.graph.inputs(layer).start) & (edges[:, 1] < last)]
        without = _without_each(model, ones, written, jnp.asarray(here), plain, metric, layer, chunk)
        scores[here[:, 0], here[:, 1]] = np.asarray(without, np.float64) - base
        done += len(here)
        if progress is not None:
            progress(done, len(edges))
    return scores


@jax.jit
def _plain(model: MaskedModel, ones: Array) -> tuple[Array, Written]:
    return masked_run(model, ones), write(model, ones)


@partial(jax.jit, static_argnames=("metric", "layer", "chunk"))
def _without_each(
    model: MaskedModel,
    ones: Array,
    written: Written,
    edges: Array,
    plain: Array,
    metric: Metric,
    layer: int,
    chunk: int,
) -> Array:
    def one(edge: Array) -> Array:
        mask = ones.at[edge[0], edge[1]].set(0.0)
        return metric(masked_run(model, mask, layer=layer, written=written), plain)

    return jax.lax.map(one, edges, batch_size=None if chunk == 1 else chunk)


def eap(model: MaskedModel, metric: Metric) -> Scores:
    """Edge attribution patching.

    **Raises:** `ModelError` for a metric that is flat in the plain run, as the KL to it is.

    **Source:** Syed, Rager and Conmy 2023, arXiv:2310.10348.
    """
    _refuse_flat(model, metric)
    return _from_gradients(model, metric, (1.0,))


def clean_corrupted(model: MaskedModel, metric: Metric) -> Scores:
    """The mean of EAP with derivatives on the plain and on the corrupted input. **Source:** Hanna et al. 2024."""
    return _from_gradients(model, metric, (0.0, 1.0))


def eap_ig_inputs(model: MaskedModel, metric: Metric, steps: int = 5) -> Scores:
    """EAP-IG on inputs: derivatives at embeddings corrupted + k/m (plain - corrupted), k = 0 to m - 1.

    With one step the derivatives are those on the corrupted input alone.

    **Source:** Hanna, Pezzelle and Belinkov 2024, arXiv:2403.17806; the points are those of its published code.
    """
    _check_steps(steps)
    return _from_gradients(model, metric, tuple(k / steps for k in range(steps)))


def eap_ig_activations(model: MaskedModel, metric: Metric, steps: int = 5) -> Scores:
    """EAP-IG on activations: derivatives with respect to the mask at masks of (k + 1/2)/m everywhere, k = 0 to m - 1.

    The scores add up to metric(nothing kept) - metric(everything kept), up to the quadrature's error.

    **Source:** Marks et al. 2024, arXiv:2403.19647 (over activations); Mueller et al. 2025 (MIB).
    """
    _check_steps(steps)
    ones = jnp.asarray(model.graph.possible, jnp.float32)
    plain, _ = _plain(model, ones)
    points = ((k + 0.5) / steps for k in range(steps))
    total = sum(np.asarray(_mask_gradient(model, a * ones, plain, metric), np.float64) for a in points)
    return np.asarray(-total / steps)


@partial(jax.jit, static_argnames="metric")
def _mask_gradient(model: MaskedModel, mask: Array, plain: Array, metric: Metric) -> Array:
    return jax.grad(lambda m: metric(masked_run(model, m), plain))(mask)


def _from_gradients(model: MaskedModel, metric: Metric, points: Sequence[float]) -> Scores:
    """-e_s . g_d with g_d averaged over runs on inputs between corrupted (0) and plain (1)."""
    ones = jnp.asarray(model.graph.possible, jnp.float32)
    plain, written = _plain(model, ones)
    total = sum(_products(model, ones, written, plain, jnp.asarray(a, jnp.float32), metric) for a in points)
    return np.asarray(-np.asarray(total, np.float64) / len(points) * model.graph.possible)


@partial(jax.jit, static_argnames="metric")
def _products(model: MaskedModel, ones: Array, written: Written, plain: Array, point: Array, metric: Metric) -> Array:
    """e_s . g_d for all pairs, [S, D]."""
    batch, positions, width = model.embedded.shape
    between = replace(model, embedded=_between(model, point))
    zeros = jnp.zeros((ones.shape[1], batch, positions, width))
    gradients = jax.grad(lambda nudges: metric(masked_run(between, ones, nudges=nudges), plain))(zeros)
    with jax.default_matmul_precision("float32"):
        rows = []
        for i, delta in enumerate(written.deltas):
            if delta.ndim == 3:
                directions = neuron_rows(model.config, model.params["blocks"][i // 2 - 1])
                along = jnp.einsum("dbtc,nc->ndbt", gradients, directions)
                rows.append(jnp.einsum("nbt,ndbt->nd", delta, along))
            else:
                rows.append(jnp.einsum("sbtc,dbtc->sd", delta, gradients))
        return jnp.concatenate(rows)


def _between(model: MaskedModel, point: Array) -> Array:
    """Embeddings between what stands in for `input` (0) and the plain ones (1)."""
    corrupted = model.ablated[0][0]
    return corrupted + point * (model.embedded - corrupted)


def _refuse_flat(model: MaskedModel, metric: Metric) -> None:
    ones = jnp.asarray(model.graph.possible, jnp.float32)
    plain, _ = _plain(model, ones)
    corrupted, _ = _plain(replace(model, embedded=_between(model, jnp.zeros(()))), ones)
    here, there = (float(jnp.abs(jax.grad(metric)(x, plain)).sum()) for x in (plain, corrupted))
    if here <= FLAT * there:
        raise ModelError(
            f"the metric is flat in the plain run (its derivative with respect to the logits is {here:.2g} in all, "
            f"{there:.2g} on the corrupted input), as a KL to the plain run is, and EAP would rank edges by rounding "
            "errors. Take eap_ig_inputs (with one step: the derivative on the corrupted input) or eap_ig_activations."
        )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ModelError(f"{steps} steps of integrated gradients: it takes one or more")
