"""Moves of knobs at equal distortion: by the slope where it hardly changes, where it does by solving for the step."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from estimators.fisher import euclidean_metric
from estimators.prices import Prices
from estimators.solver import Solver

RATE = 10.0  # bits for each factor of e in the step


class Landscape:
    """distortion = scale step^2 + floor, total = bits - RATE ln step, of each value of one knob."""

    def __init__(self, **knob: tuple[float, float, float]) -> None:
        self.knob = {float(key.removeprefix("at")): value for key, value in knob.items()}
        self.asked: list[tuple[float, float]] = []

    def __call__(self, metric: Any, step: float, knobs: dict[str, float]) -> SimpleNamespace:
        scale, floor, bits = self.knob[knobs["k"]]
        self.asked.append((step, knobs["k"]))
        total = bits - RATE * math.log(step)
        return SimpleNamespace(distortion=scale * step**2 + floor, total=lambda prices: total)


def solver_on(landscape: Landscape, step: float = 0.1) -> tuple[Solver, float, float, float]:
    """At the knob's value 0: the solver, its distortion, its total and the slope of total against ln distortion."""
    solver = Solver.__new__(Solver)  # without a task: all that a move asks for is the outlook
    solver.metric, solver.step, solver.knobs, solver.prices = euclidean_metric(1), step, {"k": 0.0}, Prices()
    solver._outlook = landscape
    here = landscape(solver.metric, step, solver.knobs)
    landscape.asked.clear()
    return solver, here.distortion, here.total(None), RATE / 2


def test_a_move_that_saves_bits_at_the_same_distortion_is_made() -> None:
    landscape = Landscape(at0=(1, 0, 100), at1=(1, 0, 90))
    solver, target, total, slope = solver_on(landscape)
    assert solver._move("k", 1.0, target, total, slope) == pytest.approx(total - 10)
    assert (solver.knobs, solver.step) == ({"k": 1.0}, 0.1)


def test_a_little_more_distortion_is_priced_by_the_slope() -> None:
    landscape = Landscape(at0=(1, 0, 100), at1=(1.2, 0, 99.5), at2=(1.2, 0, 98))
    solver, target, total, slope = solver_on(landscape)
    assert solver._move("k", 1.0, target, total, slope) == total  # saves 0.5, costs 5 ln 1.2 = 0.91
    assert (solver.knobs, solver.step) == ({"k": 0.0}, 0.1)
    found = solver._move("k", 2.0, target, total, slope)
    assert found == pytest.approx(total - 2 + slope * math.log(1.2))
    assert (solver.knobs, solver.step) == ({"k": 2.0}, 0.1)
    assert len(landscape.asked) == 2


def test_where_distortion_changes_much_the_step_is_solved_for_again() -> None:
    landscape = Landscape(at0=(1, 0, 100), at1=(4, 0, 90), at2=(4, 0, 94))
    solver, target, total, slope = solver_on(landscape)
    assert solver._move("k", 2.0, target, total, slope) == total  # saves 6, costs 10 ln 2 = 6.9
    found = solver._move("k", 1.0, target, total, slope)
    assert found == pytest.approx(total - 10 + RATE * math.log(2), abs=0.2)
    assert solver.step == pytest.approx(0.05, rel=0.02)
    assert landscape(None, solver.step, {"k": 1.0}).distortion == pytest.approx(target, rel=0.04)


def test_what_no_step_makes_good_is_not_taken() -> None:
    """A neuron that is gone: a floor of distortion, however fine the numbers that are left."""
    landscape = Landscape(at0=(1, 0, 100), at1=(1, 0.02, 60))
    solver, target, total, slope = solver_on(landscape)
    by_slope = total - 40 + slope * math.log(3)
    assert by_slope < total  # by the slope alone it would have been
    assert solver._move("k", 1.0, target, total, slope) == total
    assert (solver.knobs, solver.step) == ({"k": 0.0}, 0.1)


def test_less_distortion_is_turned_into_coarser_steps() -> None:
    landscape = Landscape(at0=(1, 0, 100), at1=(0.1, 0, 105))
    solver, target, total, slope = solver_on(landscape)
    found = solver._move("k", 1.0, target, total, slope)
    assert found == pytest.approx(total + 5 - RATE * math.log(math.sqrt(10)), abs=0.2)
    assert solver.step == pytest.approx(0.1 * math.sqrt(10), rel=0.02)


def test_longer_and_worse_is_seen_at_a_glance() -> None:
    landscape = Landscape(at0=(1, 0, 100), at1=(9, 0, 101))
    solver, target, total, slope = solver_on(landscape)
    assert solver._move("k", 1.0, target, total, slope) == total
    assert solver.knobs == {"k": 0.0}
    assert len(landscape.asked) == 1


def test_a_climb_goes_on_for_as_long_as_it_gains() -> None:
    bits = (100, 97, 95, 94, 96, 80)
    landscape = Landscape(**{f"at{i}": (1.0, 0.0, float(b)) for i, b in enumerate(bits)})
    solver, target, total, slope = solver_on(landscape)
    found = solver._climb("k", [float(i) for i in range(6)], target, total, slope)
    assert solver.knobs == {"k": 3.0}  # 5 lies behind a hill
    assert found == pytest.approx(total - 6)
