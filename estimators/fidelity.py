"""Activations at a fidelity: the standard residual coder behind an explanation, and what the receiver makes of both.

The explanation predicts; the residual coder sends what is missing. Everything that is measured here came out of the
decoder: the message goes to bytes and back, the symbols are the receiver's. The solver that meets a fidelity is in
`estimators/solver.py`.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from estimators.first_use import static_bits
from estimators.fisher import Metric, euclidean_metric, fisher_metric
from estimators.kernels import Damage, RegionEvaluator, evaluator_for
from estimators.prices import Outline, Prices, Size, independent
from mdl.alphabets import check_alphabet
from mdl.errors import ExplanationError, TaskError
from mdl.message import Message, Section, encode_message
from mdl.models.vectors import Vectors
from mdl.protocols import Decoder, Explanation, Sample, Settings
from mdl.receiver import Receiver, Reconstruction, decoder_of, predicted, source_sections, special_section
from mdl.state import DenseState, IndexState, JoinedState, SparseState, State, first_use_order
from mdl.task import Activations, Task
from mdl.transform_coding import TransformCoder, moments, principal_axes

PROBE_SEQUENCES = 16  # of the tuning data: enough to compare settings by, not to fit a transform on
PROBE_ROWS = 4096  # the same, where a sequence is one row of numbers
AXES_TOKENS = 32768  # at most so many tokens for the residual coder's axes
QUANTISER_TOKENS = 8192  # at most so many for its thresholds and reconstruction points


@dataclass(frozen=True)
class Split:
    """Some sequences with what every evaluation on them needs."""

    activations: Activations
    reference: np.ndarray
    sample: Sample

    @classmethod
    def of(cls, evaluator: RegionEvaluator, activations: Activations) -> Split:
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
    sources: dict[str, list[Section]] = field(default_factory=dict, init=False, repr=False)

    def at(self, horizon: float) -> Bench:
        """The same bench for another N: kernels, metrics and splits are shared, as far as they exist."""
        other = copy(self)
        other.horizon = horizon
        return other

    @cached_property
    def evaluator(self) -> RegionEvaluator:
        return evaluator_for(self.task.model, self.task.region)

    @cached_property
    def probe(self) -> Split:
        """A small part of the tuning data, for quick looks."""
        tune = self.task.tune_activations
        return Split.of(self.evaluator, tune.head(PROBE_SEQUENCES if tune.tokens.shape[1] > 1 else PROBE_ROWS))

    @cached_property
    def held_out(self) -> Split:
        if self.task.held_out is None:
            raise TaskError("this task has no held-out data: scores are measured on nothing else")
        return Split.of(self.evaluator, self.task.held_out)

    @cached_property
    def examples(self) -> tuple[Sample, ...]:
        """What the residual coder's axes are fitted on: tuning data first, then as much fit data as is allowed."""
        tune, fit = self.task.tune_activations, self.task.fit_activations
        wanted = max(AXES_TOKENS - tune.n_tokens, 0) // max(fit.n_tokens // len(fit.tokens), 1)
        return (tune.sample(), fit.head(wanted).sample()) if wanted else (tune.sample(),)

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        model = self.task.model  # for Gaussian outputs, the Fisher metric is the Euclidean one
        if isinstance(model, Vectors) and model.likelihood == "gaussian":
            return (euclidean_metric(self.task.width, model.noise or 1.0),)
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
        """Put reconstructed values [n, d] and the special constants in the region's place, and measure.

        **Raises:** `ExplanationError` for a KL that is not finite; it is never clipped.
        """
        full = split.activations.filled(values, dict(zip(self.special[0], special, strict=True)))
        self.evaluations += 1
        damage = self.evaluator.damage(split.activations, split.reference, full)
        if bad := int((~np.isfinite(damage.kl_bits)).sum()):
            raise ExplanationError(
                f"the KL of {bad} of {len(damage.kl_bits)} tokens is infinite or NaN: the explained model gives no "
                "probability to what M does not exclude (unsupported), or overflows. KL is never clipped: mix in a "
                "floor, at log2(vocabulary / floor) bits where it is needed."
            )
        return damage

    def source_sections(self, kind: str) -> list[Section]:
        """The source of a decoder that is not ours: compressed once, sent with every message."""
        if kind not in self.sources:
            self.sources[kind] = source_sections(kind)
        return self.sources[kind]

    @cached_property
    def null_kl(self) -> float:
        """KL of mean ablation on the held-out data, bits a token: what the fidelities are fractions of."""
        mean = self.task.fit.outputs.mean(0, dtype=np.float64)
        n = self.held_out.activations.n_tokens
        return float(self.measure(self.held_out, np.broadcast_to(mean, (n, len(mean))), self.special[1]).kl_bits.mean())


