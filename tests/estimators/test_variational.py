"""Bits-back in place of rounded rows, behind the standard coder, on a tiny model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from decompositions.baselines import TableExplanation, TokenTable
from estimators.fidelity import Bench
from estimators.solver import Solution, Solver
from estimators.variational import (
    StatedRows,
    Variational,
    VariationalExplanation,
    row_prices,
    row_weights,
    slope_precision,
    variational,
)
from mdl.protocols import Settings
from mdl.task import Task

pytestmark = pytest.mark.usefixtures("in_little_time")


def table_rows(explanation: Any, settings: Settings) -> StatedRows:
    kept = explanation.rounded(settings).symbols.any(1)
    used = explanation.frequency[kept]
    return StatedRows("parts", 1, explanation.rows[kept], used, used)


@pytest.fixture(scope="module")
def table(tiny_task: Task) -> TableExplanation:
    return TokenTable().fit(tiny_task.for_fitting())


@pytest.fixture(scope="module")
def eps(tiny_bench: Bench) -> float:
    return 0.05 * tiny_bench.null_kl


@pytest.fixture(scope="module")
def solution(tiny_bench: Bench, table: TableExplanation, eps: float) -> Solution:
    return Solver(tiny_bench, table).solve(eps)


@pytest.fixture(scope="module")
def found(tiny_bench: Bench, table: TableExplanation, solution: Solution, eps: float) -> Variational:
    return variational(tiny_bench, table, table_rows, solution, eps)


def test_meets_the_fidelity_and_pays_for_rows(found: Variational, eps: float) -> None:
    assert found.kl == pytest.approx(eps, rel=0.05)
    assert 0 < found.row_bits < found.static * 1.001
    assert found.total == pytest.approx(found.static / found.horizon + found.rate)


def test_is_near_the_two_part_code(found: Variational, solution: Solution) -> None:
    """At a million tokens static bits are next to nothing, and rates differ by what a sample's luck makes of them."""
    assert found.rate == pytest.approx(solution.attempt.rate, rel=0.1)
    assert found.static == pytest.approx(solution.attempt.message.whole_bits, rel=0.3)


def test_a_sample_stands_in_the_section(tiny_bench: Bench, table: TableExplanation, solution: Solution) -> None:
    settings = solution.attempt.settings
    wrapped = VariationalExplanation(table, table_rows, tiny_bench.metrics[0], 1.0)
    drawn = wrapped.draw(settings)
    section = wrapped.section(settings)
    assert section.header == drawn.stated.header
    np.testing.assert_allclose(section.parts[1].values(), drawn.posterior.sample(0), rtol=1e-4, atol=1e-5)
    again = VariationalExplanation(table, table_rows, tiny_bench.metrics[0], 1.0)
    np.testing.assert_array_equal(again.section(settings).parts[1].symbols, section.parts[1].symbols)


def test_weights_are_those_of_the_optimal_step(table: TableExplanation, solution: Solution) -> None:
    """A row's rounding error is s^2 / 12 a direction; at weight 6 / s^2 that is where another nat of error and 1 / ln 2
    bits of rows balance."""
    settings = solution.attempt.settings
    rows = table_rows(table, settings)
    weights = row_weights(rows, settings, 2.0)
    np.testing.assert_allclose(row_weights(rows, settings, 1.0), 4.0 * weights)
    steps = settings.knobs["static"] * np.sqrt(6.0 / row_weights(rows, settings, 1.0))
    np.testing.assert_allclose(steps, settings.metric_step(rows.energy, rows.frequency))


def test_slope_gives_the_weight(solution: Solution) -> None:
    """6 / (p Delta)^2 is the slope in nats over twice the distortion."""
    p, attempt = slope_precision(solution), solution.attempt
    weight = 6.0 / (p * attempt.settings.step) ** 2
    assert weight == pytest.approx(solution.slope * math.log(2.0) / (2.0 * attempt.distortion))


def test_rows_alone(tiny_bench: Bench, table: TableExplanation, solution: Solution) -> None:
    prices = row_prices(table, table_rows, tiny_bench.metrics[0], solution.attempt.settings)
    assert prices.entries == table_rows(table, solution.attempt.settings).rows.size
    assert prices.sampled_error == pytest.approx(prices.rounded_error, rel=0.5)
    assert prices.kl_bits < prices.rounded_bits
    assert prices.saved > 0.0
