"""The solver: it meets the fidelity, and what it reports is what a receiver with the bytes alone would get."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from decompositions.baselines import ConstantExplanation, Nothing, TokenTable
from decompositions.clusters import Clusters, ClustersExplanation
from estimators.fidelity import Attempt, Bench, Coding
from estimators.prices import Prices
from estimators.solver import Solution, Solver
from mdl.errors import ExplanationError, PluginError, TaskError
from mdl.message import Section, decode_message
from mdl.models.model import Model
from mdl.protocols import Explanation, Inputs, Sample, Settings
from mdl.receiver import decoder_of
from mdl.state import NoState
from mdl.task import Task
from mdl.units import bits_to_nats, nats_to_bits


def kl_bits(model: Model, tokens: np.ndarray, site: str, values: np.ndarray) -> np.ndarray:
    """KL of each position from two whole runs of the model, in float64."""
    rows = []
    for writes in (None, {site: values}):
        logits = np.asarray(model.run(tokens, ["logits"], writes)["logits"], np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        rows.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
    return nats_to_bits(np.sum(np.exp(rows[0]) * (rows[0] - rows[1]), -1))


def prepare(bench: Bench, explanation: Explanation, step: float, knobs: Mapping[str, float]) -> Coding:
    """With the Fisher metric, its residual coder fitted on all that is meant for it."""
    metric = bench.metrics[0]
    settings = Settings(bench.horizon, step, metric.root, knobs)
    return Coding.prepare(bench, explanation, metric, settings, step, bench.examples)


def received(task: Task, attempt: Attempt) -> np.ndarray:
    """The region's outputs as somebody rebuilds them who has the message, the symbols and the tokens."""
    special, explanation, residual = decode_message(attempt.message.data)
    activations = task.held_out
    inputs = activations.sample().inputs
    values = decoder_of(explanation).predict(inputs, attempt.state)
    values = values + decoder_of(residual).predict(inputs, attempt.residual)
    full = np.zeros_like(activations.outputs)
    full[activations.scored] = values
    full[activations.tokens == 0] = special.header[0].values()[0]
    return full


def test_the_null_is_mean_ablation(tiny_bench: Bench, tiny_task: Task, tiny_model: Model) -> None:
    activations = tiny_task.held_out
    values = np.broadcast_to(tiny_task.fit.outputs.mean(0, dtype=np.float64), activations.outputs.shape).copy()
    fit = tiny_task.fit_activations
    values[activations.tokens == 0] = fit.outputs[fit.tokens == 0].mean(0, dtype=np.float64)
    expected = kl_bits(tiny_model, activations.tokens, tiny_task.region.output, values.astype(np.float32))
    assert tiny_bench.null_kl == pytest.approx(expected[activations.scored].mean(), rel=1e-4)
    assert tiny_bench.null_kl > 0.5


def test_the_fidelity_is_met(tiny_bench: Bench, nothing_at_one_percent: Solution) -> None:
    eps = 0.01 * tiny_bench.null_kl
    assert nothing_at_one_percent.attempt.kl == pytest.approx(eps, rel=0.02)
    assert 0 < nothing_at_one_percent.evaluations <= 40
    assert nothing_at_one_percent.notes == ()


def test_what_is_scored_came_out_of_the_decoder(
    tiny_task: Task, tiny_model: Model, nothing_at_one_percent: Solution
) -> None:
    attempt = nothing_at_one_percent.attempt
    activations = tiny_task.held_out
    expected = kl_bits(tiny_model, activations.tokens, tiny_task.region.output, received(tiny_task, attempt))
    assert np.allclose(attempt.damage.kl_bits, expected[activations.scored], rtol=1e-3, atol=1e-5)
    n = activations.n_tokens
    assert attempt.rate <= attempt.residual.length().total / n + 1e-9  # token ids may tell something of it
    assert dataclasses.replace(attempt, prices=Prices()).rate == pytest.approx(attempt.residual.length().total / n)
    assert attempt.total == pytest.approx(attempt.rate + 8 * len(attempt.message.data) / 1e6)


def test_the_rate_falls_as_the_kl_may_rise(
    nothing_at_one_percent: Solution, tiny_bench: Bench, tiny_task: Task
) -> None:
    looser = Solver(tiny_bench, Nothing().fit(tiny_task.for_fitting()), tiny_bench.metrics[0], 0.4)
    found = looser.solve(0.1 * tiny_bench.null_kl)
    assert found.attempt.kl == pytest.approx(0.1 * tiny_bench.null_kl, rel=0.02)
    # Sixteen axes and 3.3 octaves of distortion are 27 bits at high rate, less where axes have gone silent.
    assert 10 < nothing_at_one_percent.attempt.rate - found.attempt.rate < 27
    assert nothing_at_one_percent.slope > 0 or len(nothing_at_one_percent.attempts) == 1


def test_a_prediction_saves_bits(tiny_bench: Bench, tiny_task: Task) -> None:
    """The same step behind the mean and behind the token table: the same KL, for fewer bits."""
    found = []
    for decomposition, knobs in ((Nothing(), {}), (TokenTable(), {"static": 4.0})):
        explanation = decomposition.fit(tiny_task.for_fitting())
        coding = prepare(tiny_bench, explanation, 0.12, knobs)
        found.append(coding.attempt(tiny_bench, tiny_bench.held_out))
    nothing, table = found
    assert table.kl == pytest.approx(nothing.kl, rel=0.15)
    assert table.rate < nothing.rate - 1
    assert table.message.whole_bits > nothing.message.whole_bits
    assert table.received.touched[1].shape[0] == tiny_task.held_out.n_tokens
    assert table.state.length().total == 0


