"""Ways to find circuits: nested sets of edges, from nothing to everything, on the fit data.

| search | which edges (or nodes) go first |
| --- | --- |
| eap-ig | those of the least integrated gradient with respect to the mask (EAP-IG on activations) |
| exact | those whose removal alone changes least (edge patching) |
| greedy | the one (of many: the tenth) whose removal from what is left changes least, again and again |

Of nodes, change is counted per number of their weights: what a node is worth against what it costs. Which of the nested
circuits is sent is not decided here: the settings' N says how many bits a change is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decompositions.circuits.decoder import embedded
from decompositions.circuits.kept import circuit_config
from mdl.models.circuits.attribution import eap_ig_activations, exact
from mdl.models.circuits.graph import INPUT, Graph
from mdl.models.circuits.masked import MaskedModel, masked_model, masked_run, masked_runs
from mdl.models.circuits.metrics import mean_kl
from mdl.models.circuits.outputs import source_outputs
from mdl.models.networks import TransformerRegion
from mdl.models.sites import LOGITS
from mdl.protocols import Settings
from mdl.task import Task
from mdl.units import nats_to_bits

SEQUENCES = 8  # of the fit data, on which circuits are searched; more where few of their positions are asked for
MOST_SEQUENCES = 64
POSITIONS = 64  # of each, at which change is measured; fewer where sequences have fewer
CIRCUITS = 40  # on a path, about
EXACT_UNITS = 64  # up to which greedy search tries every removal
SHARE = 0.1  # of the units that go at once, where there are more
POINTS = (0.125, 0.375, 0.625, 0.875)  # of the path from nothing to what is left, for gradients


def mean_square(found: Any, reference: Any) -> Any:
    """Of a residual stream's change, over that of the stream about its mean."""
    spread = jnp.square(reference - reference.mean((0, 1))).mean()
    return jnp.square(found - reference).mean() / spread


@dataclass(frozen=True, eq=False)
class Searched:
    """The region's own network on some of the fit data, with what stands in for dropped sources.

    **Arguments:** `model`: ready for masks, at some scored positions; `means` [S, d]: of the sources' outputs (zeros
    under zero ablation); `stream` [layers + 1]: mean squares of the residual stream; `metric`: of what comes out;
    `share`: of the scored tokens, those at which it is asked for.
    """

    network: TransformerRegion
    graph: Graph
    ablation: str
    model: MaskedModel
    means: np.ndarray
    stream: np.ndarray
    metric: Callable[[Any, Any], Any]
    share: float = 1.0

    @classmethod
    def of(
        cls, task: Task, network: TransformerRegion, weights: Mapping[str, np.ndarray], graph: Graph, ablation: str
    ) -> Searched:
        """From the first sequences of the fit data."""
        inputs, asked, config = task.fit.inputs, task.fit_activations.asked, circuit_config(network)
        counts = asked.sum(1)
        some = np.flatnonzero(counts)
        wanted = SEQUENCES * POSITIONS / np.median(np.minimum(counts[some], POSITIONS))
        chosen = some[: min(round(wanted), MOST_SEQUENCES)]
        places = _places(asked[chosen])
        values = None if inputs.values is None else jnp.asarray(inputs.values[chosen])
        params, tokens = embedded(network, config, dict(weights), values, jnp.asarray(inputs.tokens[chosen]))
        outputs = np.asarray(source_outputs(config, params, tokens, graph), np.float64)  # [B, S, T, d]
        means = outputs.mean((0, 2)) if ablation == "mean" else np.zeros((outputs.shape[1], config.d_model))
        ablated = jnp.asarray(means, jnp.float32)
        model = masked_model(config, params, tokens, ablated, graph, places)
        metric = mean_kl if network.output == LOGITS else mean_square
        share = float(asked.sum() / inputs.scored.sum())
        return cls(network, graph, ablation, model, means, _squares(graph, outputs), metric, share)

    def constants(self, edges: np.ndarray) -> np.ndarray:
        """What each destination reads in the place of its dropped sources, [D, d]."""
        return np.asarray((self.graph.possible & ~edges).T.astype(np.float64) @ self.means)

    def changes(self, masks: np.ndarray) -> np.ndarray:
        """The metric under each of some masks, [M]."""
        found = masked_runs(self.model, jnp.asarray(masks, jnp.float32), self.metric, (self.plain(),), 1, True)
        return np.asarray(found, np.float64)

    def plain(self) -> Any:
        """What the region itself puts out at the scored positions."""
        return masked_run(self.model, jnp.asarray(self.graph.possible, jnp.float32))

    def sizes(self) -> np.ndarray:
        """How many numbers each source's node takes, [S]: its own weights and those that it reads by."""
        config, graph = self.network.config, self.graph
        head = config.d_model * config.d_head * 2 * (1 + graph.key_value_heads / graph.n_heads)
        mlp = config.d_model * config.d_mlp * (3 if config.gated_mlp else 2)
        return np.array([1.0 if s == INPUT else head if s.startswith("a") else mlp for s in graph.sources])


def _places(asked: np.ndarray) -> np.ndarray:
    """Positions of each sequence, as many of each, [B, K]: spread over those that are asked for, some of them several
    times where a sequence has fewer than others, so that every sequence counts alike."""
    count = min(POSITIONS, int(asked.sum(1).max()))
    rows = [np.flatnonzero(row) for row in asked]
    return np.stack([row[np.linspace(0, len(row) - 1, count).round().astype(int)] for row in rows])


