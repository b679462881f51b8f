"""Variational estimate of static bits: rows of an explanation as a posterior, paid for by KL(q || p), bits-back.

An explanation is wrapped so that a sample of the posterior stands where its rounded rows stood; all else (decoder,
state, residual coder, the step that meets the fidelity, payment on first use) is as in the two-part code. Bits-back
needs other bits that the sender wants to send anyway, to choose the sample with, and a receiver that can fit q again
once it has decoded everything: hence "estimate".

Against rounding at the best uniform step, a normal posterior of the same error saves (1/2) log2(2 pi e / 12) = 0.2546
bits an entry at high rate; rounding gets some of that back where entries are small against the step (its dead zone).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse

from estimators.fidelity import Attempt, Bench, Coding, encoded
from estimators.first_use import static_bits
from estimators.fisher import Metric
from estimators.meeting import meet
from estimators.posterior import Posterior, fit_posterior
from estimators.solver import Solution
from mdl.message import Message, QuantisedArray, Section, encode_message
from mdl.protocols import Explanation, Sample, Settings
from mdl.receiver import decoder_of
from mdl.state import NoState, State
from mdl.streams import CodedDense, choose
from mdl.units import bits_to_nats, nats_to_bits

FINE = 2.0**-22  # of the largest entry: the grid on which a sample stands in a message
TOLERANCE = 0.02  # of KL; the rest is made good along the solver's slope
OBTAINED = "estimate"


@dataclass(frozen=True)
class StatedRows:
    """The static rows of an explanation at some settings, before rounding: as many as its section then has.

    **Arguments:** `group`, `index`: their place in the section, "header" or "parts"; `rows` [r, d]; `energy` [r]:
    E[c^2] of the coefficients that they are used with; `frequency` [r]: how often, or 1.
    """

    group: str
    index: int
    rows: np.ndarray
    energy: np.ndarray
    frequency: np.ndarray | float = 1.0

    def of(self, section: Section) -> QuantisedArray:
        """The array of a section that states these rows."""
        array: QuantisedArray = getattr(section, self.group)[self.index]
        return array

    def put(self, section: Section, array: QuantisedArray) -> Section:
        """The section with another array in their place."""
        arrays = list(getattr(section, self.group))
        arrays[self.index] = array
        return replace(section, **{self.group: tuple(arrays)})  # type: ignore[arg-type]


RowsOf = Callable[[Any, Settings], StatedRows]


def row_weights(stated: StatedRows, settings: Settings, precision: float) -> np.ndarray:
    """What an error of each row costs, nats a unit of |.|_G^2: 6 / s^2, s being the step that the two-part code would
    take at the knob `static` = `precision` (`Settings.metric_step`)."""
    steps = replace(settings, knobs={"static": precision}).metric_step(stated.energy, stated.frequency)
    return np.broadcast_to(6.0 / np.square(steps), (len(stated.rows),))


def slope_precision(solution: Solution) -> float:
    r"""The precision at which `row_weights` are what the solver's slope says: N E[c^2] d rate / d |e|_G^2.

    With the slope -d rate / d ln KL in nats and KL proportional to |e|_G^2 = 2 D: weight slope / (2 D) in place of
    6 / (p Delta)^2.
    """
    attempt = solution.attempt
    exchange = bits_to_nats(max(solution.slope, 1e-9)) / (2.0 * attempt.distortion)
    return math.sqrt(6.0 / exchange) / attempt.settings.step


@dataclass(frozen=True)
class Drawn:
    """What stands for rows at some settings: the section as it was stated, its posterior, the section with a sample."""

    settings: Settings
    stated: Section
    rows: StatedRows
    posterior: Posterior
    section: Section


@dataclass(frozen=True)
class VariationalExplanation:
    """An explanation whose rows are a sample of a posterior. Everything else is the inner explanation's.

    **Arguments:** `metric`: in which errors of rows are weighed; `precision`: as the knob `static`; `seed`: of the
    sample.
    """

    inner: Explanation
    rows_of: RowsOf
    metric: Metric
    precision: float
    seed: int = 0
    drawn: dict[int, Drawn] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def kind(self) -> str:
        return self.inner.kind

    @property
    def knobs(self) -> Mapping[str, Sequence[float]]:
        return self.inner.knobs

    def draw(self, settings: Settings) -> Drawn:
        """Fit and sample; once for each settings met, the latest kept."""
        known = self.drawn.get(id(settings))
        if known is None or known.settings is not settings:
            stated = self.inner.section(settings)
            rows = self.rows_of(self.inner, settings)
            lattice = rows.of(stated).lattice
            prediction = None if lattice is None else lattice.prediction
            weights = row_weights(rows, settings, self.precision)
            posterior = fit_posterior(rows.rows, weights, self.metric.root, prediction)
            sample = posterior.sample(self.seed)
            array = QuantisedArray.from_values(sample, FINE * max(float(np.abs(sample).max()), 1e-30))
            self.drawn.clear()
            self.drawn[id(settings)] = Drawn(settings, stated, rows, posterior, rows.put(stated, array))
        return self.drawn[id(settings)]

    def section(self, settings: Settings) -> Section:
        return self.draw(settings).section

    def encode(self, decoder: Any, sample: Sample, settings: Settings) -> State:
        return self.inner.encode(decoder, sample, settings)


def variational_static(
    bench: Bench,
    coding: Coding,
    explanation_touched: scipy.sparse.csr_array | None,
    residual_touched: scipy.sparse.csr_array | None,
    n_tokens: int,
    grid: np.ndarray,
) -> np.ndarray:
    """static(N) in bits: the message without the rows, the prior, and KL(q || p) of each row on its first use.

    **Arguments:** `explanation_touched`: parts in the order of the section as it was stated.
    """
    assert isinstance(coding.explanation, VariationalExplanation)
    drawn = coding.explanation.draw(coding.settings)
    array = drawn.rows.of(drawn.section)
    empty = QuantisedArray(np.zeros((len(array.symbols), 0), np.int64), np.zeros(len(array.symbols), np.int64))
    message = encode_message(coding.sections(bench, drawn.rows.put(drawn.section, empty)))
    touched = [None, explanation_touched, residual_touched]
    touched += [None] * (len(message.part_bits) - len(touched))
    header, with_rows = drawn.posterior.prior_bits()
    bits = drawn.posterior.kl_bits + with_rows
    # As a message of that length would be paid, of which nothing but its lengths is looked at.
    whole = Message(bytes(math.ceil((header + float(bits.sum())) / 8.0)), (bits,), 0.0)
    uses = explanation_touched if drawn.rows.group == "parts" else None
    return static_bits(message, touched, n_tokens, grid) + static_bits(whole, [uses], n_tokens, grid)


@dataclass(frozen=True)
class RowPrices:
    """The same rows at the same weights, both ways: bits and weighted errors (bits), in all `entries` of kept rows."""

    entries: int
    rounded_bits: float
    rounded_error: float
    kl_bits: float
    prior_bits: float
    sampled_error: float

    @property
    def saved(self) -> float:
        """Bits plus weighted error that bits-back saves, an entry."""
        rounded = self.rounded_bits + self.rounded_error
        return (rounded - self.kl_bits - self.prior_bits - self.sampled_error) / max(self.entries, 1)


def row_prices(explanation: Explanation, rows_of: RowsOf, metric: Metric, settings: Settings) -> RowPrices:
    """Rounding and bits-back of the rows alone, at the weights that the rounding's own steps imply."""
    section = explanation.section(settings)
    rows = rows_of(explanation, settings)
    array = rows.of(section)
    weights = row_weights(rows, settings, settings.knobs.get("static", 1.0))
    prediction = None if array.lattice is None else array.lattice.prediction
    posterior = fit_posterior(rows.rows, weights, metric.root, prediction)
    left = np.sum(np.square((rows.rows - array.values()) @ metric.root), 1)
    header, with_rows = posterior.prior_bits()
    return RowPrices(
        entries=rows.rows.size,
        rounded_bits=encode_message([Section("rows", (), (array,))]).information_bits,
        rounded_error=float(nats_to_bits(weights @ left)),
        kl_bits=float(posterior.kl_bits.sum()),
        prior_bits=header + float(with_rows.sum()),
        sampled_error=float(nats_to_bits(weights @ posterior.error)),
    )


