"""Logits of a label: KL by the label's distribution, its Fisher metric, and the certificate of both."""

from __future__ import annotations

import math

import numpy as np
import pytest

from estimators.categorical_kernels import CategoricalEvaluator
from estimators.certify import certify
from estimators.fidelity import Bench
from estimators.kernels import evaluator_for
from mdl.data import from_rows
from mdl.models import Vectors
from mdl.models.toys.modular import ModularAddition, modular_inputs
from mdl.score import check_phenomena
from mdl.task import Task, build_task

P = 11


def sums(scale: float = 0.6) -> Vectors:
    """A random network of addition's shape: its labels are uncertain."""
    network, rng = ModularAddition(P, 16), np.random.default_rng(0)
    weights = {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in network.matrices.items()}
    return Vectors.computed(network, weights, modular_inputs(network), "sums", "categorical")


@pytest.fixture(scope="module")
def task() -> Task:
    model = sums()
    return build_task(model, "vectors", from_rows(model.first_equal, None, 0, "sums"), lambda *_: None)


def test_inputs_architecture_and_flops_are_in_the_task(task: Task) -> None:
    assert task.region.input == "inputs"
    assert task.description["region_flops"] == 2 * (2 * P * 16 + 16 * P)
    inputs = task.fit.inputs
    assert inputs.network == ModularAddition(P, 16)
    assert inputs.values is not None
    assert inputs.values.shape == (len(task.fit_activations.tokens), 1, 2 * P)


def test_kl_is_the_labels(task: Task) -> None:
    bench = Bench(task, 1e6)
    assert isinstance(bench.evaluator, CategoricalEvaluator)
    outputs = bench.held_out.sample.outputs.astype(np.float64)
    values = outputs + np.random.default_rng(1).normal(size=outputs.shape)
    damage = bench.measure(bench.held_out, values, np.zeros((0, P)))
    for row in range(5):
        p, q = (np.exp(x) / np.exp(x).sum() for x in (outputs[row], values[row].astype(np.float32)))
        slow = sum(a * math.log2(a / b) for a, b in zip(p, q, strict=True))
        assert damage.kl_bits[row] == pytest.approx(slow, rel=1e-4)
    assert np.isnan(damage.loss_bits).all()
    shifted = bench.measure(bench.held_out, outputs + 3.0, np.zeros((0, P)))
    assert np.abs(shifted.kl_bits).max() < 1e-10  # a constant on all logits changes no probability


def test_gradients_have_the_fisher_informations_second_moment(task: Task) -> None:
    evaluator = evaluator_for(task.model, task.region)
    outputs = task.fit.outputs.astype(np.float64)
    p = np.exp(outputs - outputs.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    exact = np.diag(p.mean(0)) - p.T @ p / len(p)
    draws = [evaluator.score_gradients(task.fit_activations, seed) for seed in range(200)]
    moments = np.stack([g.T @ g / len(g) for g in draws])
    error = np.abs(moments.mean(0) - exact) / (moments.std(0) / math.sqrt(len(draws)) + 1e-12)
    assert error.max() < 5.0
    assert np.abs(np.concatenate(draws).sum(1)).max() < 1e-9  # no gradient along the constant


def test_both_metrics_are_tried(task: Task) -> None:
    bench = Bench(task, 1e6)
    assert [metric.name for metric in bench.metrics] == ["fisher", "euclidean"]
    outputs, fisher = bench.held_out.sample.outputs, bench.metrics[0]
    error = 0.02 * np.random.default_rng(2).normal(size=outputs.shape)
    damage = bench.measure(bench.held_out, outputs + error, np.zeros((0, P)))
    assert fisher.distortion(error) / 2 == pytest.approx(damage.kl_bits.mean() * math.log(2), rel=0.3)


def test_a_certain_model_has_a_metric_still() -> None:
    """Where the second label has a probability of 1e-7, no sampled label would show it."""
    outputs = np.zeros((50, 1, 3), np.float32)
    outputs[:, :, 0] = 16.0
    model = sums()
    task = build_task(model, "vectors", from_rows(model.first_equal, None, 0, "sums"), lambda *_: None)
    some = task.fit_activations.head(50)
    gradients = evaluator_for(model, task.region).score_gradients(type(some)(**{**vars(some), "outputs": outputs}), 0)
    p = math.exp(-16) / (1 + 2 * math.exp(-16))
    assert np.square(gradients[:, 1]).mean() == pytest.approx(p * (1 - p), rel=0.3)


def test_the_kl_is_certified(task: Task) -> None:
    bench = Bench(task, 1e6)
    split = bench.held_out
    values = split.reference + 0.5 * np.random.default_rng(3).normal(size=split.reference.shape).astype(np.float32)
    damage = bench.evaluator.damage(split.activations, split.reference, values)
    found = certify(bench.evaluator, split.activations, split.reference, values, damage.kl_bits, 7, sequences=1000)
    assert found.agrees
    assert found.tokens == split.activations.n_tokens
    wrong = certify(
        bench.evaluator, split.activations, split.reference, values, damage.kl_bits + 0.3, 7, sequences=1000
    )
    assert not wrong.agrees


def test_a_labels_distribution_is_a_behaviour(task: Task) -> None:
    assert check_phenomena(task.model, task.region.output, ["behaviour"], None)[0] == ["behaviour"]
