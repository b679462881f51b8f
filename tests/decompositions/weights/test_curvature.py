"""The curvature of weights, against exact Jacobians and finite differences on networks small enough for both."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decompositions.weights.curvature import Curvature, MeasuredCurvature, batches_of, measure, square_root
from decompositions.weights.dense import evaluate
from mdl.data import Dataset
from mdl.errors import TaskError
from mdl.models import Vectors
from mdl.models.model import Model
from mdl.models.toys.superposition import Superposition
from mdl.protocols import Inputs
from mdl.task import build_task
from tests.decompositions.weights.cases import (
    Linear,
    TwoLayers,
    no_progress,
    pentagon,
    random_inputs,
    random_weights,
    task_of,
)


def predicted(curvature: Curvature, error: np.ndarray) -> float:
    """tr(A E B E^T)."""
    return float(np.trace(curvature.inputs @ error @ curvature.outputs @ error.T))


def jacobian(network: Any, weights: dict, inputs: Inputs, name: str) -> np.ndarray:
    """d outputs / d weight, [n, d_out, *weight]."""

    def outputs(weight: Any) -> Any:
        own = {**{n: jnp.asarray(w) for n, w in weights.items()}, name: weight}
        return network.run(own, jnp.asarray(inputs.values), jnp.asarray(inputs.tokens))

    found = np.asarray(jax.jacfwd(outputs)(jnp.asarray(weights[name])), np.float64)
    return found.reshape(inputs.n_tokens, -1, *weights[name].shape)


def exact(network: Any, weights: dict, inputs: Inputs, name: str, error: np.ndarray, root: np.ndarray) -> float:
    """E |root J dW|^2 a token."""
    change = np.tensordot(jacobian(network, weights, inputs, name), error, error.ndim)
    return float(np.square(change @ root.T).sum(1).mean())


def test_of_a_linear_map_it_is_the_inputs_second_moments_and_the_metric() -> None:
    network = Linear()
    weights, inputs = random_weights(network), random_inputs(network, 4096)
    root = square_root(np.cov(np.random.default_rng(5).normal(size=(3, 9))))
    found = measure(network, weights, inputs, inputs.scored, root).matrices["W"]
    x = inputs.scored_values().astype(np.float64)
    np.testing.assert_allclose(found.inputs, x.T @ x / len(x), atol=1e-4)
    np.testing.assert_allclose(found.outputs, root @ root.T, atol=0.05 * np.trace(root @ root) / 3)
    error = np.random.default_rng(6).normal(size=(4, 3))
    assert predicted(found, error) == pytest.approx(exact(network, weights, inputs, "W", error, root), rel=0.05)


@pytest.mark.parametrize("name", ["W_in", "W_out"])
def test_of_a_relu_network_by_finite_differences(name: str) -> None:
    """Behind the ReLU a weight's error counts independently of what goes in: exact. In front of it the mean over all
    directions of the error is, for inputs of one length."""
    network = TwoLayers()
    weights, inputs = random_weights(network), random_inputs(network, 1500)
    weights["T"][:] = 0.0
    root = np.diag([1.0, 0.5, 2.0])
    curvature = measure(network, weights, inputs, inputs.scored, root).matrices[name]
    rng = np.random.default_rng(1)
    directions = [rng.normal(size=network.matrices[name]) for _ in range(1 if name == "W_out" else 60)]
    before, found, size = evaluate(network, weights, inputs), [], 1e-2
    for error in directions:
        after = evaluate(network, {**weights, name: (weights[name] + size * error).astype(np.float32)}, inputs)
        found.append(np.square((after - before) @ root / size).sum(1).mean())
    assert np.mean([predicted(curvature, e) for e in directions]) == pytest.approx(np.mean(found), rel=0.07)
    whole = np.square(jacobian(network, weights, inputs, name)).sum((0, 2, 3)) @ np.diag(root) ** 2 / inputs.n_tokens
    assert np.trace(curvature.inputs) * np.trace(curvature.outputs) == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("name", ["T", "b_in", "b_out"])
def test_of_tables_and_vectors_it_is_the_expected_squared_derivative(name: str) -> None:
    network = TwoLayers()
    weights, inputs = random_weights(network), random_inputs(network, 12, 2, ids=3)
    root = np.diag([1.0, 0.5, 2.0])
    means = [measure(network, weights, inputs, inputs.scored, root, seed).others[name] for seed in range(200)]
    squares = np.square(jacobian(network, weights, inputs, name))
    wanted = np.tensordot(np.square(np.diag(root)), squares.sum(0), 1) / inputs.n_tokens
    assert means[0].shape == weights[name].shape
    np.testing.assert_allclose(np.mean(means, 0), wanted, rtol=0.35, atol=0.02 * wanted.max())
    assert np.mean(means) == pytest.approx(wanted.mean(), rel=0.25)
    if name == "T":
        assert not np.mean(means, 0)[3:].any()  # ids that do not occur


def test_of_a_matrix_that_is_used_twice_it_keeps_both_marginals() -> None:
    """Of the two uses' Kronecker products A1 x B1 + A2 x B2, each summed over tokens, both partial traces."""
    network, weights = Superposition(5, 2), pentagon()
    inputs = random_inputs(network, 2000)
    x = np.abs(inputs.scored_values()).astype(np.float64)
    inputs = Inputs(inputs.tokens, inputs.scored, x.astype(np.float32)[:, None], network)
    found = measure(network, weights, inputs, inputs.scored, np.eye(5)).matrices["W"]
    w, hidden = weights["W"].astype(np.float64), x @ weights["W"]
    on = (hidden @ w.T + weights["b"] > 0).astype(np.float64)
    first = x.T @ x / len(x), w.T @ np.diag(on.mean(0)) @ w
    second = np.diag(on.mean(0)), hidden.T @ hidden / len(x)
    lefts = sum(np.trace(b) * a for a, b in (first, second))
    rights = sum(np.trace(a) * b for a, b in (first, second))
    scale = np.trace(found.outputs)
    np.testing.assert_allclose(found.inputs * scale, lefts, atol=0.06 * np.trace(lefts) / 5)
    np.testing.assert_allclose(np.trace(found.inputs) * found.outputs, rights, atol=0.06 * np.trace(rights) / 2)


