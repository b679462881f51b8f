"""static(N), paid on first use: against counting over all windows, at its ends, and what must not move it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from estimators.first_use import GRID, static_curve, touched_share
from mdl.message import Message, QuantisedArray, Section, encode_message


def shares_by_counting(touched: np.ndarray, size: int) -> np.ndarray:
    """The share of cyclic windows of `size` tokens in which each part is touched."""
    n = len(touched)
    windows = [touched[(start + np.arange(min(size, n))) % n].any(0) for start in range(n)]
    return np.mean(windows, 0)


def uses(tokens: int, parts: int, seed: int = 0, dead: int = 2) -> np.ndarray:
    """Which part each token touches, from always to almost never, the last `dead` never."""
    rng = np.random.default_rng(seed)
    frequency = np.geomspace(1.0, 0.5 / tokens, parts)
    frequency[parts - dead :] = 0
    return rng.random((tokens, parts)) < frequency


def message_of(parts: int, seed: int = 0) -> Message:
    rng = np.random.default_rng(seed)
    rows = QuantisedArray.from_values(rng.normal(size=(parts, 6)), np.exp2(rng.uniform(-6, -1, parts)))
    mean = QuantisedArray.from_values(rng.normal(size=6), 0.01)
    return encode_message([Section("special", (mean,)), Section("dictionary", (mean,), (rows,))])


def sparse(touched: np.ndarray) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array(touched)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 25), parts=st.integers(1, 6), density=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_shares_are_those_of_all_cyclic_windows(tokens: int, parts: int, density: float, seed: int) -> None:
    touched = np.random.default_rng(seed).random((tokens, parts)) < density
    sizes = sorted({1, 2, 3, tokens // 2 + 1, tokens})
    found = touched_share(sparse(touched), np.array(sizes))
    assert found.shape == (len(sizes), parts)
    for row, size in zip(found, sizes, strict=True):
        assert np.allclose(row, shares_by_counting(touched, size), atol=1e-12)


def test_the_curve_is_the_sum_over_parts() -> None:
    tokens, parts = 60, 9
    touched, message = uses(tokens, parts), message_of(parts)
    curve = static_curve(message, [None, sparse(touched)], tokens)
    for n, bits in zip(curve.tokens, curve.bits, strict=True):
        if n <= tokens:
            paid = shares_by_counting(touched, int(n))
        else:
            paid = np.where(touched.any(0), 1.0, 1 - (1 - 0.5 / (tokens + 1)) ** (n - tokens))
        assert bits == pytest.approx(message.header_bits + message.part_bits[1] @ paid, rel=1e-12)


def test_one_token_pays_the_header_and_its_own_parts() -> None:
    touched, message = uses(500, 20), message_of(20)
    curve = static_curve(message, [None, sparse(touched)], 500)
    one_tokens = np.mean([message.part_bits[1][row].sum() for row in touched])
    assert curve.at(1.0) == pytest.approx(message.header_bits + one_tokens, rel=1e-12)
    assert curve.header_bits == message.header_bits


def test_it_rises_from_one_tokens_parts_to_the_whole_file() -> None:
    touched, message = uses(500, 20), message_of(20)
    curve = static_curve(message, [None, sparse(touched)], 500)
    assert (np.diff(curve.bits) >= -1e-9).all()
    assert (np.diff(curve.tokens) > 0).all()
    assert curve.bits[-1] == pytest.approx(8 * len(message.data), rel=1e-9)
    assert curve.whole_bits == 8 * len(message.data)
    assert curve.at(1e15) == curve.bits[-1]
    assert curve.at(0.01) == curve.bits[0]


def test_at_all_tokens_everything_seen_is_paid_and_nothing_else() -> None:
    touched, message = uses(300, 12), message_of(12)
    curve = static_curve(message, [None, sparse(touched)], 300)
    seen = touched.any(0)
    assert curve.tokens.count(300.0) == 1
    assert curve.at(300.0) == pytest.approx(message.header_bits + message.part_bits[1][seen].sum(), rel=1e-12)


def test_a_part_that_is_never_touched_moves_only_the_whole() -> None:
    touched = uses(200, 10, dead=1)
    message = message_of(10)
    # The same bits, without the last part: it is taken out of the shares, not coded anew.
    without = Message(message.data, (message.part_bits[0], message.part_bits[1][:-1]), message.information_bits)
    last = message.part_bits[1][-1]
    long = static_curve(message, [None, sparse(touched)], 200)
    short = static_curve(without, [None, sparse(touched[:, :-1])], 200)
    grid = np.array(long.tokens)
    # Its bits have gone over to the header of `without`.
    difference = np.array(long.bits) - (np.array(short.bits) - last)
    assert np.allclose(difference[grid <= 200], 0, atol=1e-9)
    assert difference[-1] == pytest.approx(last, rel=1e-9)
    assert (np.diff(difference[grid >= 200]) >= -1e-9).all()
    # Half a use in 201 tokens is what it is held to be worth: 63 % of it is paid 402 tokens later.
    assert np.interp(200 + 402, grid, difference) == pytest.approx(last * (1 - np.exp(-1)), rel=0.05)


def test_an_indivisible_lump_is_paid_at_once() -> None:
    message = message_of(10)
    curve = static_curve(message, [None, None], 200)
    assert set(curve.bits) == {8.0 * len(message.data)}


def test_a_part_that_every_token_touches_is_paid_at_once() -> None:
    message = message_of(10)
    curve = static_curve(message, [None, sparse(np.ones((50, 10), bool))], 50)
    assert np.allclose(curve.bits, 8 * len(message.data))


def test_the_order_of_parts_changes_nothing() -> None:
    touched, message = uses(100, 15), message_of(15)
    order = np.random.default_rng(4).permutation(15)
    permuted = Message(message.data, (message.part_bits[0], message.part_bits[1][order]), message.information_bits)
    before = static_curve(message, [None, sparse(touched)], 100)
    after = static_curve(permuted, [None, sparse(touched[:, order])], 100)
    assert np.allclose(before.bits, after.bits, rtol=1e-12)


def test_bursts_are_cheaper_than_scattered_uses() -> None:
    """The same frequency, in one run or spread out: windows of ten tokens meet the spread-out part far more often."""
    burst, spread = np.zeros((100, 1), bool), np.zeros((100, 1), bool)
    burst[:10], spread[::10] = True, True
    assert touched_share(sparse(burst), np.array([10]))[0, 0] == pytest.approx(0.19)
    assert touched_share(sparse(spread), np.array([10]))[0, 0] == 1.0


def test_explicit_zeros_are_not_uses() -> None:
    values = scipy.sparse.csr_array((np.array([True, False]), (np.array([0, 1]), np.array([0, 1]))), shape=(4, 2))
    values.eliminate_zeros()
    assert touched_share(values, np.array([4]))[0].tolist() == [1.0, 0.0]


def test_unsorted_columns_are_no_matter() -> None:
    touched = uses(40, 6, dead=0)
    rows, columns = np.nonzero(touched)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = scipy.sparse.coo_array((np.ones(len(rows), bool), (rows[order], columns[order])), shape=touched.shape)
    for size in (1, 5, 40):
        assert np.allclose(
            touched_share(shuffled.tocsr(), np.array([size])), touched_share(sparse(touched), np.array([size]))
        )


def test_the_grid_runs_from_one_to_ten_billion() -> None:
    assert GRID[0] == 1
    assert GRID[-1] == 1e10
    assert (np.diff(GRID) > 0).all()
