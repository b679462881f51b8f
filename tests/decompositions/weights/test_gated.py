"""The receiver of gated components: masks, gates and what is touched, against a plain numpy reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from scipy.special import erf

from decompositions.weights.components import Components
from decompositions.weights.factors import Factors
from decompositions.weights.gated import GatedDecoder, run_masked
from decompositions.weights.gating import GateParameters, gate_values, hard
from decompositions.weights.parts import KINDS
from estimators.conduct import check_decoder
from mdl.data import Dataset
from mdl.models import Vectors
from mdl.models.model import Model
from mdl.models.toys.superposition import Superposition
from mdl.protocols import Inputs
from mdl.receiver import decoder_of
from mdl.state import NoState
from mdl.task import Task, build_task
from tests.decompositions.weights.cases import (
    TwoLayers,
    no_progress,
    pentagon,
    random_factors,
    random_gates,
    random_inputs,
    random_weights,
    settings_of,
    state_of,
    superposition,
    task_of,
    through_bytes,
)

WIDE = TwoLayers(8, 10, 6, 1)
# Of W_in (8 x 10) components of two terms, one, three, and one whose matrix is fewer numbers than its five terms.
IDS = {"W_in": [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3], "W_out": [0, 1, 1, 2]}
WeightOf = Callable[[str, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def wide() -> Task:
    inputs = random_inputs(WIDE, 150).scored_values()
    return task_of(Vectors.computed(WIDE, random_weights(WIDE), inputs, "wide"))


@pytest.fixture(scope="module")
def tied() -> Task:
    return task_of(superposition())


def sent(task: Task, factors: Factors, step: float = 0.05, **options: Any) -> GatedDecoder:
    """The decoder that comes out of the bytes."""
    explanation = Components(object=factors, **options).fit(task)
    decoder = decoder_of(through_bytes(explanation.section(settings_of(explanation, task, step))))
    assert isinstance(decoder, GatedDecoder)
    return decoder


def parts_of(decoder: GatedDecoder, number: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Of one matrix, in float64: the rest, and each component's part [C, d_in, d_out]."""
    matrix, count = decoder.matrices[number], decoder.layout.components
    rest = np.zeros(shape) if matrix.rest is None else matrix.rest.astype(np.float64)
    each = np.zeros((count, *shape))
    if matrix.terms is not None:
        for c, r in np.ndindex(*matrix.terms.shape[:2]):
            each[c] += np.outer(matrix.terms[c, r, : shape[0]], matrix.terms[c, r, shape[0] :])
    if matrix.own is not None:
        each += matrix.own.reshape(count, *shape)
    return rest, each


def forward(network: Any, weight_of: WeightOf, others: tuple[np.ndarray, ...], x: np.ndarray) -> np.ndarray:
    """One token through the network, in numpy."""
    if isinstance(network, Superposition):
        w = weight_of("W", x)
        return np.maximum(x @ w @ w.T + others[0][0], 0)
    table, b_in, b_out = others
    x = x + table[0]
    hidden = np.maximum(x @ weight_of("W_in", x) + b_in[0], 0)
    return np.asarray(hidden @ weight_of("W_out", hidden) + b_out[0])


