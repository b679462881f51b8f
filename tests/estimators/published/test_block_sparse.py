"""The block-sparse code against a plain oracle, and against what its terms have to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse

from estimators.published.block_sparse import Spectra, block_variances, gaussian_rate_bits, target_distortion
from mdl.errors import ExplanationError

N, BLOCKS, BLOCK, WIDTH, HORIZON = 400, 6, 2, 5, 1e6


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense coefficients [N, BLOCKS * BLOCK], directions, and what is left."""
    rng = np.random.default_rng(3)
    on = rng.random((N, BLOCKS)) < rng.uniform(0.1, 0.6, BLOCKS)
    codes = rng.normal(1.0, 2.0, (N, BLOCKS, BLOCK)) @ np.array([[1.0, 0.4], [0.0, 0.7]]) * on[:, :, None]
    return codes.reshape(N, -1), rng.normal(size=(BLOCKS * BLOCK, WIDTH)), 0.3 * rng.normal(size=(N, WIDTH))


def oracle(codes: np.ndarray, rows: np.ndarray, residual: np.ndarray, delta: float, block: int, smooth: bool) -> float:
    """As the paper prints it, block by block, from the covariance of what a block adds when it is on."""

    def rate(v: float) -> float:
        return 0.5 * math.log2(1 + v / delta) if smooth else max(0.5 * math.log2(max(v, 1e-300) / delta), 0.0)

    tokens, blocks, width = len(codes), codes.shape[1] // block, rows.shape[1]
    bits = active = 0.0
    for g in range(blocks):
        some = codes[:, g * block : (g + 1) * block]
        on = some[np.any(some != 0, axis=1)]
        p = len(on) / tokens
        active += p
        spectrum = np.linalg.eigvalsh(np.cov(on @ rows[g * block : (g + 1) * block], rowvar=False, bias=True))
        bits += p * sum(rate(v) for v in spectrum[-block:])
    lgamma = math.lgamma
    bits += (lgamma(blocks + 1) - lgamma(active + 1) - lgamma(blocks - active + 1)) / math.log(2)
    bits += sum(rate(v) for v in np.linalg.eigvalsh(np.cov(residual, rowvar=False, bias=True)))
    return bits + 0.5 * blocks * block * (width - block) / HORIZON * math.log2(HORIZON)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("block", [1, 2])
def test_the_length_is_the_formula(case: tuple[np.ndarray, ...], block: int, smooth: bool) -> None:
    codes, rows, residual = case
    found = Spectra.of(scipy.sparse.csr_array(codes), rows, residual, block).length(0.05, HORIZON, smooth)
    assert found.total == pytest.approx(oracle(codes, rows, residual, 0.05, block, smooth), rel=1e-9)


def test_terms_by_hand() -> None:
    """One of four unit features on at each token, values 1 and 3 in turn, a residual of variance 1/4 in each of 3."""
    values = np.zeros((64, 4))
    values[np.arange(64), np.arange(64) % 4] = np.where(np.arange(64) // 4 % 2, 3.0, 1.0)
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 2.0
    spectra = Spectra.of(scipy.sparse.csr_array(values), np.eye(4, 3), np.tile(signs, (16, 1)))
    found = spectra.length(1 / 16, 1024.0)
    assert found.support == pytest.approx(2.0)  # log2 C(4, 1)
    # The fourth row is zero: three features of variance 1, each on a quarter of the time, at delta = 1/16.
    assert found.codes == pytest.approx(3 / 4 * 2.0)
    assert found.residual == pytest.approx(3 * 0.5 * math.log2(4))
    assert found.dictionary == pytest.approx(0.5 * 4 * 2 / 1024 * 10)


def test_the_smooth_rate_charges_more_and_both_fall_with_distortion() -> None:
    variances = np.array([0.0, 0.01, 0.5, 2.0, 40.0])
    last = np.full(5, np.inf)
    for delta in (0.01, 0.1, 1.0, 10.0):
        hard, smooth = (gaussian_rate_bits(variances, delta, s) for s in (False, True))
        assert np.all(smooth >= hard)
        assert np.all(smooth - hard <= 0.5 + 1e-12)  # at most where v = delta
        assert np.all(hard <= last)
        last = hard


def test_rotating_a_blocks_directions_changes_nothing(case: tuple[np.ndarray, ...]) -> None:
    codes, rows, _ = case
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(2, 2)))[0]
    turned = (codes.reshape(N, BLOCKS, 2) @ turn).reshape(N, -1)
    again = (turn.T @ rows.reshape(BLOCKS, 2, WIDTH)).reshape(-1, WIDTH)
    share, variances = block_variances(scipy.sparse.csr_array(codes), rows, 2)
    other_share, other = block_variances(scipy.sparse.csr_array(turned), again, 2)
    np.testing.assert_array_equal(share, other_share)
    np.testing.assert_allclose(variances, other, rtol=1e-9)


def test_the_target_is_a_share_of_the_variance() -> None:
    outputs = np.array([[1.0, 4.0], [-1.0, 0.0]])
    assert target_distortion(outputs, 0.8) == pytest.approx(0.2 * 2.5)


def test_what_makes_no_sense_is_refused(case: tuple[np.ndarray, ...]) -> None:
    codes, rows, residual = case
    with pytest.raises(ExplanationError, match="12 features in blocks of 5"):
        Spectra.of(scipy.sparse.csr_array(codes), rows, residual, 5)
    for delta in (0.0, float("nan"), -1.0):
        with pytest.raises(ExplanationError, match="a distortion of"):
            Spectra.of(scipy.sparse.csr_array(codes), rows, residual).length(delta, HORIZON)
