"""Decompositions that nobody had to learn: each sums to the weights, and spoiling one leaves the sum as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from decompositions.weights.factors import Factors
from decompositions.weights.parts import KINDS, merged, random_parts, split
from mdl.errors import ExplanationError
from mdl.models.model import Model
from mdl.models.networks import Network, TransformerRegion
from mdl.models.toys.gated import GatedFunctions
from mdl.models.toys.superposition import Superposition
from tests.decompositions.weights.cases import Linear, TwoLayers, random_weights

NETWORKS: list[Network] = [
    Linear(),
    TwoLayers(),
    Superposition(5, 2),
    Superposition(5, 2, identity=True, tied=False),
    GatedFunctions(3, 4),
]


def lacking(factors: Factors, weights: dict) -> float:
    return max(float(np.abs(left).max()) for left in factors.leftover(weights).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_every_kind_sums_to_the_weights(kind: str, network: Network) -> None:
    weights = random_weights(network)
    factors = KINDS[kind](network, weights)
    factors.check(network)
    assert set(factors.tensors) == set(network.matrices)
    assert lacking(factors, weights) < 1e-6
    used = np.concatenate([t.component for t in factors.tensors.values()])
    np.testing.assert_array_equal(np.unique(used), np.arange(factors.n_components))
    for name, tensor in factors.tensors.items():
        np.testing.assert_allclose(tensor.matrices(factors.n_components).sum(0), weights[name], atol=1e-6)


@pytest.mark.parametrize("region", [("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")])
def test_so_it_does_in_a_transformer(region: tuple[str, str], tiny_model: Model) -> None:
    network = TransformerRegion.of(tiny_model, *region)
    weights = network.weights(tiny_model)
    for kind, make in KINDS.items():
        factors = make(network, weights)
        factors.check(network)
        assert lacking(factors, weights) < 2e-5, kind
    neurons = KINDS["neurons"](network, weights)
    assert neurons.n_components == network.matrices["blocks.0.mlp.W_out"][0]
    for tensor in neurons.tensors.values():  # one and the same in both matrices
        np.testing.assert_array_equal(tensor.component, np.arange(neurons.n_components))


def test_how_many_parts_there_are() -> None:
    network = TwoLayers()  # 4 x 6 and 6 x 3
    weights = random_weights(network)
    counts = {kind: make(network, weights).n_components for kind, make in KINDS.items()}
    assert counts == {"whole": 1, "singular": 4 + 3, "columns": 4 + 6, "neurons": 6, "random": 4 + 6}
    few = random_parts(network, weights, share=0.5)
    assert few.n_components == 2 + 3
    assert lacking(few, weights) > 0.1
    again = random_parts(network, weights, share=0.5)
    assert all(np.array_equal(t.inputs, again.tensors[n].inputs) for n, t in few.tensors.items())
    assert not np.allclose(random_parts(network, weights, 1, 0.5).tensors["W_in"].inputs, few.tensors["W_in"].inputs)


def test_a_singular_direction_is_numpys() -> None:
    network = Linear(5, 4)
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(5, 2)) @ rng.normal(size=(2, 4))
    factors = KINDS["singular"](network, {"W": matrix})
    values = np.linalg.svd(matrix, compute_uv=False)
    assert factors.n_components == 2  # its rank
    norms = [np.linalg.norm(part) for part in factors.tensors["W"].matrices(2)]
    np.testing.assert_allclose(norms, values[:2])
    zero = KINDS["singular"](network, {"W": np.zeros((5, 4))})
    assert zero.n_components == 0
    with pytest.raises(ExplanationError, match="singular directions has no component in any matrix"):
        zero.check(network)


@pytest.mark.parametrize(
    "spoil", [lambda f: merged(f, 1, 3), lambda f: split(f, 1), lambda f: split(merged(f, 4, 0), 0)]
)
@pytest.mark.parametrize("kind", ["singular", "neurons", "columns"])
def test_merged_and_split_sum_to_the_same(kind: str, spoil: Callable[[Factors], Factors]) -> None:
    network = TwoLayers()
    weights = random_weights(network)
    spoilt = spoil(KINDS[kind](network, weights))
    spoilt.check(network)
    assert lacking(spoilt, weights) < 1e-6


def test_merging_closes_the_numbers_up() -> None:
    network = TwoLayers()
    factors = KINDS["neurons"](network, random_weights(network))
    for pair in ((1, 3), (3, 1)):
        both = merged(factors, *pair)
        assert both.n_components == 5
        assert both.name == "neurons, two merged"
        for name, tensor in both.tensors.items():
            np.testing.assert_array_equal(tensor.component, [0, 1, 2, 1, 3, 4])
            before = factors.tensors[name].matrices(6)
            np.testing.assert_allclose(tensor.matrices(5)[1], before[1] + before[3])
            np.testing.assert_allclose(tensor.matrices(5)[[0, 2, 3, 4]], before[[0, 2, 4, 5]])


def test_splitting_gives_two_that_are_needed_together() -> None:
    network = TwoLayers()
    factors = KINDS["neurons"](network, random_weights(network))
    two = split(factors, 2, seed=4)
    assert two.n_components == 7
    for name, tensor in two.tensors.items():
        before, after = factors.tensors[name].matrices(6), tensor.matrices(7)
        np.testing.assert_allclose(after[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
        np.testing.assert_allclose(after[2] + after[6], before[2])
        halves = [np.linalg.norm(after[i] - before[2] / 2) / np.linalg.norm(before[2] / 2) for i in (2, 6)]
        assert min(halves) > 0.2
    np.testing.assert_array_equal(two.tensors["W_in"].component[:6], factors.tensors["W_in"].component)


@pytest.mark.parametrize("ids", [(0, 6), (-1, 2), (2, 2)])
def test_numbers_that_are_no_components(ids: tuple[int, int]) -> None:
    network = TwoLayers()
    factors = KINDS["neurons"](network, random_weights(network))
    with pytest.raises(ExplanationError, match=r"neurons has components 0 to 5; given were"):
        merged(factors, *ids)
    if ids != (2, 2):
        with pytest.raises(ExplanationError, match="components 0 to 5"):
            split(factors, ids[0] if ids[0] < 0 else ids[1])


def test_inputs_of_a_network_that_reads_one_of_them() -> None:
    """Input column c of the first matrix is all that an input with nothing else on needs of it."""
    network = Linear()
    weights = random_weights(network)
    factors = KINDS["columns"](network, weights)
    parts = factors.tensors["W"].matrices(factors.n_components)
    x = np.zeros(4)
    x[2] = 1.5
    np.testing.assert_allclose(x @ parts[2], x @ weights["W"])
