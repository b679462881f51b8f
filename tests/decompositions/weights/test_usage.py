"""How components are used, how precisely they are sent for it, and what having one on costs."""

from __future__ import annotations

import numpy as np
import pytest

from decompositions.weights.components import Components
from decompositions.weights.factors import Factors
from decompositions.weights.packing import Scaled, Slots
from decompositions.weights.parts import merged
from decompositions.weights.truths import gated_truth
from decompositions.weights.usage import MatrixUse, Usage, activations, importances
from mdl.message import QuantisedArray, encode_message
from mdl.models import Vectors
from mdl.protocols import Settings
from mdl.task import Task
from tests.decompositions.weights.cases import (
    TwoLayers,
    gated,
    random_factors,
    random_inputs,
    random_weights,
    settings_of,
    task_of,
)

NETWORK = TwoLayers(4, 6, 3, 1)
IDS = {"W_in": [0, 1, 1, 2], "W_out": [2, 0]}


@pytest.fixture(scope="module")
def task() -> Task:
    inputs = random_inputs(NETWORK, 200).scored_values()
    return task_of(Vectors.computed(NETWORK, random_weights(NETWORK), inputs, "two layers"))


def first_layer(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """What both matrices are multiplied with."""
    weights = random_weights(NETWORK)
    x = task.fit.inputs.scored_values() + weights["T"][0]
    return x, np.maximum(x @ weights["W_in"] + weights["b_in"], 0)


def test_activations_are_what_matrices_are_multiplied_with(task: Task) -> None:
    found = activations(NETWORK, random_weights(NETWORK), task.fit.inputs)
    for array, wanted in zip(found.values(), first_layer(task), strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-5)


def test_importances_are_the_largest_of_a_components_gates(task: Task) -> None:
    seen = dict(zip(NETWORK.matrices, first_layer(task), strict=True))
    together = random_factors(NETWORK, IDS, gated=True)
    apart = random_factors(NETWORK, {"W_in": [0, 1, 2, 3], "W_out": [4, 5]}, gated=True)
    each = importances(apart, seen)
    wanted = np.stack([each[:, [0, 5]].max(1), each[:, [1, 2]].max(1), each[:, [3, 4]].max(1)], 1)
    found = importances(together, seen)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert 0 <= found.min() < found.max() <= 1


def test_usage_against_loops(task: Task) -> None:
    factors, seen = random_factors(NETWORK, IDS), dict(zip(NETWORK.matrices, first_layer(task), strict=True))
    rng = np.random.default_rng(0)
    masks = (rng.random((len(seen["W_in"]), 3)) * (rng.random((len(seen["W_in"]), 3)) < 0.4)).astype(np.float32)
    found = Usage.of(factors, seen, masks)
    np.testing.assert_allclose(found.frequency, [np.mean(masks[:, c] > 0) for c in range(3)])
    for name, tensor in factors.tensors.items():
        use, x = found.matrices[name], seen[name].astype(np.float64)
        for s, c in enumerate(tensor.component):
            coefficient = [m * (row @ tensor.inputs[s]) for m, row in zip(masks[:, c], x, strict=True)]
            assert use.energy[s] == pytest.approx(np.mean(np.square(coefficient)), rel=1e-5)
            assert use.size[s] == pytest.approx(np.mean(masks[:, c] * np.square(x).mean(1)), rel=1e-5)
        assert np.trace(use.spread) / len(use.spread) == pytest.approx(1 + 1e-4)
        np.testing.assert_allclose(use.spread, use.spread.T)
    never = Usage.of(factors, seen, np.zeros_like(masks))
    assert not never.frequency.any()
    assert all(np.isfinite(use.spread).all() for use in never.matrices.values())


def test_slots_put_every_subcomponent_somewhere() -> None:
    """A matrix of 8 x 10: five terms of 18 numbers are more than its 80."""
    network = TwoLayers(8, 10, 6, 1)
    tensor = random_factors(network, {"W_in": [3, 0, 1, 3, 3, 1, 3, 3, 5, 5]}).tensors["W_in"]
    slots = Slots.of(tensor, 6, whole=True)
    assert slots.own.tolist() == [False, False, False, True, False, False]
    assert slots.place.tolist() == [[1, -1], [2, 5], [-1, -1], [-1, -1], [-1, -1], [8, 9]]
    terms = Slots.of(tensor, 6, whole=False)
    assert not terms.own.any()
    assert terms.place[3].tolist() == [0, 3, 4, 6, 7]
    assert sorted(terms.place[terms.place >= 0]) == list(range(10))
    one = random_factors(TwoLayers(1, 1, 1, 1), {"W_in": [0, 1]}).tensors["W_in"]
    assert not Slots.of(one, 2, whole=True).own.any()  # one term is never more than a matrix


def test_factors_are_scaled_against_each_other_and_multiply_to_the_same(task: Task) -> None:
    explanation = Components(object=random_factors(NETWORK, IDS, gated=True), leftover="send").fit(task)
    packing = explanation._packing(settings_of(explanation, task, 0.1))
    for name, tensor in packing.factors.tensors.items():
        use, curvature = packing.usage.matrices[name], packing.curvature.matrices[name]
        scaled = Scaled.of(tensor, use, curvature)
        for s in range(len(tensor.component)):
            np.testing.assert_allclose(
                np.outer(scaled.inputs[s], scaled.outputs[s]), np.outer(tensor.inputs[s], tensor.outputs[s]), atol=1e-6
            )
        again = Scaled.of(
            type(tensor)(8 * tensor.inputs, tensor.outputs / 8, tensor.component), use_of(use, 64), curvature
        )
        np.testing.assert_allclose(again.inputs, scaled.inputs, rtol=1e-6)  # units of the factors do not matter
        np.testing.assert_allclose(again.energy, scaled.energy, rtol=1e-6)


def use_of(use: MatrixUse, factor: float) -> MatrixUse:
    """The same use of factors V in units so many times larger, squared."""
    return MatrixUse(use.energy * factor, use.spread, use.size)


def test_units_of_the_factors_change_no_bit_and_no_prediction(task: Task) -> None:
    factors = random_factors(NETWORK, IDS)
    scaled = {n: type(t)(16 * t.inputs, t.outputs / 16, t.component) for n, t in factors.tensors.items()}
    bits = []
    for given in (factors, Factors(scaled, "random")):
        explanation = Components(object=given, gates="static", leftover="send").fit(task)
        bits.append(encode_message([explanation.section(settings_of(explanation, task, 0.1))]).whole_bits)
    assert bits[0] == pytest.approx(bits[1], rel=0.01)


def test_rare_components_are_sent_more_coarsely_only_as_they_are_paid_for_less() -> None:
    """n = N / (1 - (1 - f)^N): at N = 1 the step does not depend on how rare a component is."""
    settings = Settings(1.0, 0.1, np.eye(3))
    often, rare = settings.static_step(0.5, 0.5), settings.static_step(0.01, 0.01)
    assert rare == pytest.approx(often)
    long = Settings(1e6, 0.1, np.eye(3))
    assert long.static_step(0.01, 0.01) == pytest.approx(long.static_step(0.5, 0.5) * np.sqrt(50), rel=1e-3)


def test_a_component_costs_its_index_and_its_share_of_a_part(task: Task) -> None:
    explanation = Components(object=random_factors(NETWORK, IDS, gated=True), leftover="send").fit(task)
    short, long = (settings_of(explanation, task, 0.1, horizon) for horizon in (1.0, 1e9))
    prices = {s.horizon: explanation._packing(s).prices(s, explanation.section(s)) for s in (short, long)}
    frequency = np.clip(explanation._usage(short).frequency, 0.5 / 4096, 1 - 1e-6)
    index = np.log2(np.maximum((1 - frequency) / frequency, 1)) + 0.1
    np.testing.assert_allclose(prices[1e9], index, atol=1e-3)
    content = prices[1.0] - index
    bits = encode_message([explanation.section(short)]).part_bits[0]
    assert (content > 0.3 * bits).all()
    assert (content < 3.0 * bits + 5).all()


def test_parts_of_the_truth_are_sent_apart_and_the_merged_one_in_one() -> None:
    """Of gated functions: rows of zeros where a component has nothing, and bits for what it has."""
    model = gated()
    task, truth = task_of(model), gated_truth(model.network, model.weights).factors
    found = {}
    for name, factors in {"truth": truth, "merged": merged(truth, 0, 1)}.items():
        explanation = Components(object=factors).fit(task)
        section = explanation.section(settings_of(explanation, task, 0.05))
        found[name] = encode_message([section]).part_bits[0]
        assert all(isinstance(a, QuantisedArray) and len(a.symbols) == len(found[name]) for a in section.parts)
    assert len(found["merged"]) == 3
    assert found["merged"][0] > 1.3 * max(found["merged"][1:])
    assert found["truth"].max() < 3 * found["truth"].min()
