"""The water-filling bound against its own limits."""

from __future__ import annotations

import numpy as np

from decompositions.weights.bound import water_filling
from decompositions.weights.curvature import Curvature, Curvatures


def _case(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], Curvatures]:
    matrix, a, b = rng.normal(size=(6, 5)), rng.normal(size=(6, 6)), rng.normal(size=(5, 5))
    return {"W": matrix}, Curvatures({"W": Curvature(a @ a.T + np.eye(6), b @ b.T + np.eye(5))}, {})


def test_halving_the_error_costs_half_a_bit_a_weight_at_high_rate() -> None:
    weights, curvatures = _case(np.random.default_rng(0))
    first, second = water_filling(weights, curvatures, [1e-6, 0.5e-6])
    assert np.isclose(second.bits - first.bits, 0.5 * 30)
    assert np.isclose(first.kl_bits, 1e-6)


def test_it_equals_the_closed_form_where_all_are_under_water_alike() -> None:
    weights, curvatures = _case(np.random.default_rng(1))
    c = curvatures.matrices["W"]
    (found,) = water_filling(weights, curvatures, [1e-6])
    level = 2 * np.log(2) * 1e-6 / 30
    variance = np.mean(weights["W"] ** 2)
    logdet = 5 * np.linalg.slogdet(c.inputs)[1] + 6 * np.linalg.slogdet(c.outputs)[1]
    assert np.isclose(found.bits, 0.5 * (30 * np.log(variance / level) + logdet) / np.log(2))


def test_nothing_is_sent_where_the_whole_error_is_allowed() -> None:
    weights, curvatures = _case(np.random.default_rng(2))
    (found,) = water_filling(weights, curvatures, [1e9])
    assert found.bits < 1e-6
