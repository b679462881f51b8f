"""The truths of the toy models sum to their weights, and are needed where they say they are."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from decompositions.weights.factors import Factors, TensorFactors
from decompositions.weights.truths import (
    Truth,
    gated_truth,
    key_frequencies,
    modular_truth,
    neurons_served,
    residual_truth,
    superposition_truth,
)
from mdl.errors import ModelError
from mdl.models import Vectors
from mdl.models.toys.gated import GatedFunctions, gated_functions, gated_inputs
from mdl.models.toys.modular import ModularAddition, modular_inputs, train_modular
from mdl.models.toys.residual import ResidualMLP, residual_inputs, train_residual
from mdl.models.toys.superposition import (
    Superposition,
    random_rotation,
    represented,
    rotated,
    superposition_inputs,
    train_superposition,
)
from mdl.models.toys.training import Recipe, Trained


def rows(trained: Trained, inputs: np.ndarray, likelihood: str = "gaussian") -> np.ndarray:
    return Vectors.computed(trained.network, trained.weights, inputs, "toy", likelihood).rows


def unexplained(found: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the outputs' variance."""
    return float(np.square(found - wanted).sum() / np.square(wanted - wanted.mean(0)).sum())


def exact(truth: Truth, trained: Trained) -> bool:
    truth.factors.check(trained.network)
    left = truth.factors.leftover(trained.weights)
    return max(float(np.abs(array).max()) for array in left.values()) < 1e-6


@pytest.fixture(scope="module")
def small() -> Trained:
    """Five features in two channels, trained for a fifth of the published steps."""
    return train_superposition(0, Superposition(), Recipe(2000, 512, 1e-2))


@pytest.mark.parametrize("rotate", [False, True])
def test_superposition(small: Trained, rotate: bool) -> None:
    assert represented(small.network, small.weights).min() >= 0.5
    rotation = random_rotation(5, 1) if rotate else None
    model = small if rotation is None else rotated(small, rotation)
    truth = superposition_truth(model.network, model.weights, rotation)
    assert exact(truth, model)
    inputs = superposition_inputs(model.network, 500, 2, rotation=rotation)
    plain = superposition_inputs(small.network, 500, 2)
    assert (truth.active(inputs) == (plain > 1e-4)).mean() > 0.999
    assert unexplained(truth.outputs(model.network, model.weights, inputs), rows(model, inputs)) < 0.1
    single = inputs[truth.active(inputs).sum(1) == 1]
    answers = truth.outputs(model.network, model.weights, single)
    own = truth.active(single)
    np.testing.assert_allclose(answers[own], rows(model, single)[own], atol=1e-4)  # a feature's own answer is all its
    assert answers[~own].max() == 0.0  # no interference: biases are negative


def test_the_identity_is_one_component_always_on(small: Trained) -> None:
    model = Trained(Superposition(identity=True), {**small.weights, "identity": np.eye(2, dtype=np.float32)}, 0.0)
    truth = superposition_truth(model.network, model.weights)
    assert exact(truth, model)
    assert truth.factors.n_components == 6
    inputs = superposition_inputs(model.network, 50, 0)
    assert truth.active(inputs)[:, 5].all()
    plain = superposition_truth(small.network, small.weights)
    np.testing.assert_allclose(
        truth.outputs(model.network, model.weights, inputs),
        plain.outputs(small.network, small.weights, inputs),
        atol=1e-6,
    )


def test_a_rotated_network_needs_its_rotation(small: Trained) -> None:
    model = rotated(small, random_rotation(5, 1))
    with pytest.raises(ValueError, match="needs to know how"):
        superposition_truth(model.network, model.weights)


@pytest.mark.parametrize(("seed", "functions"), [(0, 4), (1, 7)])
def test_gated_functions_are_exact(seed: int, functions: int) -> None:
    made = gated_functions(seed, GatedFunctions(functions))
    truth, inputs = gated_truth(made.network, made.weights), gated_inputs(made.network, 300, seed)
    assert all(not np.any(left) for left in truth.factors.leftover(made.weights).values())
    assert np.array_equal(truth.active(inputs), inputs[:, 1:] > 0)
    found, wanted = truth.outputs(made.network, made.weights, inputs), rows(made, inputs)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    sizes = [np.linalg.matrix_rank(m) for m in truth.factors.tensors["W_in"].matrices(functions)]
    assert sizes == [2] * functions


def test_a_component_of_gated_functions_that_is_off_is_missed() -> None:
    made = gated_functions(2)
    truth, inputs = gated_truth(made.network, made.weights), gated_inputs(made.network, 300, 0)
    probe = truth.probe.copy()
    probe[:, 1] = 0.0
    without = Truth(truth.factors, probe, truth.always)
    found, wanted = without.outputs(made.network, made.weights, inputs), rows(made, inputs)
    needed = inputs[:, 2] > 0
    np.testing.assert_allclose(found[~needed], wanted[~needed], atol=1e-4)
    assert np.abs(found[needed] - wanted[needed]).mean() > 0.1


