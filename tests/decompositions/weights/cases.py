"""Tiny networks and tasks, small enough for brute force, and the way of an explanation through its message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decompositions.weights.factors import Factors, ScalarGates, TensorFactors
from mdl.data import from_rows
from mdl.message import Section, decode_message, encode_message
from mdl.models import Vectors
from mdl.models.operators import Weight, multiply
from mdl.models.toys.gated import GatedFunctions, gated_functions, gated_inputs
from mdl.models.toys.superposition import Superposition, superposition_inputs
from mdl.protocols import Decoder, Inputs, Settings
from mdl.receiver import decoder_of
from mdl.state import SparseState, State
from mdl.task import Task, build_task


def no_progress(*_: Any) -> None:
    """What a task reports its progress to, when nobody looks."""


@dataclass(frozen=True)
class Linear:
    """out = x W."""

    d_in: int = 4
    d_out: int = 3

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        return {"W": (self.d_in, self.d_out)}

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        return {}

    @property
    def vectors(self) -> dict[str, int]:
        return {}

    def run(self, weights: Mapping[str, Weight], values: Any, tokens: Any) -> Any:
        with jax.default_matmul_precision("float32"):
            return multiply(values, weights["W"])


@dataclass(frozen=True)
class TwoLayers:
    """out = relu((x + T[token]) W_in + b_in) W_out + b_out."""

    d_in: int = 4
    hidden: int = 6
    d_out: int = 3
    ids: int = 5

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        return {"W_in": (self.d_in, self.hidden), "W_out": (self.hidden, self.d_out)}

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        return {"T": (self.ids, self.d_in)}

    @property
    def vectors(self) -> dict[str, int]:
        return {"b_in": self.hidden, "b_out": self.d_out}

    def run(self, weights: Mapping[str, Weight], values: Any, tokens: Any) -> Any:
        with jax.default_matmul_precision("float32"):
            before = multiply(values + jnp.asarray(weights["T"])[tokens], weights["W_in"]) + weights["b_in"]
            return multiply(jax.nn.relu(before), weights["W_out"]) + weights["b_out"]


def random_weights(network: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal, float32, in the network's shapes."""
    rng = np.random.default_rng(seed)
    shapes = {**network.matrices, **network.tables, **{name: (size,) for name, size in network.vectors.items()}}
    return {name: rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[0]) for name, shape in shapes.items()}


def random_inputs(network: Any, sequences: int, positions: int = 1, seed: int = 1, ids: int = 5) -> Inputs:
    """Correlated normal values of length 1, and random token ids; every position is scored."""
    rng = np.random.default_rng(seed)
    width = next(iter(network.matrices.values()))[0]
    values = rng.normal(size=(sequences, positions, width)) @ (np.eye(width) + 0.6 * rng.normal(size=(width, width)))
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    tokens = rng.integers(0, ids, (sequences, positions)).astype(np.int32)
    return Inputs(tokens, np.ones_like(tokens, bool), values.astype(np.float32), network)


def pentagon() -> dict[str, np.ndarray]:
    """Weights of Superposition(5, 2) by hand: five features at equal angles, of different lengths."""
    angles = 2 * np.pi * np.arange(5) / 5
    lengths = np.array([1.0, 1.05, 0.95, 1.1, 0.9])[:, None]
    w = lengths * np.stack([np.cos(angles), np.sin(angles)], 1)
    return {"W": w.astype(np.float32), "b": np.full(5, -0.35, np.float32)}


def superposition(count: int = 400, probability: float = 0.1) -> Vectors:
    """Its outputs, at a tolerance of 1 % of their variance."""
    network = Superposition(5, 2)
    inputs = superposition_inputs(network, count, 3, probability)
    return Vectors.computed(network, pentagon(), inputs, "superposition").tolerating(0.01)


def gated(count: int = 300, functions: int = 4, neurons: int = 5) -> Vectors:
    """Gated functions, at a tolerance of 1 % of their variance."""
    made = gated_functions(0, GatedFunctions(functions, neurons))
    inputs = gated_inputs(made.network, count, 1)
    return Vectors.computed(made.network, made.weights, inputs, "gated").tolerating(0.01)


def task_of(vectors: Vectors) -> Task:
    """All of the rows, without the held-out ones."""
    data = from_rows(vectors.first_equal, None, 0, vectors.name)
    return build_task(vectors, "vectors", data, no_progress).for_fitting()


def settings_of(explanation: Any, task: Task, step: float, horizon: float = 1e3, **knobs: float) -> Settings:
    """The Euclidean metric, and the finest value of every knob that is not given."""
    finest = {name: grid[0] for name, grid in explanation.knobs.items()} | knobs
    return Settings(horizon, step, np.eye(task.width), finest)


def through_bytes(section: Section) -> Section:
    """What the receiver has of it."""
    (found,) = decode_message(encode_message([section]).data)
    return found


def received(explanation: Any, task: Task, settings: Settings) -> tuple[Decoder, State, np.ndarray]:
    """The receiver's decoder, rebuilt from bytes, the state of the fit data and what is predicted of them."""
    decoder = decoder_of(through_bytes(explanation.section(settings)))
    state = explanation.encode(decoder, task.fit, settings)
    return decoder, state, decoder.predict(task.fit.inputs, state)


def closest(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, over the spread of what is wanted."""
    return float(np.abs(found - wanted).max() / wanted.std())


def random_gates(count: int, seed: int = 1, hidden: int = 3) -> ScalarGates:
    """Gates that are open for some inputs, closed for others and in between for some."""
    rng = np.random.default_rng(seed)
    arrays = [scale * rng.normal(size=(count, hidden)) for scale in (6.0, 0.5, 1.0)]
    return ScalarGates(*(a.astype(np.float32) for a in (*arrays, 0.2 * rng.normal(size=count))))


def random_factors(network: Any, counts: Mapping[str, Any], seed: int = 1, gated: bool = False) -> Factors:
    """Normal factors of some matrices, with given component ids."""
    rng, tensors = np.random.default_rng(seed), {}
    for number, (name, ids) in enumerate(counts.items()):
        rows, columns = network.matrices[name]
        component = np.asarray(ids, np.int64)
        inputs, outputs = rng.normal(size=(len(component), rows)), rng.normal(size=(len(component), columns))
        gates = random_gates(len(component), seed + number) if gated else None
        tensors[name] = TensorFactors(inputs / np.sqrt(rows), outputs / np.sqrt(columns), component, gates)
    return Factors(tensors, "random")


def state_of(mask: np.ndarray) -> SparseState:
    """Indices of the components that are on, bool [n, C]."""
    tokens, features = np.nonzero(mask)
    ones, classes = np.ones(len(tokens), np.int64), np.zeros(mask.shape[1], np.int64)
    return SparseState(tokens, features, ones, classes, len(mask), signed=False)
