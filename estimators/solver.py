"""Choices of the sender: metric, knobs and step, for the shortest total at a fidelity.

Metric and knobs are chosen on tuning data, mostly by the second-order distortion e^T G e / 2, which costs no model
evaluation; the step is then solved for by real evaluations of held-out data, of whose message it is a part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from estimators.fidelity import Attempt, Bench, Coding, Outlook, Split
from estimators.fisher import Metric
from estimators.prices import Outline, Prices
from mdl.errors import ExplanationError, MessageError
from mdl.protocols import Explanation, Sample, Settings
from mdl.streams import Coded, CodedDense, choose
from mdl.units import bits_to_nats

KL_TOLERANCE = 0.01  # the solver stops within this relative distance of eps ...
KL_PROMISE = 0.02  # ... and a score is refused beyond this one
SMALL_RATE = 0.25  # of the total: what is told per token is little beside the message
MAX_EVALUATIONS = 12  # of the held-out data, per fidelity
LARGEST_COARSENING = 1.5  # at a time, of an explanation that meets a fidelity with no residual at all
HOPELESS = 1.1  # a metric whose total is so many times the other's at equal distortion is not searched any further
KNOWN = 8  # outlooks that are kept
SMALL_GAP = 0.3  # in the logarithm of the distortion: further away, its price is worked out anew
LEAST_GAIN = 1e-3  # of a move: bits a token, or a share of what is below one
NARROW = 0.02  # steps closer than this (in the logarithm) are not told apart
# Two attempts closer than this in ln KL say more about quantisation noise than about the slope of the rate.
SLOPE_RUN = 0.1
# d ln KL / d ln step before it was measured: a little under the quadratic law, because of dead zones.
USUAL_KL_SLOPE = 1.7
FLAT = 0.1  # a smaller slope than this is none


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
    step: float = 1.0
    knobs: dict[str, float] = field(default_factory=dict)
    # Measured KL over second-order distortion at the last evaluation: 1 where the quadratic approximation is exact.
    calibration: float = 1.0
    # -d rate / d ln KL, bits a token, where it was last measured.
    slope: float = 0.0
    # What streams cost over the closed form that the search goes by, and the codes by which that was last measured.
    prices: Prices = field(default_factory=Prices)
    coded: Coded | None = None
    corrected: CodedDense | None = None
    known: dict[tuple[Any, ...], Outlook] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        middle = {k: v[len(v) // 2] for k, v in self.explanation.knobs.items()}
        self.knobs = middle | self._start | self.knobs

    @property
    def _start(self) -> dict[str, float]:
        """Where knobs are to begin, if an explanation says so."""
        return dict(getattr(self.explanation, "start", {}))

    def send(self, attempt: Attempt, split: Split) -> tuple[Coded, CodedDense | None]:
        """An attempt's streams under their shorter codes; the search goes by these prices from here on."""
        context = split.sample.inputs.context()
        self.coded = choose(attempt.state, context, self.coded)
        codes = None if attempt.residual is None else CodedDense.choose(attempt.residual, context, self.corrected)
        self.corrected = codes or self.corrected
        self.prices = Prices.of(self.coded, codes, attempt.message.whole_bits / Outline.of(attempt.sections).whole_bits)
        return self.coded, codes

    def for_horizon(self, horizon: float) -> Solver:
        """A solver that starts from what this one found, and chooses every precision for another N."""
        return replace(self, bench=self.bench.at(horizon), knobs=dict(self.knobs))

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
        best = _nearest(attempts, eps)
        notes: tuple[str, ...] = ()
        if best.kl < eps * (1 - KL_PROMISE):
            notes = (f"meets the fidelity with room to spare: KL {best.kl:.4g} of the {eps:.4g} bits a token allowed",)
        elif best.kl > eps * (1 + KL_PROMISE):
            raise ExplanationError(
                f"{self.explanation.name}: no step of the residual coder brings the KL to {eps:.4g} bits a token; the "
                f"nearest of {len(attempts)} evaluations is {best.kl:.4g}. Either the fidelity is beyond float32, or "
                "the data are so few that KL jumps from step to step: take a coarser fidelity or more sequences."
            )
        return Solution(best, tuple(attempts), self.bench.evaluations - before, self.slope, notes)

    def _search(self, eps: float) -> list[Attempt]:
        """Metric, step and knobs, then evaluations of held-out data."""
        if self.metric is None:
            self._choose_metric(eps)
            assert self.metric is not None
        else:
            self._reconsider_metric(eps)
            if self._choose_knobs():
                self.step = self._surrogate_step(self.metric, self.step, eps)
        return self._meet(eps, self.bench.held_out, self.metric, KL_TOLERANCE)

    def _outlook(self, metric: Metric, step: float, knobs: Mapping[str, float]) -> Outlook:
        """What the probe data say of a choice; asked for again, it is not worked out again."""
        bench, settings = self.bench, self._settings(metric, step, knobs)
        key = (metric.name, step, bench.horizon, *sorted(knobs.items()))
        if key not in self.known:
            coding = Coding.prepare(bench, self.explanation, metric, settings, step, (bench.probe.sample,))
            self.known = {**dict(list(self.known.items())[-KNOWN:]), key: coding.outlook(bench)}
        return self.known[key]

    def _settings(self, metric: Metric, step: float, knobs: Mapping[str, float]) -> Settings:
        return Settings(self.bench.horizon, step, metric.root, dict(knobs))

    def target(self, eps: float) -> float:
        """The second-order distortion, nats a token, at which the KL is expected to be `eps` bits."""
        return bits_to_nats(eps) / self.calibration

    def _surrogate_step(self, metric: Metric, step: float, eps: float) -> float:
        """The step whose second-order distortion, times the calibration, is eps."""
        return self._step_for(metric, step, self.knobs, self.target(eps))

    def _step_for(self, metric: Metric, step: float, knobs: Mapping[str, float], target: float) -> float:
        """The step whose second-order distortion is `target`, nats a token (secant in the logarithm)."""
        slope, previous = USUAL_KL_SLOPE, None
        for _ in range(6):
            gap = math.log(max(self._outlook(metric, step, knobs).distortion, 1e-30) / target)
            if previous is not None and abs(math.log(step / previous[0])) > 1e-6:
                slope = min(max((gap - previous[1]) / math.log(step / previous[0]), 0.5), 4.0)
            if abs(gap) < 0.03:
                break
            previous = (step, gap)
            step *= math.exp(-min(max(gap / slope, -4.0), 4.0))
        return step

    def _choose_metric(self, eps: float) -> None:
        """Fisher or Euclidean, each with its best knobs: the shorter total at equal measured KL on the probe data."""
        found: list[tuple[float, Metric, dict[str, float], float, float, Attempt]] = []
        outputs = self.bench.probe.sample.outputs
        for metric in self.bench.metrics:
            self.metric, self.knobs, self.calibration = metric, dict(self.knobs), 1.0
            start = metric.spread(outputs)
            self.step = self._surrogate_step(metric, start, eps)
            if self.coded is None:
                probe = self.bench.probe
                self.send(self._prepare(metric, (probe.sample,)).attempt(self.bench, probe), probe)
            if found and self._outlook(metric, self.step, self.knobs).total(self.prices) > HOPELESS * found[0][0]:
                continue  # far behind with the same knobs at the same distortion: its own knobs will not turn it
            self._choose_knobs()
            self.step = self._surrogate_step(metric, self.step, eps)
            attempts = self._meet(eps, self.bench.probe, metric, tolerance=0.05)
            total = _total_at(attempts, eps)
            found.append((total, metric, self.knobs, self.step, self.calibration, attempts[-1]))
        _, self.metric, self.knobs, self.step, self.calibration, best = min(found, key=lambda f: f[0])
        # The knobs decided how much token ids tell, and that decides the knobs: once more at the prices found.
        self.send(best, self.bench.probe)
        if self._choose_knobs():
            self.step = self._surrogate_step(self.metric, self.step, eps)

    def _reconsider_metric(self, eps: float) -> None:
        """The metric and its step for another fidelity, by the outlook at the knobs in force: what is shorter at 10 %
        need not be at 1 %."""
        assert self.metric is not None
        found: list[tuple[float, Metric, float]] = []
        for metric in sorted(self.bench.metrics, key=lambda m: m is not self.metric):
            start = self.step * float(np.linalg.norm(metric.root) / np.linalg.norm(self.metric.root))
            look = self._outlook(metric, start, self.knobs)
            if found and look.total(self.prices) > HOPELESS * found[0][0] and look.distortion > self.target(eps):
                continue  # longer, and worse
            step = self._surrogate_step(metric, start, eps)
            found.append((self._outlook(metric, step, self.knobs).total(self.prices), metric, step))
        _, self.metric, self.step = min(found, key=lambda f: f[0])

    def _choose_knobs(self) -> bool:
        """Hill climbing on the knobs' grids at equal distortion on the probe data; True if anything changed.

        From a quarter of a grid, or from where the explanation would begin, where that is better than where the climb
        would: where a knob rounds every value to zero, so do its neighbours, and no climb leads away.
        """
        if all(len(grid) < 2 for grid in self.explanation.knobs.values()):
            return False
        assert self.metric is not None
        here, there = (self._outlook(self.metric, self.step * factor, self.knobs) for factor in (1.0, 1.1))
        target, total = here.distortion, here.total(self.prices)
        slope = max((total - there.total(self.prices)) / max(math.log(there.distortion / target), 1e-6), 0.0)
        before = dict(self.knobs)
        for name, grid in self.explanation.knobs.items():
            total = self._move(name, self._start.get(name, grid[len(grid) // 4]), target, total, slope)
            total = self._climb(name, list(grid), target, total, slope)
        return self.knobs != before

    def _move(self, name: str, value: float, target: float, total: float, slope: float) -> float:
        """Give a knob another value if the total falls; `slope` is -d total / d ln distortion. Returns the total.

        Where the distortion hardly changes, what it costs to have it back is read off the slope. Where it does, the
        step is solved for again: a neuron that is gone cannot be made good at the price of finer numbers.
        """
        assert self.metric is not None
        trial, step = {**self.knobs, name: value}, self.step
        look = self._outlook(self.metric, step, trial)
        found, gap = look.total(self.prices), math.log(max(look.distortion, 1e-30) / target)
        enough = total - LEAST_GAIN * min(total, 1.0)
        if gap > 0 and found >= enough:
            return total  # longer, and worse
        if abs(gap) < SMALL_GAP:
            found += slope * gap
        else:
            step = self._step_for(self.metric, step, trial, target)
            found = self._outlook(self.metric, step, trial).total(self.prices)
        if found >= enough:
            return total
        self.knobs, self.step = trial, step
        return found

    def _climb(self, name: str, grid: list[float], target: float, total: float, slope: float) -> float:
        """Move one knob along its grid for as long as the total falls."""
        position = grid.index(self.knobs[name])
        for direction in (1, -1):
            start = position
            while 0 <= position + direction < len(grid):
                total = self._move(name, grid[position + direction], target, total, slope)
                if self.knobs[name] != grid[position + direction]:
                    break
                position += direction
            if position != start:
                break
        return total

    def _meet(self, eps: float, split: Split, metric: Metric, tolerance: float) -> list[Attempt]:
        """Secant iterations on ln KL(ln step), each a real evaluation of what the decoder returns.

        The explanation is quantised once, for the step at hand: were it quantised anew for each trial step, KL would
        jump wherever one of its own steps moves to the next place on its grid. Its quantisation moves with the step in
        two cases: if it meets eps with nothing left to send behind it, so that a coarser one is wanted; and if it does
        not meet it, the message is nearly all that is paid for, and a finer one is shorter than a longer residual.
        """
        step = self.step
        attempts = self._walk(eps, split, metric, tolerance, False)
        first = attempts[0]
        little = _silent(first) or first.rate <= SMALL_RATE * first.total
        if first.kl <= eps * (1 + tolerance) or not little:
            return attempts
        ended, self.step = self.step, step
        finer = self._walk(eps, split, metric, tolerance, True)
        if _total_met(finer, eps) < _total_met(attempts, eps):
            return finer
        self.step, self.slope = ended, rate_slope(attempts)
        return attempts

    def _walk(self, eps: float, split: Split, metric: Metric, tolerance: float, together: bool) -> list[Attempt]:
        """The iterations; `together`: whether the explanation's quantisation moves from the beginning."""
        examples = self.bench.examples if split is self.bench.held_out else (self.bench.probe.sample,)
        coding = self._prepare(metric, examples)
        attempts: list[Attempt] = []
        for _ in range(MAX_EVALUATIONS):
            if together:
                coding = self._prepare(metric, examples)
            last = coding.at(self.step).attempt(self.bench, split)
            gap = math.log(max(last.kl, 1e-30) / eps)
            self.calibration = bits_to_nats(last.kl) / max(last.distortion, 1e-30)
            if not together and gap < 0 and _silent(last):
                together, attempts = True, []
            attempts.append(last)
            if abs(gap) < tolerance:
                break
            step = _next_step(attempts, eps)
            if together:
                step = min(step, LARGEST_COARSENING * last.step)
                if min(abs(math.log(step / a.step)) for a in attempts) < NARROW:
                    break
            self.step = step
        self.step = attempts[-1].step
        self.slope = rate_slope(attempts)
        return attempts

    def _prepare(self, metric: Metric, examples: tuple[Sample, ...]) -> Coding:
        settings = self._settings(metric, self.step, self.knobs)
        return Coding.prepare(self.bench, self.explanation, metric, settings, self.step, examples, self.prices)


def _silent(attempt: Attempt) -> bool:
    """Whether a residual coder stands behind the explanation and has nothing to send."""
    return attempt.residual is not None and not attempt.residual.values.any()


def _total_met(attempts: Sequence[Attempt], eps: float) -> float:
    """Total at the horizon of what meets eps, bits a token; infinite if nothing does."""
    best = _nearest(attempts, eps)
    return best.total if best.kl <= eps * (1 + KL_PROMISE) else math.inf


def _nearest(attempts: Sequence[Attempt], eps: float) -> Attempt:
    """The attempt nearest to eps; if that is beyond the promise, the nearest that stays below it, if there is one."""
    best = min(attempts, key=lambda a: abs(math.log(a.kl / eps)))
    below = [a for a in attempts if a.kl <= eps]
    return max(below, key=lambda a: a.kl) if best.kl > eps * (1 + KL_PROMISE) and below else best


def _kl_slope(attempts: Sequence[Attempt]) -> float:
    """d ln KL / d ln step from the last two attempts."""
    if len(attempts) < 2:
        return USUAL_KL_SLOPE
    a, b = attempts[-2], attempts[-1]
    run = math.log(b.step / a.step)
    return min(max(math.log(b.kl / a.kl) / run, 0.4), 4.0) if abs(run) > 1e-9 else USUAL_KL_SLOPE


def _flat(attempts: Sequence[Attempt]) -> bool:
    """Whether KL did not fall with the step between the last two attempts."""
    if len(attempts) < 2:
        return False
    a, b = attempts[-2], attempts[-1]
    return abs(math.log(b.kl / a.kl)) < FLAT * abs(math.log(b.step / a.step))


def _total_at(attempts: Sequence[Attempt], eps: float) -> float:
    """Total at the horizon, bits a token, on the line in ln KL through the two attempts nearest to eps."""
    near = sorted(attempts, key=lambda a: abs(math.log(a.kl / eps)))[:2]
    gap = math.log(near[0].kl / eps)
    run = math.log(near[-1].kl / near[0].kl)
    slope = (near[0].rate - near[-1].rate) / run if abs(run) > SLOPE_RUN else rate_slope(near)
    return near[0].total + max(slope, 0.0) * gap


def _next_step(attempts: Sequence[Attempt], eps: float) -> float:
    """Between two neighbouring steps on either side of eps, once there are such; by the slope before.

    On little data KL jumps by a few per cent from step to step, so that a secant through the last two is led astray.
    """
    points = [(math.log(a.step), math.log(max(a.kl, 1e-30) / eps)) for a in attempts]
    ordered = sorted(points)
    brackets = [(a, b) for a, b in pairwise(ordered) if (a[1] > 0) != (b[1] > 0)]
    if not brackets:
        step, gap = points[-1]
        move = min(max(gap / _kl_slope(attempts), -1.5), 1.5)
        if gap > 0 and _flat(attempts):  # nearly all symbols are zero: a slope leads nowhere
            move = max(move, math.log(2.0))
        return math.exp(step - move)
    (a, gap_a), (b, gap_b) = min(brackets, key=lambda pair: abs(pair[0][1]) + abs(pair[1][1]))
    share = min(max(gap_a / (gap_a - gap_b), 0.1), 0.9)
    return math.exp(a + share * (b - a))


def rate_slope(attempts: Sequence[Attempt]) -> float:
    """-d rate / d ln KL, bits a token: from the two attempts furthest apart, or at high rate if these are too close.

    At high rate KL goes with the square of the step, and every non-zero symbol costs log2 of what the step shrinks by:
    half a bit for each factor of two in KL, which is (non-zero symbols a token) / (2 ln 2) for each unit of ln KL.
    """
    ordered = sorted(attempts, key=lambda a: a.kl)
    run = math.log(ordered[-1].kl / ordered[0].kl)
    if run > SLOPE_RUN:
        return max((ordered[0].rate - ordered[-1].rate) / run, 0.0)
    codes = attempts[-1].residual
    return 0.0 if codes is None else float((codes.values != 0).sum()) / codes.n_tokens / (2.0 * math.log(2.0))