def test_second_order_distortion_predicts_the_kl(tiny_bench: Bench, tiny_task: Task) -> None:
    coding = prepare(tiny_bench, Nothing().fit(tiny_task.for_fitting()), 0.02, {})
    attempt = coding.attempt(tiny_bench, tiny_bench.held_out)
    assert bits_to_nats(attempt.kl) == pytest.approx(attempt.distortion, rel=0.15)


def test_the_outlook_is_what_an_attempt_finds(tiny_bench: Bench, tiny_task: Task) -> None:
    """Rate and distortion without running the model are those of coding the same data in earnest."""
    coding = prepare(tiny_bench, TokenTable().fit(tiny_task.for_fitting()), 0.1, {"static": 4.0})
    look = coding.outlook(tiny_bench)
    attempt, distortion = coding.attempt(tiny_bench, tiny_bench.probe), look.distortion
    total = look.total(Prices(static=attempt.message.whole_bits / look.outline.whole_bits))
    assert attempt.distortion == pytest.approx(distortion, rel=1e-4)
    assert attempt.total == pytest.approx(total, rel=1e-4)


def test_the_order_of_atoms_changes_nothing(tiny_bench: Bench, tiny_task: Task) -> None:
    """Permuting centroids before anything is sent: the same rate and KL, and the same bytes but for coding order."""
    explanation = Clusters(k=24, rounds=3).fit(tiny_task.for_fitting())
    order = np.random.default_rng(0).permutation(len(explanation.centroids))
    permuted = ClustersExplanation(explanation.centroids[order], explanation.frequency[order], explanation.name)
    found = []
    for e in (explanation, permuted):
        coding = prepare(tiny_bench, e, 0.12, {"static": 4.0})
        found.append(coding.attempt(tiny_bench, tiny_bench.held_out))
    first, second = found
    assert second.rate == pytest.approx(first.rate, rel=1e-6)
    assert second.kl == pytest.approx(first.kl, rel=1e-4)
    assert abs(second.message.whole_bits - first.message.whole_bits) <= 32
    assert second.total == pytest.approx(first.total, rel=1e-4)


@dataclasses.dataclass(frozen=True)
class Forgetful:
    """A sender that knows the mean and sends zeros: only what travels may count."""

    mean: np.ndarray
    name: str = "forgetful"
    kind: str = "constant"
    knobs: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def section(self, settings: Settings) -> Section:
        return ConstantExplanation(np.zeros_like(self.mean)).section(settings)

    def encode(self, decoder: object, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)


def test_what_did_not_travel_cannot_help(tiny_bench: Bench, tiny_task: Task) -> None:
    mean = tiny_task.fit.outputs.mean(0, dtype=np.float64)
    kls = []
    for explanation in (Nothing().fit(tiny_task.for_fitting()), Forgetful(mean)):
        metric = tiny_bench.metrics[0]
        settings = Settings(tiny_bench.horizon, 0.1, metric.root)
        coding = Coding.prepare(tiny_bench, explanation, metric, settings, 0.1, None)
        attempt = coding.attempt(tiny_bench, tiny_bench.held_out)
        assert attempt.residual is None
        kls.append(attempt.kl)
    assert kls[0] == pytest.approx(tiny_bench.null_kl, rel=1e-2)
    assert kls[1] > 1.05 * kls[0] or kls[1] < 0.95 * kls[0]


def test_special_positions_have_one_charged_constant(tiny_bench: Bench, tiny_task: Task) -> None:
    ids, rows = tiny_bench.special
    assert ids == (0,)
    fit = tiny_task.fit_activations
    assert np.allclose(rows[0], fit.outputs[:, 0].mean(0), atol=1e-5)
    explanation = Nothing().fit(tiny_task.for_fitting())
    coding = prepare(tiny_bench, explanation, 0.1, {})
    special = coding.sections(tiny_bench, coding.section)[0]
    assert special.kind == "special"
    assert special.header[0].values().shape == (1, 16)
    assert np.allclose(special.header[0].values(), rows, atol=1e-2)


def test_a_fidelity_that_cannot_be_met_is_refused(tiny_bench: Bench, tiny_task: Task) -> None:
    solver = Solver(tiny_bench, Nothing().fit(tiny_task.for_fitting()), tiny_bench.metrics[0], 1e-3)
    with pytest.raises(ExplanationError, match=r"nothing: no step of the residual coder brings the KL to 1e-14 bits"):
        solver.solve(1e-14)


def test_without_held_out_data_there_is_no_score(tiny_task: Task) -> None:
    with pytest.raises(TaskError, match="no held-out data"):
        _ = Bench(tiny_task.for_fitting(), 1e6).held_out


def test_a_section_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(PluginError, match="constnat"):
        decoder_of(Section("constnat"))


def test_evaluations_are_counted(tiny_bench: Bench, tiny_task: Task) -> None:
    before = tiny_bench.evaluations
    n = tiny_task.held_out.n_tokens
    inputs = tiny_task.held_out.sample().inputs
    assert isinstance(inputs, Inputs)
    tiny_bench.measure(tiny_bench.held_out, np.zeros((n, 16), np.float32), tiny_bench.special[1])
    assert tiny_bench.evaluations == before + 1
