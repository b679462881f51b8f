"""Explained variance and PCA as they are published, beside what they are called."""

from __future__ import annotations

import numpy as np
import pytest

from estimators.published.baselines import (
    components_of,
    pca,
    published_explained_variance,
    transposed_pca,
    uncentred_pca,
)
from estimators.recovered import explained_variance


def correlated(tokens: int, width: int, mean: float = 0.0, decay: float = 0.8) -> np.ndarray:
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return rng.normal(size=(tokens, width)) * decay ** np.arange(width) @ turn + mean


def test_a_mean_predictor_scores_90_percent_and_133_where_the_unit_is_a_tenth() -> None:
    """Truth: 0. With S the variance and A the mean square (both summed over d dimensions), the published denominator is
    A - (A/d)^2; it is 10 S at d = 32, S = 1.3105, A = 13.275, and -3 S once the data are 10 times as large."""
    width, square = 32, (13 / 99) ** 0.5
    variance = 32**2 * 13 / 99 / (10 + 13 / 99) ** 2  # S that solves both
    level = np.sqrt((10 + 13 / 99) * variance / width - variance / width)
    outputs = level + np.sqrt(variance / width) * np.where(np.arange(40) % 2, 1.0, -1.0)[:, None] * np.ones(width)
    prediction = np.broadcast_to(outputs.mean(0), outputs.shape)
    assert np.square(outputs).mean() == pytest.approx(square * np.sqrt(variance))
    assert explained_variance(outputs, prediction) == pytest.approx(0.0, abs=1e-12)
    assert published_explained_variance(outputs, prediction) == pytest.approx(0.90)
    assert published_explained_variance(10 * outputs, 10 * prediction) == pytest.approx(1.333, abs=1e-3)


def test_the_two_agree_where_squares_are_small_and_the_mean_is_zero() -> None:
    outputs = 1e-4 * correlated(500, 8)
    outputs -= outputs.mean(0)
    prediction = 0.7 * outputs
    assert published_explained_variance(outputs, prediction) == pytest.approx(explained_variance(outputs, prediction))


def test_the_transposed_pca_is_exact_at_full_rank_and_poor_below() -> None:
    outputs = correlated(2000, 32, mean=2.0)
    mean, components = outputs.mean(0), components_of(outputs)
    np.testing.assert_allclose(transposed_pca(outputs, components, mean, 32), outputs, atol=1e-9)
    right, wrong = (f(outputs, components, mean, 4) for f in (pca, transposed_pca))
    assert explained_variance(outputs, right) == pytest.approx(1 - 0.8**8, abs=0.02)  # 4 of variances 0.64^i
    assert explained_variance(outputs, wrong) < 0.25


def test_the_uncentred_pca_loses_what_the_mean_has_outside_its_axes() -> None:
    outputs = correlated(2000, 32, mean=2.0)
    mean, components = outputs.mean(0), components_of(outputs)
    right, wrong = pca(outputs, components, mean, 4), uncentred_pca(outputs, components, 4)
    outside = np.sum(np.square(mean - mean @ components[:4].T @ components[:4]))
    lost = np.square(outputs - wrong).sum(1).mean() - np.square(outputs - right).sum(1).mean()
    assert lost == pytest.approx(outside, rel=1e-6)
    assert explained_variance(outputs, wrong) < 0 < explained_variance(outputs, right)
    centred = outputs - mean
    np.testing.assert_allclose(uncentred_pca(centred, components, 4), pca(centred, components, 0 * mean, 4), atol=1e-9)


def test_components_are_the_principal_axes() -> None:
    outputs = correlated(500, 6, mean=1.0)
    components = components_of(outputs)
    np.testing.assert_allclose(components @ components.T, np.eye(6), atol=1e-10)
    variances = np.var((outputs - outputs.mean(0)) @ components.T, axis=0)
    assert np.all(np.diff(variances) <= 0)
