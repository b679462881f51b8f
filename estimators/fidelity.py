"""Activations at a fidelity: the standard residual coder behind an explanation, and the solver that meets eps.

The explanation predicts; the residual coder sends what is missing, with just the step whose *measured* KL is eps. An
explanation's own knobs (value steps, precision of the static part) and the metric are chosen on the tuning data for the
shortest total at the horizon; the step is then solved for on the held-out data, of which it is a part of the message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from estimators.fisher import Metric, euclidean_metric, fisher_metric
from estimators.kernels import Damage, Evaluator
from mdl.errors import ExplanationError, MessageError, TaskError
from mdl.message import Message, QuantisedArray, Section, decode_message, encode_message
from mdl.plugins import load
from mdl.protocols import Decoder, Explanation, Sample, Settings
from mdl.state import DenseState, State, first_use_order
from mdl.task import Activations, Task
from mdl.transform_coding import Axes, Quantiser, components_section, fit_quantiser, moments, principal_axes
from mdl.units import bits_to_nats

KL_TOLERANCE = 0.004  # the solver stops within this relative distance of eps
MAX_EVALUATIONS = 10  # of the held-out data, per fidelity
SPECIAL = "special"


@dataclass(frozen=True)
class Attempt:
    """An explanation coded at one step, as the receiver has it: everything here came out of the decoder.

    `state` and `residual` are the symbol streams (residual None under behaviour); `touched` has one entry a section of
    the message; `damage` is the measured effect of the reconstruction on M's predictions; `prediction` [n, d] is the
    explanation's own part of it.
    """

    settings: Settings
    metric: str
    message: Message
    state: State
    residual: DenseState | None
    touched: tuple[Any, ...]
    damage: Damage
    prediction: np.ndarray
    flops: float

    @property
    def kl(self) -> float:
        """Mean KL, bits a token."""
        return float(np.mean(self.damage.kl_bits))

    @cached_property
    def rate(self) -> float:
        """state + residual, bits a token."""
        residual = 0.0 if self.residual is None else self.residual.length().total
        return (self.state.length().total + residual) / self.state.n_tokens

    def total(self, horizon: float) -> float:
        """Bits a token at the horizon, static bits in full."""
        return self.message.whole_bits / horizon + self.rate


@dataclass(frozen=True)
class Split:
    """One split of the data with what every evaluation on it needs."""

    activations: Activations
    reference: np.ndarray
    sample: Sample

    @classmethod
    def of(cls, evaluator: Evaluator, activations: Activations) -> Split:
        return cls(activations, evaluator.reference(activations), activations.sample())


@dataclass
class Bench:
    """A task set up for evaluation: compiled kernels, metrics, splits; counts the model evaluations it makes.

    The special positions' constants are the mean outputs there on fit data; every message carries them.
    """

    task: Task
    horizon: float
    seed: int = 0
    evaluations: int = field(default=0, init=False)

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.task.model, self.task.region)

    @cached_property
    def tune(self) -> Split:
        return Split.of(self.evaluator, self.task.tune_activations)

    @cached_property
    def held_out(self) -> Split:
        if self.task.held_out is None:
            raise TaskError("this task has no held-out data: scores are measured on nothing else")
        return Split.of(self.evaluator, self.task.held_out)

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        if self.task.region.output == "logits":
            return (euclidean_metric(self.task.width),)
        return (fisher_metric(self.evaluator, self.task.tune_activations, self.seed), euclidean_metric(self.task.width))

    @cached_property
    def special(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Special token ids, and the mean output at their positions on fit data, [ids, d]."""
        fit = self.task.fit_activations
        ids = tuple(int(i) for i in np.unique(fit.tokens[~fit.scored]))
        rows = [fit.outputs[fit.tokens == i].mean(0, dtype=np.float64) for i in ids]
        return ids, np.array(rows).reshape(len(ids), self.task.width)

    def measure(self, split: Split, values: np.ndarray, special: np.ndarray) -> Damage:
        """Put reconstructed values [n, d] and the special constants in the region's place, and measure."""
        activations = split.activations
        full = np.empty_like(activations.outputs)
        full[activations.scored] = values
        for token, row in zip(self.special[0], special, strict=True):
            full[activations.tokens == token] = row
        self.evaluations += 1
        return self.evaluator.damage(activations, split.reference, full)

    @cached_property
    def null_kl(self) -> float:
        """KL of mean ablation on the held-out data, bits a token: what the fidelities are fractions of."""
        mean = self.task.fit.outputs.mean(0, dtype=np.float64)
        n = self.held_out.activations.n_tokens
        return float(self.measure(self.held_out, np.broadcast_to(mean, (n, len(mean))), self.special[1]).kl_bits.mean())