@dataclass(frozen=True)
class Variational:
    """A variational score at one N: `static` bits as paid by N tokens, `rate` at exactly eps; `kl` as measured."""

    name: str
    horizon: float
    static: float
    rate: float
    kl: float
    precision: float
    row_bits: float

    @property
    def total(self) -> float:
        """Bits a token at N."""
        return self.static / self.horizon + self.rate


def variational(
    bench: Bench, explanation: Explanation, rows_of: RowsOf, solution: Solution, eps: float, seed: int = 0
) -> Variational:
    """Bits-back in place of the rounded rows of a solved two-part code, for the same N, fidelity and settings.

    The precision is the slope's own or the two-part code's, whichever does better on probe data (a residual coder
    mends what is coarser); the residual coder's step then meets `eps` on held-out data.
    """
    attempt = solution.attempt
    assert bench.horizon == attempt.settings.horizon
    metric = next(m for m in bench.metrics if m.name == attempt.metric)
    chosen = attempt.settings.knobs.get("static", 1.0)
    candidates = (slope_precision(solution), chosen)
    wrapped = [VariationalExplanation(explanation, rows_of, bench.metrics[0], p, seed) for p in candidates]
    looks = [_outlook(bench, w, metric, attempt, solution.slope) for w in wrapped]
    best = wrapped[int(np.argmin(looks))]
    coding = Coding.prepare(bench, best, metric, attempt.settings, attempt.step, bench.examples, attempt.prices)
    found = meet(lambda s: coding.at(s).attempt(bench, bench.held_out), attempt.step, eps, TOLERANCE)[-1]
    n, inputs = found.state.n_tokens, bench.held_out.sample.inputs
    (static,) = variational_static(
        bench, coding, _touched(coding, bench.held_out.sample), found.received.touched[2], n, np.array([bench.horizon])
    )
    row_bits = float(best.draw(coding.settings).posterior.kl_bits.sum())
    rate = coded_rate(found, inputs.context()) + solution.slope * math.log(found.kl / eps)
    return Variational(explanation.name, bench.horizon, float(static), rate, found.kl, best.precision, row_bits)


