"""Masks that the toolkit draws: what they do to an exact decomposition, and to one whose gates are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from decompositions.weights.factors import Factors, ScalarGates, TensorFactors
from decompositions.weights.masking import Attack
from decompositions.weights.masks import Bench, adversarial, constant_masks, single_ablations, stochastic, under_masks
from mdl.errors import ExplanationError
from tests.decompositions.small_networks import Tied, TwoLayers, inputs, random_weights


def constant_gates(value, count):
    zero = np.zeros((count, 1), np.float32)
    return ScalarGates(zero, zero, zero, np.full(count, value, np.float32))


def columns(weights, names, gate=1.0):
    """Input columns with gates that are the same for every input; ids span the matrices."""
    tensors = {}
    for name in names:
        count = weights[name].shape[0]
        gates = constant_gates(gate, count)
        tensors[name] = TensorFactors(np.eye(count, dtype=np.float32), weights[name], np.arange(count), gates)
    return Factors(tensors)


def bench(network, gate=1.0, scale=1.0):
    weights = random_weights(network, 0)
    factors = columns({n: scale * w for n, w in weights.items()}, list(network.matrices), gate)
    values, tokens = inputs(network, 12, 1)
    return Bench(factors, network, weights, np.asarray(values), np.asarray(tokens))


@pytest.mark.parametrize("network", [Tied(4, 3), TwoLayers((4, 4, 3))])
def test_open_gates_of_an_exact_decomposition_leave_the_outputs(network):
    found = under_masks(bench(network), seed=0, adversary_steps=(3,))
    for name in ("all on", "gates", "rounded", "self-gated", "stochastic", "adversarial 3"):
        assert found[name] < 1e-9, name
    assert min(found["off"], found["random"]) > 1e-3
    assert found["active"] == sum(d_in for d_in, _ in network.matrices.values())


def test_shut_gates_leave_everything_to_the_adversary():
    one = bench(TwoLayers((4, 4, 3)), gate=0.0)
    found = under_masks(one, seed=0, adversary_steps=(2, 20))
    assert found["gates"] == pytest.approx(found["off"])
    assert found["self-gated"] == pytest.approx(found["off"])
    assert found["adversarial 20"] >= found["adversarial 2"]
    own, sources = adversarial(one, 0, Attack(10, shared=False))
    assert own > stochastic(one, 0)
    assert sources["A"].shape == (12, 1, 4)


def test_the_leftover_is_a_component_of_the_adversary_and_of_chance():
    one = bench(TwoLayers((4, 4, 3)), scale=0.5)
    assert stochastic(one, 0, leftover=False) == pytest.approx(one.distance(constant_masks(one, 1.0)))
    assert stochastic(one, 0) < stochastic(one, 0, leftover=False)
    assert adversarial(one, 0, Attack(20))[0] == pytest.approx(stochastic(one, 0, leftover=False), rel=0.3)


def test_single_ablations_are_those_of_each_component():
    network = TwoLayers((4, 4, 3))
    one = bench(network)
    found = single_ablations(one)
    x, a, b = np.asarray(one.values)[:, 0], one.weights["A"], one.weights["B"]
    for c in range(4):
        kept = np.diag((np.arange(4) != c).astype(np.float32))
        changed = np.maximum(x @ kept @ a, 0) @ kept @ b
        assert found[c] == pytest.approx(np.mean((changed - np.maximum(x @ a, 0) @ b) ** 2), rel=1e-4)


def test_the_seed_decides():
    one = bench(Tied(4, 3), gate=0.3)
    assert stochastic(one, 1) == stochastic(one, 1) != stochastic(one, 2)


def test_without_gates_there_are_no_gated_masks():
    one = bench(Tied(4, 3))
    tensor = one.factors.tensors["W"]
    bare = Factors({"W": TensorFactors(tensor.inputs, tensor.outputs, tensor.component)})
    without = Bench(bare, one.network, one.weights, one.values, one.tokens)
    assert set(under_masks(without, 0)) == {"all on", "off", "random", "seed"}
    with pytest.raises(ExplanationError, match="no gates"):
        without.gates()
    with pytest.raises(ExplanationError, match="'metric' needs the root"):
        Bench(bare, one.network, one.weights, one.values, one.tokens, "metric").distance({})
