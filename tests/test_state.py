"""State streams: exact lengths, shares of tokens, and real bitstreams that decode to the same symbols."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse

from mdl.codes.bitstream import BitWriter
from mdl.codes.counts import kt_bits
from mdl.state import DenseState, IndexState, NoState, SparseState, State, first_use_order

TOKENS = 400


def sparse_state(signed: bool = True, seed: int = 0, features: int = 30, tokens: int = TOKENS) -> SparseState:
    """Features of very different frequencies, two of them never used, in three classes of values."""
    rng = np.random.default_rng(seed)
    on = rng.random((tokens, features)) < np.geomspace(0.4, 0.002, features)
    on[:, [3, 7]] = False
    values = 1 + rng.geometric(0.3, (tokens, features))
    signs = rng.choice([-1, 1], values.shape) if signed else 1
    matrix = scipy.sparse.csr_array(np.where(on, values * signs, 0))
    return SparseState.from_matrix(matrix, rng.integers(0, 3, features), signed)


def dense_state(seed: int = 0, width: int = 5, tokens: int = TOKENS) -> DenseState:
    rng = np.random.default_rng(seed)
    return DenseState(np.rint(rng.laplace(0, np.geomspace(8, 0.05, width), (tokens, width))).astype(np.int64))


def index_state(seed: int = 0, clusters: int = 20) -> IndexState:
    rng = np.random.default_rng(seed)
    return IndexState(rng.choice(clusters, TOKENS, p=rng.dirichlet(np.full(clusters, 0.3))), clusters)


STATES: dict[str, Callable[[], State]] = {
    "none": lambda: NoState(TOKENS),
    "dense": dense_state,
    "dense of one column": lambda: dense_state(1, 1),
    "sparse, signed": sparse_state,
    "sparse, positive": lambda: sparse_state(signed=False),
    "index": index_state,
    "sparse, one token": lambda: sparse_state(tokens=1),
    "dense, all zero": lambda: DenseState(np.zeros((TOKENS, 3), np.int64)),
    "sparse, never on": lambda: SparseState.from_matrix(
        scipy.sparse.csr_array((TOKENS, 4), dtype=np.int64), np.zeros(4, np.int64), True
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_the_shares_of_tokens_sum_to_the_length(name: str) -> None:
    state = STATES[name]()
    assert isinstance(state, State)
    length = state.length()
    assert length.per_token.shape == (state.n_tokens,)
    assert length.per_token.sum() == pytest.approx(length.total, rel=1e-6, abs=1e-9)
    assert 0 <= length.learning <= length.total or length.total == 0
    assert length.code


@pytest.mark.parametrize("name", STATES)
def test_the_stream_is_as_long_as_its_length(name: str) -> None:
    state, writer = STATES[name](), BitWriter()
    state.write(writer)
    total = state.length().total
    assert writer.information_bits == pytest.approx(total, abs=1e-3)
    assert abs(8 * len(writer.to_bytes()) - total) <= 64 + 0.001 * total


def test_the_order_of_parts_is_worth_nothing() -> None:
    """A code that depended on how the sender numbers its features would pay for an arbitrary choice."""
    rng = np.random.default_rng(1)
    for state in (sparse_state(), index_state()):
        permuted = state.reordered(rng.permutation(state.n_parts))
        assert permuted.length().total == pytest.approx(state.length().total, rel=1e-12)
        assert np.allclose(permuted.length().per_token, state.length().per_token)


def test_reordering_moves_the_columns() -> None:
    order = np.random.default_rng(2).permutation(30)
    state = sparse_state()
    assert np.array_equal(state.reordered(order).matrix().toarray(), state.matrix().toarray()[:, order])
    assert np.array_equal(state.reordered(order).classes, state.classes[order])
    index, order = index_state(), np.random.default_rng(3).permutation(20)
    assert np.array_equal(index.reordered(order).touched().toarray(), index.touched().toarray()[:, order])


def test_features_that_are_never_on_cost_nothing() -> None:
    state = sparse_state()
    wider = SparseState(
        state.tokens, state.features, state.values, np.r_[state.classes, np.zeros(500, np.int64)], TOKENS, True
    )
    assert wider.length().total == state.length().total
    assert np.allclose(wider.length().per_token, state.length().per_token)


def test_parts_in_the_order_of_their_first_use() -> None:
    touched = scipy.sparse.csr_array(np.array([[0, 0, 1, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]))
    order = first_use_order(touched)
    assert order[:3].tolist() == [2, 0, 4]
    assert sorted(order[3:].tolist()) == [1, 3]


def test_what_tokens_touch() -> None:
    dense, sparse, index = dense_state(), sparse_state(), index_state()
    assert np.array_equal(dense.touched().toarray(), dense.values != 0)
    assert np.array_equal(sparse.touched().toarray(), sparse.matrix().toarray() != 0)
    assert (index.touched().sum(1) == 1).all()
    assert np.array_equal(index.touched().toarray().argmax(1), index.indices)
    assert NoState(3).touched() is None


def test_explicit_zeros_are_no_symbols() -> None:
    matrix = scipy.sparse.csr_array((np.array([2, 0, -1]), (np.array([0, 0, 1]), np.array([1, 0, 2]))), shape=(2, 3))
    state = SparseState.from_matrix(matrix, np.zeros(3, np.int64), True)
    assert state.values.tolist() == [2, -1]
    assert state.features.tolist() == [1, 2]


def test_zeros_and_ones_cost_what_krichevsky_and_trofimov_say() -> None:
    """One column of 0 and +-1: a decision for zero, one for the sign, one that the magnitude is not larger."""
    values = np.random.default_rng(4).choice([-1, 0, 1], (200, 1), p=[0.1, 0.8, 0.1])
    on, negative = np.count_nonzero(values), np.count_nonzero(values < 0)
    expected = kt_bits(on, 200 - on) + kt_bits(negative, on - negative) + kt_bits(0, on)
    assert DenseState(values).length().total == pytest.approx(float(expected), rel=1e-9)


def test_learning_vanishes_per_token() -> None:
    short, long = (DenseState(np.tile(dense_state().values, (k, 1))).length() for k in (1, 16))
    assert long.learning / 16 < 0.25 * short.learning
    assert long.total < 16 * short.total
