"""Feedback rounding of matrices: what it gains over the nearest numbers, and that symbols say what is decoded."""

from __future__ import annotations

import numpy as np
import pytest

from decompositions.weights.curvature import Curvature
from decompositions.weights.dense import rounded_rows
from decompositions.weights.rounding import round_matrix, round_to_nearest
from mdl.codes.steps import grid_steps
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section, encode_message
from mdl.protocols import Settings
from tests.decompositions.weights.cases import through_bytes

ROWS, COLUMNS = 40, 24


def correlated(size: int, rng: np.random.Generator, power: float) -> np.ndarray:
    """A second moment with eigenvalues that fall as a power, in random directions."""
    rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return (rotation * np.arange(1.0, size + 1) ** -power) @ rotation.T


def curvature_of(seed: int, power: float = 1.5, rows: int = ROWS, columns: int = COLUMNS) -> Curvature:
    rng = np.random.default_rng(seed)
    return Curvature(correlated(rows, rng, power), correlated(columns, rng, power))


def settings(step: float, columns: int = COLUMNS) -> Settings:
    return Settings(1e3, step, np.eye(columns))


def loss(array: QuantisedArray, matrix: np.ndarray, curvature: Curvature) -> float:
    """tr(E^T A E B)."""
    error = array.values() - matrix
    return float(np.trace(error.T @ curvature.inputs @ error @ curvature.outputs))


def bits(array: QuantisedArray) -> float:
    return encode_message([Section("weights", (array,))]).whole_bits


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_correlated_inputs_feedback_beats_nearest_at_equal_bits(seed: int) -> None:
    matrix, curvature = np.random.default_rng(seed).normal(size=(ROWS, COLUMNS)), curvature_of(seed)
    nearest = [round_to_nearest(matrix, curvature, settings(s)) for s in np.geomspace(0.05, 30.0, 12)]
    sizes, losses = (np.array([f(a) for a in nearest]) for f in (bits, lambda a: loss(a, matrix, curvature)))
    order = np.argsort(sizes)
    for step in (0.3, 1.0, 2.0):
        fed = round_matrix(matrix, curvature, settings(step))
        assert sizes.min() < bits(fed) < sizes.max()
        at_equal_bits = np.exp(np.interp(bits(fed), sizes[order], np.log(losses[order])))
        assert loss(fed, matrix, curvature) < 0.7 * at_equal_bits


def test_where_nothing_is_correlated_it_is_no_worse_than_nearest() -> None:
    matrix, flat = np.random.default_rng(3).normal(size=(ROWS, COLUMNS)), Curvature(np.eye(ROWS), np.eye(COLUMNS))
    near, fed = (rounder(matrix, flat, settings(2.0)) for rounder in (round_to_nearest, round_matrix))
    slack = np.log2(loss(fed, matrix, flat) / loss(near, matrix, flat)) / 2 * matrix.size
    assert bits(fed) + slack < 1.03 * bits(near)


def test_what_is_decoded_is_what_the_symbols_say() -> None:
    matrix, curvature = np.random.default_rng(4).normal(size=(ROWS, COLUMNS)), curvature_of(4)
    stated = round_matrix(matrix, curvature, settings(2.0))
    (found,) = through_bytes(Section("weights", (stated,))).header
    np.testing.assert_array_equal(found.values(), stated.values())
    assert stated.lattice is not None
    columns = grid_steps(stated.lattice.columns)
    by_hand = stated.symbols * columns * grid_steps(stated.exponents)[:, None]
    assert stated.lattice.prediction is None  # 40 rows of 24 numbers would not pay for one
    np.testing.assert_array_equal(stated.values(), by_hand.astype(np.float32))
    plain = round_to_nearest(matrix, curvature, settings(2.0))
    by_hand = plain.symbols * grid_steps(plain.exponents)[:, None]
    np.testing.assert_array_equal(plain.values(), by_hand.astype(np.float32))
    assert (np.abs(plain.values() - matrix) <= 0.5001 * grid_steps(plain.exponents)[:, None]).all()


