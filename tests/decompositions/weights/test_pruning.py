"""Neurons that are taken out: what is left of them, and what the others make good."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from decompositions.weights.curvature import MeasuredCurvature
from decompositions.weights.dense import evaluate
from decompositions.weights.pruning import MLP, mlps, prune
from decompositions.weights.yardsticks import Neurons
from mdl.data import Dataset
from mdl.models import Vectors
from mdl.models.model import Model
from mdl.models.operators import Recorder
from mdl.models.toys.superposition import Superposition
from mdl.receiver import decoder_of
from mdl.task import Task, build_task
from tests.decompositions.weights.cases import (
    TwoLayers,
    no_progress,
    random_inputs,
    random_weights,
    received,
    settings_of,
    task_of,
)

NETWORK = TwoLayers(4, 12, 3)
ROOT = np.diag([1.0, 2.0, 0.5])


@pytest.fixture(scope="module")
def task() -> Task:
    inputs = random_inputs(NETWORK, 500).scored_values()
    return task_of(Vectors.computed(NETWORK, random_weights(NETWORK), inputs, "two layers"))


@pytest.fixture(scope="module")
def source(task: Task) -> MeasuredCurvature:
    return MeasuredCurvature.of(task)


@pytest.fixture(scope="module")
def hidden(source: MeasuredCurvature) -> np.ndarray:
    """Activations of the neurons on fit data."""
    weights = {name: jnp.asarray(weight) for name, weight in source.weights.items()}
    recorder = Recorder(weights["W_out"])
    values = jnp.asarray(source.inputs.values)
    source.network.run({**weights, "W_out": recorder}, values, jnp.asarray(source.inputs.tokens))
    return np.asarray(recorder.seen[0][0], np.float64)[:, 0]


def changed(source: MeasuredCurvature, share: float, refit: bool) -> dict[str, np.ndarray]:
    found = prune(source, source.under(ROOT), (1.0, share), refit)
    assert all(np.array_equal(w, source.weights[name]) for name, w in found.at(1.0).items() if name != "b_out")
    return {**source.weights, **found.at(share)}


def mean_error(source: MeasuredCurvature, weights: dict[str, np.ndarray]) -> float:
    """In the metric, on fit data."""
    after = evaluate(source.network, {n: np.asarray(w, np.float32) for n, w in weights.items()}, source.inputs)
    before = evaluate(source.network, source.weights, source.inputs)
    return float(np.square((after - before) @ ROOT).sum(1).mean())


def test_which_layers_have_neurons(tiny_model: Model, tiny_data: Dataset) -> None:
    assert mlps(NETWORK) == [MLP(("W_in",), ("b_in",), "W_out", "b_out")]
    assert mlps(Superposition(5, 2)) == []
    task = build_task(tiny_model, "upstream of blocks.1.hook_resid_mid", tiny_data, no_progress)
    (found,) = mlps(task.fit.inputs.network)  # of block 0: attention has none
    assert found == MLP(("blocks.0.mlp.W_in",), ("blocks.0.mlp.b_in",), "blocks.0.mlp.W_out", "blocks.0.mlp.b_out")


@pytest.mark.parametrize("refit", [False, True])
def test_what_is_gone_is_zero_and_its_mean_is_in_the_bias(
    source: MeasuredCurvature, hidden: np.ndarray, refit: bool
) -> None:
    weights = changed(source, 0.5, refit)
    gone = ~weights["W_out"].any(1)
    assert gone.sum() == 6
    assert not weights["W_in"][:, gone].any()
    assert not weights["b_in"][gone].any()
    np.testing.assert_array_equal(weights["W_in"][:, ~gone], source.weights["W_in"][:, ~gone])
    lost = source.weights["W_out"] - weights["W_out"]
    np.testing.assert_allclose(weights["b_out"], source.weights["b_out"] + hidden.mean(0) @ lost, atol=1e-5)
    if not refit:
        np.testing.assert_array_equal(weights["W_out"][~gone], source.weights["W_out"][~gone])
    float32 = {name: np.asarray(w, np.float32) for name, w in weights.items()}
    means = [evaluate(source.network, w, source.inputs).mean(0) for w in (float32, source.weights)]
    np.testing.assert_allclose(*means, atol=1e-4)  # what the others take over leaves the mean where it was


def test_the_others_take_over_what_least_squares_says(source: MeasuredCurvature, hidden: np.ndarray) -> None:
    weights = changed(source, 0.5, refit=True)
    gone, centred = ~weights["W_out"].any(1), hidden - hidden.mean(0)
    told = np.linalg.lstsq(centred[:, ~gone], centred[:, gone] @ source.weights["W_out"][gone], rcond=None)[0]
    wanted = source.weights["W_out"][~gone] + told
    left = centred[:, ~gone] @ (weights["W_out"][~gone] - wanted)
    assert np.square(left).mean() < 1e-4 * np.square(centred @ source.weights["W_out"]).mean()


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_refitting_beats_mean_ablation(source: MeasuredCurvature, share: float) -> None:
    errors = [mean_error(source, changed(source, share, refit)) for refit in (True, False)]
    assert errors[0] < errors[1]


def test_the_first_to_go_costs_least_a_bit_saved(source: MeasuredCurvature, hidden: np.ndarray) -> None:
    """Against removing each neuron in turn and solving for the others' weights."""
    centred, output = hidden - hidden.mean(0), source.weights["W_out"].astype(np.float64)
    metric = source.under(ROOT).matrices["W_out"].outputs
    harm, gain = np.zeros(12), np.zeros(12)
    for j in range(12):
        others = np.arange(12) != j
        told = np.linalg.lstsq(centred[:, others], centred[:, j], rcond=None)[0]
        lost = np.outer(centred[:, j] - centred[:, others] @ told, output[j])
        harm[j] = np.einsum("nd,de,ne->", lost, metric, lost) / len(lost)
        for rows in (output, source.weights["W_in"].T):
            scale = np.sqrt(np.square(rows).mean()) / 4
            gain[j] += np.log2(1 + np.abs(rows[j]) / scale).sum() + 0.05 * rows.shape[1]
    weights = changed(source, 11 / 12, refit=True)
    assert np.flatnonzero(~weights["W_out"].any(1)).tolist() == [int(np.argmin(harm / gain))]


