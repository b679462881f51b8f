"""Streams that begin where another ended."""

from __future__ import annotations

import numpy as np
import pytest

from estimators.primed import CODE_BITS, carried_bits, concatenated, follow, naming_bits, primed_bits
from mdl.errors import ExplanationError
from mdl.state import Context, DenseState, IndexState, JoinedState, NoState, SparseState, State

pytestmark = pytest.mark.usefixtures("in_little_time")
N = 120


def context(seed: int, n: int = N) -> Context:
    rng = np.random.default_rng(seed)
    previous = np.arange(n) - 1
    previous[::12] = -1
    return Context(rng.integers(0, 9, n), previous)


def dense(seed: int) -> DenseState:
    rng = np.random.default_rng(seed)
    return DenseState(np.rint(rng.standard_normal((N, 3)) * (1.0, 9.0, 80.0)).astype(np.int64))


def indices(seed: int) -> IndexState:
    return IndexState(np.random.default_rng(seed).zipf(1.7, N).clip(1, 30).astype(np.int64) - 1, 30)


def sparse(seed: int) -> SparseState:
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((N, 12)) < 0.15, rng.integers(1, 9, (N, 12)), 0)
    tokens, features = np.nonzero(values)
    return SparseState(tokens, features, values[tokens, features].astype(np.int64), np.arange(12) % 3, N, False)


def test_carried_columns_obey_the_chain_rule() -> None:
    first, second = dense(0), dense(1)
    whole = DenseState(np.concatenate([first.values, second.values])).bits()
    assert first.bits() + carried_bits(second.values, first.values) == pytest.approx(whole)


def test_carried_bits_of_a_single_column_by_hand() -> None:
    """Zero or not, and nothing else: a KT coin that fell on 0 three times gives the next 0 a chance of 3.5 / 4."""
    zeros = np.zeros((3, 1), np.int64)
    assert carried_bits(zeros[:1], zeros) == pytest.approx(-np.log2(3.5 / 4.0))


@pytest.mark.parametrize("make", [dense, indices, sparse])
def test_what_was_learnt_is_not_learnt_again(make) -> None:  # type: ignore[no-untyped-def]
    state, before = make(1), make(0)
    alone = primed_bits(state, context(1), None, None)
    primed = primed_bits(state, context(1), before, context(0))
    assert 0 < primed < alone


@pytest.mark.parametrize("make", [dense, indices, sparse])
def test_streams_follow_one_another(make) -> None:  # type: ignore[no-untyped-def]
    both = concatenated(make(0), make(1))
    assert both.n_tokens == 2 * N
    joined = follow(context(0), context(1))
    assert joined.n_tokens == 2 * N
    assert (joined.previous[N:] == np.where(context(1).previous < 0, -1, context(1).previous + N)).all()


def test_streams_of_several_add_up() -> None:
    pair: State = JoinedState((sparse(0), dense(0)))
    alone = [primed_bits(s, context(0), None, None) for s in (sparse(0), dense(0))]
    assert primed_bits(pair, context(0), None, None) == pytest.approx(sum(alone))
    assert primed_bits(NoState(N), context(0), None, None) == 0.0
    assert min(alone) > CODE_BITS


def test_other_alphabets_do_not_follow() -> None:
    with pytest.raises(ExplanationError, match="cannot follow"):
        concatenated(dense(0), indices(0))


def test_parts_that_were_not_sent_are_named() -> None:
    """Five parts known to both ends, in any order: a stream that introduces them all says which permutation."""
    state = IndexState(np.array([3, 3, 0, 4, 1, 2]), 5)
    assert naming_bits(state, None) == pytest.approx(np.log2(120.0))
    assert naming_bits(state, IndexState(np.array([3, 0, 0]), 5)) == pytest.approx(np.log2(6.0))
    assert naming_bits(dense(0), None) == 0.0
