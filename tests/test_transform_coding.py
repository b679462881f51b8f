"""The standard residual coder on Gaussian data, where the best possible rate is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl.codes.reals import reverse_water_filling
from mdl.errors import MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.protocols import Inputs, Settings
from mdl.state import DenseState
from mdl.transform_coding import (
    KIND,
    SHIFT_LEVELS,
    SHIFT_UNITS,
    Axes,
    ComponentsDecoder,
    Quantiser,
    components_section,
    fit_quantiser,
    moments,
    principal_axes,
)

TOKENS, WIDTH = 40_000, 8
SPECTRUM = 2.0 ** np.array([4, 3, 2, 1, 0, -1, -2, -4])
# A uniform quantiser with an ideal entropy code is this much above the rate-distortion function at high rate:
# log2(2 pi e / 12) / 2 bits a sample (Gish and Pierce 1968).
GAP = 0.5 * np.log2(2 * np.pi * np.e / 12)


def gaussian(tokens: int = TOKENS, spectrum: np.ndarray = SPECTRUM, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    return (rng.normal(size=(tokens, len(spectrum))) * np.sqrt(spectrum)) @ rotation.T + rng.normal(size=len(spectrum))


def inputs_of(tokens: int) -> Inputs:
    return Inputs(np.zeros((1, tokens), np.int32), np.ones((1, tokens), bool))


def settings_of(step: float, root: np.ndarray, horizon: float = 1e9) -> Settings:
    return Settings(horizon, step, root)


def coded(data: np.ndarray, step: float, root: np.ndarray) -> tuple[Axes, DenseState, np.ndarray]:
    """Axes, symbols, and what a receiver with the message makes of them."""
    axes = principal_axes(*moments(data), root)
    u = axes.transform(data)
    quantiser = fit_quantiser(u, step)
    state = DenseState(quantiser.quantise(u))
    message = encode_message([components_section(axes, quantiser, settings_of(step, root))])
    decoder = ComponentsDecoder.from_section(decode_message(message.data)[0])
    return axes, state, decoder.predict(inputs_of(len(data)), state)


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return gaussian()


def excess(data: np.ndarray, step: float) -> tuple[float, float]:
    """Bits a token used, over reverse water-filling at the measured distortion plus the gap an active axis."""
    axes, state, decoded = coded(data, step, np.eye(WIDTH))
    distortion = float(np.mean(np.sum(np.square(data - decoded), 1)))
    bound, shares = reverse_water_filling(axes.variances, distortion)
    active = int((shares < 0.999 * axes.variances).sum())
    rate = state.length().total / len(data)
    assert rate > bound
    assert np.count_nonzero(state.values.any(0)) == active
    return rate, bound + GAP * active


@pytest.mark.parametrize("step", [0.06, 0.25, 0.5, 1.0, 1.5])
def test_the_rate_is_reverse_water_filling_plus_the_gap(data: np.ndarray, step: float) -> None:
    """From 50 down to 13 bits for eight axes: within 2 %, the cost of learning the tables included."""
    rate, expected = excess(data, step)
    assert rate == pytest.approx(expected, rel=0.0205)


@pytest.mark.parametrize("step", [2.0, 3.0, 4.0, 6.0, 8.0])
def test_at_low_rates_the_dead_zone_beats_the_formula(data: np.ndarray, step: float) -> None:
    rate, expected = excess(data, step)
    assert rate < 0.98 * expected


def test_finer_steps_cost_bits_and_save_distortion(data: np.ndarray) -> None:
    found = []
    for step in (0.25, 0.5, 1.0, 2.0, 4.0):
        _, state, decoded = coded(data[:5000], step, np.eye(WIDTH))
        found.append((state.length().total, float(np.square(data[:5000] - decoded).sum())))
    rates, distortions = zip(*found, strict=True)
    assert list(rates) == sorted(rates, reverse=True)
    assert list(distortions) == sorted(distortions)


def test_in_a_metric_errors_are_small_where_they_matter(data: np.ndarray) -> None:
    """Direction 0 matters a hundred times as much: errors there are ten times smaller, at step^2 / 12 in the metric."""
    root = np.diag([10.0, 1, 1, 1, 1, 1, 1, 1])
    _, _, decoded = coded(data, 0.1, root)
    error = np.sqrt(np.square(data - decoded).mean(0))
    assert error[0] * 10 == pytest.approx(error[1:].mean(), rel=0.1)
    in_metric = np.square((data - decoded) @ root).mean(0)
    assert in_metric.mean() == pytest.approx(0.1**2 / 12, rel=0.05)


def test_axes_diagonalise_the_covariance_in_the_metric(data: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    half = rng.normal(size=(WIDTH, WIDTH))
    root = half @ half.T / WIDTH + 0.5 * np.eye(WIDTH)
    axes = principal_axes(*moments(data), root)
    u = axes.transform(data).astype(np.float64)
    covariance = u.T @ u / len(u)
    assert np.allclose(covariance, np.diag(axes.variances), atol=1e-3 * axes.variances[0])
    assert (np.diff(axes.variances) <= 0).all()
    assert np.allclose(axes.analysis @ axes.synthesis, np.eye(WIDTH), atol=1e-9)
    # |u| is the length in the metric.
    assert np.square(u).sum(1) == pytest.approx(np.square((data - data.mean(0)) @ root).sum(1), rel=1e-3)


def test_the_first_axes_are_the_largest(data: np.ndarray) -> None:
    axes = principal_axes(*moments(data), np.eye(WIDTH))
    few = axes.first(3)
    assert few.analysis.shape == (WIDTH, 3)
    assert few.synthesis.shape == (3, WIDTH)
    assert np.array_equal(few.transform(data[:10]), axes.transform(data[:10])[:, :3])
    assert axes.first(0).transform(data[:10]).shape == (10, 0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    zero=st.floats(0.5, 1.5),
    rounding=st.floats(0.0, 0.5),
    step=st.floats(0.01, 10.0),
    seed=st.integers(0, 1000),
)
def test_quantisers_are_symmetric_and_monotone(zero: float, rounding: float, step: float, seed: int) -> None:
    one = np.ones(1)
    quantiser = Quantiser(step, zero * one, rounding * one, np.zeros((1, SHIFT_LEVELS), np.int64), one)
    u = np.sort(np.random.default_rng(seed).normal(size=(500, 1)) * 5 * step, 0).astype(np.float32)
    levels = quantiser.quantise(u)
    assert np.array_equal(quantiser.quantise(-u), -levels)
    assert (np.diff(levels[:, 0]) >= 0).all()
    # Never further than a step from an unshifted level, but for what the dead zone silences.
    distance = np.abs(u / np.float32(step) - levels)
    assert (distance[levels != 0] <= 1 + 1e-5).all()
    assert (distance[levels == 0] <= zero + 1e-5).all()


def test_fitted_thresholds_and_points_are_in_their_ranges(data: np.ndarray) -> None:
    u = principal_axes(*moments(data), np.eye(WIDTH)).transform(data)
    for step in (0.1, 1.0, 5.0):
        quantiser = fit_quantiser(u, step)
        assert (quantiser.zero >= 0.5).all()
        assert ((quantiser.rounding >= 0) & (quantiser.rounding <= 0.5)).all()
        assert (np.abs(quantiser.shifts) <= SHIFT_UNITS).all()
        assert quantiser.shifts.shape == (WIDTH, SHIFT_LEVELS)
    coarse = fit_quantiser(u, 5.0)
    assert (np.diff(coarse.zero) >= 0).all()  # the less variance, the wider the dead zone


def test_absurdly_fine_steps_do_not_wrap_around() -> None:
    quantiser = Quantiser(1e-12, np.full(1, 0.5), np.full(1, 0.5), np.zeros((1, SHIFT_LEVELS), np.int64), np.ones(1))
    assert quantiser.quantise(np.array([[5.0], [-5.0]], np.float32)).ravel().tolist() == [1 << 30, -(1 << 30)]


def test_reconstruction_points_are_the_centroids(data: np.ndarray) -> None:
    u = principal_axes(*moments(data), np.eye(WIDTH)).transform(data)
    quantiser = fit_quantiser(u, 2.0)
    levels = quantiser.quantise(u)
    for level in (1, 2):
        here = np.abs(levels[:, 0]) == level
        centroid = np.abs(u[here, 0]).mean() / 2.0
        assert level - quantiser.shifts[0, level - 1] / SHIFT_UNITS == pytest.approx(
            centroid, abs=0.5 / SHIFT_UNITS + 1e-3
        )


def test_silent_axes_cost_next_to_nothing() -> None:
    """Sixteen axes of which twelve are far below the water: no symbols, and a few bits of rows and shifts each."""
    spectrum = np.r_[SPECTRUM[:4], np.full(12, 1e-4)]
    data = gaussian(4000, spectrum)
    root = np.eye(16)
    axes = principal_axes(*moments(data), root)
    quantiser = fit_quantiser(axes.transform(data), 0.5)
    state = DenseState(quantiser.quantise(axes.transform(data)))
    assert not state.values[:, 4:].any()
    silent = DenseState(state.values[:, 4:]).length().total
    assert silent < 12 * (0.5 * np.log2(4000) + 2)  # the zero decision's Krichevsky-Trofimov cost
    message = encode_message([components_section(axes, quantiser, settings_of(0.5, root, horizon=1e5))])
    bits = message.part_bits[0]
    assert bits[4:].sum() < 0.1 * bits[:4].sum()
    assert state.touched().sum(0)[4:].sum() == 0


def test_a_section_comes_back_from_bytes(data: np.ndarray) -> None:
    axes = principal_axes(*moments(data), np.eye(WIDTH))
    quantiser = fit_quantiser(axes.transform(data), 0.3)
    section = components_section(axes, quantiser, settings_of(0.3, np.eye(WIDTH), 1e6))
    received = decode_message(encode_message([section]).data)[0]
    ours, theirs = (ComponentsDecoder.from_section(s) for s in (section, received))
    assert received.kind == KIND
    for name in ("mean", "rows", "shifts"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    # In units of the step, precision 1e-6 of the horizon is far finer than what is coded with it.
    assert np.allclose(theirs.rows, 0.3 * axes.synthesis, atol=2e-3)
    state = DenseState(quantiser.quantise(axes.transform(data[:500])))
    assert np.array_equal(ours.predict(inputs_of(500), state), theirs.predict(inputs_of(500), state))
    assert theirs.flops_per_token(inputs_of(500), state) == 2 * WIDTH * WIDTH
    assert theirs.predict(inputs_of(500), state).dtype == np.float32


def test_a_longer_horizon_buys_more_precise_rows(data: np.ndarray) -> None:
    axes = principal_axes(*moments(data), np.eye(WIDTH))
    quantiser = fit_quantiser(axes.transform(data), 0.5)
    sizes = [
        encode_message([components_section(axes, quantiser, settings_of(0.5, np.eye(WIDTH), n))]).whole_bits
        for n in (1e3, 1e7)
    ]
    # Half of log2 N a number, 6.6 bits for each of 8 * 8 + 8 numbers; these few numbers need wider tables, too.
    ideal = 72 * np.log2(1e4) / 2
    assert ideal - 8 <= sizes[1] - sizes[0] < 1.3 * ideal


def test_sections_that_do_not_fit_are_refused() -> None:
    mean = QuantisedArray.from_values(np.zeros(4), 0.1)
    rows = QuantisedArray.from_values(np.ones((3, 5)), 0.1)
    shifts = QuantisedArray.from_integers(np.zeros((3, SHIFT_LEVELS), np.int64))
    with pytest.raises(MessageError, match="one header array"):
        ComponentsDecoder.from_section(Section(KIND, (mean,), (rows,)))
    with pytest.raises(MessageError, match="do not fit a mean of 4"):
        ComponentsDecoder.from_section(Section(KIND, (mean,), (rows, shifts)))
