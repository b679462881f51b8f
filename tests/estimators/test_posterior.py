"""A Gaussian posterior over rows: its cost against an oracle, and what it saves over rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest

from estimators.posterior import COLUMN_GRID, ROW_GRID, Posterior, fit_posterior
from mdl.codes.lattice import PREDICTION_UNITS, fit_prediction

ROWS, WIDTH = 40, 6


def some_rows(seed: int = 0) -> np.ndarray:
    """Rows with unequal columns that depend on one another, and unequal lengths."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(WIDTH) + 0.5 * np.triu(rng.standard_normal((WIDTH, WIDTH)), 1)
    return rng.standard_normal((ROWS, WIDTH)) @ mixing * np.exp(0.5 * rng.standard_normal((ROWS, 1)))


def some_root(seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    return (vectors * np.exp(rng.standard_normal(WIDTH))) @ vectors.T


def prior_covariances(posterior: Posterior) -> np.ndarray:
    """Of each row, [r, d, d], from what the receiver is told and nothing else."""
    columns = posterior.prior.header[0].symbols[:, 0] / COLUMN_GRID
    rest = np.eye(len(columns))
    if len(posterior.prior.header) == 2:
        below = np.tril_indices(len(columns), -1)
        rest[below] -= posterior.prior.header[1].symbols[:, 0] / PREDICTION_UNITS
    back = np.linalg.inv(rest)
    shape = back @ np.diag(4.0**columns) @ back.T
    return 4.0 ** (posterior.prior.parts[1].symbols[:, 0] / ROW_GRID)[:, None, None] * shape


@pytest.mark.parametrize("predicted", [False, True])
def test_cost_is_the_divergence_of_full_gaussians(predicted: bool) -> None:
    rows, root = some_rows(), some_root()
    prediction = fit_prediction(rows) if predicted else None
    posterior = fit_posterior(rows, np.full(ROWS, 20.0), root, prediction)
    assert posterior.kept.sum() > ROWS / 2
    priors = prior_covariances(posterior)
    for i in np.flatnonzero(posterior.kept):
        prior = priors[i]
        mean = posterior.mean[i] @ posterior.basis
        own = posterior.basis.T @ np.diag(posterior.spread[i] ** 2) @ posterior.basis
        precision = np.linalg.inv(prior)
        log_ratio = np.linalg.slogdet(prior)[1] - np.linalg.slogdet(own)[1]
        nats = 0.5 * (np.trace(precision @ own) + mean @ precision @ mean - WIDTH + log_ratio)
        assert posterior.kl_bits[i] == pytest.approx(nats / math.log(2.0), rel=1e-6)
        left = mean - rows[i]
        assert posterior.error[i] == pytest.approx(left @ root @ root @ left + np.trace(root @ own @ root), rel=1e-6)


def test_optimum_of_a_known_prior() -> None:
    """Behind its own prior a product posterior is exact: precisions add up, and means shrink by their share."""
    rows, weights = some_rows(), np.full(ROWS, 3.0)
    posterior = fit_posterior(rows, weights, np.eye(WIDTH), steps=200)
    variance = np.diagonal(prior_covariances(posterior), axis1=1, axis2=2)
    precision = 1.0 / variance + 2.0 * weights[:, None]
    own = np.square(posterior.spread) @ np.square(posterior.basis)
    kept = posterior.kept
    assert kept.sum() > ROWS / 2
    np.testing.assert_allclose(own[kept], (1.0 / precision)[kept], rtol=0.25)  # the prior is rounded afterwards
    np.testing.assert_allclose((posterior.mean @ posterior.basis)[kept], (rows * 6.0 / precision)[kept], atol=0.1)


def test_quarter_bit_over_rounding_at_high_rate() -> None:
    r"""Uniform steps s with the same slope, 6 / s^2 = a, cost (1/2) log2(2 pi e / 12) more an entry, errors alike."""
    rng = np.random.default_rng(3)
    rows, step = rng.standard_normal((200, 32)), 0.02
    weights = np.full(len(rows), 6.0 / step**2)
    posterior = fit_posterior(rows, weights, np.eye(32))
    rounded = 0.5 * math.log2(2.0 * math.pi * math.e) - math.log2(step)  # entropy of a rounded standard normal
    saved = rounded - posterior.kl_bits.sum() / rows.size
    # Each row's own scale is one parameter of 32 entries, and lets them cost 1/64 nat less.
    assert saved == pytest.approx(0.5 * math.log2(2.0 * math.pi * math.e / 12.0) + 1.0 / 64 / math.log(2.0), abs=0.03)
    assert posterior.error.mean() == pytest.approx(32 * step**2 / 12.0, rel=0.02)


def test_rows_that_matter_little_are_left_out() -> None:
    rows = some_rows()
    weights = np.where(np.arange(ROWS) < 10, 1e-9, 50.0)
    posterior = fit_posterior(rows, weights, np.eye(WIDTH))
    assert not posterior.kept[:10].any()
    assert posterior.kept[10:].all()
    assert not posterior.kl_bits[:10].any()
    assert not posterior.sample(0)[:10].any()


def test_samples_err_as_promised() -> None:
    rows, root = some_rows(), some_root()
    posterior = fit_posterior(rows, np.full(ROWS, 5.0), root)
    errors = [np.square((posterior.sample(seed) - rows) @ root).sum(1) for seed in range(300)]
    assert np.mean(errors) == pytest.approx(posterior.error.mean(), rel=0.05)
    np.testing.assert_array_equal(posterior.sample(7), posterior.sample(7))


def test_prior_costs_what_its_message_takes() -> None:
    posterior = fit_posterior(some_rows(), np.full(ROWS, 5.0), some_root())
    header, rows = posterior.prior_bits()
    assert 0 < header < 1000
    assert rows.shape == (ROWS,)
    assert 0 < rows.sum() < 8 * ROWS
