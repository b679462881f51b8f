"""A step that meets a KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from estimators.meeting import meet


@dataclass(frozen=True)
class Trial:
    step: float
    kl: float


@pytest.mark.parametrize("power", [0.8, 1.7, 2.5])
@pytest.mark.parametrize("start", [1e-3, 1.0, 50.0])
def test_power_laws_are_met(power: float, start: float) -> None:
    trials = meet(lambda s: Trial(s, 3.0 * s**power), start, 0.7, 0.01, most=12)
    assert trials[-1].kl == pytest.approx(0.7, rel=0.02)


def test_a_jump_is_bracketed() -> None:
    """KL jumps over the target: the nearest side of the jump is found, and looking stops."""
    trials = meet(lambda s: Trial(s, s * (1.0 if s < 1.0 else 1.5)), 0.3, 1.2, 0.01, most=40)
    gaps = [abs(math.log(t.kl / 1.2)) for t in trials]
    assert gaps == sorted(gaps, reverse=True)
    assert len(trials) < 40
    assert trials[-1].step == pytest.approx(1.0, rel=0.01)


def test_what_counts_is_the_step_returned() -> None:
    """Steps on a grid: the trial's own step is what the next one goes by."""
    trials = meet(_on_grid, 5.0, 0.1, 0.2)
    assert trials[-1].kl == pytest.approx(0.1, rel=0.25)


def _on_grid(step: float) -> Trial:
    near = 2.0 ** (round(8 * math.log2(step)) / 8)
    return Trial(near, near**2)