def encoded(explanation: Explanation, section: Section, sample: Sample, settings: Settings) -> State:
    """The sender's symbols for a sample, as the decoder's alphabet takes them.

    The sender encodes with a decoder of its own: what it does to that one cannot matter.
    """
    state = explanation.encode(decoder_of(section), sample, settings)
    return check_alphabet(decoder_of(section).alphabet).accept(state, sample.inputs.n_tokens)


@dataclass(frozen=True)
class Attempt:
    """An explanation coded at one step, as the receiver has it: everything here came out of the decoder.

    `stated` is the explanation's section as it was stated, before its parts were put in the order of first use;
    `sections` are what is sent once, and `message` is these as bytes, written when asked for: sections are integers,
    which come back from the bytes as they were (a score is refused if they do not); `state` and `residual` are the
    symbol streams (residual None under behaviour); `received` is what the receiver made of them, `damage` its measured
    effect on M's predictions; `distortion` is e^T G e / 2 of the error left, nats a token.
    """

    settings: Settings
    step: float
    metric: str
    stated: Section
    sections: tuple[Section, ...]
    state: State
    residual: DenseState | None
    received: Reconstruction
    damage: Damage
    distortion: float
    prices: Prices = field(default_factory=Prices)

    @property
    def kl(self) -> float:
        """Mean KL, bits a token."""
        return float(np.mean(self.damage.kl_bits))

    @cached_property
    def rate(self) -> float:
        """state + residual, bits a token, at the prices in force."""
        residual = 0.0 if self.residual is None else self.prices.residual.bits(independent(self.residual))
        return (self.prices.state.bits(independent(self.state)) + residual) / self.state.n_tokens

    @cached_property
    def message(self) -> Message:
        """What is sent once, as bytes."""
        return encode_message(list(self.sections))

    @property
    def total(self) -> float:
        """Bits a token at the horizon N of the settings, static bits as paid on first use."""
        n = self.settings.horizon
        (static,) = static_bits(self.message, self.received.touched, self.state.n_tokens, np.array([n]))
        return static / n + self.rate


@dataclass(frozen=True)
class Sent:
    """An explanation's symbols for a split, and its section with the parts in the order of their first use."""

    split: Split
    section: Section
    state: State


