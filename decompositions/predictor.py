"""A linear predictor from the previous position's reconstruction, with transform-coded innovations (DPCM).

    c_t = A c_(t-1) + sum_i r(q_ti) row_i,    prediction_t = mean + c_t

c is zero where no scored position stands before. The sender quantises in closed loop: what is coded at t is the output
minus what the *decoded* past predicts, so that errors do not add up. State and static bits are those of transform
coding (`mdl/transform_coding.py`), plus A; like `pca` of full rank it leaves the residual coder next to nothing.

Source: Jayant and Noll 1984, "Digital Coding of Waveforms", 6; here for vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse

from mdl.alphabets import DenseAlphabet
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import DenseState, State
from mdl.static_rows import metric_rows
from mdl.task import Task
from mdl.transform_coding import (
    SHIFT_UNITS,
    ComponentsDecoder,
    TransformCoder,
    components_section,
    moments,
    principal_axes,
)

KIND = "predictor"
SOME_SEQUENCES = 48  # of the fit data, on which the loop is run to fit it
ROUNDS = 2  # of running the loop and fitting predictor and axes to what it reconstructs
LARGEST_GAIN = 1.0  # of a predictor's spectral radius: one that grows is refused


def columns(inputs: Inputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each position: which sequences are scored there, and the numbers of these tokens among the n."""
    found = []
    for column in inputs.numbers().T:
        here = np.flatnonzero(column >= 0)
        found.append((here, column[here]))
    return found


def _carried(matrix: np.ndarray, past: np.ndarray) -> np.ndarray:
    """A c for each sequence, [sequences, d]; `matrix` is A transposed."""
    with np.errstate(over="ignore", invalid="ignore"):  # a loop that grows without end is told of, not warned of
        return past @ matrix


@dataclass(frozen=True)
class PredictorDecoder:
    """`matrix` [d, d]: A transposed; `innovations`: rows and reconstruction points of what the past does not say."""

    mean: np.ndarray
    matrix: np.ndarray
    innovations: ComponentsDecoder

    @classmethod
    def from_section(cls, section: Section) -> PredictorDecoder:
        """Header: mean [1, d], A transposed [d, d]. Parts: rows [r, d], shifts [r, 3] in 1/32.

        **Raises:** `MessageError` if the arrays do not fit together, or the predictor runs away.
        """
        if len(section.header) != 2 or len(section.parts) != 2:
            counts = f"{len(section.header)} header and {len(section.parts)} part arrays"
            raise MessageError(f"a 'predictor' section has two header and two part arrays, not {counts}")
        mean, matrix = section.header[0].vector("the mean of a 'predictor' section"), section.header[1].values()
        if matrix.shape != (len(mean), len(mean)):
            raise MessageError(f"'predictor': a matrix {matrix.shape} does not fit a mean of {len(mean)}")
        if len(section.parts[0].symbols) != len(section.parts[1].symbols):
            lengths = f"{len(section.parts[0].symbols)} and {len(section.parts[1].symbols)}"
            raise MessageError(f"'predictor': {lengths} rows and shifts; an axis has one of each")
        zero = QuantisedArray.from_integers(np.zeros((1, len(mean)), np.int64))
        return cls(mean, matrix, ComponentsDecoder.from_section(Section("components", (zero,), section.parts)))

    @property
    def alphabet(self) -> DenseAlphabet:
        return self.innovations.alphabet

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]. **Raises:** `MessageError` if they run away."""
        fresh = self.innovations.predict(inputs, state)
        past = np.zeros((len(inputs.tokens), len(self.mean)), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for here, rows in columns(inputs):
                now = np.zeros_like(past)
                now[here] = fresh[rows] + _carried(self.matrix, past)[here]
                fresh[rows], past = now[here], now
        if not np.isfinite(fresh).all():
            raise MessageError("'predictor': its recurrence grows beyond float32; the predictor was damaged")
        return self.mean + fresh

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        """The axes that have a symbol. Later positions need them too, by way of the recurrence: paid by then."""
        return state.touched()

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        return 2.0 * self.matrix.size + self.innovations.flops_per_token(inputs, state)


def close_loop(
    decoder: PredictorDecoder, coder: TransformCoder, sample: Sample
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run the sender's loop over a sample.

    **Returns:** symbols [n, r]; what each position's past was reconstructed as, minus the mean [n, d]; the innovations
    that were coded [n, d]. **Raises:** `MessageError` for a loop that grows without end.
    """
    wanted = (sample.outputs - decoder.mean).astype(np.float32)
    symbols = np.zeros((len(wanted), len(decoder.innovations.rows)), np.int64)
    pasts, innovations = np.zeros_like(wanted), np.zeros_like(wanted)
    past = np.zeros((len(sample.inputs.tokens), wanted.shape[1]), np.float32)
    for here, rows in columns(sample.inputs):
        carried = _carried(decoder.matrix, past)
        if not np.isfinite(carried).all():
            raise MessageError("the predictor, rounded, makes what it reconstructs grow without end: take finer steps")
        rest = wanted[rows] - carried[here]
        q = coder.encode(rest).values
        now = np.zeros_like(past)
        now[here] = decoder.innovations.predict(sample.inputs, DenseState(q)) + carried[here]
        symbols[rows], pasts[rows], innovations[rows] = q, past[here], rest
        past = now
    return symbols, pasts, innovations


