"""What the table shows: from the decoder's own terms, which have to be what it predicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse

from decompositions.dictionary import SCALE, DictionaryDecoder
from decompositions.pca import PCA
from estimators.fidelity import Bench, Coding
from estimators.published.figures import Terms, published_figures
from mdl.ledger import Published
from mdl.protocols import AdditiveDecoder, Inputs, Settings
from mdl.receiver import Receiver
from mdl.state import DenseState, IndexState, JoinedState, NoState, SparseState
from mdl.task import Task

ALL = {
    *("MDL-SAE bound", "MDL-SAE bound, unordered", "MDL-SAE entropy"),
    *("SAEBench mdl", "SAEBench mdl, mended", "block-sparse", "block-sparse, smooth"),
}
TOKENS, FEATURES, WIDTH = 90, 12, 6


def sparse_state() -> SparseState:
    rng = np.random.default_rng(7)
    symbols = rng.integers(1, 6, (TOKENS, FEATURES)) * (rng.random((TOKENS, FEATURES)) < 0.25)
    return SparseState.from_matrix(scipy.sparse.csr_array(symbols), np.zeros(FEATURES, np.int64), False)


def decoder(side: int = 0) -> DictionaryDecoder:
    rng = np.random.default_rng(8)
    atoms, bias, steps = rng.normal(size=(FEATURES, WIDTH)), rng.normal(size=WIDTH), rng.uniform(0.2, 3.0, FEATURES)
    arrays = (a.astype(np.float32) for a in (atoms, bias, steps))
    return DictionaryDecoder(*arrays, np.zeros(FEATURES, np.int64), False, side, (0.25, 1.0))


def inputs() -> Inputs:
    return Inputs(np.zeros((1, TOKENS), np.int64), np.ones((1, TOKENS), bool))


def figures(state: object, made: DictionaryDecoder | None, noise: float = 0.1) -> dict[str, Published]:
    rng = np.random.default_rng(9)
    prediction = np.zeros((TOKENS, WIDTH), np.float32) if made is None else made.predict(inputs(), state)
    outputs = prediction + noise * rng.normal(size=prediction.shape).astype(np.float32)
    terms = Terms.of(state, None if made is None else made.terms(state))
    return dict(published_figures(terms, outputs, prediction, prediction + 0.5 * (outputs - prediction), 1e6))


def test_a_dictionarys_terms_are_its_prediction() -> None:
    made, state = decoder(), sparse_state()
    coefficients, rows = made.terms(state)
    assert isinstance(made, AdditiveDecoder)
    np.testing.assert_allclose(coefficients @ rows + made.bias, made.predict(inputs(), state), rtol=1e-5, atol=1e-5)


def test_terms_carry_a_tokens_scale() -> None:
    made = decoder(SCALE)
    scales = np.random.default_rng(1).integers(-4, 5, (TOKENS, 1))
    state = JoinedState((sparse_state(), DenseState(scales, parts=False)))
    coefficients, rows = made.terms(state)
    scale = np.exp2(0.25 * scales)
    predicted = coefficients @ rows + scale * made.bias
    np.testing.assert_allclose(predicted, made.predict(inputs(), state), rtol=1e-4, atol=1e-4)


def test_the_components_terms_are_their_prediction(tiny_bench: Bench, tiny_task: Task) -> None:
    explanation = PCA(rank=5).fit(tiny_task.for_fitting())
    knobs = {name: grid[0] for name, grid in explanation.knobs.items()}
    settings = Settings(tiny_bench.horizon, 0.5, tiny_bench.metrics[0].root, knobs)
    coding = Coding.prepare(tiny_bench, explanation, tiny_bench.metrics[0], settings, 0.5, None)
    attempt = coding.attempt(tiny_bench, tiny_bench.probe)
    receiver = Receiver.of(attempt.message.data)
    terms = receiver.terms(attempt.state)
    assert terms is not None
    constant = attempt.received.prediction - terms[0] @ terms[1]
    np.testing.assert_allclose(constant, np.broadcast_to(constant[0], constant.shape), atol=1e-4)
    assert terms[0].nnz == np.count_nonzero(attempt.state.values)


def test_every_formula_applies_to_a_dictionary_and_says_what_it_is() -> None:
    found = figures(sparse_state(), decoder())
    assert found.keys() == ALL
    assert {(p.unit, p.obtained) for p in found.values()} == {("bits a token", "estimate")}
    assert all(math.isfinite(p.value) and p.value > 0 and p.code and p.source for p in found.values())
    l0 = sparse_state().matrix().nnz / TOKENS
    assert found["MDL-SAE bound"].value == pytest.approx(l0 * (7 + math.log2(FEATURES)))
    assert found["MDL-SAE bound, unordered"].value < found["MDL-SAE bound"].value
    # Five levels of each feature are apart in 128 bins as in 64: the mended figure is the entropy, where bins suffice.
    assert found["SAEBench mdl, mended"].value <= found["MDL-SAE entropy"].value + 1e-9
    assert found["block-sparse"].value <= found["block-sparse, smooth"].value


def test_finer_reconstructions_cost_the_block_sparse_code_more() -> None:
    coarse, fine = (figures(sparse_state(), decoder(), noise)["block-sparse"].value for noise in (0.4, 0.1))
    assert fine > coarse


def test_side_information_leaves_out_what_does_not_know_it() -> None:
    scales = np.random.default_rng(1).integers(-4, 5, (TOKENS, 1))
    found = figures(JoinedState((sparse_state(), DenseState(scales, parts=False))), decoder(SCALE))
    assert found.keys() == ALL - {"SAEBench mdl", "SAEBench mdl, mended"}


def test_a_decoder_that_does_not_say_its_terms_has_the_formulas_of_symbols_alone() -> None:
    dense = DenseState(np.random.default_rng(3).integers(-3, 4, (TOKENS, 4)))
    for state in (sparse_state(), dense):
        assert figures(state, None).keys() == {n for n in ALL if n.startswith("MDL-SAE")}


@pytest.mark.parametrize("state", [NoState(TOKENS), IndexState(np.zeros(TOKENS, np.int64), 3)])
def test_other_states_have_none(state: object) -> None:
    assert figures(state, None) == {}
