"""The lattice code: exact streams, rounding that the metric approves of, prediction that pays."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl.codes import BitReader, BitWriter
from mdl.codes.lattice import (
    MOST_PREDICTED,
    Lattice,
    Rounding,
    fit_prediction,
    nearest_planes,
)
from mdl.codes.steps import LARGEST_EXPONENT, STEPS_PER_OCTAVE, grid_steps
from mdl.errors import CodeError


def metric(width: int, seed: int) -> np.ndarray:
    """A symmetric root whose eigenvalues span two decades."""
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    return (rotation * np.logspace(-1, 1, width)) @ rotation.T


def correlated(rows: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, width)) @ rng.normal(size=(width, width))


def written(lattice: Lattice, symbols: np.ndarray, exponents: np.ndarray) -> tuple[bytes, float]:
    writer = BitWriter()
    lattice.write(writer, symbols, exponents)
    return writer.to_bytes(), writer.information_bits


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 1000), st.floats(-12, 6))
def test_round_trip_and_exactness(rows: int, width: int, seed: int, octave: float) -> None:
    values = correlated(rows, width, seed)
    exponents = np.random.default_rng(seed).integers(-8, 9, rows) + round(STEPS_PER_OCTAVE * octave)
    rounding = Rounding.of(values, metric(width, seed), fit_prediction(values))
    symbols = rounding.symbols(values, exponents)
    data, bits = written(rounding.lattice, symbols, exponents)
    assert abs(8 * len(data) - bits) <= 64 + 0.001 * bits
    reader = BitReader(data)
    lattice, received = Lattice.read(reader, exponents, width)
    reader.finish()
    assert np.array_equal(received, symbols)
    assert np.array_equal(lattice.values(received, exponents), rounding.lattice.values(symbols, exponents))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(0, 1000))
def test_the_order_of_rows_changes_nothing_else(seed: int) -> None:
    values, exponents = correlated(30, 5, seed), np.random.default_rng(seed).integers(-12, 0, 30)
    rounding = Rounding.of(values, metric(5, seed), fit_prediction(values))
    order = np.random.default_rng(seed + 1).permutation(30)
    symbols = rounding.symbols(values, exponents)
    assert np.array_equal(rounding.symbols(values[order], exponents[order]), symbols[order])
    writer, other = BitWriter(), BitWriter()
    cost = rounding.lattice.write(writer, symbols, exponents)
    moved = rounding.lattice.write(other, symbols[order], exponents[order])
    assert abs(writer.information_bits - other.information_bits) <= 1e-6
    assert np.allclose(moved, cost[order])


def test_finer_steps_cost_more_and_err_less() -> None:
    values, root = correlated(200, 8, 0), metric(8, 0)
    rounding = Rounding.of(values, root, fit_prediction(values))
    found = []
    for exponent in (8, 4, 0, -4, -8, -12):
        exponents = np.full(200, exponent)
        symbols = rounding.symbols(values, exponents)
        error = (values - rounding.lattice.values(symbols, exponents)) @ root
        found.append((written(rounding.lattice, symbols, exponents)[1], np.square(error).mean()))
    bits, errors = zip(*found, strict=True)
    assert list(bits) == sorted(bits)
    assert list(errors) == sorted(errors, reverse=True)


def test_errors_are_a_step_squared_over_twelve_in_every_direction() -> None:
    """High rate: what Babai's rounding leaves is uniform in a box of the Gram-Schmidt lengths, here one step each."""
    values, root = correlated(4000, 6, 1), metric(6, 1)
    rounding = Rounding.of(values, root, fit_prediction(values))
    exponents = np.full(4000, -24)
    error = (values - rounding.lattice.values(rounding.symbols(values, exponents), exponents)) @ root
    step = 2.0 ** (-24 / STEPS_PER_OCTAVE)
    # Columns' steps lie on a grid of quarter octaves.
    assert np.square(error).mean() == pytest.approx(step**2 / 12, rel=0.15)
    second = error.T @ error / len(error)
    assert np.linalg.eigvalsh(second).max() < 1.6 * np.linalg.eigvalsh(second).min()


