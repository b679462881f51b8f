"""What a receiver can learn from what it has decoded: the next block's explanation, metric and axes.

Everything here is a function of inputs and reconstructions of earlier blocks (and of integers that were sent), so that
sender and receiver compute it alike. "Alike" is meant to the last bit: least squares, eigenvectors and gradients are
floating-point, so both ends have to run the same programs on the same kind of machine with as many threads. That is
why such lengths are "codelength" and not "coded".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from estimators.fidelity import Bench, encoded
from estimators.fisher import Metric, fisher_metric
from mdl.message import Section
from mdl.protocols import Decomposition, Explanation, Inputs, Sample, Settings
from mdl.receiver import decoder_of, predicted
from mdl.state import NoState, State
from mdl.task import Activations, Task
from mdl.transform_coding import SHIFT_LEVELS, SHIFT_UNITS, Axes, Quantiser, moments, principal_axes

FREE = 1e9  # the N for which what is not sent is quantised: so fine that it makes no difference
METRIC_SEQUENCES = 16  # reconstructions on which the metric is estimated, the latest
METRIC_DRAWS = 8  # draws of M's own tokens over all of them, where they are fewer than half of that
ERROR_TOKENS = 32768  # the latest errors, from which axes are learnt
STEPS_PER_OCTAVE = 64  # steps are sent as integers e, the step being 2^(e / 64)
# Reconstruction points, as agreed once: for |q| = 1, 2, and 3 or more, in 1/32 of a step towards zero.
SHIFTS = (2, 1, 0)
ZERO, ROUNDING = 0.6, 0.45  # thresholds by which both ends put old errors on new axes


def step_of(exponent: int) -> float:
    """The step that an integer stands for."""
    return 2.0 ** (exponent / STEPS_PER_OCTAVE)


def exponent_of(step: float) -> int:
    """The integer of the nearest step."""
    return round(STEPS_PER_OCTAVE * float(np.log2(step)))


def joined(parts: list[Activations]) -> Activations:
    """Sequences of several, their documents kept apart."""
    offsets = np.cumsum([0, *(int(p.groups.max()) + 1 for p in parts[:-1])])
    arrays = [k for k, v in vars(parts[0]).items() if isinstance(v, np.ndarray)]
    columns: dict[str, Any] = {k: np.concatenate([getattr(p, k) for p in parts]) for k in arrays}
    columns["groups"] = np.concatenate([p.groups + o for p, o in zip(parts, offsets, strict=True)])
    return replace(parts[0], **columns)


@dataclass(frozen=True)
class Past:
    """What both ends have after some blocks.

    **Arguments:** `known`: inputs and, in place of outputs, reconstructions; `errors` [n, d]: what each block's
    reconstruction added to its prediction, from the second block on; `codes` [n, d]: the symbols that it did so by;
    `exponent`: of the last block's step.
    """

    known: Activations
    errors: np.ndarray
    codes: np.ndarray
    exponent: int

    def task(self, task: Task) -> Task:
        """The past as all the data there are."""
        return replace(task, fit_activations=self.known, tune_activations=self.known, held_out=None)

    def latest(self, tokens: int) -> Sample | None:
        """The last whole sequences, of at most so many tokens; None if there are none."""
        sizes = np.cumsum(self.known.scored.sum(1)[::-1])
        count = int(np.searchsorted(sizes, tokens, side="right"))
        return self.known.some(slice(len(sizes) - count, None)).sample() if count else None


@dataclass(frozen=True)
class BlockCode:
    """What a block is coded under: an explanation in full precision (None at the very first), and axes behind it."""

    explanation: Explanation | None
    section: Section | None
    settings: Settings
    axes: Axes

    def encode(self, sample: Sample) -> State:
        """The explanation's symbols for a sample."""
        if self.explanation is None or self.section is None:
            return NoState(sample.inputs.n_tokens)
        return encoded(self.explanation, self.section, sample, self.settings)

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The explanation's prediction [n, d]."""
        if self.section is None:
            return np.zeros((inputs.n_tokens, len(self.axes.mean)), np.float32)
        return predicted(decoder_of(self.section), inputs, state)

    def corrected(self, prediction: np.ndarray, codes: np.ndarray, step: float) -> np.ndarray:
        """The prediction with the residual coder's symbols [n, d], float32."""
        shifts = np.array((0, *SHIFTS)) / SHIFT_UNITS
        points = np.sign(codes) * (np.abs(codes) - shifts[np.minimum(np.abs(codes), SHIFT_LEVELS)])
        correction = self.axes.mean + (points * step) @ self.axes.synthesis
        return np.asarray(prediction + correction, np.float32)

    def on_axes(self, errors: np.ndarray, step: float) -> np.ndarray:
        """Symbols [n, d] for errors that both ends have, under thresholds that both ends have."""
        width = self.axes.analysis.shape[1]
        rule = Quantiser(step, np.full(width, ZERO), np.full(width, ROUNDING), np.zeros((width, 0)), np.zeros(width))
        return rule.quantise(self.axes.transform(errors)).astype(np.int64)


def metric_scale(metric: Metric) -> float:
    """Root mean square length of a unit vector in a metric: what a Euclidean step is worth there."""
    return float(np.sqrt(np.mean(np.sum(np.square(metric.root), 1))))


def first_code(width: int) -> BlockCode:
    """A code that needs nothing learnt: no explanation, no mean, every coordinate by itself."""
    identity = np.eye(width)
    axes = Axes(np.zeros(width), identity, identity, np.ones(width))
    return BlockCode(None, None, Settings(FREE, 1.0, identity), axes)


def next_code(
    past: Past, task: Task, decomposition: Decomposition, metric: Metric, knobs: dict[str, float], step: float
) -> BlockCode:
    """The code of the next block: refitted on the past.

    **Arguments:** `step`: what the explanation's own precisions go by, the last block's. The axes are those of the
    errors as they were made on earlier blocks; after one block there are none but those of the fit itself.
    """
    explanation = decomposition.fit(past.task(task))
    settings = Settings(FREE, step, metric.root, knobs)
    section = explanation.section(settings)
    errors = past.errors[-ERROR_TOKENS:]
    if not len(errors):
        code = BlockCode(explanation, section, settings, first_code(task.width).axes)
        sample = past.known.sample()
        errors = sample.outputs - code.predict(sample.inputs, code.encode(sample))
    return BlockCode(explanation, section, settings, principal_axes(*moments(errors), metric.root))


def learnt_metric(bench: Bench, past: Past, last: Metric | None) -> Metric:
    """The rest of the model's metric, from reconstructions; kept once it rests on enough of them."""
    count = len(past.known.tokens)
    if bench.task.region.output == "logits":
        return bench.metrics[0]
    if last is not None and count > METRIC_SEQUENCES:
        return last
    some = past.known.some(slice(max(0, count - METRIC_SEQUENCES), None))
    return fisher_metric(bench.evaluator, some, bench.seed, max(1, METRIC_DRAWS // count))
