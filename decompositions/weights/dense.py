"""A region's weights, or fewer numbers in their place, sent once: the receiver runs the region's architecture on them.

Nothing is told per token. Each matrix comes whole, or as a product of two; the activations that it meets are those of
the explained region itself, so that what goes wrong in one layer is in the input of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decompositions.baselines import STATIC_KNOB
from decompositions.weights.curvature import (
    BATCH_TOKENS,
    Curvature,
    Curvatures,
    MeasuredCurvature,
    batches_of,
    device,
)
from decompositions.weights.rounding import round_matrix, round_to_nearest
from mdl.alphabets import NoAlphabet
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section
from mdl.models.networks import Network
from mdl.models.operators import Chain
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import NoState, State

KIND = "weights"
Rounder = Callable[[np.ndarray, Curvature, Settings], QuantisedArray]
QUANTISERS: Mapping[str, Rounder] = {"feedback": round_matrix, "nearest": round_to_nearest}
LARGEST_RANK = 1 << 20


@dataclass(frozen=True)
class Description:
    """Numbers in the place of a region's weights: `matrices` whole, or as two factors; `others` by name."""

    matrices: Mapping[str, np.ndarray | tuple[np.ndarray, np.ndarray]]
    others: Mapping[str, np.ndarray]


def evaluate(network: Network, weights: Mapping[str, Any], inputs: Inputs) -> np.ndarray:
    """The region's outputs on its weights (arrays or operators) at the scored positions, float32 [n, d]."""
    rows = []
    for batch in batches_of(inputs, BATCH_TOKENS):
        values, tokens, _ = device(batch)
        rows.append(np.asarray(_run(network, dict(weights), values, tokens), np.float32)[batch.scored])
    return np.concatenate(rows)


@partial(jax.jit, static_argnums=0)
def _run(network: Network, weights: dict[str, Any], values: Any, tokens: Any) -> Any:
    return network.run(weights, values, tokens)


def architecture(inputs: Inputs) -> Network:
    """The network that the receiver knows. **Raises:** `MessageError` where there is none."""
    if inputs.network is None:
        raise MessageError("a message of weights for a region whose architecture is not known: it cannot be run")
    return inputs.network


@dataclass(frozen=True)
class WeightsDecoder:
    """Arrays in the order of the network's matrices (two of a product), tables and vectors; `ranks` 0: whole."""

    ranks: tuple[int, ...]
    arrays: tuple[np.ndarray, ...]

    @classmethod
    def from_section(cls, section: Section) -> WeightsDecoder:
        """Header: ranks [1, matrices], then the arrays.

        **Raises:** `MessageError` for fewer arrays than the ranks ask for, or products that do not fit together.
        """
        if section.parts or not section.header or len(section.header[0].symbols) != 1:
            raise MessageError("a 'weights' section begins with the ranks of its matrices, and has no parts")
        columns = section.header[0].symbols.shape[1]
        ranks = section.header[0].integers("the ranks of a 'weights' section", 0, LARGEST_RANK, columns)[0]
        arrays = tuple(a.values() for a in section.header[1:])
        if len(arrays) < len(ranks) + int((ranks > 0).sum()):
            raise MessageError(f"'weights': {len(arrays)} arrays for matrices of the ranks {ranks.tolist()}")
        return cls(tuple(ranks.tolist()), arrays)

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def weights(self, network: Network) -> dict[str, Any]:
        """By the network's names. **Raises:** `MessageError` where they do not fit it."""
        names = [*network.matrices, *network.tables, *network.vectors]
        wanted = len(names) + sum(rank > 0 for rank in self.ranks)
        if len(self.ranks) != len(network.matrices) or len(self.arrays) != wanted:
            raise MessageError(
                f"'weights': {len(self.arrays)} arrays and {len(self.ranks)} ranks; this region has "
                f"{len(network.matrices)} matrices among {len(names)} weights"
            )
        shapes: dict[str, tuple[int, ...]] = {**network.matrices, **network.tables}
        shapes |= {name: (1, size) for name, size in network.vectors.items()}
        ranks = (*self.ranks, *(0 for _ in names[len(self.ranks) :]))
        found, rest = {}, iter(self.arrays)
        for name, rank in zip(names, ranks, strict=True):
            first = next(rest)
            second = next(rest) if rank else None
            found[name] = _weight(name, first, second, shapes[name], rank)
        return {name: w[0] if name in network.vectors else w for name, w in found.items()}

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]."""
        network = architecture(inputs)
        return evaluate(network, self.weights(network), inputs)

    def touched(self, inputs: Inputs, state: State) -> None:
        return None

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        """Of the products with matrices, zeros left out: a pruned neuron costs nothing."""
        network = architecture(inputs)
        count = sum(self.ranks[i] > 0 for i in range(len(self.ranks))) + len(self.ranks)
        looked_up = len(network.tables) + len(network.vectors)
        assert count + looked_up == len(self.arrays)
        return 2.0 * sum(float(np.count_nonzero(a)) for a in self.arrays[:count])


def _weight(name: str, first: np.ndarray, second: np.ndarray | None, shape: tuple[int, ...], rank: int) -> Any:
    found = first.shape if second is None else (first.shape[0], second.shape[1])
    inner = () if second is None else (first.shape[1], second.shape[0])
    if found != shape or inner not in ((), (rank, rank)):
        raise MessageError(f"'weights': {name} is {shape}; the message has {found}, by way of {inner or 'itself'}")
    return jnp.asarray(first) if second is None else Chain(jnp.asarray(first), jnp.asarray(second))


@dataclass(frozen=True)
class WeightsExplanation:
    """The sender's side. `describe` gives the numbers to send, for the settings' knobs and curvature."""

    name: str
    curvature: MeasuredCurvature
    describe: Callable[[Settings, Curvatures], Description]
    quantiser: str = "feedback"
    own_knobs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    kind: str = KIND

    @property
    def knobs(self) -> Mapping[str, Sequence[float]]:
        return {"static": STATIC_KNOB, **self.own_knobs}

    def section(self, settings: Settings) -> Section:
        """Ranks, matrices on their lattices, tables and vectors."""
        found = self.curvature.under(settings.root)
        description = self.describe(settings, found)
        rounder, network = QUANTISERS[self.quantiser], self.curvature.network
        arrays, ranks = [], []
        for name in network.matrices:
            matrix, curvature = description.matrices[name], found.matrices[name]
            if isinstance(matrix, tuple):
                ranks.append(matrix[0].shape[1])
                sides = curvature.through(*matrix)
                arrays += [rounder(m, c, settings) for m, c in zip(matrix, sides, strict=True)]
            else:
                ranks.append(0)
                arrays.append(rounder(matrix, curvature, settings))
        for name in (*network.tables, *network.vectors):
            arrays.append(rounded_rows(description.others[name], found.others[name], settings))
        return Section(KIND, (QuantisedArray.from_integers(np.array([ranks]).reshape(1, -1)), *arrays))

    def encode(self, decoder: WeightsDecoder, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)


def rounded_rows(values: np.ndarray, sensitivity: np.ndarray, settings: Settings) -> QuantisedArray:
    """A table, or a vector as one row, with a step for each row; `sensitivity`: expected squared derivative of the
    outputs, in the metric, of each number."""
    flat = replace(settings, root=np.eye(1))
    energy = np.atleast_2d(sensitivity).mean(1)
    return QuantisedArray.from_values(np.atleast_2d(values), flat.static_step(energy))
