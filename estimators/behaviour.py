"""Behaviour: the sender's choices where nothing is sent behind the explanation and its KL is left as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from estimators.fidelity import Bench, Coding
from estimators.fisher import Metric
from estimators.prices import Prices
from estimators.solver import LEAST_GAIN, Solution, Solver
from mdl.errors import ExplanationError, MessageError
from mdl.models.vectors import Vectors
from mdl.protocols import Explanation, Settings


@dataclass(frozen=True)
class Effort:
    """How far the step is searched, in octaves from where the search begins (the step scales every precision).

    `first`: all looked at, `moves`: made from the best for as long as they gain, `most`: evaluations of the probe data.
    """

    first: tuple[float, ...]
    moves: tuple[float, ...]
    most: int


OF_TRANSFORMERS = Effort((-4.0, 0.0, 4.0), (-2.0, 2.0, -1.0, 1.0), 8)
# An evaluation of rows takes no time, and their totals have several valleys.
OCTAVES = (-6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)
OF_ROWS = Effort(OCTAVES, (-1.0, 1.0, -0.5, 0.5, -0.25, 0.25), 40)


@dataclass
class Search:
    """Coordinate descent on the step and the knobs for the shortest static(N) / N + state + KL on the probe data."""

    bench: Bench
    explanation: Explanation
    metric: Metric
    prices: Prices
    start: float
    found: dict[tuple[object, ...], tuple[float, Coding | None]] = field(default_factory=dict)

    def total(self, exponent: float, knobs: Mapping[str, float]) -> float:
        """Bits a token at the horizon, of what the decoder returns."""
        key = (exponent, *sorted(knobs.items()))
        if key not in self.found:
            if len(self.found) >= self.effort.most:
                return math.inf
            step = self.start * 2.0**exponent
            settings = Settings(self.bench.horizon, step, self.metric.root, dict(knobs))
            try:
                coding = Coding.prepare(self.bench, self.explanation, self.metric, settings, step, None, self.prices)
                attempt = coding.attempt(self.bench, self.bench.probe)
                self.found[key] = (attempt.total + attempt.kl, coding)
            except MessageError:  # a step that the explanation cannot take
                self.found[key] = (math.inf, None)
        return self.found[key][0]

    def run(self, knobs: Mapping[str, float]) -> Coding:
        """From these knobs and the best of a few steps: each coordinate in turn, until nothing gains.

        **Raises:** `ExplanationError` if no step can be sent.
        """
        now = dict(knobs)
        # With nothing beside it, "static" scales what the step scales: the same messages again.
        grids = {} if set(now) == {"static"} else self.explanation.knobs
        exponent = min(self.effort.first, key=lambda e: self.total(e, now))
        best, before = self.total(exponent, now), math.inf
        while best < before - LEAST_GAIN * min(best, 1.0):
            before = best
            for move in self.effort.moves:
                while self.total(exponent + move, now) < self.total(exponent, now):
                    exponent += move
            for name, grid in grids.items():
                now = self._along(exponent, now, name, grid)
            best = self.total(exponent, now)
        coding = min(self.found.values(), key=lambda f: f[0])[1]
        if coding is None:
            raise ExplanationError(
                f"{self.explanation.name}: none of {len(self.found)} steps from {self.start:.3g} on can be sent. Is a "
                "number of the explanation far larger than the outputs?"
            )
        return coding

    @property
    def effort(self) -> Effort:
        """What the model allows."""
        return OF_ROWS if isinstance(self.bench.task.model, Vectors) else OF_TRANSFORMERS

    def _along(self, exponent: float, knobs: dict[str, float], name: str, grid: Sequence[float]) -> dict[str, float]:
        """The best of a knob's ends and neighbours, and on from there for as long as it gains."""
        here = grid.index(knobs[name])
        places = {here, 0, len(grid) - 1, max(here - 1, 0), min(here + 1, len(grid) - 1)}
        place = min(sorted(places), key=lambda p: self.total(exponent, {**knobs, name: grid[p]}))
        for move in (-1, 1):
            while 0 <= place + move < len(grid) and self.total(
                exponent, {**knobs, name: grid[place + move]}
            ) < self.total(exponent, {**knobs, name: grid[place]}):
                place += move
        return {**knobs, name: grid[place]}


def cheapest_for_behaviour(
    bench: Bench, explanation: Explanation, solver: Solver, solutions: Sequence[Solution]
) -> Coding:
    """The explanation at its shortest total; the step begins where the coarsest fidelity was met, or at the spread of
    the outputs."""
    metric = solver.metric or bench.metrics[0]
    outputs = bench.probe.sample.outputs
    spread = metric.spread(outputs)
    start = solutions[0].attempt.step if solutions else spread
    return Search(bench, explanation, metric, solver.prices, start).run(solver.knobs)
