"""The three columns of one explanation, and that nothing but the message and the symbols reaches them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jaxtyping
import numpy as np
import pytest

from decompositions.baselines import Nothing
from decompositions.clusters import Clusters, ClustersDecoder, ClustersExplanation
from decompositions.pca import PCA
from estimators.accounting import SurpriseAccounting
from estimators.fidelity import Attempt, Bench, Coding
from estimators.prices import Prices
from estimators.recovered import explained_variance, recovered
from mdl.codes.bitstream import BitWriter
from mdl.errors import CodeError, ExplanationError
from mdl.message import Section, decode_message
from mdl.protocols import Explanation, Sample, Settings
from mdl.receiver import decoder_of
from mdl.state import DenseState, IndexState, SparseState, State
from mdl.task import ACTIVATIONS, BEHAVIOUR, Task, build_task

HORIZON, STEP = 1e4, 0.5


def silent(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def estimator(tiny_task: Task) -> SurpriseAccounting:
    return SurpriseAccounting(tiny_task, HORIZON)


@pytest.fixture(scope="module")
def clusters(tiny_task: Task) -> ClustersExplanation:
    return Clusters(k=6).fit(tiny_task.for_fitting())


def settings_for(bench: Bench, knobs: dict[str, float]) -> Settings:
    return Settings(bench.horizon, STEP, bench.metrics[0].root, knobs)


def attempt_of(bench: Bench, explanation: Explanation, residual: bool = True) -> Attempt:
    knobs = {name: grid[0] for name, grid in explanation.knobs.items()}
    examples = bench.examples if residual else None
    return Coding.prepare(bench, explanation, bench.metrics[0], settings_for(bench, knobs), STEP, examples).attempt(
        bench, bench.held_out
    )


@dataclass(frozen=True)
class Leaky:
    """Clusters whose encoder plants the true outputs wherever it can reach: in the decoder, and in its own fields."""

    honest: ClustersExplanation
    name: str = "leaky"
    kind: str = "clusters"

    @property
    def knobs(self) -> Mapping[str, Sequence[float]]:
        return self.honest.knobs

    def section(self, settings: Settings) -> Section:
        return self.honest.section(settings)

    def encode(self, decoder: ClustersDecoder, sample: Sample, settings: Settings) -> IndexState:
        state = self.honest.encode(decoder, sample, settings)
        decoder.centroids[:] = sample.outputs[: len(decoder.centroids)]  # in place
        object.__setattr__(decoder, "centroids", sample.outputs)  # and outright
        object.__setattr__(decoder, "leaked", sample.outputs)
        object.__setattr__(self, "leaked", sample.outputs)
        return state


@pytest.mark.parametrize("residual", [True, False], ids=["with the residual coder", "without"])
def test_what_is_planted_in_the_senders_decoder_has_no_effect(
    estimator: SurpriseAccounting, clusters: ClustersExplanation, residual: bool
):
    honest, leaky = (attempt_of(estimator.bench, e, residual) for e in (clusters, Leaky(clusters)))
    assert leaky.message.data == honest.message.data
    assert leaky.rate == honest.rate
    assert leaky.kl == honest.kl
    np.testing.assert_array_equal(leaky.received.prediction, honest.received.prediction)


def test_the_outlook_is_not_fooled_either(estimator: SurpriseAccounting, clusters: ClustersExplanation):
    bench, knobs = estimator.bench, {"static": 1.0}
    looks = [
        Coding.prepare(bench, e, bench.metrics[0], settings_for(bench, knobs), STEP, bench.examples).outlook(bench)
        for e in (clusters, Leaky(clusters))
    ]
    assert looks[0].distortion == looks[1].distortion
    assert looks[0].total(Prices()) == looks[1].total(Prices())


@pytest.mark.parametrize("decomposition", [Nothing(), Clusters(k=6), PCA(rank=3)], ids=lambda d: type(d).__name__)
def test_a_receiver_gets_the_same_from_the_bytes_and_the_symbols(estimator: SurpriseAccounting, decomposition: Any):
    bench = estimator.bench
    attempt = attempt_of(bench, decomposition.fit(bench.task.for_fitting()))
    inputs = bench.held_out.sample.inputs
    special, explanation, residual = decode_message(bytes(attempt.message.data))
    prediction = decoder_of(explanation).predict(inputs, attempt.state)
    np.testing.assert_array_equal(prediction, attempt.received.prediction)
    values = prediction + decoder_of(residual).predict(inputs, attempt.residual)
    damage = bench.measure(bench.held_out, values, special.header[0].values())
    np.testing.assert_array_equal(damage.kl_bits, attempt.damage.kl_bits)
    total = attempt.state.length().total + attempt.residual.length().total
    assert attempt.rate == pytest.approx(total / inputs.n_tokens)


def sparse(values: np.ndarray) -> SparseState:
    tokens = np.arange(len(values))
    return SparseState(tokens, np.zeros_like(tokens), values, np.zeros(1, np.int64), len(values), True)


@pytest.fixture
def annotations_are_not_checked() -> Iterator[None]:
    """As when the program runs: outside these tests nothing looks at them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("annotations_are_not_checked")
