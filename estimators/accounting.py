"""The surprise-accounting estimator: three columns for each explanation, under both phenomena.

Activations at a fidelity: state and residual are lengths of codes on held-out data at a measured KL. Behaviour: the
residual is the KL itself, nothing else being sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from estimators.fidelity import Attempt, Bench, Coding
from estimators.first_use import static_curve
from estimators.intervals import compare_pairs
from estimators.recovered import Baselines, explained_variance, recovered
from estimators.solver import Solution, Solver
from mdl.ledger import Comparison, Entry, Score, ratio_stderr
from mdl.protocols import Explanation
from mdl.state import StreamLength
from mdl.task import ACTIVATIONS, BEHAVIOUR, Task

STATIC_SOURCE = "semi-adaptive tables and parametric codes, constriction's ANS"
RATE_SOURCE = "Krichevsky and Trofimov 1981"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scored:
    """A score and the bytes of the message that it is a score of."""

    score: Score
    message: bytes


@dataclass
class SurpriseAccounting:
    """Scores explanations of one task. `horizon` is N, at which the sender's precisions are chosen."""

    task: Task
    horizon: float
    seed: int = 0

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.task, self.horizon, self.seed)

    @cached_property
    def baselines(self) -> Baselines:
        split = self.bench.held_out
        outputs = split.sample.outputs
        kept = self.bench.special[1]
        clean = self.bench.measure(split, outputs, kept)
        return Baselines(clean, self.bench.measure(split, np.zeros_like(outputs), np.zeros_like(kept)))

    @property
    def null_kl_bits(self) -> float:
        """KL of mean ablation, bits a token: what fidelities are fractions of."""
        return self.bench.null_kl

    def score(
        self, explanation: Explanation, phenomena: Sequence[str], fidelities: Sequence[float], progress: Progress
    ) -> list[Scored]:
        """Every setting of one explanation: fidelities from coarse to fine, then behaviour.

        **Raises:** `ExplanationError` if a fidelity cannot be met.
        """
        solver = Solver(self.bench, explanation)
        solutions: list[Solution] = []
        found: list[Scored] = []
        steps = len(fidelities) * (ACTIVATIONS in phenomena) + (BEHAVIOUR in phenomena)
        for fidelity in sorted(fidelities, reverse=True) if ACTIVATIONS in phenomena else ():
            progress(f"{explanation.name} at {100 * fidelity:g} % of the null's KL", len(found), steps)
            solution = solver.solve(fidelity * self.bench.null_kl)
            solutions.append(solution)
            found.append(self._activations(explanation, fidelity, solution))
        if BEHAVIOUR in phenomena:
            progress(f"{explanation.name} under behaviour", len(found), steps)
            found.append(self._behaviour(explanation, solver, solutions))
        curve = tuple(sorted({p for s in solutions for p in ((a.kl, a.rate) for a in s.attempts)}))
        notes = self.bench.evaluator.notes
        return [Scored(replace(f.score, curve=curve, notes=(*f.score.notes, *notes)), f.message) for f in found]

    def compare(self, scores: Sequence[Score]) -> tuple[Comparison, ...]:
        """All pairs of each setting, on the same sequences."""
        settings = dict.fromkeys((s.phenomenon, s.fidelity) for s in scores)
        chosen = [[s for s in scores if (s.phenomenon, s.fidelity) == setting] for setting in settings]
        return tuple(c for group in chosen for c in compare_pairs(group, self.seed))

    def _activations(self, explanation: Explanation, fidelity: float, solution: Solution) -> Scored:
        attempt, eps = solution.attempt, fidelity * self.bench.null_kl
        assert attempt.residual is not None
        streams = {"state": attempt.state.length(), "residual": attempt.residual.length()}
        entries = [self._stream_entry(column, length) for column, length in streams.items()]
        groups = self.bench.held_out.activations.group_sums
        bits = sum((groups(s.per_token) for s in streams.values()), np.zeros(1))
        # What meeting eps exactly, sequence by sequence, would have cost: KL's own sampling error enters the interval.
        bits = bits + solution.slope * groups(attempt.damage.kl_bits / eps - 1.0)
        score = self._score(explanation, attempt, ACTIVATIONS, fidelity, entries, bits, solution.evaluations)
        return Scored(replace(score, notes=solution.notes), attempt.message.data)

    def _behaviour(self, explanation: Explanation, solver: Solver, solutions: Sequence[Solution]) -> Scored:
        before = self.bench.evaluations
        coding = self._cheapest_for_behaviour(explanation, solver, solutions)
        attempt = coding.attempt(self.bench, self.bench.held_out)
        length, kl = attempt.state.length(), attempt.damage.kl_bits
        sizes = self._sizes
        groups = self.bench.held_out.activations.group_sums
        stderr = ratio_stderr(groups(kl), sizes)
        entries = [
            self._stream_entry("state", length),
            Entry(
                "KL", "residual", attempt.kl, stderr, "codelength", "M's samples under M_E, beyond M", "Cover 2006, 5.4"
            ),
        ]
        bits = groups(length.per_token) + groups(kl)
        evaluations = self.bench.evaluations - before
        score = self._score(explanation, attempt, BEHAVIOUR, None, entries, bits, evaluations)
        return Scored(score, attempt.message.data)

    def _cheapest_for_behaviour(
        self, explanation: Explanation, solver: Solver, solutions: Sequence[Solution]
    ) -> Coding:
        """Descend on the step (which scales every precision) for the shortest total on the probe data."""
        metric = solver.metric or self.bench.metrics[0]
        outputs = self.bench.probe.sample.outputs
        spread = math.sqrt(metric.distortion(outputs - outputs.mean(0)) / len(metric.root))
        start = solutions[0].attempt.settings.step if solutions else spread
        totals: dict[int, tuple[float, Coding]] = {}

        def total(exponent: int) -> float:
            if exponent not in totals:
                step = start * 2.0**exponent
                coding = Coding.prepare(self.bench, explanation, metric, step, solver.knobs, None)
                attempt = coding.attempt(self.bench, self.bench.probe)
                totals[exponent] = (attempt.total(self.horizon) + attempt.kl, coding)
            return totals[exponent][0]

        best = min((-3, 0, 3), key=total)
        best = min((best - 1, best, best + 1), key=total)
        return totals[best][1]

    @cached_property
    def _sizes(self) -> np.ndarray:
        activations = self.bench.held_out.activations
        return activations.group_sums(np.ones(activations.n_tokens))

    def _stream_entry(self, column: str, length: StreamLength) -> Entry:
        n = self.bench.held_out.activations.n_tokens
        sums = self.bench.held_out.activations.group_sums(length.per_token)
        stderr = ratio_stderr(sums, self._sizes) if length.total else 0.0
        return Entry(column, column, length.total / n, stderr, "codelength", length.code, RATE_SOURCE)

    def _score(
        self,
        explanation: Explanation,
        attempt: Attempt,
        phenomenon: str,
        fidelity: float | None,
        entries: list[Entry],
        sequence_bits: np.ndarray,
        evaluations: int,
    ) -> Score:
        activations = self.bench.held_out.activations
        n, message = activations.n_tokens, attempt.message
        static = [Entry("header", "static", message.header_bits, 0.0, "coded", "message", STATIC_SOURCE)]
        for name, bits in zip(("special", "explanation", "residual coder"), message.part_bits, strict=False):
            if len(bits):
                entry = Entry(
                    f"parts of the {name}", "static", float(bits.sum()), 0.0, "coded", "message", STATIC_SOURCE
                )
                static.append(entry)
        sums = activations.group_sums(attempt.damage.kl_bits)
        return Score(
            explanation=explanation.name,
            phenomenon=phenomenon,
            fidelity=fidelity,
            entries=(*static, *entries),
            static=static_curve(message, attempt.touched, n),
            kl_bits=attempt.kl,
            kl_stderr=ratio_stderr(sums, self._sizes),
            sequence_bits=tuple(map(float, sequence_bits)),
            sequence_tokens=tuple(int(s) for s in self._sizes),
            evaluations=evaluations,
            settings={"metric": attempt.metric, "step": attempt.settings.step, **attempt.settings.knobs},
            beside=self._beside(attempt),
        )

    def _beside(self, attempt: Attempt) -> Mapping[str, float]:
        """Of the explanation's own prediction, without the residual coder: as people use it."""
        split = self.bench.held_out
        damage = attempt.damage
        if attempt.residual is not None:
            damage = self.bench.measure(split, attempt.prediction, self.bench.special[1])
        touched = attempt.state.touched()
        region = self.task.description["region_flops"]
        return {
            "l0": 0.0 if touched is None else touched.nnz / attempt.state.n_tokens,
            "explained_variance": explained_variance(split.sample.outputs, attempt.prediction),
            **recovered(damage, self.baselines),
            "prediction_kl_bits": float(np.mean(damage.kl_bits)),
            "flops_ratio": attempt.flops / region,
            "learning_bits": sum(s.length().learning for s in (attempt.state, attempt.residual) if s is not None)
            / attempt.state.n_tokens,
        }