def regression(pasts: np.ndarray, values: np.ndarray, ridge: float) -> np.ndarray:
    """A transposed, [d, d]: least squares of values [n, d] on pasts [n, d]; `ridge` is relative to the mean energy."""
    x, y = pasts.astype(np.float64), values.astype(np.float64)
    gram = x.T @ x
    gram += (ridge * np.trace(gram) / len(gram) + 1e-30) * np.eye(len(gram))
    return stable(np.linalg.solve(gram, x.T @ y))


def stable(matrix: np.ndarray) -> np.ndarray:
    """The matrix, scaled down where its recurrence would grow."""
    radius = float(np.abs(np.linalg.eigvals(matrix)).max(initial=0.0))
    return matrix * min(1.0, 0.99 * LARGEST_GAIN / max(radius, 1e-30))


@dataclass(frozen=True)
class PredictorExplanation:
    """The sender's side: the loop is fitted anew for each step, for what is reconstructed depends on it.

    `some`: fit sequences on which it runs; `matrix` [d, d]: A transposed of the exact outputs, where it starts from;
    `static` is the knob of A's precision, `value` the ratio of the innovations' step to the residual coder's.
    """

    mean: np.ndarray
    matrix: np.ndarray
    some: Sample
    ridge: float
    name: str = KIND
    kind: str = KIND
    knobs: Mapping[str, Sequence[float]] = field(default_factory=lambda: {"value": (1.0,), "static": (1.0, 2.0, 4.0)})
    # The latest settings met: section and encode ask for the same loop in turn.
    fitted: dict[int, tuple[Settings, np.ndarray, TransformCoder, np.ndarray]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def loop(self, settings: Settings) -> tuple[np.ndarray, TransformCoder, np.ndarray]:
        """A transposed, the innovations' coder, and the mean squares of what A multiplies."""
        known = self.fitted.get(id(settings))
        if known is None or known[0] is not settings:
            self.fitted.clear()
            self.fitted[id(settings)] = (settings, *self._fit(settings))
        return self.fitted[id(settings)][1:]

    def _fit(self, settings: Settings) -> tuple[np.ndarray, TransformCoder, np.ndarray]:
        step = settings.step * settings.knobs.get("value", 1.0)
        wanted = (self.some.outputs - self.mean).astype(np.float32)
        before = self.some.inputs.context().previous
        pasts = np.where(before[:, None] >= 0, wanted[before], 0.0)
        matrix, innovations = self.matrix, wanted - pasts @ self.matrix
        for _ in range(ROUNDS):
            coder = _coder(innovations, settings.root, step)
            decoder = _exact_decoder(self.mean, matrix, coder)
            _, pasts, _ = close_loop(decoder, coder, self.some)
            matrix = regression(pasts, wanted, self.ridge)
            innovations = wanted - pasts @ matrix
        return matrix, _coder(innovations, settings.root, step), np.square(pasts, dtype=np.float64).mean(0)

    def section(self, settings: Settings) -> Section:
        """Mean and A once; an axis of the innovations is a part."""
        matrix, coder, energy = self.loop(settings)
        sent = metric_rows(matrix, np.maximum(energy, 1e-12), settings)
        inner = components_section(coder.axes, coder.quantiser, replace(settings, knobs={}))
        mean = QuantisedArray.from_values(self.mean, settings.static_step(1.0))
        return Section(self.kind, (mean, sent), inner.parts)

    def encode(self, decoder: PredictorDecoder, sample: Sample, settings: Settings) -> DenseState:
        """The loop's symbols, with the decoder's own reconstruction fed back."""
        return DenseState(close_loop(decoder, self.loop(settings)[1], sample)[0])


def _coder(innovations: np.ndarray, root: np.ndarray, step: float) -> TransformCoder:
    mean, covariance = moments(innovations)
    covariance = covariance + np.outer(mean, mean)  # the loop has no mean of its own
    return TransformCoder.fit(principal_axes(np.zeros(len(mean)), covariance, root), innovations, step)


def _exact_decoder(mean: np.ndarray, matrix: np.ndarray, coder: TransformCoder) -> PredictorDecoder:
    """What the receiver would have if static numbers were sent exactly."""
    rows = (coder.quantiser.step * coder.axes.synthesis).astype(np.float32)
    shifts = coder.quantiser.shifts.astype(np.float32) / np.float32(SHIFT_UNITS)
    inner = ComponentsDecoder(np.zeros(len(mean), np.float32), rows, shifts)
    return PredictorDecoder(mean.astype(np.float32), matrix.astype(np.float32), inner)


@dataclass(frozen=True)
class Predictor:
    """Each position predicted from the one before, as it was reconstructed, and the innovation transform-coded.

    Behind a table it is `sum:first=token-table,second=predictor`. `ridge` is relative to the mean energy.
    """

    ridge: float = 1e-3

    def fit(self, task: Task) -> PredictorExplanation:
        """**Raises:** `ExplanationError` for a ridge that is not positive, or sequences of one position."""
        if not self.ridge > 0:
            raise ExplanationError(f"predictor: ridge = {self.ridge:g}; it is positive")
        sample = task.fit
        before = sample.inputs.context().previous
        behind = np.flatnonzero(before >= 0)
        if not len(behind):
            raise ExplanationError("predictor: no scored position stands behind another one; take longer sequences")
        mean = sample.outputs.mean(0, dtype=np.float64)
        wanted = sample.outputs - mean
        matrix = regression(wanted[before[behind]], wanted[behind], self.ridge)
        some = task.fit_activations.head(SOME_SEQUENCES).sample()
        return PredictorExplanation(mean, matrix, some, self.ridge)
