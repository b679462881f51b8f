"""Yardsticks: nothing, a look-up table of token ids, an affine map of the region's inputs.

Under *activations* "nothing" in front of the standard residual coder is transform coding, and what every other
explanation has to beat; under *behaviour* it is mean ablation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.sparse

from decompositions.token_effects import LARGEST_TOKEN, check_tokens, nested_effects, numbered_pairs
from mdl.alphabets import NoAlphabet
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import NoState, State
from mdl.static_rows import metric_rows, predict_columns
from mdl.task import Task

STATIC_KNOB: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class ConstantDecoder:
    """The same vector at every position."""

    mean: np.ndarray

    @classmethod
    def from_section(cls, section: Section) -> ConstantDecoder:
        """Header: mean [1, d]."""
        if len(section.header) != 1 or section.parts:
            raise MessageError("a 'constant' section has one header array and no parts")
        return cls(section.header[0].vector("the mean of a 'constant' section"))

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        return np.broadcast_to(self.mean, (inputs.n_tokens, len(self.mean))).astype(np.float32)

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        return None

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        return 0.0


@dataclass(frozen=True)
class ConstantExplanation:
    """The mean output."""

    mean: np.ndarray
    name: str = "nothing"
    kind: str = "constant"
    knobs: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def section(self, settings: Settings) -> Section:
        return Section(self.kind, (QuantisedArray.from_values(self.mean, settings.static_step(1.0)),))

    def encode(self, decoder: ConstantDecoder, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)


@dataclass(frozen=True)
class Nothing:
    """The null: the mean, and whatever codes the residual. Every other explanation is measured against it."""

    def fit(self, task: Task) -> ConstantExplanation:
        return ConstantExplanation(task.fit.outputs.mean(0, dtype=np.float64))


@dataclass(frozen=True)
class TableDecoder:
    """mean + a row for the current token's id, where the table has one."""

    mean: np.ndarray
    ids: np.ndarray
    rows: np.ndarray

    @classmethod
    def from_section(cls, section: Section) -> TableDecoder:
        """Header: mean [1, d]. Parts: id increments [r, 1], rows [r, d]."""
        if len(section.header) != 1 or len(section.parts) != 2:
            raise MessageError("a 'table' section has one header array (mean) and two part arrays (ids, rows)")
        mean, rows = section.header[0].vector("the mean of a 'table' section"), section.parts[1].values()
        if rows.shape[1] != len(mean):
            raise MessageError(f"'table': rows {rows.shape} do not fit a mean of {len(mean)}")
        what = "the array of token ids of a 'table' section, which increase from row to row,"
        increments = section.parts[0].integers(what, 1, LARGEST_TOKEN, 1)
        ids = np.cumsum(increments[:, 0]) - 1
        if len(ids) and ids[-1] > LARGEST_TOKEN:
            raise MessageError(f"'table': token ids up to {ids[-1]}; there are none above {LARGEST_TOKEN}")
        return cls(mean, ids, rows)

    def _row_of(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position = np.minimum(np.searchsorted(self.ids, tokens), max(len(self.ids) - 1, 0))
        found = self.ids[position] == tokens if len(self.ids) else np.zeros(len(tokens), bool)
        return position, found

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        position, found = self._row_of(inputs.scored_tokens())
        out = np.broadcast_to(self.mean, (len(position), len(self.mean))).astype(np.float32)
        out[found] += self.rows[position[found]]
        return out

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        position, found = self._row_of(inputs.scored_tokens())
        return scipy.sparse.coo_array(
            (np.ones(found.sum(), bool), (np.flatnonzero(found), position[found])), shape=(len(found), len(self.ids))
        ).tocsr()

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        return float(len(self.mean))


@dataclass(frozen=True)
class TableExplanation:
    """Shrunken mean output for each token id, `rows` [r, d] beyond the overall mean, used with `frequency` [r]."""

    mean: np.ndarray
    ids: np.ndarray
    rows: np.ndarray
    frequency: np.ndarray
    name: str = "token-table"
    kind: str = "table"
    knobs: Mapping[str, Sequence[float]] = field(default_factory=lambda: {"static": STATIC_KNOB})

    @cached_property
    def prediction(self) -> np.ndarray | None:
        """Of columns from those before them; it does not depend on the settings."""
        return predict_columns(self.rows)

    def rounded(self, settings: Settings) -> QuantisedArray:
        """All rows, those among them that round to nothing."""
        return metric_rows(self.rows, self.frequency, settings, self.prediction, frequency=self.frequency)

    def section(self, settings: Settings) -> Section:
        rows = self.rounded(settings)
        kept = np.flatnonzero(np.any(rows.symbols, axis=1))  # a row that rounds to nothing is not worth its id
        increments = np.diff(self.ids[kept], prepend=-1)
        mean = QuantisedArray.from_values(self.mean, settings.static_step(1.0))
        parts = (QuantisedArray.from_integers(increments.reshape(-1)), rows.rows(kept))
        return Section(self.kind, (mean,), parts)

    def encode(self, decoder: TableDecoder, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)


@dataclass(frozen=True)
class TokenTable:
    """A vector for each token id: what it adds to the overall mean, as `nested_effects` predicts it of unseen text.

    A row is the token's mean output, pairs of it weighed alike, shrunk in every direction to the overall mean.
    """

    def fit(self, task: Task) -> TableExplanation:
        """**Raises:** `ExplanationError` where there are no token ids."""
        check_tokens(task.region.output, "token-table")
        inputs = task.fit.inputs
        found = numbered_pairs(inputs)
        mean, rows, _ = nested_effects(task.fit.outputs, found.owner, found.pair)
        return TableExplanation(mean, found.tokens, rows, np.bincount(found.owner, found.counts) / inputs.n_tokens)


@dataclass(frozen=True)
class AffineDecoder:
    """inputs @ matrix + bias."""

    matrix: np.ndarray
    bias: np.ndarray

    @classmethod
    def from_section(cls, section: Section) -> AffineDecoder:
        """Header: matrix [d_in, d], bias [1, d]."""
        if len(section.header) != 2 or section.parts:
            raise MessageError("an 'affine' section has two header arrays (matrix, bias) and no parts")
        matrix, bias = section.header[0].values(), section.header[1].vector("the bias of an 'affine' section")
        if matrix.shape[1] != len(bias):
            raise MessageError(f"'affine': a matrix {matrix.shape} does not fit a bias of {len(bias)}")
        return cls(matrix, bias)

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        return (inputs.scored_values() @ self.matrix + self.bias).astype(np.float32)

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        return None

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        return 2.0 * self.matrix.size


@dataclass(frozen=True)
class AffineExplanation:
    """Least-squares map of the region's inputs; `energy` [d_in] is E[x_i^2]."""

    matrix: np.ndarray
    bias: np.ndarray
    energy: np.ndarray
    name: str = "affine"
    kind: str = "affine"
    knobs: Mapping[str, Sequence[float]] = field(default_factory=lambda: {"static": STATIC_KNOB})

    @cached_property
    def prediction(self) -> np.ndarray | None:
        """Of columns from those before them; it does not depend on the settings."""
        return predict_columns(self.matrix)

    def section(self, settings: Settings) -> Section:
        matrix = metric_rows(self.matrix, self.energy, settings, self.prediction)
        return Section(self.kind, (matrix, QuantisedArray.from_values(self.bias, settings.static_step(1.0))))

    def encode(self, decoder: AffineDecoder, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)


@dataclass(frozen=True)
class Affine:
    """The best affine map from what enters the region to what leaves it; `ridge` is relative to the mean input energy.

    For a region upstream of a site the input is the token's embedding, known to the receiver only where it is tied to
    the unembedding, which lies outside the region.
    """

    ridge: float = 1e-4

    def fit(self, task: Task) -> AffineExplanation:
        if task.region.input == "nothing":
            raise ExplanationError("affine: nothing enters the region of rows of numbers, so there is nothing to map")
        if task.fit.inputs.values is None:
            raise ExplanationError(
                f"affine: the input of region {task.region.name!r} is token ids, of which there is no affine map (and "
                "the embedding is not known to the receiver, being inside the region). Use token-table, or a region "
                "such as blocks.L.mlp."
            )
        inputs, outputs = task.fit.inputs.scored_values().astype(np.float64), task.fit.outputs.astype(np.float64)
        centre, mean = inputs.mean(0), outputs.mean(0)
        x, y = inputs - centre, outputs - mean
        gram = x.T @ x
        gram += self.ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        matrix = np.linalg.solve(gram, x.T @ y)
        return AffineExplanation(matrix, mean - centre @ matrix, np.square(inputs).mean(0))