def test_neurons_that_never_fire_go_first() -> None:
    network, weights = NETWORK, random_weights(NETWORK)
    weights["b_in"] = np.where(np.isin(np.arange(12), [2, 7]), -100.0, 1.0).astype(np.float32)  # all others fire
    weights["W_out"][[2, 7]] = 5.0
    task = task_of(Vectors.computed(network, weights, random_inputs(network, 300).scored_values(), "dead"))
    source = MeasuredCurvature.of(task)
    found = changed(source, 10 / 12, refit=True)
    assert np.flatnonzero(~found["W_out"].any(1)).tolist() == [2, 7]
    assert mean_error(source, found) < 1e-8


def test_the_explanation_sends_zeros_and_saves_their_bits(task: Task) -> None:
    explanation = Neurons(5).fit(task)
    settings = settings_of(explanation, task, 0.02)
    sent = decoder_of(explanation.section(settings)).weights(NETWORK)
    gone = ~np.asarray(sent["W_out"]).any(1)
    assert gone.sum() == 7
    assert not np.asarray(sent["W_in"])[:, gone].any()
    assert not np.asarray(sent["b_in"])[gone].any()
    errors = {}
    for refit in (True, False):
        explanation = Neurons(5, refit).fit(task)
        found = received(explanation, task, settings_of(explanation, task, 0.02))[2]
        errors[refit] = np.square(found - task.fit.outputs).sum(1).mean()
    assert errors[True] < errors[False]
    spread = task.fit.outputs - task.fit.outputs.mean(0)
    assert errors[True] < np.square(spread).sum(1).mean()


def test_the_share_that_is_kept_is_a_knob(task: Task) -> None:
    explanation = Neurons().fit(task)
    kept = []
    for share in (1.0, 0.5, 0.05):
        section = explanation.section(settings_of(explanation, task, 0.02, kept=share))
        kept.append(int(np.asarray(decoder_of(section).weights(NETWORK)["W_out"]).any(1).sum()))
    assert kept == [12, 6, 1]