def test_finer_steps_err_less_and_cost_more() -> None:
    matrix, curvature = np.random.default_rng(5).normal(size=(ROWS, COLUMNS)), curvature_of(5)
    found = [round_matrix(matrix, curvature, settings(step)) for step in (2.0, 0.5, 0.125)]
    losses = [loss(a, matrix, curvature) for a in found]
    assert losses[0] > losses[1] > losses[2]
    assert bits(found[0]) < bits(found[1]) < bits(found[2])
    assert losses[1] / losses[2] == pytest.approx(16, rel=0.25)  # the square of the step
    finest = round_matrix(matrix, curvature, settings(1e-3))
    np.testing.assert_allclose(finest.values(), matrix, atol=0.05)


def test_steps_follow_the_curvature() -> None:
    """Inputs twice as large, or a metric that weighs errors twice: steps half as large."""
    matrix, base = np.random.default_rng(6).normal(size=(ROWS, COLUMNS)), curvature_of(6)
    for rounder in (round_to_nearest, round_matrix):
        for finer in (
            Curvature(16 * base.inputs, base.outputs.copy()),
            Curvature(base.inputs.copy(), 16 * base.outputs),
        ):
            errors = [np.abs(rounder(matrix, c, settings(0.2)).values() - matrix).mean() for c in (base, finer)]
            assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_few_rows_are_rounded_number_by_number() -> None:
    matrix, curvature = np.random.default_rng(7).normal(size=(5, COLUMNS)), curvature_of(7, rows=5)
    found, plain = (rounder(matrix, curvature, settings(1.0)) for rounder in (round_matrix, round_to_nearest))
    assert found.lattice is None
    np.testing.assert_array_equal(found.symbols, plain.symbols)


def test_many_rows_have_their_columns_predicted_where_that_pays() -> None:
    rng = np.random.default_rng(8)
    mixing = np.tril(rng.normal(size=(8, 8)), -1) + 0.3 * np.eye(8)
    matrix, flat = rng.normal(size=(200, 8)) @ mixing.T, Curvature(np.eye(200), np.eye(8))
    found = round_matrix(matrix, flat, settings(0.5, 8))
    assert found.lattice is not None
    assert found.lattice.prediction is not None
    (back,) = through_bytes(Section("weights", (found,))).header
    np.testing.assert_array_equal(back.values(), found.values())
    error = found.values() - matrix
    step = float(settings(0.5, 8).metric_step(1.0))
    assert np.sqrt(np.square(error).mean()) == pytest.approx(step / np.sqrt(12), rel=0.15)


@pytest.mark.parametrize("rounder", [round_matrix, round_to_nearest])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(rounder, bad: float) -> None:
    matrix = np.ones((ROWS, COLUMNS))
    matrix[3, 4] = bad
    with pytest.raises(MessageError, match=r"1 of 960 .* NaN or infinite"):
        rounder(matrix, curvature_of(0), settings(1.0))


def test_steps_beyond_all_precision_are_refused() -> None:
    with pytest.raises(MessageError, match=r"far more steps than float32 resolves|more than 2\^60"):
        round_matrix(np.ones((ROWS, COLUMNS)), curvature_of(0), settings(1e-20))


def test_rows_of_tables_get_steps_by_their_sensitivity() -> None:
    values = np.random.default_rng(9).normal(size=(3, 50))
    sensitivity = np.repeat([[1.0], [64.0], [0.0]], 50, 1)
    found = rounded_rows(values, sensitivity, settings(1.0))
    assert found.exponents[0] - found.exponents[1] == 12  # an eighth of the step: three octaves of four
    assert not found.symbols[2].any()  # nothing depends on it
    one = rounded_rows(values[0], sensitivity[0], settings(1.0))
    assert one.symbols.shape == (1, 50)