def _squares(graph: Graph, outputs: np.ndarray) -> np.ndarray:
    """Mean squares of the stream before each layer and at the end, [layers + 1]."""
    layer_of = np.array([-1 if s == INPUT else int(s[1:].partition(".")[0]) for s in graph.sources])
    streams = (outputs[:, layer_of < layer].sum(1) for layer in range(graph.n_layers + 1))
    return np.array([float(np.mean(np.square(s))) for s in streams])


@dataclass(frozen=True, eq=False)
class Path:
    """Nested circuits, bool [sources, destinations] each."""

    circuits: tuple[np.ndarray, ...]
    known: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def fixed(cls, edges: np.ndarray) -> Path:
        """One circuit, and nothing to choose."""
        return cls((np.asarray(edges, bool),))

    @classmethod
    def by(cls, graph: Graph, units: list[np.ndarray], nodes: bool) -> Path:
        """Circuits of the first units of an order, most important first; `units`: tables of edges, or of sources."""
        counts = sorted({round(len(units) * f) for f in np.linspace(0, 1, CIRCUITS)} | {len(units)})
        found: list[np.ndarray] = []
        for count in counts:
            together = np.logical_or.reduce([np.zeros_like(units[0]), *units[:count]])
            edges = graph.pruned(graph.induced(together) if nodes else together, constant=True)
            if not found or (edges != found[-1]).any():
                found.append(edges)
        return cls(tuple(found))

    def damage(self, searched: Searched, settings: Settings) -> list[float]:
        r"""Of each circuit, bits a token: KL, or about what a residual coder of the settings would take,

        $$\sum_i \tfrac12 \log_2 (1 + 12 u_i^2 / \Delta^2)$$ over the errors u in the metric: for large ones the length of a
        uniform quantiser's code, for small ones what the distortion that they leave costs at that coder's exchange rate.
        """
        if len(self.circuits) == 1:
            return [0.0]
        errors = self._errors(searched)
        if searched.network.output == LOGITS:
            return [searched.share * nats_to_bits(float(kl)) for kl in errors]
        squares = np.square(errors @ settings.root.T.astype(np.float32))
        coded = 0.5 * np.log2(1.0 + 12.0 * squares / settings.step**2)
        bits = coded if settings.corrected else nats_to_bits(squares / 2.0)
        return [float(b) for b in bits.sum(-1).mean((1, 2), dtype=np.float64)]

    def _errors(self, searched: Searched) -> np.ndarray:
        """KL of each circuit, nats a token [M], or the errors of the stream [M, B, K, d]: no setting changes them."""
        if "errors" not in self.known:
            masks = jnp.asarray(np.stack(self.circuits), jnp.float32)
            chosen = mean_kl if searched.network.output == LOGITS else jnp.subtract
            self.known["errors"] = np.asarray(masked_runs(searched.model, masks, chosen, (searched.plain(),), 1, True))
        return self.known["errors"]


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
    units = _units(graph, nodes)
    left, gone = list(range(len(units))), []
    sizes = searched.sizes()[1:] if nodes else np.ones(len(units))
    always = np.eye(len(graph.sources), dtype=bool)[0] if nodes else np.zeros_like(graph.possible)
    while left:
        now = np.logical_or.reduce([always, *(units[i] for i in left)])
        if len(left) <= EXACT_UNITS:
            masks = np.stack([_edges(graph, now & ~units[i], nodes) for i in left])
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
    graph, units = searched.graph, _units(searched.graph, nodes)
    worth = np.array([abs(_along(scores, unit, nodes)) for unit in units])
    worth = worth / searched.sizes()[1:] if nodes else worth
    order = [units[i] for i in np.argsort(-worth, kind="stable")]
    first = np.eye(len(graph.sources), dtype=bool)[0]
    return Path.by(graph, [first, *order] if nodes else order, nodes)


def ranked(searched: Searched, scores: np.ndarray) -> Path:
    """Edges by the size of given scores (NaN: no such edge)."""
    return _ranked(searched, np.nan_to_num(scores), nodes=False)


def _units(graph: Graph, nodes: bool) -> list[np.ndarray]:
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


def _edges(graph: Graph, units: np.ndarray, nodes: bool) -> np.ndarray:
    return graph.induced(units) if nodes else units


def _gradients(searched: Searched, edges: np.ndarray) -> np.ndarray:
    """The metric's mean derivative with respect to the mask, on the way from nothing to these edges."""
    plain, mask = searched.plain(), jnp.asarray(edges, jnp.float32)
    total = sum(np.asarray(_gradient(searched.model, a * mask, plain, searched.metric), np.float64) for a in POINTS)
    return np.asarray(total / len(POINTS) * edges)


@partial(jax.jit, static_argnames="metric")
def _gradient(model: MaskedModel, mask: Any, plain: Any, metric: Callable[[Any, Any], Any]) -> Any:
    return jax.grad(lambda m: metric(masked_run(model, m), plain))(mask)


SEARCHES: Mapping[str, Callable[[Searched, bool], Path]] = {
    "eap-ig": by_attribution,
    "exact": by_patching,
    "greedy": greedily,
}
