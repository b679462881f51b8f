"""Quantisers against the theory of entropy-coded scalar quantisation, and the codes of quantised values."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mdl.codes import (
    AdaptiveInteger,
    BitReader,
    BitWriter,
    DiscretisedGaussian,
    DiscretisedLaplace,
    TableCode,
    centroid_shifts,
    dead_zone_dequantise,
    dead_zone_quantise,
    dequantise,
    optimal_step,
    reverse_water_filling,
    two_part_bits,
    uniform_quantise,
)
from mdl.codes.tables import MAX_SPAN, FrequencyTable, level_weights, parametric_weights
from mdl.errors import CodeError

CODES = [TableCode(), DiscretisedLaplace(), DiscretisedGaussian()]


def gaussian(n):
    """Quantiles at even spacing: a sample without sampling error."""
    return norm.ppf((np.arange(n) + 0.5) / n)


def entropy(levels):
    p = np.unique(levels, return_counts=True)[1] / levels.size
    return -(p * np.log2(p)).sum()


# Entropy-coded uniform quantisation of a standard Gaussian, centroid decoding: the project's reference values.
@pytest.mark.parametrize(
    ("step", "rate", "distortion"), [(0.5, 3.06197, 0.0204081), (1.0, 2.10483, 0.0769152), (2.0, 1.24120, 0.253507)]
)
def test_gaussian_at_uniform_steps(step, rate, distortion):
    values = gaussian(400_000)
    levels = uniform_quantise(values, step)
    assert entropy(levels) == pytest.approx(rate, abs=3e-5)
    centroids = np.bincount(levels - levels.min(), values) / np.bincount(levels - levels.min())
    assert np.mean((values - centroids[levels - levels.min()]) ** 2) == pytest.approx(distortion, abs=3e-5)
    shifts = centroid_shifts(values, levels, step)
    near = np.mean((values - dead_zone_dequantise(levels, step, shifts)) ** 2)
    assert distortion - 3e-5 < near < np.mean((values - dequantise(levels, step)) ** 2)


def test_midpoints_cost_more_than_centroids():
    values = gaussian(400_000)
    assert np.mean((values - dequantise(uniform_quantise(values, 1.0), 1.0)) ** 2) == pytest.approx(0.083333, abs=2e-5)


def test_halves_round_away_from_zero_and_the_dead_zone_is_wide():
    values = np.array([-2.5, -1.5, -0.5, -0.49, 0.0, 0.49, 0.5, 1.5, 2.5])
    assert uniform_quantise(values, 1.0).tolist() == [-3, -2, -1, 0, 0, 0, 1, 2, 3]
    assert np.array_equal(dead_zone_quantise(values, 1.0, 0.5), uniform_quantise(values, 1.0))
    assert dead_zone_quantise(np.array([-0.8, 0.79, 0.8, 1.79, 1.8]), 1.0, 0.2).tolist() == [-1, 0, 1, 1, 2]
    shifted = dead_zone_dequantise(np.array([-3, -1, 0, 1, 2, 9]), 2.0, np.array([0.3, 0.2, 0.1]))
    assert shifted == pytest.approx([-6.2, -2.6, 0.0, 2.6, 4.4, 18.2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_quantise(np.array([1.0]), 0.0), "positive"),
        (lambda: uniform_quantise(np.array([math.nan]), 1.0), "NaN"),
        (lambda: uniform_quantise(np.array([math.inf]), 1.0), "infinity"),
        (lambda: uniform_quantise(np.array([1e10]), 1e-10), "too fine"),
        (lambda: dead_zone_quantise(np.array([1.0]), 1.0, 0.6), "rounding"),
        (lambda: dead_zone_dequantise(np.array([1]), 1.0, np.zeros(0)), "at least one shift"),
        (lambda: reverse_water_filling(np.array([1.0]), 0.0), "D > 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(CodeError, match=message):
        call()


@pytest.mark.parametrize(
    ("water", "rate", "distortion"), [(1.0, 1, 2.25), (0.5, 2, 1.25), (0.25, 3, 0.75), (0.1, 4.98289, 0.30)]
)
def test_reverse_water_filling(water, rate, distortion):
    bits, levels = reverse_water_filling(np.array([4.0, 1.0, 0.25]), distortion)
    assert bits == pytest.approx(rate, abs=1e-5)
    assert levels == pytest.approx(np.minimum([4.0, 1.0, 0.25], water))
    assert reverse_water_filling(np.array([4.0, 1.0]), 5.0)[0] == 0.0


@pytest.mark.parametrize(("uses", "bits"), [(100, 6.2508), (10_000, 9.5727)])
def test_two_part_code_at_its_optimal_step(uses, bits):
    assert two_part_bits(16.0, 1.0, uses) == pytest.approx(bits, abs=5e-5)
    step = optimal_step(1.0, uses)
    assert step == pytest.approx(3.4641 / math.sqrt(uses), rel=1e-5)

    def total(s):
        return math.log2(16.0 / s) + uses * s**2 / 24 / math.log(2)

    assert total(step) == pytest.approx(bits, abs=5e-5)
    assert total(step) < min(total(0.99 * step), total(1.01 * step))


def laplace(n, scale, seed=0):
    return np.rint(np.random.default_rng(seed).laplace(size=n) * scale).astype(np.int64)


@pytest.mark.parametrize("code", CODES, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("n", "scale"), [(20_000, 0.3), (20_000, 6.0), (60, 3.0), (1, 40.0)])
def test_stream_is_as_long_as_the_exact_length(stream, code, n, scale):
    values = laplace(n, scale)
    reader = stream(lambda writer: code.write(writer, values), code.bits(values))
    assert np.array_equal(code.read(reader, n), values)
    reader.finish()
    header = code.table_bits(values) if isinstance(code, TableCode) else code.parameter_bits(values)
    assert header + code.symbol_bits(values).sum() == pytest.approx(code.bits(values), rel=1e-12)


@pytest.mark.parametrize("code", CODES, ids=lambda c: type(c).__name__)
@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.integers(-3, 3) | st.integers(-900, 900), max_size=40))
def test_round_trip(code, values):
    array, writer = np.array(values, dtype=np.int64), BitWriter()
    code.write(writer, array)
    assert writer.information_bits == pytest.approx(code.bits(array), abs=1e-6)
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(code.read(reader, array.size), array)
    reader.finish()


def test_table_is_near_the_entropy_and_survives_a_far_offset():
    values = laplace(100_000, 5.0)
    code = TableCode()
    assert code.bits(values) < values.size * entropy(values) * 1.002 + 400
    assert abs(code.bits(values + 10**9) - code.bits(values)) < 80
    assert code.bits(np.full(1000, 7)) < 25


def test_table_takes_the_coarseness_that_is_shortest():
    assert TableCode().table(laplace(200_000, 3.0)).coarseness == 1
    assert TableCode().table(laplace(50, 3.0)).coarseness > 1


def test_table_against_a_plain_oracle():
    table = FrequencyTable(-1, np.array([5, 0, 13, 2]), 1)
    weights = [128, 0, 64 << 3, 76]
    assert table.frequencies().tolist() == weights
    assert table.lengths()[0] == pytest.approx(-math.log2(128 / sum(weights)), abs=1e-12)
    assert table.lengths()[1] == math.inf
    steps = AdaptiveInteger().bits(np.array([5, -5, 13, -11]), np.zeros(4, dtype=np.int64), 1)[0]
    assert table.bits() == pytest.approx(4 + 5 + 2 + steps, abs=1e-12)  # delta of zigzag(-1) + 1 = 2, and of 3 + 1 = 4


def test_weights_grow_by_quarter_octaves():
    weights = level_weights(np.arange(1, 60), 1)
    assert weights / 64 == pytest.approx(2 ** (np.arange(59) / 4), rel=0.007)
    assert np.array_equal(level_weights(np.array([0, 1, 2, 3]), 4), [0, 64, 128, 256])


def test_symbols_too_many_for_a_table_are_refused():
    for code in CODES:
        with pytest.raises(CodeError, match=f"{MAX_SPAN}.*step is too fine"):
            code.bits(np.array([-MAX_SPAN, MAX_SPAN]))


@pytest.mark.parametrize("family", ["laplace", "gaussian"])
@pytest.mark.parametrize("grid", [0, 40, 64, 100])
def test_parametric_weights_follow_their_density(family, grid):
    scale = 2.0 ** ((grid - 64) / 8)
    k = np.arange(50.0)
    density = np.exp(-k / scale) if family == "laplace" else np.exp(-((k / scale) ** 2) / 2)
    expected = 8 * math.ceil(scale) + np.floor(2**24 * density)
    assert np.abs(np.array(parametric_weights(family, grid, 49)) - expected).max() <= 1


def test_each_family_is_best_on_its_own():
    rng = np.random.default_rng(0)
    normal, double = np.rint(rng.normal(size=5000) * 8).astype(np.int64), laplace(5000, 8.0)
    assert DiscretisedGaussian().bits(normal) < DiscretisedLaplace().bits(normal)
    assert DiscretisedLaplace().bits(double) < DiscretisedGaussian().bits(double)
    assert DiscretisedGaussian().bits(normal) < 5000 * (0.5 * math.log2(2 * math.pi * math.e * 64)) * 1.005


@pytest.mark.parametrize("code", CODES, ids=lambda c: type(c).__name__)
def test_a_cut_stream_is_refused(code):
    writer = BitWriter()
    code.write(writer, laplace(300, 9.0))
    data = writer.to_bytes()
    for start, stop in [(0, -4), (0, -40), (4, len(data)), (40, len(data))]:
        with pytest.raises(CodeError):
            _read_all(code, data[start:stop])


def _read_all(code, data):
    reader = BitReader(data)
    code.read(reader, 300)
    reader.finish()
