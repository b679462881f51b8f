"""A region's own network on some of the fit data, ready for masks: what all searches for circuits look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decompositions.circuits.decoder import embedded
from decompositions.circuits.kept import Kept, circuit_config
from mdl.models.circuits.ablations import mean, optimal, zero
from mdl.models.circuits.graph import INPUT, Graph
from mdl.models.circuits.masked import MaskedModel, masked_model, masked_run
from mdl.models.circuits.metrics import mean_kl
from mdl.models.circuits.outputs import Outputs, Values, neuron_rows, source_outputs
from mdl.models.config import TransformerConfig
from mdl.models.networks import TransformerRegion
from mdl.models.sites import LOGITS
from mdl.models.transformer import Params
from mdl.task import Task

SEQUENCES = 8  # of the fit data, on which circuits are searched; more where few of their positions are asked for
MOST_SEQUENCES = 64
POSITIONS = 64  # of each, at which change is measured; fewer where sequences have fewer
NUMBER = 3.0  # bits, nominal: what a number of a weight matrix takes at the precisions that pay, give or take one


def mean_square(found: Any, reference: Any) -> Any:
    """Of a residual stream's change, over that of the stream about its mean."""
    spread = jnp.square(reference - reference.mean((0, 1))).mean()
    return jnp.square(found - reference).mean() / spread


@dataclass(frozen=True, eq=False)
class Searched:
    """The region's own network on some of the fit data, with what stands in for dropped sources.

    **Arguments:** `model`: ready for masks, at some scored positions; `means` [S, d]: of the sources' outputs (zeros
    under zero ablation); `stream` [layers + 1]: mean squares of the residual stream; `metric`: of what comes out, the
    mean KL in nats for logits, else `mean_square`; `subspace`: whether readers' matrices may come on the span of what
    their sources write; `tokens` [B, T], `places` [B, K]: what the model is ready for; `share`: of the scored tokens,
    those at which predictions are asked for.
    """

    network: TransformerRegion
    graph: Graph
    ablation: str
    model: MaskedModel
    means: np.ndarray
    stream: np.ndarray
    metric: Callable[[Any, Any], Any]
    subspace: bool
    tokens: Any
    places: np.ndarray
    share: float
    known: dict[bytes, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        task: Task,
        network: TransformerRegion,
        weights: Mapping[str, np.ndarray],
        graph: Graph,
        ablation: str,
        subspace: bool = False,
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
        ablated = (zero(config, graph) if ablation == "zero" else mean(config, params, tokens, graph)).fixed
        means = _rows(config, params, graph, ablated)
        model = masked_model(config, params, tokens, ablated, graph, places)
        metric = mean_kl if network.output == LOGITS else mean_square
        squares, share = _squares(config, params, tokens), float(asked.sum() / inputs.scored.sum())
        return cls(network, graph, ablation, model, means, squares, metric, subspace, tokens, places, share)

    def constants(self, edges: np.ndarray) -> np.ndarray:
        """What each destination reads in the place of its dropped sources, [D, d]."""
        dropped = (self.graph.possible & ~edges).T.astype(np.float64)
        return np.asarray(dropped @ (self._fitted(edges) if self.ablation == "optimal" else self.means))

    def _fitted(self, edges: np.ndarray) -> np.ndarray:
        """Constants [S, d] that minimise the KL of one circuit."""
        if edges.tobytes() not in self.known:
            config, params = self.model.config, self.model.params
            fitted = optimal(config, params, self.tokens, self.graph, edges, scored=self.places)
            self.known[edges.tobytes()] = _rows(config, params, self.graph, fitted.fixed)
        found: np.ndarray = self.known[edges.tobytes()]
        return found

    def change(self, edges: np.ndarray) -> float:
        """The metric of one circuit."""
        return float(_outcome(self.model, jnp.asarray(edges, jnp.float32), self.plain, self.metric))

    def error(self, edges: np.ndarray) -> np.ndarray:
        """What one circuit gets wrong of the outputs, [B, K, d]."""
        return np.asarray(_outcome(self.model, jnp.asarray(edges, jnp.float32), self.plain, jnp.subtract))

    def changes(self, masks: np.ndarray) -> np.ndarray:
        """The metric under each of some masks, [M]: one by one, so that nodes without edges are not computed."""
        return np.array([self.change(mask) for mask in masks])

    def bits(self, edges: np.ndarray) -> float:
        """About what a circuit costs to state, before anything is known of precision: NUMBER bits for every number that
        it keeps, log2 E for every edge."""
        kept = Kept(self.network, self.graph, edges, self.subspace, self.ablation != "zero")
        numbers = sum(len(block.rows) * len(block.columns) for block in kept.blocks())
        return NUMBER * numbers + float(edges.sum()) * float(np.log2(self.graph.n_edges))

    @cached_property
    def plain(self) -> Any:
        """What the region itself puts out at the scored positions."""
        return masked_run(self.model, jnp.asarray(self.graph.possible, jnp.float32))

    def sizes(self) -> np.ndarray:
        """How many numbers each source's node takes, [S]: its own weights and those that it reads by."""
        config, graph = self.network.config, self.graph
        head = config.d_model * config.d_head * 2 * (1 + graph.key_value_heads / graph.n_heads)
        mlp = config.d_model * config.d_mlp * (3 if config.gated_mlp else 2) / (graph.neurons or 1)
        return np.array([1.0 if s == INPUT else head if s.startswith("a") else mlp for s in graph.sources])


@partial(jax.jit, static_argnames="metric")
def _outcome(model: MaskedModel, mask: Any, plain: Any, metric: Callable[[Any, Any], Any]) -> Any:
    return metric(masked_run(model, mask, skip=True), plain)


def _places(asked: np.ndarray) -> np.ndarray:
    """Positions of each sequence, as many of each, [B, K]: spread over those that are asked for, some of them several
    times where a sequence has fewer than others, so that every sequence counts alike."""
    count = min(POSITIONS, int(asked.sum(1).max()))
    rows = [np.flatnonzero(row) for row in asked]
    return np.stack([row[np.linspace(0, len(row) - 1, count).round().astype(int)] for row in rows])


def _squares(config: TransformerConfig, params: Params, tokens: Any) -> np.ndarray:
    """Mean squares of the stream before each layer and at the end, [layers + 1]."""
    graph = Graph.of(config)
    outputs = np.asarray(source_outputs(config, params, tokens, graph), np.float64)  # [B, S, T, d]
    layer_of = np.array([-1 if s == INPUT else int(s[1:].partition(".")[0]) for s in graph.sources])
    streams = (outputs[:, layer_of < layer].sum(1) for layer in range(graph.n_layers + 1))
    return np.array([float(np.mean(np.square(s))) for s in streams])


def _rows(config: TransformerConfig, params: Params, graph: Graph, values: Values) -> np.ndarray:
    """What stands in for each source, as it writes it, float64 [S, d]: a neuron's number times its row."""
    if not isinstance(values, Outputs):
        return np.asarray(values, np.float64)
    nodes, numbers = np.asarray(values.nodes, np.float64), np.asarray(values.neurons, np.float64)
    found = [nodes[:1]]
    for layer, block in enumerate(params["blocks"]):
        heads, own = 1 + layer * graph.n_heads, layer * graph.neurons
        rows = np.asarray(neuron_rows(config, block), np.float64)
        found += [nodes[heads : heads + graph.n_heads], numbers[own : own + graph.neurons, None] * rows]
    return np.concatenate(found)
