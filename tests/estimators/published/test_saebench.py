"""SAEBench's figure: a worked case for each of its defects, and a plain transcription of what it does."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import scipy.sparse
import torch

from estimators.published.saebench import (
    Dictionary,
    Edges,
    Mends,
    SAEBenchLength,
    description_length,
    pick_minimum,
    quantisation_error,
    saebench_sweep,
    top_k,
)

PUBLISHED, MENDED = Mends(), Mends.all()


def length(codes: np.ndarray, mends: Mends, bins: int = 8, calibration: np.ndarray | None = None) -> float:
    sparse = scipy.sparse.csr_array(codes)
    base = sparse if calibration is None else scipy.sparse.csr_array(calibration)
    return description_length(sparse, Edges.of(base, bins, mends), mends)


def error(codes: np.ndarray, rows: np.ndarray, outputs: np.ndarray, mends: Mends, bins: int = 8) -> float:
    sparse, dictionary = scipy.sparse.csr_array(codes), Dictionary(rows, np.zeros(rows.shape[1]))
    return quantisation_error(sparse, dictionary, outputs, Edges.of(sparse, bins, mends), mends)


def binary(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def plainly(codes: np.ndarray, rows: np.ndarray, outputs: np.ndarray, bins: int) -> tuple[float, float]:
    """What the published program computes, feature by feature with torch's own histogram and buckets."""
    total, quantised = 0.0, np.zeros_like(codes)
    for i, column in enumerate(codes.T):
        edges = torch.linspace(0.0, max(100.0, column.max()), bins + 1, dtype=torch.float64)
        values = torch.tensor(column)
        share = torch.histogram(values, bins=edges)[0]
        share = share[share > 0] / share.sum()
        p = float((values > 0).double().mean())
        total += (binary(p) if 0 < p < 1 else 0.0) - p * float((share * torch.log2(share)).sum())
        index = torch.bucketize(values, edges).clamp(1, bins) - 1
        quantised[:, i] = (0.5 * (edges[:-1] + edges[1:]))[index].numpy()
    return total, math.sqrt(np.mean((quantised @ rows - outputs) ** 2)) / outputs.shape[1]


