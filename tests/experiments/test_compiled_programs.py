"""The contest of compiled programs, on a program that has eight edges; what its table says of cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from decompositions.circuits.sparse_sender import SparseCircuit
from experiments.compiled_programs import cases, contest
from experiments.compiled_programs.cases import MEAN, ZERO, Case
from experiments.compiled_programs.contest import HORIZONS, TRUTH, totals, verdict
from experiments.compiled_programs.descent import descend
from experiments.compiled_programs.report import summary, table
from mdl.models.compiled import library


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(cases, "PROGRAMS", {"hist": lambda: library.hist(4, ("a", "b"))})
    return Case.of("hist", 0)


def test_a_seed_draws_the_case(case: Case) -> None:
    assert 50 <= case.compiled.sharpness < 200
    sizes = [len(a.tokens) for a in (case.task.fit_activations, case.task.tune_activations, case.task.held_out) if a]
    assert sum(sizes) == 2 + 4 + 8 + 16
    assert case.truth(ZERO).sum() == 6
    assert case.truth(MEAN).sum() == 5  # the MLP reads `one` alone of the embedding
    drawn = case.random(6)
    assert 1 <= drawn.sum() <= 6
    assert (drawn == case.random(6)).all()


@pytest.mark.usefixtures("in_little_time")
def test_the_truth_is_shortest_in_a_contest(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "HORIZONS", (1e6,))
    cell = contest.contest(case, (ZERO,), rounded=False)
    scores = cell[ZERO]["scores"]
    own = scores[TRUTH + " (sparse)"][0]
    assert own["edges"] == 6
    assert own["rate"] < 1e-3
    assert scores["nothing"][0]["rate"] > 1.0
    assert scores["random (sparse)"][0]["rate"] > 1.0
    found = verdict(cell, ZERO, 0)
    assert found["wins"]
    assert found["margin"] == min(t for n, t in totals(scores, 0).items() if not n.startswith(TRUTH)) - found["total"]


def test_descent_leaves_out_what_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "PROGRAMS", {"frac_prevs": lambda: library.frac_prevs(4, ("x", "y"))})
    case = Case.of("frac_prevs", 0)
    explanation = SparseCircuit(edges=case.truth(ZERO)).fit(case.task.for_fitting())
    graph = explanation.circuit.graph
    idle = case.truth(ZERO) | graph.mask(["input->logits"])  # carries nothing
    assert (descend(explanation, idle, 1e6) == case.truth(ZERO)).all()
    assert descend(explanation, case.truth(ZERO), 1e-3).sum() < 5


def cell(totals_of: dict[str, float]) -> dict[str, Any]:
    scores = {name: [{"totals": [t] * len(HORIZONS)}] for name, t in totals_of.items()}
    return {"program": "p", **{a: {"scores": scores} for a in (ZERO, MEAN)}}


def test_the_table_counts_wins() -> None:
    won = cell({"truth (sparse)": 100.0, "nothing": 150.0, "truth (rounded)": 90.0})
    even = cell({"truth (sparse)": 100.0, "greedy (sparse)": 93.0})
    lost = cell({"truth (sparse)": 100.0, "truth, pruned by bits for N = 1000 (sparse)": 80.0})
    assert [verdict(c, ZERO, 0)["wins"] for c in (won, even, lost)] == [True, True, False]
    lines = table([won, even, lost])
    assert len(lines) == 2 + 2 * len(HORIZONS)
    assert "| 3 | 2 | 100 |" in lines[2]
    assert "-20 to 50" in lines[2]
    found = summary([won, even, lost])
    assert f"in {4 * len(HORIZONS)} of {6 * len(HORIZONS)}" in found
    assert f"fewer edges in {2 * len(HORIZONS)};" in found
    assert np.isclose(totals(won[ZERO]["scores"], 0)["nothing"], 150.0)
