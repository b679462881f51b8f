"""The next step of the residual coder, from what was measured at those before."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from estimators.fidelity import Attempt
from estimators.solver import _next_step

EPS = 0.01


def attempt(step: float, kl: float) -> Attempt:
    found = Mock(spec=Attempt)
    found.step, found.kl = step, kl
    return found


def test_where_kl_does_not_depend_on_the_step_it_is_halved() -> None:
    """An explanation that all but meets eps: all symbols are zero, and a small gap asks for a small step."""
    assert _next_step([attempt(8.0, 1.036 * EPS)], EPS) > 7.8
    assert _next_step([attempt(8.0, 1.036 * EPS), attempt(7.8, 1.036 * EPS)], EPS) == pytest.approx(3.9)
    assert _next_step([attempt(8.0, 0.9 * EPS), attempt(8.2, 0.9 * EPS)], EPS) > 8.2


def test_a_slope_that_was_measured_is_followed() -> None:
    found = _next_step([attempt(8.0, 4.0 * EPS), attempt(4.0, 2.0 * EPS)], EPS)
    assert found == pytest.approx(2.0)


def test_between_steps_on_both_sides_of_eps() -> None:
    found = _next_step([attempt(8.0, 1.04 * EPS), attempt(4.0, 1.04 * EPS), attempt(2.0, 0.8 * EPS)], EPS)
    assert 2.0 < found < 4.0
