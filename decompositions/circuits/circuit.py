"""Circuits: edges of a region's graph that are kept, with the weights that they need; the rest is ablated.

A circuit is charged for what it keeps. Edges by themselves, with the weights known to the receiver (the "pointer" that
circuit papers count), would make the whole model the best explanation of itself: log2 C(E, E) = 0 and KL = 0.

What stands in for a dropped source is part of the message: nothing (zero ablation), or constants, which are charged.
Resampled activations cannot be: to make them, the receiver would have to run what was dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from decompositions.baselines import STATIC_KNOB
from decompositions.circuits.decoder import KIND, CircuitDecoder
from decompositions.circuits.formats import load_circuit
from decompositions.circuits.kept import Kept, circuit_config
from decompositions.circuits.packing import Packing
from decompositions.circuits.paths import Path as Nested
from decompositions.circuits.search import ranked
from decompositions.circuits.searched import Searched
from decompositions.circuits.searches import SEARCHES
from decompositions.weights.curvature import MeasuredCurvature
from mdl.errors import ExplanationError
from mdl.message import Section
from mdl.models.circuits.graph import Graph
from mdl.models.networks import TransformerRegion
from mdl.models.sites import LOGITS
from mdl.protocols import Sample, Settings
from mdl.state import NoState
from mdl.task import Task

LEVELS = ("node", "neuron", "edge", "subspace")
ABLATIONS = ("zero", "mean", "optimal")
PLACES = 9  # on a path, among which the search for precisions moves


@dataclass(frozen=True)
class Circuit:
    """A circuit of a region.

    **Arguments:** `search`: of SEARCHES, ignored if there is a `file` (any format of `decompositions.circuits.formats`,
    named by `format` where a file does not tell) or `edges`, bool [sources, destinations]; `level`: whether whole nodes
    are kept (of MLPs, also neurons) or edges, and whether readers' matrices come on the span of what their sources
    write ("subspace"); `ablation`: what stands in for the rest: nothing, the means of what is dropped, or (of a whole
    model) constants fitted to the circuit that was found under means.
    """

    search: str = "eap-ig"
    level: Literal["node", "neuron", "edge", "subspace"] = "edge"
    ablation: Literal["zero", "mean", "optimal"] = "mean"
    file: str = ""
    format: str = ""
    edges: Any = field(default=None, repr=False)
    name: str = ""

    def fit(self, task: Task) -> CircuitExplanation:
        """**Raises:** `ExplanationError` for options that there are not, and for a circuit without edges; `ModelError`
        for a region that has no graph, or a file of another architecture."""
        for what, value, known in (("level", self.level, LEVELS), ("ablation", self.ablation, ABLATIONS)):
            if value not in known:
                raise ExplanationError(f"no {what} {value!r} of a circuit: there is {', '.join(known)}")
        if not self.file and self.edges is None and self.search not in SEARCHES:
            raise ExplanationError(f"no search {self.search!r} for circuits: there is {', '.join(SEARCHES)}")
        curvature = MeasuredCurvature.of(task)
        network = curvature.network
        if not isinstance(network, TransformerRegion):
            raise ExplanationError(
                "circuits are of transformers: this region has no heads or MLPs to be joined by edges"
            )
        if self.ablation == "optimal" and network.output != LOGITS:
            raise ExplanationError(
                f"optimal ablation is fitted to predictions, and this region ends at {network.output}: take "
                "ablation=mean, or the region 'model'"
            )
        graph = Graph.of(circuit_config(network), self.level == "neuron")
        subspace = self.level == "subspace"
        searched = Searched.of(task, network, curvature.weights, graph, self.ablation, subspace)
        path = self._path(graph, searched)
        found = Path(self.file).stem or ("edges" if self.edges is not None else self.search)
        name = self.name or f"circuit ({found}, {self.level}, {self.ablation})"
        return CircuitExplanation(name, network, graph, curvature, searched, path, subspace)

    def _path(self, graph: Graph, searched: Searched) -> Nested:
        constant = True  # what stands in for dropped sources is the same at every position
        if self.edges is not None:
            edges = np.asarray(self.edges)
            if edges.shape != graph.possible.shape or (edges & ~graph.possible).any():
                raise ExplanationError(
                    f"edges {edges.shape} for a graph of {graph.possible.shape}, or edges that are not in it"
                )
            return Nested.fixed(_some(graph.pruned(edges, constant)))
        if self.file:
            loaded = load_circuit(Path(self.file), graph, self.format or None)
            if loaded.edges is None:
                assert loaded.scores is not None
                return ranked(searched, loaded.scores)
            return Nested.fixed(_some(graph.pruned(loaded.edges, constant)))
        return SEARCHES[self.search](searched, self.level in ("node", "neuron"))


def _some(edges: np.ndarray) -> np.ndarray:
    if not edges.any():
        raise ExplanationError(
            "the circuit is empty once dead ends are left out: no path of its edges leads from the input to the logits"
        )
    return edges


@dataclass(frozen=True)
class CircuitExplanation:
    """`path`: circuits from nothing to everything. Under behaviour the horizon chooses one, by its KL on fit data;
    where a residual coder follows, its place on the path is a knob: what damage costs is known when it is mended."""

    name: str
    network: TransformerRegion
    graph: Graph
    curvature: MeasuredCurvature
    searched: Searched
    path: Nested
    subspace: bool
    kind: str = KIND
    known: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def knobs(self) -> Mapping[str, Sequence[float]]:
        count = len(self.path.circuits)
        places = tuple(float(i) for i in np.unique(np.linspace(0, count - 1, PLACES).round())[::-1])
        return {"circuit": places, "static": STATIC_KNOB} if count > 1 else {"static": STATIC_KNOB}

    @property
    def start(self) -> Mapping[str, float]:
        """Everything: from there on, whatever is dropped has to pay."""
        return {"circuit": len(self.path.circuits) - 1.0} if len(self.path.circuits) > 1 else {}

    def section(self, settings: Settings) -> Section:
        """As `CircuitDecoder` reads it."""
        return self._packing(self.chosen(settings), settings).section(settings)

    def chosen(self, settings: Settings) -> np.ndarray:
        """Edges: at the knob's place, or the least of static bits / N + KL along the path."""
        if settings.corrected and "circuit" in settings.knobs:
            return self.path.circuits[int(settings.knobs["circuit"])]
        curvature = self.curvature.under(settings.root)
        totals = []
        for edges, damage in zip(self.path.circuits, self.path.damage(self.searched, settings), strict=True):
            kept = self._kept(edges)
            totals.append(estimated_bits(kept, self.curvature.weights, curvature, settings) / settings.horizon + damage)
        return self.path.circuits[int(np.argmin(totals))]

    def _kept(self, edges: np.ndarray) -> Kept:
        dropped = bool((self.graph.possible & ~edges).any()) and self.searched.ablation != "zero"
        return Kept(self.network, self.graph, edges, self.subspace, dropped)

    def _packing(self, edges: np.ndarray, settings: Settings) -> Packing:
        """The latest circuit's is kept: what rounding takes at any step is worked out once."""
        key = edges.tobytes() + settings.root.tobytes()
        if self.known.get("key") != key:
            kept, curvature = self._kept(edges), self.curvature.under(settings.root)
            constants = self.searched.constants(edges)
            packing = Packing(kept, self.curvature.weights, constants, curvature, self.searched.stream)
            self.known.update(key=key, packing=packing)
        found: Packing = self.known["packing"]
        return found

    def encode(self, decoder: CircuitDecoder, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)


def estimated_bits(kept: Kept, weights: Mapping[str, np.ndarray], curvature: Any, settings: Settings) -> float:
    r"""$$\sum_{r,j} \tfrac12 \log_2(1 + 12 v_r / s_r^2)$$ over rows r of all blocks, in bits; v is the mean square of
    the tensor, s the step that a row would have."""
    total = 0.0
    for block in kept.blocks():
        size = len(block.rows) * len(block.columns)
        mean_square = float(np.mean(np.square(weights[block.name])))
        if block.name in curvature.matrices:
            c = curvature.matrices[block.name]
            energy = float(np.trace(c.inputs)) / len(c.inputs) * float(np.trace(c.outputs)) / len(c.outputs)
        else:
            energy = float(np.mean(curvature.others[block.name]))
        step = float(settings.metric_step(energy))
        total += size * 0.5 * np.log2(1.0 + 12.0 * mean_square / step**2)
    return total
