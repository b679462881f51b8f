"""The search under behaviour: what it minimises, and that it ends no worse than it began."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from decompositions.weights.components import Components
from decompositions.weights.yardsticks import Neurons, Weights
from estimators.accounting import SurpriseAccounting
from estimators.behaviour import OF_ROWS, Search, cheapest_for_behaviour
from estimators.fidelity import Bench
from estimators.prices import Prices
from estimators.solver import Solver
from mdl.data import from_rows
from mdl.models import Vectors
from mdl.models.toys.gated import GatedFunctions, gated_functions, gated_inputs
from mdl.task import BEHAVIOUR, Task, build_task

HORIZON = 300.0


@pytest.fixture(scope="module")
def task() -> Task:
    made = gated_functions(0, GatedFunctions(3, 4))
    model = Vectors.computed(made.network, made.weights, gated_inputs(made.network, 240, 1), "gated").tolerating(0.01)
    return build_task(model, "vectors", from_rows(model.first_equal, None, 0, "gated"), lambda *_: None)


@pytest.fixture(scope="module")
def bench(task: Task) -> Bench:
    return Bench(task, HORIZON)


def searched(bench: Bench, explanation: Any, start: float = 0.3) -> Search:
    return Search(bench, explanation, bench.metrics[0], Prices(), start)


def middle(explanation: Any) -> dict[str, float]:
    return {name: grid[len(grid) // 2] for name, grid in explanation.knobs.items()}


@pytest.mark.parametrize("decomposition", [Weights(), Neurons(), Components(parts="neurons")], ids=str)
def test_it_ends_no_worse_than_it_began(decomposition: Any, bench: Bench, task: Task) -> None:
    explanation = decomposition.fit(task.for_fitting())
    search, knobs = searched(bench, explanation), middle(explanation)
    coding = search.run(knobs)
    assert len(search.found) <= OF_ROWS.most
    totals = {key: total for key, (total, _) in search.found.items()}
    first = [search.total(e, knobs) for e in OF_ROWS.first]
    attempt = coding.attempt(bench, bench.probe)
    found = attempt.total + attempt.kl
    assert found == pytest.approx(min(totals.values()))
    assert found <= min(first)
    assert coding.coder is None  # nothing is sent behind it
    assert attempt.residual is None
    assert not coding.settings.corrected
    assert set(coding.settings.knobs) == set(explanation.knobs)


def test_what_is_minimised(bench: Bench, task: Task) -> None:
    """Static bits over N, and KL, of a function of the inputs; a step that is ten octaves finer is dearer."""
    explanation = Weights().fit(task.for_fitting())
    search = searched(bench, explanation)
    total = search.total(0.0, {"static": 1.0})
    ((_, coding),) = search.found.values()
    attempt = coding.attempt(bench, bench.probe)
    by_hand = attempt.message.whole_bits / HORIZON + float(np.mean(attempt.damage.kl_bits))
    assert total == pytest.approx(by_hand, rel=1e-9)
    assert search.total(0.0, {"static": 1.0}) == total
    assert len(search.found) == 1  # asked for again, not worked out again
    fine = search.total(-10.0, {"static": 1.0})
    kl = next(reversed(search.found.values()))[1].attempt(bench, bench.probe).kl
    assert fine > kl
    assert kl < attempt.kl


def test_steps_that_cannot_be_taken_are_infinite(bench: Bench, task: Task) -> None:
    explanation = Weights().fit(task.for_fitting())
    search = searched(bench, explanation)
    assert search.total(-100.0, {"static": 1.0}) == math.inf
    for exponent in range(OF_ROWS.most):
        search.found["filled", exponent] = search.found[-100.0, ("static", 1.0)]
    assert search.total(0.0, {"static": 1.0}) == math.inf  # and so are those beyond the budget


def test_a_longer_horizon_affords_finer_weights(bench: Bench, task: Task) -> None:
    explanation = Weights().fit(task.for_fitting())
    kl = []
    for horizon in (30.0, 1e6):
        other = bench.at(horizon)
        coding = cheapest_for_behaviour(other, explanation, Solver(other, explanation), [])
        kl.append(coding.attempt(other, other.held_out).kl)
    assert kl[1] < 0.5 * kl[0]
    assert kl[0] < 1.5 * bench.null_kl


def test_a_search_need_not_be_made_twice(task: Task) -> None:
    """At the settings of a score comes the same score; at coarser ones a shorter message and a larger KL."""
    estimator = SurpriseAccounting(task, HORIZON)
    explanation = Components(parts="neurons").fit(task.for_fitting())
    first = estimator.score(explanation, [BEHAVIOUR], [], lambda *_: None)[0].score
    again = estimator.score_at(explanation, first.settings)
    assert again.score.total(HORIZON) == first.total(HORIZON)
    assert again.message
    assert again.score.evaluations == 1
    coarse = estimator.score_at(explanation, {**first.settings, "step": 4.0 * float(first.settings["step"])}).score
    assert coarse.explanation == first.explanation
    assert coarse.static.whole_bits < first.static.whole_bits
    assert coarse.kl_bits > first.kl_bits
