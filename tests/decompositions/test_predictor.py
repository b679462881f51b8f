"""Prediction from the previous position's reconstruction: the loop, the recurrence, an exactly known source."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from decompositions.pca import PCA
from decompositions.predictor import Predictor, PredictorDecoder, PredictorExplanation, close_loop, stable
from estimators.conduct import check_decoder
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.protocols import Decoder, Decomposition, Explanation, Inputs, Sample, Settings
from mdl.receiver import decoder_of
from mdl.state import DenseState
from mdl.task import Activations, Task

WIDTH = 4


def source(sequences: int = 40, positions: int = 50, seed: int = 0) -> tuple[np.ndarray, Any]:
    """A stationary first-order vector source with a known A; the first position of each sequence is not scored."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    matrix = (rotation * np.array([0.97, 0.95, 0.9, 0.2])) @ rotation.T
    x = np.zeros((sequences, positions, WIDTH))
    for place in range(1, positions):
        x[:, place] = x[:, place - 1] @ matrix.T + 0.3 * rng.normal(size=(sequences, WIDTH))
    tokens, scored = np.zeros((sequences, positions), np.int64), np.ones((sequences, positions), bool)
    scored[:, 0] = False
    outputs = (x + 3.0).astype(np.float32)
    activations = Activations(tokens, scored, np.arange(sequences), outputs, None, None)
    return matrix, SimpleNamespace(fit=activations.sample(), fit_activations=activations, width=WIDTH)


def fit(decomposition: Any, task: Any) -> Any:
    """Fit without the run-time check of the task's type."""
    return inspect.unwrap(type(decomposition).fit)(decomposition, task)


def received(explanation: Explanation, settings: Settings) -> Any:
    """The decoder that the explanation's bytes give."""
    return decoder_of(decode_message(encode_message([explanation.section(settings)]).data)[0])


def test_the_loop_ends_where_the_receiver_does_within_a_step() -> None:
    _, task = source()
    explanation = fit(Predictor(), task)
    assert isinstance(explanation, Explanation)
    assert isinstance(Predictor(), Decomposition)
    settings = Settings(1e6, 0.1, np.eye(WIDTH), {"value": 1.0, "static": 1.0})
    decoder = received(explanation, settings)
    assert isinstance(decoder, Decoder)
    state = explanation.encode(decoder, task.fit, settings)
    assert isinstance(state, DenseState)
    predicted = decoder.predict(task.fit.inputs, state)
    assert predicted.dtype == np.float32
    # No error is carried on: what is wrong at a position is its own quantisation.
    assert np.abs(predicted - task.fit.outputs).max() < 0.15
    assert np.square(predicted - task.fit.outputs).mean() < 0.1**2 / 8
    flops = decoder.flops_per_token(task.fit.inputs, state)
    assert flops == 2 * WIDTH * WIDTH + 2 * decoder.innovations.rows.size


def test_the_receivers_recurrence_is_what_a_slow_one_says() -> None:
    _, task = source(3, 6)
    settings = Settings(1e6, 0.1, np.eye(WIDTH), {"value": 1.0, "static": 1.0})
    decoder = received(fit(Predictor(), task), settings)
    scored = np.array([[0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]], bool)
    inputs = Inputs(np.zeros((3, 6), np.int64), scored)
    symbols = np.random.default_rng(3).integers(-3, 4, (int(scored.sum()), len(decoder.innovations.rows)))
    predicted = decoder.predict(inputs, DenseState(symbols))
    fresh = decoder.innovations.predict(inputs, DenseState(symbols))
    row, expected = 0, []
    for sequence in scored:
        past = np.zeros(WIDTH)
        for on in sequence:
            past = fresh[row] + decoder.matrix.T @ past if on else np.zeros(WIDTH)
            if on:
                expected.append(decoder.mean + past)
                row += 1
    assert np.allclose(predicted, expected, atol=1e-5)