@cache
def _decoder_class(kind: str) -> Any:
    return load("decoder", kind)


def decoder_of(section: Section) -> Decoder:
    """The receiver's decoder for a section, by the kind that it names.

    **Raises:** `PluginError` for a kind that nothing installed provides, `MessageError` if the arrays do not fit it.
    """
    return _decoder_class(section.kind).from_section(section)


@dataclass(frozen=True)
class Coding:
    """The sender's choices behind an attempt: explanation, metric, step, knobs; and the residual coder they imply."""

    explanation: Explanation
    metric: Metric
    settings: Settings
    section: Section
    axes: Axes | None
    quantiser: Quantiser | None

    @classmethod
    def prepare(
        cls,
        bench: Bench,
        explanation: Explanation,
        metric: Metric,
        step: float,
        knobs: Mapping[str, float],
        residual: bool = True,
    ) -> tuple[Coding, float, float]:
        """Fit the residual coder on the tuning data.

        **Returns:** the coding, its distortion e^T G e / 2 (nats a token, in the first metric, G being the Fisher
        information) and its rate plus static bits at the horizon (bits a token), both on the tuning data. Without
        the residual coder (`residual` False) both are infinite: only a real evaluation tells.
        """
        settings = Settings(bench.horizon, step, metric.root, dict(knobs))
        section = explanation.section(settings)
        decoder, sample = decoder_of(section), bench.tune.sample
        state = explanation.encode(decoder, sample, settings)
        errors = sample.outputs - decoder.predict(sample.inputs, state)
        if not residual:
            return cls(explanation, metric, settings, section, None, None), math.inf, math.inf
        axes = principal_axes(*moments(errors), metric.root)
        u = axes.transform(errors)
        quantiser = fit_quantiser(u, step)
        coding = cls(explanation, metric, settings, section, axes, quantiser)
        residual = DenseState(quantiser.quantise(u))
        points = decoder_of(coding.residual_section).predict(sample.inputs, residual)
        message = encode_message(coding.sections(bench))
        rate = (state.length().total + residual.length().total) / state.n_tokens
        return coding, bench.metrics[0].distortion(errors - points) / 2, rate + message.whole_bits / bench.horizon

    @cached_property
    def residual_section(self) -> Section:
        return components_section(self.axes, self.quantiser, self.settings)

    def sections(self, bench: Bench, residual: bool = True) -> list[Section]:
        """What is sent once: the special positions' constants, the explanation, the residual coder."""
        special = QuantisedArray.from_values(bench.special[1], self.settings.static_step(1.0))
        return [Section(SPECIAL, (special,)), self.section] + ([self.residual_section] if residual else [])

    def attempt(self, bench: Bench, split: Split, residual: bool = True) -> Attempt:
        """Send the split: message to bytes and back, symbols by the decoded decoder, reconstruction, measurement."""
        inputs, settings = split.sample.inputs, self.settings
        state = self.explanation.encode(decoder_of(self.section), split.sample, settings)
        section = self.section
        if hasattr(state, "reordered"):
            # Features are numbered by first use in the stream, so their parts are sent in that order.
            order = first_use_order(state.touched())
            section, state = section.reordered(order), state.reordered(order)
        coding = replace(self, section=section)
        message = encode_message(coding.sections(bench, residual))
        special, sent, *rest = decode_message(message.data)
        decoder = decoder_of(sent)
        prediction = decoder.predict(inputs, state)
        values, codes, touched = prediction, None, [None, decoder.touched(inputs, state)]
        if residual:
            codes = DenseState(self.quantiser.quantise(self.axes.transform(split.sample.outputs - prediction)))
            values = prediction + decoder_of(rest[0]).predict(inputs, codes)
            touched.append(codes.touched())
        damage = bench.measure(split, values, special.header[0].values())
        flops = decoder.flops_per_token(inputs, state)
        return Attempt(settings, self.metric.name, message, state, codes, tuple(touched), damage, prediction, flops)