def test_it_beats_equal_independent_columns_by_what_theory_says() -> None:
    """Half the log of arithmetic over geometric mean of the metric, and of variances over innovations, a number."""
    rows, width = 6000, 6
    values, root = correlated(rows, width, 2), metric(width, 2)
    covariance, gram = values.T @ values / rows, root @ root.T
    gain = 0.5 * np.log2(np.trace(gram) / width) - np.linalg.slogdet(gram)[1] / np.log(2) / 2 / width
    gain += 0.5 * np.log2(np.diag(covariance)).mean() - np.linalg.slogdet(covariance)[1] / np.log(2) / 2 / width
    step = 2.0**-5
    exponents = np.full(rows, round(STEPS_PER_OCTAVE * np.log2(step)))
    rounding = Rounding.of(values, root, fit_prediction(values))
    ours = written(rounding.lattice, rounding.symbols(values, exponents), exponents)[1]
    flat = step / np.sqrt(np.trace(gram) / width)  # the same mean square error
    zero = np.zeros(width, np.int64)
    spreads = np.rint(4 * np.log2(np.sqrt(np.diag(covariance)) / flat)).astype(np.int64)
    plain = Lattice(zero, spreads)
    theirs = written(plain, np.rint(values / flat).astype(np.int64), np.zeros(rows, np.int64))[1]
    assert (theirs - ours) / values.size == pytest.approx(gain, abs=0.15)
    assert gain > 1


def test_nearest_planes_against_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    width, n = 70, 5  # more than two blocks
    generator = np.tril(rng.normal(size=(width, width))) * 0.1 + np.eye(width)
    targets = rng.normal(size=(width, n)) * 4
    found = nearest_planes(targets, generator, np.full((width, n), 0.5))
    for point in range(n):
        rest = targets[:, point].copy()
        for j in range(width - 1, -1, -1):
            k = np.rint(rest[j] / generator[j, j])
            assert k == found[j, point]
            rest -= k * generator[j]


def test_prediction_is_least_squares_up_to_its_unit() -> None:
    values = correlated(500, 5, 4)
    prediction = fit_prediction(values)
    assert not np.triu(prediction).any()
    for j in range(1, 5):
        exact = np.linalg.lstsq(values[:, :j], values[:, j], rcond=None)[0]
        left = values[:, j] - values[:, :j] @ exact
        ours = values[:, j] - values[:, :j] @ (prediction[j, :j] / 16)
        assert np.square(ours).sum() <= 1.1 * np.square(left).sum() + 0.01 * np.square(values[:, j]).sum()


def flat(width: int, prediction: np.ndarray | None = None) -> Lattice:
    return Lattice(np.zeros(width, np.int64), np.zeros(width, np.int64), prediction)


def full(width: int, coefficient: int) -> np.ndarray:
    return np.tril(np.full((width, width), coefficient), -1)


@pytest.mark.parametrize(
    ("lattice", "match"),
    [
        (Lattice(np.full(2, LARGEST_EXPONENT + 1), np.zeros(2, np.int64)), "steps of up to 505 where 504"),
        (Lattice(np.zeros(2, np.int64), np.array([0, -1009])), "spreads of up to 1009 where 1008"),
        (flat(2, full(2, (1 << 20) + 1)), "coefficients of up to 1048577"),
        (flat(MOST_PREDICTED + 1, full(MOST_PREDICTED + 1, 0)), "prediction of 1025 columns; 1024 are the most"),
    ],
)
def test_lattices_beyond_the_limits_are_refused(lattice: Lattice, match: str) -> None:
    width = len(lattice.columns)
    with pytest.raises(CodeError, match=match):
        lattice.check(width)
    data, _ = written(lattice, np.ones((1, width), np.int64), np.zeros(1, np.int64))
    with pytest.raises(CodeError, match=match):
        Lattice.read(BitReader(data), np.zeros(1, np.int64), width)
    with pytest.raises(CodeError, match="do not fit a width"):
        lattice.check(width + 1)


def test_a_prediction_that_runs_away_is_refused() -> None:
    wild = flat(200, full(200, 1 << 20))
    wild.check(200)
    with pytest.raises(CodeError, match="beyond floating point"):
        wild.largest(np.ones((1, 200), np.int64), np.zeros(1, np.int64))