def masked_reference(network: Any, decoder: GatedDecoder, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Token by token, with the matrix of its own that each token has."""
    parts = {n: parts_of(decoder, i, s) for i, (n, s) in enumerate(network.matrices.items())}
    rows = []
    for x, on in zip(values.astype(np.float64), mask.astype(np.float64), strict=True):
        own = {name: rest + np.tensordot(on, each, 1) for name, (rest, each) in parts.items()}
        rows.append(forward(network, lambda name, _, own=own: own[name], decoder.others, x))
    return np.array(rows)


def check_masks(task: Task, factors: Factors, leftover: str) -> GatedDecoder:
    """Random masks, and all on or off, against the reference."""
    decoder, inputs = sent(task, factors, leftover=leftover), task.fit.inputs
    shape = (inputs.n_tokens, factors.n_components)
    for mask in (np.random.default_rng(0).random(shape) < 0.5, np.ones(shape, bool), np.zeros(shape, bool)):
        state = state_of(mask)
        found = decoder.predict(inputs, state)
        wanted = masked_reference(inputs.network, decoder, inputs.scored_values(), mask)
        np.testing.assert_allclose(found, wanted, atol=2e-5 * max(1.0, np.abs(wanted).max()))
        assert found.dtype == np.float32
        touched = decoder.touched(inputs, state)
        assert touched is not None
        np.testing.assert_array_equal(touched.toarray() != 0, mask)
    return decoder


@pytest.mark.parametrize("leftover", ["drop", "send"])
def test_terms_and_whole_matrices_under_a_mask(wide: Task, leftover: str) -> None:
    decoder = check_masks(wide, random_factors(WIDE, IDS, gated=True), leftover)
    first, second = decoder.matrices
    assert first.terms is not None
    assert first.terms.shape == (4, 3, 18)  # three at most
    assert first.own is not None
    assert [c for c in range(4) if first.own[c].any()] == [3]
    assert not first.terms[3].any()
    assert second.own is None
    assert (first.rest is None, second.rest is None) == (leftover == "drop",) * 2


def test_a_matrix_that_is_used_both_ways_is_masked_both_ways(tied: Task) -> None:
    network = Superposition(5, 2)
    decoder = check_masks(tied, random_factors(network, {"W": [0, 1, 2]}, gated=True), "send")
    assert decoder.matrices[0].own is None
    decoder = check_masks(tied, random_factors(network, {"W": [0, 1, 1, 1, 2]}, gated=True), "drop")
    assert decoder.matrices[0].own is not None


def test_the_whole_matrix_as_one_part_is_sent_as_it_is(tied: Task) -> None:
    decoder = sent(tied, KINDS["whole"](Superposition(5, 2), pentagon()), step=1e-4, gates="static")
    (matrix,) = decoder.matrices
    assert matrix.terms is None
    assert matrix.own is not None
    np.testing.assert_allclose(matrix.own.reshape(5, 2), pentagon()["W"], atol=1e-3)
    none = NoState(tied.fit.inputs.n_tokens)
    np.testing.assert_allclose(decoder.predict(tied.fit.inputs, none), tied.fit.outputs, atol=2e-3)
    assert decoder.touched(tied.fit.inputs, none) is None  # all of it, at once


def test_matrices_that_are_not_decomposed_are_always_there(wide: Task) -> None:
    decoder = check_masks(wide, random_factors(WIDE, {"W_out": IDS["W_out"]}, gated=True), "drop")
    assert decoder.matrices[0].rest is not None
    assert decoder.matrices[0].terms is None


def gate_reference(gates: tuple[np.ndarray, ...], inner: np.ndarray) -> np.ndarray:
    """clip(w_out . gelu(w_in v + b_in) + b_out, 0, 1), of one token."""
    into, bias, out, last = (np.asarray(g, np.float64) for g in gates)
    before = into * inner[:, None] + bias
    gelu = 0.5 * before * (1 + erf(before / np.sqrt(2)))
    return np.clip((gelu * out).sum(1) + last.ravel(), 0, 1)


def test_a_gates_value() -> None:
    gates = random_gates(5, seed=0)
    arrays = tuple(vars(gates).values())
    inner = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    found = np.asarray(hard(gate_values(GateParameters(*(jnp.asarray(a) for a in arrays)), jnp.asarray(inner))))
    wanted = np.array([gate_reference(arrays, row) for row in inner])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert (found == 0).any()
    assert (found == 1).any()


def program_reference(network: Any, decoder: GatedDecoder, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs, and which components are on in any matrix, token by token."""
    names, rows, opened = list(network.matrices), [], []
    parts = {n: parts_of(decoder, i, s) for i, (n, s) in enumerate(network.matrices.items())}
    for x in values.astype(np.float64):
        on = np.zeros(decoder.layout.components, bool)

        def weight_of(name: str, at: np.ndarray, on: np.ndarray = on) -> np.ndarray:
            matrix, (rest, each) = decoder.matrices[names.index(name)], parts[name]
            assert matrix.terms is not None
            assert matrix.gates is not None
            gate = gate_reference(matrix.gates, matrix.terms[:, 0, : len(at)].astype(np.float64) @ at)
            on |= gate > 0
            return np.asarray(rest + np.tensordot(gate, each, 1))

        rows.append(forward(network, weight_of, decoder.others, x))
        opened.append(on)
    return np.array(rows), np.array(opened)


@pytest.mark.parametrize("leftover", ["drop", "send"])
def test_the_receiver_runs_the_gates(wide: Task, tied: Task, leftover: str) -> None:
    spanning = random_factors(WIDE, {"W_in": [0, 1, 2, 4], "W_out": [2, 3, 0]}, gated=True)
    for task, factors in ((wide, spanning), (tied, random_factors(Superposition(5, 2), {"W": [0, 1, 2]}, gated=True))):
        decoder, inputs = sent(task, factors, gates="program", leftover=leftover), task.fit.inputs
        none = NoState(inputs.n_tokens)
        wanted, opened = program_reference(inputs.network, decoder, inputs.scored_values())
        np.testing.assert_allclose(decoder.predict(inputs, none), wanted, atol=5e-5 * max(1.0, np.abs(wanted).max()))
        touched = decoder.touched(inputs, none)
        assert touched is not None
        assert (touched.toarray() != opened).mean() < 1e-3  # but for gates within rounding of zero
        assert 0.02 < opened.mean() < 0.98


def test_the_gates_are_the_ones_that_were_given(wide: Task) -> None:
    """At fine steps the program computes what V, U and gates of the file do, in whatever units V and U are."""
    plain = random_factors(WIDE, {"W_in": [0, 1, 2, 3], "W_out": [2, 3, 0]}, gated=True)
    units = np.array([8.0, 1.0, 0.125, 1.0])[:, None]
    first = plain.tensors["W_in"]
    skewed = replace(first, outputs=units * first.outputs)
    for factors in (plain, replace(plain, tensors={**plain.tensors, "W_in": skewed})):
        decoder, inputs = sent(wide, factors, 1e-4, gates="program"), wide.fit.inputs
        rows = []
        for x in inputs.scored_values().astype(np.float64):

            def weight_of(name: str, at: np.ndarray, factors: Factors = factors) -> np.ndarray:
                tensor = factors.tensors[name]
                assert tensor.gates is not None
                gate = gate_reference(tuple(vars(tensor.gates).values()), tensor.inputs @ at)
                return np.asarray((tensor.inputs * gate[:, None]).T @ tensor.outputs)

            rows.append(forward(WIDE, weight_of, decoder.others, x))
        found, wanted = decoder.predict(inputs, NoState(inputs.n_tokens)), np.array(rows)
        assert np.sqrt(np.square(found - wanted).mean()) < 0.03 * wanted.std()  # gates come in steps of 1 %


@pytest.fixture(scope="module", params=["blocks.0.mlp", "blocks.0.attn", "upstream of blocks.1.hook_resid_pre"])
def region(request: pytest.FixtureRequest, tiny_model: Model, tiny_data: Dataset) -> Task:
    return build_task(tiny_model, request.param, tiny_data, no_progress).for_fitting()


def spanning(task: Task, count: int = 12) -> Factors:
    """Gated components that have a part in every matrix of a transformer's region."""
    network = task.fit.inputs.network
    assert network is not None
    return random_factors(network, {name: np.arange(count) for name in network.matrices}, gated=True)


def test_gates_see_their_own_token(region: Task) -> None:
    """Of the first matrices that a region multiplies with: other tokens' inputs are others, the gates are the same."""
    decoder, network = sent(region, spanning(region), gates="program"), region.fit.inputs.network
    assert network is not None
    matrices, others = decoder.weights(network)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 8, 16)).astype(np.float32)
    tokens, place = np.zeros((3, 8), np.int32), 4
    changed = rng.normal(size=values.shape).astype(np.float32)
    changed[:, place] = values[:, place]
    seen = [
        run_masked(network, matrices, others, None, jnp.asarray(v), jnp.asarray(tokens))[1] for v in (values, changed)
    ]
    for name in [n for n in network.matrices if n.rpartition(".")[2] in ("W_Q", "W_K", "W_V", "W_in")][:3]:
        first, second = (np.asarray(s[name]) for s in seen)
        np.testing.assert_allclose(first[:, place], second[:, place], atol=1e-6)
        assert not np.allclose(first[:, place - 1], second[:, place - 1])


