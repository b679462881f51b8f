"""ACDC: edges removed one by one, from the logits back, wherever a metric grows by less than a threshold.

Every removal is judged against the circuit that is left, in the order of the published algorithm: destinations from the
last to the first, for each of them its sources from the last to the first. What lies before a destination's layer is
still whole when its edges are tried, so that runs start there.

**Source:** Conmy et al. 2023, arXiv:2304.14997, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mdl.errors import ModelError
from mdl.models.circuits.masked import MaskedModel, Written, masked_run, write
from mdl.models.circuits.metrics import Metric


def acdc(
    model: MaskedModel, metric: Metric, threshold: float, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """The edges that are left, bool [sources, destinations], dead ends included (`Graph.pruned` takes them out).

    **Arguments:** `metric`: a loss, of logits [B, K, V] and the plain run's, which is the same function each time;
    `threshold`: by how much it may grow with each edge, in the metric's own unit (of a KL in nats, b bits of the
    message are worth b ln 2 / N); `progress`: is told edges done and all edges.

    **Raises:** `ModelError` for a threshold that is negative or no number.
    """
    if not threshold >= 0:
        raise ModelError(f"a threshold of {threshold}: ACDC takes 0 or more, in the unit of the metric")
    graph = model.graph
    edges = np.array(graph.possible)
    plain, whole = masked_run(model, jnp.asarray(edges, jnp.float32)), write(model, jnp.asarray(edges, jnp.float32))
    now, done = float(metric(plain, plain)), 0
    for destination in reversed(range(edges.shape[1])):
        layer = _layer(model, destination)
        for source in np.flatnonzero(graph.possible[:, destination])[::-1]:
            edges[source, destination] = False
            without = float(_loss(model, jnp.asarray(edges, jnp.float32), whole, plain, metric, layer))
            if without - now < threshold:
                now = without
            else:
                edges[source, destination] = True
            done += 1
            if progress is not None:
                progress(done, graph.n_edges)
    return edges


def _layer(model: MaskedModel, destination: int) -> int:
    """The layer whose inputs a destination is among; the number of layers for the logits."""
    starts = [model.graph.inputs(layer).start for layer in range(model.graph.n_layers + 1)]
    return int(np.searchsorted(starts, destination, side="right")) - 1


@partial(jax.jit, static_argnames=("metric", "layer"))
def _loss(model: MaskedModel, mask: Array, written: Written, plain: Array, metric: Metric, layer: int) -> Any:
    return metric(masked_run(model, mask, layer=layer, written=written), plain)