@pytest.mark.parametrize("values", [np.array([0.25, 1.5]), np.array([0.5, 1e12])], ids=["narrow", "wide"])
@pytest.mark.parametrize("state_of", [lambda v: DenseState(v[:, None]), sparse], ids=["dense", "sparse"])
def test_symbols_that_are_no_integers_are_refused(state_of: Callable[[np.ndarray], State], values: np.ndarray):
    """Or real values would travel at the price of their whole parts."""
    with pytest.raises(CodeError, match="2 values of type float64: symbols are integers"):
        state_of(values).length()
    with pytest.raises(CodeError, match="symbols are integers"):
        state_of(values).bits()
    with pytest.raises(CodeError, match="symbols are integers"):
        state_of(values).write(BitWriter())
    assert state_of(np.rint(values).astype(np.int64) + 1).bits() > 0


def test_behaviour_is_the_state_and_the_kl(estimator: SurpriseAccounting, clusters: ClustersExplanation):
    (scored,) = estimator.score(clusters, [BEHAVIOUR], [], silent)
    score, task = scored.score, estimator.task
    special, section = decode_message(scored.message)
    state = clusters.encode(
        decoder_of(section),
        task.held_out.sample(),
        Settings(HORIZON, 1.0, next(m.root for m in estimator.bench.metrics if m.name == score.settings["metric"])),
    )
    prediction = decoder_of(section).predict(task.held_out.sample().inputs, state)
    damage = estimator.bench.measure(estimator.bench.held_out, prediction, special.header[0].values())
    assert score.column("residual") == pytest.approx(damage.kl_bits.mean(), rel=1e-6)
    assert score.column("state") == 8 * len(scored.streams.state) / state.n_tokens
    assert 8 * len(scored.streams.state) == pytest.approx(state.length().total, abs=100)
    # 15 scored tokens a sequence, every one as long: the ratio estimator is the plain standard error of the mean.
    means = damage.kl_bits.reshape(-1, 15).mean(1)
    assert score.column_stderr("residual") == pytest.approx(means.std(ddof=1) / math.sqrt(len(means)), rel=1e-6)
    assert (score.phenomenon, score.fidelity) == (BEHAVIOUR, None)
    assert score.column("static") == 8 * len(scored.message)


def test_figures_beside_the_score_are_of_the_decoded_prediction(
    estimator: SurpriseAccounting, clusters: ClustersExplanation
):
    (scored,) = estimator.score(clusters, [BEHAVIOUR], [], silent)
    beside, bench = scored.score.beside, estimator.bench
    assert beside["l0"] == 1.0  # one centroid a token
    assert beside["flops_ratio"] == 0.0
    assert 0 < beside["explained_variance"] < 1
    assert beside["prediction_kl_bits"] == pytest.approx(scored.score.kl_bits)
    outputs = bench.held_out.sample.outputs
    mean = np.broadcast_to(bench.task.fit.outputs.mean(0), outputs.shape)
    (null,) = estimator.score(Nothing().fit(bench.task.for_fitting()), [BEHAVIOUR], [], silent)
    expected = recovered(bench.measure(bench.held_out, mean, bench.special[1]), estimator.baselines)
    assert null.score.beside["kl_recovered"] == pytest.approx(expected["kl_recovered"], abs=0.1)
    assert null.score.beside["explained_variance"] == pytest.approx(explained_variance(outputs, mean), abs=0.05)
    assert null.score.beside["l0"] == 0.0


def test_a_fidelity_is_met_as_measured(estimator: SurpriseAccounting):
    (scored,) = estimator.score(Nothing().fit(estimator.task.for_fitting()), [ACTIVATIONS], [0.05], silent)
    score = scored.score
    assert score.kl_bits == pytest.approx(0.05 * estimator.null_kl_bits, rel=0.02)
    assert score.evaluations >= 1
    assert min(abs(kl - score.kl_bits) for kl, _ in score.curve) < 1e-12
    finest, coarsest = min(score.curve), max(score.curve)
    assert finest[0] < coarsest[0]
    assert finest[1] > coarsest[1]  # less KL takes more bits


def test_a_fidelity_that_is_not_met_is_an_error(estimator: SurpriseAccounting, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("estimators.solver.MAX_EVALUATIONS", 1)
    monkeypatch.setattr("estimators.solver.KL_TOLERANCE", 0.0)
    monkeypatch.setattr("estimators.solver.Solver._surrogate_step", lambda *_: 3.0)
    explanation = Nothing().fit(estimator.task.for_fitting())
    with pytest.raises(ExplanationError, match="nothing: no step of the residual coder brings the KL to"):
        estimator.score(explanation, [ACTIVATIONS], [1e-4], silent)


def test_a_region_without_arithmetic_has_no_ratio_of_operations(tiny_model: Any, tiny_data: Any):
    task = build_task(tiny_model, "upstream of blocks.0.hook_resid_pre", tiny_data, silent)
    assert task.description["region_flops"] == 0
    (scored,) = SurpriseAccounting(task, 1e6).score(Nothing().fit(task.for_fitting()), [BEHAVIOUR], [], silent)
    assert "flops_ratio" not in scored.score.beside
    assert scored.score.beside["explained_variance"] == pytest.approx(0.0, abs=0.1)