@pytest.mark.parametrize("gates", ["indices", "program", "static"])
def test_a_decoder_needs_what_it_touches_and_nothing_later(region: Task, gates: str) -> None:
    factors, inputs = spanning(region), region.fit.inputs
    explanation = Components(object=factors, gates=gates, leftover="send").fit(region)
    section = explanation.section(settings_of(explanation, region, 0.3))
    state = NoState(inputs.n_tokens)
    if gates == "indices":  # components that most sequences do without
        rare = np.random.default_rng(1).random((inputs.n_tokens, 12)) < np.geomspace(0.003, 0.5, 12)
        state = state_of(rare)
    check_decoder("parts", section, inputs, state)


def test_so_does_one_of_a_toy(wide: Task) -> None:
    inputs = wide.fit.inputs
    for gates in ("indices", "program", "static"):
        ids = IDS if gates == "indices" else {"W_in": [0, 1, 2], "W_out": [1, 2, 3]}
        factors = random_factors(WIDE, ids, gated=True)
        explanation = Components(object=factors, gates=gates).fit(wide)
        section = explanation.section(settings_of(explanation, wide, 0.1))
        mask = np.random.default_rng(1).random((inputs.n_tokens, 4)) < [0.01, 0.1, 0.5, 1.0]
        check_decoder("parts", section, inputs, state_of(mask) if gates == "indices" else NoState(inputs.n_tokens))


