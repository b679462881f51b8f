"""The sampled metric against the exact one, and what it predicts against what is measured."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators.fisher import RIDGE, euclidean_metric, fisher_metric
from estimators.kernels import Evaluator
from mdl.models.model import Model
from mdl.task import Task
from mdl.units import bits_to_nats

SAMPLES = 24


def logits_of(model: Model, x: jax.Array) -> jax.Array:
    """Final norm and unembedding of one residual-stream vector, in the type of `x`."""
    params = jax.tree.map(lambda w: jnp.asarray(np.asarray(w), x.dtype), model.params)
    centred = x - x.mean()
    normed = centred / jnp.sqrt(jnp.square(centred).mean() + model.config.norm_eps)
    return (normed * params["ln_final"]["w"] + params["ln_final"]["b"]) @ params["embed"]["W_E"].T


def exact_fisher(model: Model, x: np.ndarray) -> np.ndarray:
    """J^T (diag p - p p^T) J at each row of x [n, d], in float64."""

    def one(row: jax.Array) -> jax.Array:
        jacobian = jax.jacobian(lambda v: logits_of(model, v))(row)
        p = jax.nn.softmax(logits_of(model, row))
        centred = jacobian - p @ jacobian
        return centred.T @ (p[:, None] * centred)

    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(x, jnp.float64)))


@pytest.fixture(scope="module")
def evaluator(last_task: Task) -> Evaluator:
    return Evaluator(last_task.model, last_task.region)


def test_the_sampled_metric_converges_to_the_exact_one(last_task: Task, evaluator: Evaluator) -> None:
    activations = last_task.fit_activations
    exact = exact_fisher(last_task.model, activations.outputs[activations.scored]).mean(0)
    draws = []
    for seed in range(SAMPLES):
        gradients = evaluator.score_gradients(activations, 1000 + seed).astype(np.float64)
        draws.append(gradients.T @ gradients / len(gradients))
    mean, error = np.mean(draws, 0), np.std(draws, 0, ddof=1) / np.sqrt(SAMPLES)
    z = (mean - exact) / np.maximum(error, 1e-12)
    # 136 entries of a symmetric matrix, of Student's t with 23 degrees of freedom.
    assert np.abs(z).max() < 5
    assert np.sqrt(np.mean(z**2)) < 1.6
    assert np.linalg.norm(mean - exact) < 0.1 * np.linalg.norm(exact)


def test_the_root_is_that_of_the_mean_and_a_ridge(last_task: Task, evaluator: Evaluator) -> None:
    activations = last_task.fit_activations
    metric = fisher_metric(evaluator, activations, seed=3, samples=3)
    rows = np.concatenate([evaluator.score_gradients(activations, 3 + 7919 * i) for i in range(3)]).astype(np.float64)
    expected = rows.T @ rows / len(rows)
    expected += RIDGE * np.trace(expected) / len(expected) * np.eye(len(expected))
    assert metric.name == "fisher"
    assert np.allclose(metric.root, metric.root.T)
    assert np.allclose(metric.root @ metric.root, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert np.linalg.cond(metric.root) < 1e4


def test_half_of_e_g_e_is_the_kl_of_small_errors(last_task: Task, evaluator: Evaluator) -> None:
    activations = last_task.held_out
    reference = evaluator.reference(activations)
    exact = exact_fisher(last_task.model, activations.outputs[activations.scored])
    noise = np.random.default_rng(0).normal(size=activations.outputs.shape).astype(np.float32)
    noise *= 0.01 * activations.outputs.std()
    damage = evaluator.damage(activations, reference, activations.outputs + noise)
    errors = noise[activations.scored].astype(np.float64)
    by_token = np.einsum("ni,nij,nj->n", errors, exact, errors) / 2
    measured = bits_to_nats(damage.kl_bits)
    assert measured.mean() == pytest.approx(by_token.mean(), rel=0.02)
    assert np.corrcoef(measured, by_token)[0, 1] > 0.99


def test_the_sampled_metric_predicts_the_kl_of_isotropic_errors(last_task: Task, evaluator: Evaluator) -> None:
    """Errors that know nothing of the token: e^T G e / 2 with the mean G is the mean KL, but for sampling."""
    activations = last_task.held_out
    metric = fisher_metric(evaluator, activations, seed=1, samples=16)
    reference = evaluator.reference(activations)
    measured, predicted = [], []
    for seed in range(6):
        noise = np.random.default_rng(seed).normal(size=activations.outputs.shape).astype(np.float32)
        noise *= 0.01 * activations.outputs.std()
        found = evaluator.damage(activations, reference, activations.outputs + noise)
        measured.append(bits_to_nats(found.kl_bits.mean()))
        predicted.append(metric.distortion(noise[activations.scored]) / 2)
    assert np.mean(measured) == pytest.approx(np.mean(predicted), rel=0.05)


def test_errors_that_reach_later_positions_are_counted(tiny_task: Task) -> None:
    """Upstream of a layer with attention, one position's error costs at the positions behind it too."""
    evaluator, activations = Evaluator(tiny_task.model, tiny_task.region), tiny_task.held_out
    metric = fisher_metric(evaluator, activations, seed=1, samples=16)
    reference = evaluator.reference(activations)
    measured, predicted = [], []
    for seed in range(16):
        rng = np.random.default_rng(seed)
        noise = np.zeros_like(activations.outputs)
        position = 1 + seed % (activations.tokens.shape[1] - 1)
        noise[:, position] = 0.01 * activations.outputs.std() * rng.normal(size=noise[:, position].shape)
        found = evaluator.damage(activations, reference, activations.outputs + noise)
        measured.append(bits_to_nats(found.kl_bits.sum()))
        predicted.append(metric.distortion(noise[:, position]) * len(noise) / 2)
    assert np.sum(measured) == pytest.approx(np.sum(predicted), rel=0.1)


def test_distortion_is_the_mean_square_in_the_metric() -> None:
    errors = np.random.default_rng(0).normal(size=(50, 4))
    assert euclidean_metric(4).distortion(errors) == pytest.approx(np.square(errors).sum(1).mean())
    assert euclidean_metric(4).name == "euclidean"


def test_a_direction_without_effect_costs_next_to_nothing(last_task: Task, evaluator: Evaluator) -> None:
    """The final norm subtracts the mean: only the ridge stands against a constant added to all channels."""
    metric = fisher_metric(evaluator, last_task.tune_activations, seed=0)
    constant = np.ones((1, last_task.width))
    ridge = RIDGE / (1 + RIDGE) * np.sum(metric.root**2) / last_task.width
    assert metric.distortion(constant) == pytest.approx(ridge * last_task.width, rel=1e-3)


def test_spread_is_of_each_dimension_and_never_nothing() -> None:
    outputs = np.array([[1.0, -2.0], [3.0, 2.0]])
    assert euclidean_metric(2).spread(outputs) == pytest.approx(np.sqrt((1.0 + 4.0) / 2))
    assert euclidean_metric(2).spread(np.ones((3, 2))) == 1.0  # all alike: a step of 0 would say nothing