@pytest.mark.parametrize("bins", [4, 8, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_as_published_it_is_what_the_program_does(bins: int, signed: bool) -> None:
    rng = np.random.default_rng(bins)
    codes = rng.gamma(1.5, 30.0, (150, 9)) * (rng.random((150, 9)) < 0.3)
    codes = codes * np.where(signed & (rng.random(codes.shape) < 0.5), -1.0, 1.0)
    rows, outputs = rng.normal(size=(9, 6)), rng.normal(size=(150, 6))
    expected = plainly(codes, rows, outputs, bins)
    assert length(codes, PUBLISHED, bins) == pytest.approx(expected[0], rel=1e-9)
    assert error(codes, rows, outputs, PUBLISHED, bins) == pytest.approx(expected[1], rel=1e-9)


def test_the_largest_activation_starts_at_100() -> None:
    """Values of up to 10 all land in the first bin: their entropy is gone. From the data's own range it is 3 bits."""
    codes = np.repeat(np.arange(1.0, 9.0), 4)[:, None] * 1.25
    assert length(codes, PUBLISHED) == 0.0
    assert length(codes, replace(PUBLISHED, range_from_data=True)) == pytest.approx(2.75)  # 10.0 shares the last bin
    assert length(codes, MENDED) == pytest.approx(2.75)
    assert Edges.of(scipy.sparse.csr_array(codes), 8, PUBLISHED).high.tolist() == [100.0]


def test_zeros_switch_everything_on_and_the_error_halves_with_the_bins() -> None:
    """The published expected results: 1.1165, 0.5582, 0.2790, 0.1395 at 8, 16, 32 and 64 bins. A dictionary whose
    rows add up to a vector of the right length gives them whatever is reconstructed."""
    rng = np.random.default_rng(0)
    width, features = 512, 2048
    rows = rng.normal(size=(features, width))
    rows += (1.1165 * 16 / 100 * width - rows.sum(0)) / features  # 100 / (2 * 8) times the sum, over d, is 1.1165
    codes = np.zeros((20, features))
    codes[np.arange(20), rng.integers(0, features, 20)] = 1.0
    outputs = codes @ rows
    found = [error(codes, rows, outputs, PUBLISHED, bins) for bins in (8, 16, 32, 64)]
    np.testing.assert_allclose(found, [1.1165, 0.5582, 0.2790, 0.1395], rtol=2e-3)
    assert error(codes, rows, outputs, replace(PUBLISHED, zero_stays_zero=True)) < 0.02
    assert error(codes, rows, outputs, replace(MENDED, relative_error=False), 64) < 1e-4


def test_the_entropy_of_values_counts_tokens_that_are_off() -> None:
    """On a quarter of the time at 80, always 80: nothing to say of the value, and H(1/4) is charged once more, times
    p; and a value of 5 that shares the first bin with zero is not seen at all."""
    codes = np.repeat([[80.0], [0.0]], [25, 75], axis=0)
    assert length(codes, PUBLISHED) == pytest.approx(1.25 * binary(0.25))
    assert length(codes, replace(PUBLISHED, entropy_given_on=True)) == pytest.approx(binary(0.25))
    low = np.repeat([[5.0], [0.0]], [25, 75], axis=0)
    assert length(low, PUBLISHED) == pytest.approx(binary(0.25))


def test_k_is_not_applied_to_the_length() -> None:
    rng = np.random.default_rng(2)
    codes = scipy.sparse.csr_array(rng.uniform(1.0, 90.0, (60, 10)))
    dictionary, outputs = Dictionary(rng.normal(size=(10, 4)), np.zeros(4)), rng.normal(size=(60, 4))
    sweep = {k: saebench_sweep(codes, dictionary, outputs, k=k, bins=[16])[0] for k in (None, 2)}
    assert sweep[2].bits == sweep[None].bits
    assert sweep[2].error != sweep[None].error
    mends = Mends(top_k_in_length=True)
    mended = saebench_sweep(codes, dictionary, outputs, mends, k=2, bins=[16])[0]
    assert mended.bits < 0.5 * sweep[2].bits
    assert mended.bits == description_length(top_k(codes, 2), Edges.of(codes, 16, mends), mends)


def test_top_k_keeps_the_largest_that_are_positive() -> None:
    codes = scipy.sparse.csr_array(np.array([[3.0, 0.0, 1.0, 2.0], [0.0, -5.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    expected = [[3.0, 0.0, 0.0, 2.0], [0.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert top_k(codes, 2).toarray().tolist() == expected


def test_what_is_called_mse_is_its_root_over_the_width() -> None:
    """A reconstruction by zero of outputs +-3 in 64 dimensions: MSE 9, all of the variance; 3/64 as published."""
    outputs = np.where(np.random.default_rng(4).random((50, 64)) < 0.5, 3.0, -3.0)
    outputs[25:] = -outputs[:25]
    codes, rows = np.zeros((50, 2)), np.ones((2, 64))
    mends = replace(PUBLISHED, zero_stays_zero=True)
    assert error(codes, rows, outputs, mends) == pytest.approx(3 / 64)
    assert error(codes, rows, outputs, replace(mends, relative_error=True)) == pytest.approx(1.0)
    assert error(codes, rows, 10 * outputs, mends) == pytest.approx(30 / 64)


def test_only_what_is_above_zero_fires() -> None:
    """A signed code, half of it negative, with four equal values: 2 bits, of which the published figure sees a part."""
    codes = np.tile([[-90.0], [-30.0], [30.0], [90.0]], (25, 1))
    # p = 1/2; the negative half is outside [0, 100] and out of the histogram.
    assert length(codes, PUBLISHED) == pytest.approx(1.0 + 0.5 * 1.0)
    assert length(codes, replace(PUBLISHED, any_sign_fires=True)) == pytest.approx(2.0)
    assert length(codes, MENDED) == pytest.approx(2.0)
    outputs, rows = codes.copy(), np.ones((1, 1))
    assert error(codes, rows, outputs, PUBLISHED, 100) > 40
    assert error(codes, rows, outputs, replace(PUBLISHED, any_sign_fires=True), 100) < 1.0


def test_values_above_the_calibrations_drop_out() -> None:
    calibration = np.array([[120.0], [10.0]])
    codes = np.array([[150.0], [200.0], [10.0], [70.0]])
    assert length(codes, PUBLISHED, 8, calibration) == pytest.approx(1.0)  # of four values two are left
    mended = replace(PUBLISHED, outside_counts=True)
    assert length(codes, mended, 8, calibration) == pytest.approx(1.5)  # 1/4, 1/4, 1/2


def test_every_switch_is_a_mend_of_its_own_and_all_of_them_agree_with_counting() -> None:
    rng = np.random.default_rng(9)
    codes = rng.integers(-8, 9, (300, 5)) * (rng.random((300, 5)) < 0.4) * 1.0
    expected = 0.0
    for column in codes.T:
        on = column[column != 0]
        counts = np.unique(on, return_counts=True)[1] / len(on)
        expected += binary(len(on) / 300) - len(on) / 300 * float(np.sum(counts * np.log2(counts)))
    assert length(codes, MENDED, 64) == pytest.approx(expected)
    assert all(getattr(MENDED, f.name) and not getattr(PUBLISHED, f.name) for f in fields(Mends))


def test_the_shortest_within_the_threshold_counts() -> None:
    lengths = [SAEBenchLength(8, 10.0, 0.5), SAEBenchLength(16, 12.0, 0.1), SAEBenchLength(32, 14.0, 0.05)]
    assert pick_minimum(lengths).bins == 16
    assert pick_minimum(lengths, 0.01).bins == 8  # none is: the shortest of all, as published
