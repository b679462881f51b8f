"""Ways to find circuits by ranking: nested sets of edges, from nothing to everything, on the fit data.

| search | which edges (or nodes) go first |
| --- | --- |
| eap-ig | those of the least integrated gradient with respect to the mask (EAP-IG on activations) |
| exact | those whose removal alone changes least (edge patching) |
| greedy | the one (of many: the tenth) whose removal from what is left changes least, again and again |

Of nodes, change is counted per number of their weights: what a node is worth against what it costs. Which of the nested
circuits is sent is not decided here: the settings' N says how many bits a change is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decompositions.circuits.paths import Path
from decompositions.circuits.searched import Searched
from mdl.models.circuits.attribution import eap_ig_activations, exact
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import MaskedModel, masked_run

EXACT_UNITS = 64  # up to which greedy search tries every removal
SHARE = 0.1  # of the units that go at once, where there are more
POINTS = (0.125, 0.375, 0.625, 0.875)  # of the path from nothing to what is left, for gradients


def by_attribution(searched: Searched, nodes: bool) -> Path:
    """EAP-IG on activations. **Source:** Mueller et al. 2025 (MIB); Marks et al. 2024, arXiv:2403.19647."""
    return _ranked(searched, eap_ig_activations(searched.model, searched.metric), nodes)


def by_patching(searched: Searched, nodes: bool) -> Path:
    """Exact edge patching; of nodes, exact removal."""
    if not nodes:
        return _ranked(searched, exact(searched.model, searched.metric), nodes)
    sources, graph = np.eye(len(searched.graph.sources), dtype=bool)[1:], searched.graph
    changes = searched.changes(np.stack([graph.induced(~one) for one in sources]))
    order = np.argsort(-np.abs(changes) / searched.sizes()[1:], kind="stable")
    first = np.eye(len(graph.sources), dtype=bool)[0]
    return Path.by(graph, [first, *(sources[i] for i in order)], nodes)


def greedily(searched: Searched, nodes: bool) -> Path:
    """Backward elimination by what is left. **Source:** Conmy et al. 2023 (ACDC), arXiv:2304.14997, with the order of
    removal given by the change in place of a threshold on it."""
    graph = searched.graph
    units = units_of(graph, nodes)
    left, gone = list(range(len(units))), []
    sizes = searched.sizes()[1:] if nodes else np.ones(len(units))
    always = np.eye(len(graph.sources), dtype=bool)[0] if nodes else np.zeros_like(graph.possible)
    while left:
        now = np.logical_or.reduce([always, *(units[i] for i in left)])
        if len(left) <= EXACT_UNITS:
            masks = np.stack([edges_of(graph, now & ~units[i], nodes) for i in left])
            changes, count = searched.changes(masks), 1
        else:
            gradient = _gradients(searched, graph.induced(now) if nodes else now)
            changes = np.array([abs(_along(gradient, units[i], nodes)) for i in left])
            count = max(1, int(SHARE * len(left)))
        for place in np.argsort(changes / sizes[left], kind="stable")[:count]:
            gone.append(left[int(place)])
        left = [i for i in left if i not in set(gone)]
    order = [units[i] for i in reversed(gone)]
    return Path.by(graph, [always, *order] if nodes else order, nodes)


def _ranked(searched: Searched, scores: np.ndarray, nodes: bool) -> Path:
    graph, units = searched.graph, units_of(searched.graph, nodes)
    worth = np.array([abs(_along(scores, unit, nodes)) for unit in units])
    worth = worth / searched.sizes()[1:] if nodes else worth
    order = [units[i] for i in np.argsort(-worth, kind="stable")]
    first = np.eye(len(graph.sources), dtype=bool)[0]
    return Path.by(graph, [first, *order] if nodes else order, nodes)


def ranked(searched: Searched, scores: np.ndarray) -> Path:
    """Edges by the size of given scores (NaN: no such edge)."""
    return _ranked(searched, np.nan_to_num(scores), nodes=False)


def units_of(graph: Graph, nodes: bool) -> list[np.ndarray]:
    """Single nodes but the input, as tables of sources; or single edges."""
    if nodes:
        return list(np.eye(len(graph.sources), dtype=bool)[1:])
    found = []
    for source, destination in np.argwhere(graph.possible):
        one = np.zeros_like(graph.possible)
        one[source, destination] = True
        found.append(one)
    return found


def _along(scores: np.ndarray, unit: np.ndarray, nodes: bool) -> float:
    return float(scores[unit].sum())


def edges_of(graph: Graph, units: np.ndarray, nodes: bool) -> np.ndarray:
    return graph.induced(units) if nodes else units


def _gradients(searched: Searched, edges: np.ndarray) -> np.ndarray:
    """The metric's mean derivative with respect to the mask, on the way from nothing to these edges."""
    plain, mask = searched.plain, jnp.asarray(edges, jnp.float32)
    total = sum(np.asarray(_gradient(searched.model, a * mask, plain, searched.metric), np.float64) for a in POINTS)
    return np.asarray(total / len(POINTS) * edges)


@partial(jax.jit, static_argnames="metric")
def _gradient(model: MaskedModel, mask: Any, plain: Any, metric: Callable[[Any, Any], Any]) -> Any:
    return jax.grad(lambda m: metric(masked_run(model, m), plain))(mask)
