"""Circuits as sparse tables, the sender's side: dead numbers left out, the others to as many digits as pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from decompositions.baselines import STATIC_KNOB
from decompositions.circuits.circuit import Circuit, CircuitExplanation
from decompositions.circuits.decoder import run_circuit
from decompositions.circuits.kept import UNEMBED, Kept, circuit_config
from decompositions.circuits.sparse import (
    KIND,
    Places,
    SparseCircuitDecoder,
    Weights,
    section_of,
    whole_blocks,
    write_sparse,
)
from mdl.codes.sparse_tables import rounded
from mdl.errors import CodeError, MessageError
from mdl.message import Section
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.metrics import kl_divergence
from mdl.models.networks import TransformerRegion
from mdl.models.sites import LOGITS
from mdl.protocols import Sample, Settings
from mdl.state import NoState
from mdl.task import Task
from mdl.units import nats_to_bits

ALL = "all"
DIGITS = 6  # binary, of numbers where circuits are compared before digits are chosen
MOST_DIGITS = 22


@dataclass(frozen=True)
class SparseCircuit:
    """A circuit whose weights are sent as sparse tables under one code book.

    **Arguments:** as of `Circuit`; `search="all"`: the whole graph, that is, the region's sparse weights.
    """

    search: str = ALL
    ablation: Literal["zero", "mean"] = "zero"
    file: str = ""
    format: str = ""
    edges: Any = field(default=None, repr=False)
    name: str = ""

    def fit(self, task: Task) -> SparseCircuitExplanation:
        """**Raises:** as `Circuit.fit`."""
        edges = self.edges
        search = self.search
        if search == ALL:
            search = "eap-ig"  # not run: the edges are given
            network = task.fit_activations.network
            if edges is None and not self.file and isinstance(network, TransformerRegion):
                edges = Graph.of(circuit_config(network)).possible
        circuit = Circuit(search, "edge", self.ablation, self.file, self.format, edges).fit(task)
        found = self.file or (self.search if self.edges is None else "edges")
        label = "sparse weights" if found == ALL else f"sparse circuit ({found}, {self.ablation})"
        asked = task.fit_activations.asked[task.fit_activations.scored]
        outputs = task.fit.outputs.astype(np.float64)
        spread = float(np.sqrt(np.mean(np.square(outputs - outputs.mean(0)))))
        return SparseCircuitExplanation(self.name or label, circuit, spread, task.fit, asked)


@dataclass(frozen=True)
class SparseCircuitExplanation:
    """`circuit`: what is explained, and the circuits to choose from; `spread`: of the outputs about their mean; `fit`:
    data on which circuit and digits are chosen; `asked`: at which of its tokens the KL counts."""

    name: str
    circuit: CircuitExplanation
    spread: float
    fit: Sample = field(repr=False)
    asked: np.ndarray = field(repr=False)
    kind: str = KIND
    known: dict[bytes, tuple[Weights, np.ndarray]] = field(default_factory=dict, compare=False, repr=False)
    harms: dict[bytes, float] = field(default_factory=dict, compare=False, repr=False)
    sections: dict[Any, tuple[Section, np.ndarray]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def knobs(self) -> Mapping[str, Sequence[float]]:
        return {"static": STATIC_KNOB}

    def section(self, settings: Settings) -> Section:
        """The circuit with the least total of those to choose from, to as many digits as have the least total.

        **Raises:** `MessageError` for weights that the code does not carry.
        """
        return self.sent(settings)[0]

    def sent(self, settings: Settings) -> tuple[Section, np.ndarray]:
        """The section, and the edges that are in it."""
        measured = self.circuit.network.output == LOGITS and not settings.corrected
        key = (settings.horizon, *(() if measured else (settings.step, settings.root.tobytes())))
        if key not in self.sections:
            try:
                chosen = self._chosen(settings, measured)
                digits = self._best_digits(chosen, settings.horizon) if measured else self._digits(settings)
                self.sections[key] = section_of(write_sparse(*self.rounded(chosen, digits))[0]), chosen
            except CodeError as error:
                raise MessageError(f"{self.name}: {error}") from error
        return self.sections[key]

    def _chosen(self, settings: Settings, measured: bool) -> np.ndarray:
        """Of the path, by static / N and harm: the KL on the fit data where that is the phenomenon."""
        circuits = self.circuit.path.circuits
        if len(circuits) == 1:
            return circuits[0]
        harm = [self.kl(c, MOST_DIGITS) for c in circuits] if measured else self._damage(settings)
        static = [write_sparse(*self.rounded(c, DIGITS))[1] for c in circuits]
        return circuits[int(np.argmin([s / settings.horizon + h for s, h in zip(static, harm, strict=True)]))]

    def _damage(self, settings: Settings) -> list[float]:
        return self.circuit.path.damage(self.circuit.searched, settings)

    def _best_digits(self, edges: np.ndarray, horizon: float) -> int:
        """Those of the least static / N + KL on the fit data."""
        totals = [
            write_sparse(*self.rounded(edges, d))[1] / horizon + self.kl(edges, d) for d in range(MOST_DIGITS + 1)
        ]
        return int(np.argmin(totals))

    def _digits(self, settings: Settings) -> int:
        """Where the KL is not the phenomenon: one digit more for half the step (in octaves of the outputs' spread), and
        for four times the horizon."""
        octaves = np.log2(max(settings.step, 1e-300) / max(self.spread, 1e-300))
        horizon = 0.5 * np.log2(max(settings.horizon, 1.0) / 1e4)
        return int(np.clip(np.rint(DIGITS + horizon - octaves), 0, MOST_DIGITS))

    def kl(self, edges: np.ndarray, digits: int) -> float:
        """KL of the circuit with weights of so many digits on the fit data, bits a token."""
        key = edges.tobytes() + bytes([digits])
        if key not in self.harms:
            kept, weights, constants = self.rounded(edges, digits)
            single = {name: w.astype(np.float32) for name, w in weights.items()}
            found = run_circuit(kept, single, constants.astype(np.float32), self.fit.inputs)
            nats = np.asarray(kl_divergence(jnp.asarray(found), jnp.asarray(self.fit.outputs)), np.float64)
            self.harms[key] = float(nats_to_bits((nats * self.asked).mean()))
        return self.harms[key]

    def rounded(self, edges: np.ndarray, digits: int) -> tuple[Kept, Weights, np.ndarray]:
        """What `write_sparse` takes, of one circuit."""
        circuit = self.circuit
        wanted = circuit.searched.constants(edges)
        dropped = circuit.searched.ablation != "zero" and bool((circuit.graph.possible & ~edges).any())
        kept = Kept(circuit.network, circuit.graph, edges, False, dropped)
        key = edges.tobytes()
        if key not in self.known:
            self.known[key] = live(kept, circuit.curvature.weights, wanted if dropped else np.zeros_like(wanted))
        weights, constants = self.known[key]
        constants = rounded(constants, digits)
        if kept.constants and not constants.any():  # what was dropped is of no weight to anybody
            kept = Kept(kept.network, kept.graph, edges, False, False)
        return kept, {name: rounded(w, digits) for name, w in weights.items()}, constants

    def encode(self, decoder: SparseCircuitDecoder, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)


def live(kept: Kept, own: Mapping[str, np.ndarray], constants: np.ndarray) -> tuple[Weights, np.ndarray]:
    """Weights (flat, by name, float64) and constants [D, d] without numbers that cannot matter to the circuit's output.

    A row that nobody writes, a coordinate that nobody reads, a neuron or a channel of a head without the other half:
    left out until nothing more can be. Of a region with norms or biases in blocks, only what is impossible is.
    """
    weights = {name: np.zeros(shape) for name, shape in kept.shapes.items()}
    blocks = whole_blocks(kept)
    for block in blocks:
        here = np.ix_(block.rows, block.columns)
        weights[block.name][here] = np.asarray(own[block.name], np.float64).reshape(kept.shapes[block.name])[here]
    plain = (kept.config.norm, kept.config.norm_before_unembedding) == ("none", "none")
    bare = plain and set(kept.network.vectors) <= {"unembed.b_U"} and not kept.config.tied
    constants = constants * kept.needed[:, None] if kept.constants else np.zeros_like(constants)
    while True:
        before = _count(weights, constants)
        places = Places.of(kept)
        places.constants = constants != 0
        for block in blocks:
            here = np.ix_(block.rows, block.columns)
            weights[block.name][here] *= places.possible(block)
            places.put(block, weights[block.name][here] != 0)
        if bare:
            constants = _unread(kept, weights, constants)
        if _count(weights, constants) == before:
            return weights, constants


def _count(weights: Weights, constants: np.ndarray) -> int:
    return sum(int(np.count_nonzero(w)) for w in (*weights.values(), constants))


def _unread(kept: Kept, weights: Weights, constants: np.ndarray) -> np.ndarray:
    """Zero what no reader reads: writers' columns, in place, and constants, which are returned."""
    config, graph = kept.config, kept.graph
    reads = np.stack([_reads(kept, weights, name) for name in graph.destinations])  # [D, d]
    wanted = (kept.edges.astype(int) @ reads.astype(int)) > 0  # [S, d]
    for number, source in enumerate(graph.sources):
        if source == "input":
            for name in kept.network.tables:
                weights[name] *= wanted[number]
            continue
        layer, _, head = source[1:].partition(".h")
        if not head:
            weights[f"blocks.{layer}.mlp.W_out"] *= wanted[number]
            weights[f"blocks.{layer}.mlp.W_in"] *= weights[f"blocks.{layer}.mlp.W_out"].any(1)
            continue
        rows = slice(int(head) * config.d_head, (int(head) + 1) * config.d_head)
        weights[f"blocks.{layer}.attn.W_O"][rows] *= wanted[number]
        if config.n_heads == config.key_value_heads and config.positions != "rotary":
            attn = {letter: weights[f"blocks.{layer}.attn.W_{letter}"] for letter in "QKVO"}
            attn["V"][:, rows] *= attn["O"][rows].any(1)
            attn["Q"][:, rows] *= attn["K"][:, rows].any(0)
    return constants * reads


def _reads(kept: Kept, weights: Weights, destination: str) -> np.ndarray:
    """Coordinates that a destination reads, [d]."""
    if destination == "logits":
        unembed = weights.get(UNEMBED)
        return np.ones(kept.config.d_model, bool) if unembed is None else np.asarray(unembed.any(1))
    layer, _, head = destination[1:].partition(".h")
    if not head:
        names = [n for n in (f"blocks.{layer}.mlp.W_in", f"blocks.{layer}.mlp.W_gate") if n in weights]
        return np.logical_or.reduce([weights[n].any(1) for n in names])
    number, letter = head[:-1].split("<")
    columns = slice(int(number) * kept.config.d_head, (int(number) + 1) * kept.config.d_head)
    return np.asarray(weights[f"blocks.{layer}.attn.W_{letter.upper()}"][:, columns].any(1))