def test_a_truncated_stream_is_refused() -> None:
    data, _ = written(flat(3), np.arange(90).reshape(30, 3), np.zeros(30, np.int64))
    with pytest.raises(CodeError):
        Lattice.read(BitReader(data[: len(data) // 2]), np.zeros(30, np.int64), 3)


@pytest.mark.parametrize("width", [0, 400])
def test_work_is_bounded_before_it_is_done(width: int) -> None:
    """A prediction of 400 columns that are all equal takes a few bytes, and a basis of 400 x 400."""
    symbols, exponents = np.zeros((4, max(width, 1)), np.int64), np.zeros(4, np.int64)
    lattice = flat(max(width, 1), full(max(width, 1), 0) if width else None)
    writer = BitWriter()
    lattice.write(writer, symbols, exponents)
    data = writer.to_bytes()
    assert len(data) < 100
    assert writer.work >= width * width * 2
    Lattice.read(BitReader(data, writer.work), exponents, symbols.shape[1])
    with pytest.raises(CodeError, match="units of work"):
        Lattice.read(BitReader(data, writer.work - 1), exponents, symbols.shape[1])


def test_large_integers_are_added_up_in_a_fixed_order_and_pay_for_it() -> None:
    values = correlated(40, 6, 7)
    lattice = Rounding.of(values, metric(6, 7), fit_prediction(values)).lattice
    symbols = np.random.default_rng(7).integers(-9, 10, (5, 6))
    symbols[2] <<= 50
    found = lattice.points(symbols)
    columns = [[Fraction(b) for b in column] for column in lattice.basis.T]
    exact = [[sum(int(s) * b for s, b in zip(row, c, strict=True)) for c in columns] for row in symbols]
    assert [[Fraction(v) for v in row] for row in np.delete(found, 2, 0)] == [*exact[:2], *exact[3:]]
    np.testing.assert_allclose(found[2], np.array(exact[2], np.float64), rtol=1e-12, atol=1e-3)
    one = symbols[2, 0] * lattice.basis[0]
    for j in range(1, 6):
        one = one + symbols[2, j] * lattice.basis[j]
    assert np.array_equal(found[2], one)
    small, large = BitWriter(), BitWriter()
    for writer, size in ((small, 1), (large, 1 << 40)):
        flat(64, full(64, 0)).write(writer, np.full((40, 64), size), np.zeros(40, np.int64))
    assert large.work == small.work + 40 * 64**2 // 32


def test_the_basis_is_the_inverse_of_what_is_left_after_prediction() -> None:
    values = correlated(60, 9, 8)
    prediction = fit_prediction(values)
    lattice = Rounding.of(values, metric(9, 8), prediction).lattice
    exact = np.linalg.inv(np.eye(9) - prediction / 16).T * np.exp2(lattice.columns / 4)[:, None]
    np.testing.assert_allclose(lattice.basis, exact, atol=2.0**-26 * np.abs(exact).max(), rtol=1e-9)
    assert (lattice.largest(np.ones((1, 9), np.int64), np.zeros(1, np.int64))) >= np.abs(exact).sum(0).max() / 9


def test_the_grid_of_steps_is_within_a_unit_of_two_to_the_quarters() -> None:
    exponents = np.arange(-LARGEST_EXPONENT, LARGEST_EXPONENT + 1)
    np.testing.assert_allclose(grid_steps(exponents), np.exp2(exponents / STEPS_PER_OCTAVE), rtol=3e-16)
    octaves = exponents % STEPS_PER_OCTAVE == 0
    assert np.array_equal(grid_steps(exponents[octaves]), np.exp2(exponents[octaves] // STEPS_PER_OCTAVE))


def test_a_direction_without_weight_does_not_drown_the_others() -> None:
    root = np.diag([1.0, 1e-9, 1.0])
    values = correlated(50, 3, 9)
    rounding = Rounding.of(values, root)
    exponents = np.full(50, -20)
    error = values - rounding.lattice.values(rounding.symbols(values, exponents), exponents)
    assert np.abs(error[:, [0, 2]]).max() <= 0.51 * 2.0**-5 * 2**0.125


def test_steps_that_are_far_too_fine_are_refused() -> None:
    values = correlated(4, 3, 5)
    rounding = Rounding.of(values, np.eye(3))
    with pytest.raises(CodeError, match="larger"):
        rounding.symbols(values, np.full(4, -400))