@pytest.mark.parametrize("region", ["blocks.0.mlp", "blocks.0.attn", "upstream of blocks.1.hook_resid_pre"])
def test_of_a_transformers_region_it_foretells_what_an_error_does(
    region: str, tiny_model: Model, tiny_data: Dataset
) -> None:
    """For small random errors in one matrix at a time, up to a factor: tokens are held to err independently, and what
    attention adds up of them does not."""
    task = build_task(tiny_model, region, tiny_data, no_progress).for_fitting()
    source, root = MeasuredCurvature.of(task), np.eye(task.width)
    found = source.under(root)
    assert found is source.under(root.copy())  # measured once
    assert set(found.matrices) | set(found.others) == set(source.weights)
    rng = np.random.default_rng(0)
    for name, curvature in found.matrices.items():
        weight = source.weights[name]
        error = 1e-3 * float(np.abs(weight).mean()) * rng.normal(size=weight.shape)
        changed = {**source.weights, name: (weight + error).astype(np.float32)}
        after = evaluate(source.network, changed, source.inputs)
        measured = np.square(after - evaluate(source.network, source.weights, source.inputs)).sum(1).mean()
        assert 0.2 < predicted(curvature, error) / measured < 2.0, name
    for name, sensitivity in found.others.items():
        assert sensitivity.shape == source.weights[name].shape
        assert (sensitivity >= 0).all()
    np.testing.assert_allclose(
        evaluate(source.network, source.weights, source.inputs), task.fit.outputs, atol=1e-4 * task.fit.outputs.std()
    )


def test_factors_of_a_product_are_measured_through_each_other() -> None:
    rng = np.random.default_rng(2)
    a, b = (m @ m.T for m in (rng.normal(size=(5, 5)), rng.normal(size=(4, 4))))
    curvature = Curvature(a, b)
    first, second = rng.normal(size=(5, 2)), rng.normal(size=(2, 4))
    of_first, of_second = curvature.through(first, second)
    error = rng.normal(size=(5, 2))
    assert predicted(of_first, error) == pytest.approx(predicted(curvature, error @ second), rel=1e-4)
    error = rng.normal(size=(2, 4))
    assert predicted(of_second, error) == pytest.approx(predicted(curvature, first @ error), rel=1e-4)
    np.testing.assert_allclose(curvature.left @ curvature.left, curvature.inputs)
    np.testing.assert_allclose(curvature.right @ curvature.right, curvature.outputs)


def test_a_direction_that_no_input_takes_still_has_a_step() -> None:
    curvature = Curvature(np.diag([1.0, 0.0]), np.zeros((3, 3)))
    assert np.linalg.eigvalsh(curvature.inputs).min() > 0
    assert np.linalg.eigvalsh(curvature.outputs).min() > 0


def test_batches_are_all_of_the_inputs() -> None:
    inputs = random_inputs(TwoLayers(), 7, 3)
    batches = list(batches_of(inputs, 6))
    assert [len(b.tokens) for b in batches] == [2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([b.values for b in batches]), inputs.values)
    assert [len(b.tokens) for b in batches_of(inputs, 1)] == [1] * 7


def test_rows_from_nowhere_have_no_weights_to_measure() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 3))
    with pytest.raises(TaskError, match="no weights to describe"):
        MeasuredCurvature.of(task_of(Vectors.of(rows)))