def test_positions_that_are_not_scored_have_the_next_tokens_components(region: Task) -> None:
    """Nobody is told of them, and nobody pays for them: attention may still look at them."""
    decoder, inputs = sent(region, spanning(region), gates="indices", leftover="send"), region.fit.inputs
    assert not inputs.scored[:, 0].any()
    mask = np.random.default_rng(2).random((inputs.n_tokens, 12)) < 0.3
    found = decoder.predict(inputs, state_of(mask))
    everywhere = Inputs(inputs.tokens, np.ones_like(inputs.scored), inputs.values, inputs.network)
    first = inputs.numbers()[:, 1]
    full = np.zeros((*inputs.tokens.shape, 12), bool)
    full[inputs.scored], full[:, 0] = mask, mask[first]
    wanted = decoder.predict(everywhere, state_of(full.reshape(-1, 12)))[inputs.scored.ravel()]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * wanted.std())


def test_many_sequences_are_run_in_pieces(region: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, inputs = sent(region, spanning(region), gates="indices"), region.fit.inputs
    mask = np.random.default_rng(3).random((inputs.n_tokens, 12)) < 0.3
    whole = decoder.predict(inputs, state_of(mask))
    monkeypatch.setattr("decompositions.weights.gated.BATCH_TOKENS", 500)
    np.testing.assert_allclose(decoder.predict(inputs, state_of(mask)), whole, atol=1e-4 * whole.std())


def test_floating_point_operations(wide: Task) -> None:
    decoder, inputs = sent(wide, random_factors(WIDE, IDS, gated=True), leftover="send"), wide.fit.inputs
    mask = np.zeros((inputs.n_tokens, 4), bool)
    rest, parts = 80 + 60, 4 * (3 * 18 + 80) + 4 * 2 * 16
    assert decoder.flops_per_token(inputs, state_of(mask)) == pytest.approx(2 * rest)
    assert decoder.flops_per_token(inputs, state_of(~mask)) == pytest.approx(2 * (rest + parts))
    some = replace(inputs, scored=inputs.scored)
    assert decoder.flops_per_token(some, state_of(mask | [True, False, False, False])) == pytest.approx(
        2 * (rest + parts / 4)
    )
    assert isinstance(decoder.touched(inputs, state_of(mask)), scipy.sparse.csr_array)