def test_a_known_source_costs_its_innovations() -> None:
    """At a fine step the predictor finds A, and saves what prediction gains over coding each position by itself."""
    matrix, task = source(120)
    settings = Settings(1e6, 0.05, np.eye(WIDTH), {"value": 1.0, "static": 1.0})
    explanation = fit(Predictor(), task)
    decoder = received(explanation, settings)
    assert np.allclose(decoder.matrix.T, matrix, atol=0.05)
    state = explanation.encode(decoder, task.fit, settings)
    alone = fit(PCA(rank=WIDTH), task)
    other = alone.encode(received(alone, settings), task.fit, settings)
    saved = (other.bits() - state.bits()) / state.n_tokens
    covariance = np.cov(task.fit.outputs.T)
    gain = 0.5 * np.log2(np.linalg.det(covariance) / 0.3 ** (2 * WIDTH))
    assert saved == pytest.approx(gain, rel=0.1)


def test_a_decoder_is_a_function_of_the_past(tiny_task: Task) -> None:
    task = tiny_task.for_fitting()
    explanation = Predictor().fit(task)
    settings = Settings(1e6, 0.1, np.eye(16), {"value": 1.0, "static": 2.0})
    section, sample = explanation.section(settings), task.tune_activations.head(6).sample()
    state = explanation.encode(decoder_of(section), sample, settings)
    check_decoder("predictor", section, sample.inputs, state)
    left = sample.outputs - decoder_of(section).predict(sample.inputs, state)
    assert np.square(left).mean() < 0.1**2 / 6


def test_the_sender_decodes_what_the_receiver_does() -> None:
    _, task = source(4, 9)
    settings = Settings(1e3, 0.2, np.eye(WIDTH), {"value": 1.0, "static": 4.0})
    explanation = fit(Predictor(), task)
    decoder = received(explanation, settings)
    symbols, pasts, innovations = close_loop(decoder, explanation.loop(settings)[1], task.fit)
    predicted = decoder.predict(task.fit.inputs, DenseState(symbols)) - decoder.mean
    before = task.fit.inputs.context().previous
    assert np.allclose(pasts[before >= 0], predicted[before[before >= 0]], atol=1e-5)
    assert not pasts[before < 0].any()
    assert np.allclose(innovations + pasts @ decoder.matrix, task.fit.outputs - decoder.mean, atol=1e-4)


def test_a_predictor_that_grows_is_scaled_down_or_refused() -> None:
    assert np.abs(np.linalg.eigvals(stable(3 * np.eye(2)))).max() == pytest.approx(0.99)
    assert np.array_equal(stable(0.5 * np.eye(2)), 0.5 * np.eye(2))
    growing = QuantisedArray.from_values(1e20 * np.eye(2), 1e20)
    rows, shifts = QuantisedArray.from_values(np.ones((1, 2)), 1.0), np.zeros((1, 3), np.int64)
    header = (QuantisedArray.from_values(np.zeros(2), 1.0), growing)
    decoder = PredictorDecoder.from_section(Section("predictor", header, (rows, QuantisedArray.from_integers(shifts))))
    inputs = Inputs(np.zeros((1, 5), np.int64), np.ones((1, 5), bool))
    with pytest.raises(MessageError, match="grows beyond float32"):
        decoder.predict(inputs, DenseState(np.ones((5, 1), np.int64)))


def test_bad_sections_and_options_are_refused(tiny_task: Task) -> None:
    with pytest.raises(MessageError, match="two header and two part arrays, not 0"):
        PredictorDecoder.from_section(Section("predictor"))
    one = QuantisedArray.from_values(np.ones((1, 3)), 1.0)
    with pytest.raises(MessageError, match=r"a matrix \(1, 3\) does not fit a mean of 3"):
        PredictorDecoder.from_section(Section("predictor", (one, one), (one, one)))
    with pytest.raises(ExplanationError, match="ridge = 0; it is positive"):
        Predictor(ridge=0.0).fit(tiny_task.for_fitting())
    inputs = Inputs(np.zeros((3, 1), np.int64), np.ones((3, 1), bool))
    lonely = SimpleNamespace(fit=Sample(inputs, np.ones((3, 2), np.float32)))
    with pytest.raises(ExplanationError, match="no scored position stands behind"):
        fit(Predictor(), lonely)
    assert isinstance(Predictor().fit(tiny_task.for_fitting()), PredictorExplanation)
