"""The surprise-accounting estimator: three columns for each explanation, under both phenomena.

Activations at a fidelity: state and residual are lengths of codes on held-out data at a measured KL. Behaviour: the
residual is the KL itself, nothing else being sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from estimators.behaviour import cheapest_for_behaviour
from estimators.conduct import Conduct, bench_seal
from estimators.fidelity import Attempt, Bench, Coding
from estimators.first_use import static_curve
from estimators.intervals import compare_pairs
from estimators.kernels import Damage
from estimators.published.figures import published_figures
from estimators.recovered import Baselines, explained_variance, recovered
from estimators.solver import Solution, Solver
from estimators.training_compute import TrainingLoss, compute_recovered, training_loss
from estimators.transcript import Claim, Transcript
from estimators.verification.audit import Finding, audit
from mdl.errors import MessageError
from mdl.ledger import Comparison, Entry, Published, Score, Scorecard, ratio_stderr
from mdl.message import Message
from mdl.protocols import Explanation, Settings
from mdl.receiver import Receiver, Streams
from mdl.state import StreamLength
from mdl.streams import Coded
from mdl.task import ACTIVATIONS, BEHAVIOUR, Task

STATIC_SOURCE = "semi-adaptive tables and parametric codes, constriction's ANS"
RATE_SOURCE = "Krichevsky and Trofimov 1981"
KL_SOURCE = ("codelength", "M's samples under M_E, beyond M", "Cover 2006, 5.4")
# Bits a token of the state's supports or indices and of its values, and of both streams under codes blind to token ids.
SPLIT = ("support_bits", "value_bits", "state_bits_alone", "residual_bits_alone")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scored:
    """A score, and the bytes that it is a score of: the message and the streams of all held-out tokens."""

    score: Score
    message: bytes
    streams: Streams


@dataclass
class SurpriseAccounting:
    """Scores explanations of one task. `horizon` is N, at which the sender's precisions are chosen."""

    task: Task
    horizon: float
    seed: int = 0
    # The codes of each explanation's latest state: their parameters are slow to fit, and serve its next one.
    codes: dict[str, Coded] = field(default_factory=dict, repr=False)

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.task, self.horizon, self.seed)

    @cached_property
    def writer(self) -> ThreadPoolExecutor:
        """Writes streams behind the search."""
        return ThreadPoolExecutor(1, "streams")

    @cached_property
    def baselines(self) -> Baselines:
        split = self.bench.held_out
        outputs = split.sample.outputs
        kept = self.bench.special[1]
        clean = self.bench.measure(split, outputs, kept)
        return Baselines(clean, self.bench.measure(split, np.zeros_like(outputs), np.zeros_like(kept)))

    @cached_property
    def sealed(self) -> Mapping[str, Any]:
        """What the task was before anything was scored."""
        return bench_seal(self.bench)

    @property
    def null_kl_bits(self) -> float:
        """KL of mean ablation, bits a token: what fidelities are fractions of."""
        return self.bench.null_kl

    def score(
        self,
        explanation: Explanation,
        phenomena: Sequence[str],
        fidelities: Sequence[float],
        progress: Progress,
        envelope: Sequence[float] = (),
    ) -> list[Scored]:
        """Every setting of one explanation: fidelities from coarse to fine, each also with precisions chosen for the
        other horizons of `envelope`, then behaviour.

        **Raises:** `ExplanationError` if a fidelity cannot be met, or the explanation does not play by the rules
        (`estimators.conduct`).
        """
        conduct = Conduct.of(self.bench, explanation, self.sealed)
        solver = Solver(self.bench, explanation)
        conduct.check_decoder(solver.knobs)
        found: list[Callable[[], Scored]] = []
        solved: list[tuple[Solution, int]] = []
        steps = len(fidelities) * (1 + len(envelope)) * (ACTIVATIONS in phenomena) + (BEHAVIOUR in phenomena)
        for fidelity in sorted(fidelities, reverse=True) if ACTIVATIONS in phenomena else ():
            progress(f"{explanation.name} at {100 * fidelity:g} % of the null's KL", len(found), steps)
            solution = solver.solve(fidelity * self.bench.null_kl)
            conduct.check(solution.attempt)
            found.append(self._activations(explanation, fidelity, solver, solution))
            solved.append((solution, len(found) - 1))
            for horizon in envelope:
                progress(f"{explanation.name} at {100 * fidelity:g} % for N = {horizon:g}", len(found), steps)
                other = solver.for_horizon(horizon)
                anew = other.solve(fidelity * self.bench.null_kl)
                conduct.check(anew.attempt)
                found.append(self._activations(explanation, fidelity, other, anew))
        if BEHAVIOUR in phenomena:
            progress(f"{explanation.name} under behaviour", len(found), steps)
            found.append(self._behaviour(explanation, solver, [s for s, _ in solved], conduct))
        conduct.finish()
        scored = [finish() for finish in found]
        curve = tuple(sorted({point for s, index in solved for point in _curve(s, scored[index].score.rate)}))
        notes = (*getattr(explanation, "notes", ()), *self.bench.evaluator.notes)
        return [replace(f, score=replace(f.score, curve=curve, notes=(*f.score.notes, *notes))) for f in scored]

    def score_at(self, explanation: Explanation, settings: Mapping[str, float | str]) -> Scored:
        """Behaviour at settings that are known (`Score.settings`, of whatever explanation with the same knobs) in the
        place of a search. **Raises:** as `score`."""
        conduct = Conduct.of(self.bench, explanation, self.sealed)
        metric = next(m for m in self.bench.metrics if m.name == settings["metric"])
        solver = Solver(self.bench, explanation, metric, float(settings["step"]))
        solver.knobs = {name: float(settings[name]) for name in explanation.knobs}
        solver.coded = self.codes.get(explanation.name)
        known = Settings(self.horizon, solver.step, metric.root, dict(solver.knobs))
        coding = Coding.prepare(self.bench, explanation, metric, known, solver.step, None, solver.prices)
        found = self._as_behaviour(coding, solver, conduct, self.bench.evaluations)()
        conduct.finish()
        return found

    def verify(self, card: Scorecard, sent: Mapping[str, tuple[bytes, Streams]]) -> list[Finding]:
        """Decode what was sent (message and streams, by message file) in fresh processes, and work every figure of a
        scorecard out again."""
        return audit(self, card, sent)

    def compare(self, scores: Sequence[Score]) -> tuple[Comparison, ...]:
        """All pairs of each setting, on the same sequences."""
        scores = [s for s in scores if s.horizon == self.horizon]
        settings = dict.fromkeys((s.phenomenon, s.fidelity) for s in scores)
        chosen = [[s for s in scores if (s.phenomenon, s.fidelity) == setting] for setting in settings]
        return tuple(c for group in chosen for c in compare_pairs(group, self.seed))

    def _activations(
        self, explanation: Explanation, fidelity: float, solver: Solver, solution: Solution
    ) -> Callable[[], Scored]:
        found = (solution.attempt.settings.horizon, solution.evaluations, solution.slope, solution.notes)
        return self._claimed(Claim(explanation.name, ACTIVATIONS, fidelity, *found), solver, solution.attempt)

    def _behaviour(
        self, explanation: Explanation, solver: Solver, solutions: Sequence[Solution], conduct: Conduct
    ) -> Callable[[], Scored]:
        before = self.bench.evaluations
        coding = cheapest_for_behaviour(self.bench, explanation, solver, solutions)
        return self._as_behaviour(coding, solver, conduct, before)

    def _as_behaviour(self, coding: Coding, solver: Solver, conduct: Conduct, before: int) -> Callable[[], Scored]:
        attempt = coding.attempt(self.bench, self.bench.held_out)
        conduct.check(attempt)
        claim = Claim(coding.explanation.name, BEHAVIOUR, None, self.horizon, self.bench.evaluations - before)
        return self._claimed(claim, solver, attempt)

    def _claimed(self, claim: Claim, solver: Solver, attempt: Attempt) -> Callable[[], Scored]:
        """Start to write the streams. What is returned waits for them, and gives the score of what they and the message
        say: entropy coding takes seconds, in which the search goes on."""
        state, codes = solver.send(attempt, self.bench.held_out)
        self.codes[claim.explanation] = state
        writing = self.writer.submit(Streams.write, state, codes)
        settings: dict[str, float | str] = {"metric": attempt.metric, "step": attempt.step, **attempt.settings.knobs}
        receiver, inputs = Receiver.of(attempt.message.data), self.bench.held_out.sample.inputs
        received = receiver.reconstruct(inputs, attempt.state, attempt.residual)
        if not np.array_equal(received.values, attempt.received.values):
            raise MessageError(f"{claim.explanation}: what the message's bytes decode to is not what was measured")
        alone = attempt.damage
        if attempt.residual is not None:
            alone = self.bench.measure(self.bench.held_out, received.prediction, receiver.special)
        claim = replace(claim, settings=settings)

        def finish() -> Scored:
            streams = writing.result()
            transcript = Transcript.of(streams, state, codes, received, receiver.terms(state.state))
            score = self.account(claim, attempt.message, transcript, attempt.damage, alone)
            return Scored(score, attempt.message.data, streams)

        return finish

    def account(
        self,
        claim: Claim,
        message: Message,
        transcript: Transcript,
        damage: Damage,
        alone: Damage,
    ) -> Score:
        """The score of what was received.

        **Arguments:** `damage`: what its values do to M's predictions; `alone`: what the explanation's prediction does
        without the residual coder.
        """
        groups, n = self.bench.held_out.activations.group_sums, transcript.n_tokens
        kl_stderr = ratio_stderr(groups(damage.kl_bits), self._sizes)
        lengths = {"state": transcript.state, "residual": transcript.residual}
        entries = [
            self._stream_entry(column, length, size)
            for (column, length), size in zip(lengths.items(), transcript.stream_bytes, strict=True)
            if length is not None
        ]
        corrected = None if transcript.residual is None else damage
        bits = sum((groups(x.per_token) for x in lengths.values() if x is not None), np.zeros(1))
        if claim.phenomenon == BEHAVIOUR:
            entries.append(Entry("KL", "residual", float(damage.kl_bits.mean()), kl_stderr, *KL_SOURCE))
            bits = bits + groups(damage.kl_bits)
        else:
            # What meeting eps exactly, by sequence, would have cost: KL's own sampling error enters the interval.
            assert claim.fidelity is not None
            bits = bits + claim.slope * groups(damage.kl_bits / (claim.fidelity * self.bench.null_kl) - 1.0)
        return Score(
            explanation=claim.explanation,
            phenomenon=claim.phenomenon,
            fidelity=claim.fidelity,
            horizon=claim.horizon,
            entries=(*_static_entries(message), *entries),
            static=static_curve(message, transcript.touched, n),
            kl_bits=float(damage.kl_bits.mean()),
            kl_stderr=kl_stderr,
            sequence_bits=tuple(map(float, bits)),
            sequence_tokens=tuple(int(s) for s in self._sizes),
            evaluations=claim.evaluations,
            slope=claim.slope,
            settings=claim.settings,
            beside={**self._beside(transcript, alone), **self._training_compute(alone, corrected)},
            notes=claim.notes,
            published=self._published(transcript, claim.horizon),
        )

    @cached_property
    def _sizes(self) -> np.ndarray:
        activations = self.bench.held_out.activations
        return activations.group_sums(np.ones(activations.n_tokens))

    def _stream_entry(self, column: str, length: StreamLength, size: int) -> Entry:
        n = self.bench.held_out.activations.n_tokens
        sums = self.bench.held_out.activations.group_sums(length.per_token)
        stderr = ratio_stderr(sums, self._sizes) if length.total else 0.0
        return Entry(column, column, 8.0 * size / n, stderr, "coded", length.code, RATE_SOURCE)

    def _beside(self, transcript: Transcript, alone: Damage) -> Mapping[str, float]:
        """Of the explanation's own prediction, without the residual coder: as people use it."""
        outputs, flops = self.bench.held_out.sample.outputs, self.task.description["region_flops"]
        # An embedding is looked up, and rows of numbers come from nowhere: there is nothing to compare with.
        ratio = {} if flops == 0 or self.task.region.input == "nothing" else {"flops_ratio": transcript.flops / flops}
        return {
            "l0": transcript.l0,
            "explained_variance": explained_variance(outputs, transcript.prediction),
            **recovered(alone, self.baselines),
            "prediction_kl_bits": float(np.mean(alone.kl_bits)),
            **ratio,
            "learning_bits": transcript.learning,
            **{name: bits / transcript.n_tokens for name, bits in zip(SPLIT, transcript.split, strict=True)},
        }

    def _published(self, transcript: Transcript, horizon: float) -> Mapping[str, Published]:
        outputs = self.bench.held_out.sample.outputs
        return published_figures(transcript.terms, outputs, transcript.prediction, transcript.values, horizon)

    @cached_property
    def _training_loss(self) -> TrainingLoss | None:
        """The model's loss against training compute, where the task says it."""
        record = self.task.description.get("training")
        return None if record is None else training_loss(record)

    def _training_compute(self, alone: Damage, corrected: Damage | None) -> dict[str, float]:
        """Shares of training compute whose models are as good: with the explanation's own prediction in place, and with
        the residual coder's correction where there is one."""
        law = self._training_loss
        if law is None:
            return {}
        clean = float(np.nanmean(self.baselines.clean.loss_bits))
        found = {"compute_recovered": alone}
        if corrected is not None:
            found["compute_recovered_corrected"] = corrected
        return {k: compute_recovered(law, float(np.nanmean(d.loss_bits)) - clean) for k, d in found.items()}


def _curve(solution: Solution, rate: float) -> list[tuple[float, float]]:
    """(KL, rate) of a solution's attempts; those that were not written are priced as the one that was."""
    priced = solution.attempt.rate
    return [(a.kl, a.rate * (rate / priced if priced else 1.0)) for a in solution.attempts]


def _static_entries(message: Message) -> list[Entry]:
    """The header, and the parts of each section of the message."""
    entries = [Entry("header", "static", message.header_bits, 0.0, "coded", "message", STATIC_SOURCE)]
    for name, bits in zip(("special", "explanation", "residual coder"), message.part_bits, strict=False):
        if len(bits):
            total = float(bits.sum())
            entries.append(Entry(f"parts of the {name}", "static", total, 0.0, "coded", "message", STATIC_SOURCE))
    return entries