@dataclass(frozen=True)
class Coding:
    """The sender's choices: an explanation at some settings and, unless behaviour is explained, a residual coder.

    `step` is the residual coder's; the settings hold the step that the explanation's own precisions were chosen for.
    """

    explanation: Explanation
    metric: Metric
    settings: Settings
    step: float
    section: Section
    coder: TransformCoder | None
    errors: np.ndarray | None = None
    prices: Prices = field(default_factory=Prices)
    # The first example with its symbols and errors, for a look at it.
    seen: tuple[Sample, State, np.ndarray] | None = None
    # What does not depend on `step`, by split: shared by the codings that differ in it alone.
    sent: dict[int, Sent] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def prepare(
        cls,
        bench: Bench,
        explanation: Explanation,
        metric: Metric,
        settings: Settings,
        step: float,
        examples: tuple[Sample, ...] | None,
        prices: Prices | None = None,
    ) -> Coding:
        """Quantise the explanation for its settings, and fit the residual coder on `examples` (None: there is none)."""
        settings = replace(settings, corrected=examples is not None)
        section = explanation.section(settings)
        if examples is None:
            return cls(explanation, metric, settings, step, section, None, None, prices or Prices())
        states = [encoded(explanation, section, s, settings) for s in examples]
        decoder = decoder_of(section)
        errors = [s.outputs - predicted(decoder, s.inputs, state) for s, state in zip(examples, states, strict=True)]
        axes = principal_axes(*moments(np.concatenate(errors)), metric.root)
        some = errors[0][:: max(1, len(errors[0]) // QUANTISER_TOKENS)]
        coder, seen = TransformCoder.fit(axes, some, step), (examples[0], states[0], errors[0])
        return cls(explanation, metric, settings, step, section, coder, some, prices or Prices(), seen)

    def at(self, step: float) -> Coding:
        """The same explanation and axes, the residual coder's quantiser fitted anew for another step."""
        assert self.coder is not None
        assert self.errors is not None
        return replace(self, step=step, coder=TransformCoder.fit(self.coder.axes, self.errors, step))

    @cached_property
    def residual_section(self) -> Section:
        """The residual coder, its static precision chosen for its own step."""
        assert self.coder is not None
        return self.coder.section(replace(self.settings, step=self.step, knobs={}))

    def sections(self, bench: Bench, section: Section) -> list[Section]:
        """What is sent once: the special positions' constants, the explanation, the residual coder, and the source of
        a decoder that is not ours."""
        last = [] if self.coder is None else [self.residual_section]
        last += bench.source_sections(section.kind)
        return [special_section(bench.special[1], self.settings.static_step(1.0)), section, *last]

    def _send(self, split: Split) -> Sent:
        """The explanation's own part: its section in the order of first use, and the symbols for the split."""
        if id(split) not in self.sent:
            section = self.section
            state = encoded(self.explanation, section, split.sample, self.settings)
            if isinstance(state, SparseState | IndexState | JoinedState):
                # Features are numbered by first use in the stream, so their parts are sent in that order. Parts
                # beyond the state's, of which a function of the inputs decides, stay where they are.
                touched = state.touched()
                assert touched is not None
                order = first_use_order(touched)
                state = state.reordered(order)
                section = section.reordered(np.concatenate([order, np.arange(len(order), section.n_parts)]))
            self.sent[id(split)] = Sent(split, section, state)
        return self.sent[id(split)]

    def attempt(self, bench: Bench, split: Split) -> Attempt:
        """Send the split: message to bytes and back, reconstruction by the decoded decoders, measurement."""
        inputs, sent = split.sample.inputs, self._send(split)
        sections = self.sections(bench, sent.section)
        receiver = Receiver.of_sections(sections)
        codes = None
        if self.coder is not None:
            codes = self.coder.encode(split.sample.outputs - predicted(receiver.decoder, inputs, sent.state))
        received = receiver.reconstruct(inputs, sent.state, codes)
        return Attempt(
            settings=self.settings,
            step=self.step,
            metric=self.metric.name,
            stated=self.section,
            sections=tuple(sections),
            state=sent.state,
            residual=codes,
            received=received,
            damage=bench.measure(split, received.values, receiver.special),
            distortion=bench.metrics[0].distortion(split.sample.outputs - received.values) / 2,
            prices=self.prices,
        )

    def outlook(self, bench: Bench) -> Outlook:
        """What the probe data say without running the model."""
        sample, decoder = bench.probe.sample, decoder_of(self.section)
        if self.seen is not None and self.seen[0] is sample:
            return Outlook(self, bench, self.seen[1], decoder, self.seen[2])
        state = encoded(self.explanation, self.section, sample, self.settings)
        return Outlook(self, bench, state, decoder, sample.outputs - predicted(decoder, sample.inputs, state))


@dataclass(frozen=True)
class Outlook:
    """An explanation and its residual coder on the probe data, the model not run.

    `errors` [n, d]: what the explanation's prediction lacks.
    """

    coding: Coding
    bench: Bench
    state: State
    decoder: Decoder
    errors: np.ndarray

    @cached_property
    def codes(self) -> DenseState:
        """The residual coder's symbols."""
        assert self.coding.coder is not None
        return self.coding.coder.encode(self.errors)

    @cached_property
    def distortion(self) -> float:
        """e^T G e / 2 of what is left, in the first metric: nats a token, G being the Fisher information there."""
        corrector = decoder_of(self.coding.residual_section)
        left = self.errors - corrector.predict(self.bench.probe.sample.inputs, self.codes)
        return self.bench.metrics[0].distortion(left) / 2

    @cached_property
    def sizes(self) -> tuple[Size, Size]:
        """State and residual under the independent codes."""
        return independent(self.state), independent(self.codes)

    @cached_property
    def outline(self) -> Outline:
        """What the message would hold."""
        return Outline.of(self.coding.sections(self.bench, self.coding.section))

    def static_bits(self, price: float) -> float:
        """static(N) at the horizon, as paid on first use."""
        inputs, outline = self.bench.probe.sample.inputs, self.outline
        touched = [None, self.decoder.touched(inputs, self.state), self.codes.touched()]
        # A third party's decoder has its source behind these, which every token needs.
        touched += [None] * (len(outline.part_bits) - len(touched))
        (bits,) = static_bits(outline, touched, self.state.n_tokens, np.array([self.coding.settings.horizon]))
        return price * float(bits)

    def total(self, prices: Prices) -> float:
        """Bits a token at the horizon, at these prices."""
        state, residual = self.sizes
        rate = (prices.state.bits(state) + prices.residual.bits(residual)) / self.state.n_tokens
        return self.static_bits(prices.static) / self.coding.settings.horizon + rate