def coded_rate(attempt: Attempt, context: Any) -> float:
    """State and residual under their shortest codes, bits a token."""
    bits = 0.0 if isinstance(attempt.state, NoState) else choose(attempt.state, context).length.total
    if attempt.residual is not None:
        bits += CodedDense.choose(attempt.residual, context).length.total
    return bits / attempt.state.n_tokens


def _touched(coding: Coding, sample: Sample) -> scipy.sparse.csr_array | None:
    """Parts that each token needs, in the order in which the section was stated."""
    state = encoded(coding.explanation, coding.section, sample, coding.settings)
    return decoder_of(coding.section).touched(sample.inputs, state)


def _outlook(bench: Bench, wrapped: VariationalExplanation, metric: Metric, attempt: Attempt, slope: float) -> float:
    """Total on probe data, bits a token, moved to the fixed distortion along the slope; the model is not run."""
    sample = bench.probe.sample
    coding = Coding.prepare(bench, wrapped, metric, attempt.settings, attempt.step, (sample,), attempt.prices)
    look = coding.outlook(bench)
    touched = look.decoder.touched(sample.inputs, look.state)
    n, prices = look.state.n_tokens, attempt.prices
    (static,) = variational_static(bench, coding, touched, look.codes.touched(), n, np.array([bench.horizon]))
    state, residual = look.sizes
    rate = (prices.state.bits(state) + prices.residual.bits(residual)) / n
    return rate + float(static) / bench.horizon + slope * math.log(look.distortion / attempt.distortion)