def test_residual_mlps_with_a_neuron_a_feature() -> None:
    network = ResidualMLP(4, 8, (2, 2))
    embed, rng = network.embed, np.random.default_rng(0)
    weights = {}
    for layer, own in enumerate((embed[[2, 0]], embed[[3, 1]])):  # of any scale, that the two matrices share
        scale = rng.uniform(0.5, 2.0, (2, 1)).astype(np.float32)
        weights |= {f"layers.{layer}.W_in": (scale * own).T, f"layers.{layer}.W_out": own / scale}
    trained = Trained(network, {name: np.ascontiguousarray(w) for name, w in weights.items()}, 0.0)
    truth = residual_truth(network, trained.weights)
    assert truth.factors.notes == ("every neuron serves one feature",)
    assert exact(truth, trained)
    served = np.concatenate([neurons_served(network, trained.weights, layer) for layer in (0, 1)])
    assert served.tolist() == [2, 0, 3, 1]
    inputs = residual_inputs(network, 300, 0)
    assert np.array_equal(truth.active(inputs), np.abs(inputs @ network.embed.T) > 1e-4)
    found, wanted = truth.outputs(network, trained.weights, inputs), rows(trained, inputs)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    features = inputs @ embed.T
    np.testing.assert_allclose(wanted, features + np.maximum(features, 0), atol=1e-5)


def test_residual_mlps_with_too_few_neurons_have_no_known_output_parts() -> None:
    network = ResidualMLP(6, 16, (3,), "unit")
    weights = {name: np.asarray(w) for name, w in network.init(jax.random.key(0)).items()}
    truth = residual_truth(network, weights)
    truth.factors.check(network)
    assert "only W_in" in truth.factors.notes[0]
    assert truth.factors.n_components == 7
    inputs = residual_inputs(network, 200, 0, 0.3)
    assert truth.active(inputs)[:, 6].all()
    wanted = rows(Trained(network, weights, 0.0), inputs)
    assert unexplained(truth.outputs(network, weights, inputs), wanted) < 1e-6  # what enters is in W_E's span
    assert truth.explained(weights)["layers.0.W_in"] < 0.9  # and what lies outside of it is a leftover


def test_a_network_that_does_not_grok_is_refused() -> None:
    with pytest.raises(ModelError, match="none of 2 networks of 4 neurons from seed 0 grokked addition mod 7"):
        train_modular(0, ModularAddition(7, 4), Recipe(20, 49, 1e-2, 1.0), attempts=2)


def test_a_model_that_drops_features_is_refused() -> None:
    with pytest.raises(ModelError, match="none of 2 models of 5 features in 2 channels from seed 0 represents them"):
        train_superposition(0, recipe=Recipe(5, 16, 1e-3), attempts=2)


@pytest.mark.slow
def test_modular_addition_by_its_key_frequencies() -> None:
    network = ModularAddition()
    trained = train_modular(0, network)
    assert trained.figures["accuracy"] >= 0.99
    truth, inputs = modular_truth(network, trained.weights), modular_inputs(network)
    truth.factors.check(network)
    assert truth.active(inputs).all()
    assert min(truth.explained(trained.weights).values()) > 0.98
    found, labels = truth.outputs(network, trained.weights, inputs), rows(trained, inputs, "categorical").argmax(1)
    assert (found.argmax(1) == labels).mean() > 0.97
    ranks = [np.linalg.matrix_rank(m, tol=1e-5) for m in truth.factors.tensors["W_in"].matrices(len(truth.always))]
    assert max(ranks) <= 4


def test_a_frequency_that_is_put_in_is_found() -> None:
    network = ModularAddition(11, 3)
    wave = np.cos(2 * np.pi * 4 * np.arange(11) / 11)
    weights = {"W_in": np.outer(np.tile(wave, 2), np.ones(3)), "W_out": np.outer(np.ones(3), wave)}
    assert key_frequencies(network, weights).tolist() == [4]
    truth = modular_truth(network, weights)
    assert all(abs(share - 1) < 1e-9 for share in truth.explained(weights).values())
    shuffled = {**weights, "W_in": np.random.default_rng(0).permutation(weights["W_in"].ravel()).reshape(22, 3)}
    assert len(key_frequencies(network, shuffled)) > 3


def test_explained_is_a_share_of_squared_weights() -> None:
    half = TensorFactors(np.eye(2)[:1], np.array([[3.0, 4.0]]), np.zeros(1, np.int64))
    truth = Truth(Factors({"W": half}), np.zeros((2, 1)), np.ones(1, bool))
    assert truth.explained({"W": np.array([[3.0, 4.0], [0.0, 5.0]])})["W"] == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("neurons", [(20,), (10, 10), (7, 7, 7)])
def test_residual_mlps_of_default_size(neurons: tuple[int, ...]) -> None:
    network = ResidualMLP(max(20, sum(neurons)), neurons=neurons)
    trained = train_residual(0, network)
    assert trained.figures["most_missed"] < 1e-3
    truth = residual_truth(network, trained.weights)
    assert exact(truth, trained)
    inputs = residual_inputs(network, 1000, 0)
    assert unexplained(truth.outputs(network, trained.weights, inputs), rows(trained, inputs)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(5, 2), (40, 10)])
def test_superposition_of_published_sizes(sizes: tuple[int, int]) -> None:
    trained = train_superposition(0, Superposition(*sizes))
    assert trained.attempts == 1
    norms = np.linalg.norm(trained.weights["W"], axis=1)
    assert norms.max() / norms.min() < 1.1
    if sizes == (5, 2):  # a pentagon: neighbours at 72 degrees
        angles = np.sort(np.arctan2(*trained.weights["W"].T))
        gaps = np.diff(np.append(angles, angles[0] + 2 * np.pi))
        np.testing.assert_allclose(gaps, 2 * np.pi / 5, atol=0.05)