@dataclass(frozen=True)
class Solution:
    """The attempt that meets a fidelity, every attempt on held-out data on the way, and how many evaluations it took.

    `slope`: -d rate / d ln KL, bits a token, by which rates at slightly different KL are put on one footing.
    """

    attempt: Attempt
    attempts: tuple[Attempt, ...]
    evaluations: int
    slope: float
    notes: tuple[str, ...] = ()


@dataclass
class Solver:
    """Solves an explanation's fidelities one after the other, each starting from what the last one found."""

    bench: Bench
    explanation: Explanation
    metric: Metric | None = None
    step: float | None = None
    knobs: dict[str, float] = field(default_factory=dict)
    # Measured KL over second-order distortion at the last evaluation: 1 where the quadratic approximation is exact.
    calibration: float = 1.0

    def __post_init__(self) -> None:
        middle = {k: v[len(v) // 2] for k, v in self.explanation.knobs.items()}
        self.knobs = {**middle, **self.knobs}

    def solve(self, eps: float) -> Solution:
        """Meet a KL of `eps` bits a token on the held-out data.

        **Raises:** `ExplanationError` if no step does.
        """
        before = self.bench.evaluations
        try:
            attempts = self._search(eps)
        except MessageError as error:
            raise ExplanationError(
                f"{self.explanation.name}: no step of the residual coder brings the KL to {eps:.4g} bits: {error}"
            ) from error
        best = min(attempts, key=lambda a: abs(math.log(a.kl / eps)))
        notes = ()
        if best.kl < eps * (1 - 0.02):
            notes = (f"meets the fidelity with room to spare (KL {best.kl:.4g} of {eps:.4g} bits a token)",)
        elif best.kl > eps * (1 + 0.02):
            raise ExplanationError(
                f"{self.explanation.name}: no step of the residual coder brings the KL to {eps:.4g} bits a token; the "
                f"nearest of {len(attempts)} evaluations is {best.kl:.4g}. The fidelity is probably beyond float32."
            )
        return Solution(best, tuple(attempts), self.bench.evaluations - before, _slope(attempts), notes)

    def _search(self, eps: float) -> list[Attempt]:
        if self.metric is None:
            self._choose_metric(eps)
        else:
            self.step = self._surrogate_step(self.metric, self.step or 1.0, eps, self.knobs)
        self._choose_knobs(eps)
        return self._meet(eps, self.bench.held_out)

    def _prepare(self, metric: Metric, step: float, knobs: Mapping[str, float]) -> tuple[Coding, float, float]:
        return Coding.prepare(self.bench, self.explanation, metric, step, knobs)

    def _surrogate_step(self, metric: Metric, step: float, eps: float, knobs: Mapping[str, float]) -> float:
        """The step whose second-order distortion, times the calibration, is eps (secant in the logarithm)."""
        target = bits_to_nats(eps) / self.calibration
        slope, previous = 2.0, None
        for _ in range(8):
            distortion = max(self._prepare(metric, step, knobs)[1], 1e-30)
            gap = math.log(distortion / target)
            if previous is not None and abs(math.log(step / previous[0])) > 1e-6:
                slope = min(max((gap - previous[1]) / math.log(step / previous[0]), 0.5), 4.0)
            if abs(gap) < 0.02:
                break
            previous = (step, gap)
            step *= math.exp(-min(max(gap / slope, -4.0), 4.0))
        return step

    def _choose_metric(self, eps: float) -> None:
        """Fisher or Euclidean, whichever gives the shorter total at equal measured KL on the tuning data."""
        found = []
        for metric in self.bench.metrics:
            errors = self.bench.tune.sample.outputs - self.bench.tune.sample.outputs.mean(0)
            start = math.sqrt(metric.distortion(errors) / len(metric.root))
            self.calibration = 1.0
            step = self._surrogate_step(metric, start, eps, self.knobs)
            attempts = self._meet(eps, self.bench.tune, metric, step, tolerance=0.03)
            best = min(attempts, key=lambda a: abs(math.log(a.kl / eps)))
            total = best.total(self.bench.horizon) + _slope(attempts) * math.log(best.kl / eps)
            found.append((total, metric, best.settings.step, self.calibration))
        _, self.metric, self.step, self.calibration = min(found, key=lambda f: f[0])

    def _choose_knobs(self, eps: float) -> None:
        """Coordinate descent over the knobs' grids on the tuning data, at equal (calibrated) distortion."""
        assert self.metric is not None and self.step is not None
        coding, distortion, total = self._prepare(self.metric, self.step, self.knobs)
        target = distortion
        slope = self._rate_slope(distortion, total)
        for _ in range(2):
            changed = False
            for name, grid in self.explanation.knobs.items():
                for value in _neighbours(grid, self.knobs[name]):
                    trial = {**self.knobs, name: value}
                    _, d, t = self._prepare(self.metric, self.step, trial)
                    t += slope * math.log(max(d, 1e-30) / target)
                    if t < total - 1e-3:
                        self.knobs, total, changed = trial, t, True
            if not changed:
                break
        self.step = self._surrogate_step(self.metric, self.step, eps, self.knobs)

    def _rate_slope(self, distortion: float, total: float) -> float:
        """-d total / d ln distortion on the tuning data, bits a token."""
        assert self.metric is not None and self.step is not None
        _, d, t = self._prepare(self.metric, self.step * 1.1, self.knobs)
        return max((total - t) / max(math.log(d / distortion), 1e-6), 0.0)

    def _meet(
        self,
        eps: float,
        split: Split,
        metric: Metric | None = None,
        step: float | None = None,
        tolerance: float = KL_TOLERANCE,
    ) -> list[Attempt]:
        """Secant iterations on ln KL(ln step); each is a real evaluation of what the decoder returns."""
        metric, step = metric or self.metric, step or self.step
        assert metric is not None and step is not None
        attempts: list[Attempt] = []
        for _ in range(MAX_EVALUATIONS):
            coding, distortion, _ = self._prepare(metric, step, self.knobs)
            attempts.append(coding.attempt(self.bench, split))
            gap = math.log(max(attempts[-1].kl, 1e-30) / eps)
            self.calibration = bits_to_nats(attempts[-1].kl) / max(distortion, 1e-30)
            if abs(gap) < tolerance:
                break
            if gap < 0 and attempts[-1].residual is not None and not attempts[-1].residual.values.any():
                break  # nothing is left to send, and eps is met: a coarser step changes nothing
            step *= math.exp(-min(max(gap / _kl_slope(attempts), -1.5), 1.5))
        self.step = attempts[-1].settings.step
        return attempts


def _neighbours(grid: Sequence[float], value: float) -> list[float]:
    """The grid's values, nearest to the present one first, without it."""
    position = list(grid).index(value)
    return sorted((g for g in grid if g != value), key=lambda g: abs(list(grid).index(g) - position))


def _kl_slope(attempts: Sequence[Attempt]) -> float:
    """d ln KL / d ln step from the last two attempts; 1.7 (slightly under the quadratic law) from one."""
    if len(attempts) < 2:
        return 1.7
    a, b = attempts[-2], attempts[-1]
    run = math.log(b.settings.step / a.settings.step)
    if abs(run) < 1e-9:
        return 1.7
    return min(max(math.log(b.kl / a.kl) / run, 0.4), 4.0)


def _slope(attempts: Sequence[Attempt]) -> float:
    """-d rate / d ln KL from the two attempts furthest apart, or 0 from one: bits a token."""
    ordered = sorted(attempts, key=lambda a: a.kl)
    first, last = ordered[0], ordered[-1]
    run = math.log(last.kl / first.kl)
    return max((first.rate - last.rate) / run, 0.0) if run > 1e-3 else 0.0
