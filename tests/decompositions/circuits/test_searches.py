"""Searches that weigh circuits by what they cost, against the optimum over all subsets."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decompositions.circuits.circuit import Circuit, CircuitExplanation
from decompositions.circuits.edge_pruning import BETA, GAMMA, ZETA, Costs, gates, probability
from decompositions.circuits.searched import NUMBER
from decompositions.circuits.searches import SEARCHES
from decompositions.circuits.subsets import Objective
from mdl.errors import ExplanationError
from mdl.receiver import decoder_of
from mdl.state import NoState
from tests.decompositions.circuits.test_circuit import settings, task_of

WEIGHING = ("acdc", "annealing", "edge-pruning", "enumeration")


def found(search: str, kind: str, level: Any, **options: Any) -> CircuitExplanation:
    explanation = Circuit(search=search, level=level, **options).fit(task_of(kind).for_fitting())
    assert isinstance(explanation, CircuitExplanation)
    return explanation


def least(explanation: CircuitExplanation, objective: Objective) -> np.ndarray:
    """The best of a path at each exchange rate."""
    circuits = explanation.path.circuits
    return np.array([min(objective.total(c, rate) for c in circuits) for rate in objective.rates()])


@pytest.mark.parametrize("level", ["node", "subspace"])
@pytest.mark.parametrize("kind", ["one-head"])
def test_no_search_beats_enumeration_and_annealing_finds_it(kind: str, level: Any) -> None:
    optimum = found("enumeration", kind, level)
    objective = Objective(optimum.searched, level == "node")
    best = least(optimum, objective)
    nothing, everything = optimum.path.circuits[0], optimum.path.circuits[-1]
    for search in SEARCHES:
        totals = least(found(search, kind, level), objective)
        assert (totals >= best * (1 - 1e-6)).all(), search
        if search == "annealing":
            assert totals == pytest.approx(best, rel=1e-6)
        if search in WEIGHING:  # never worse than sending nothing, or everything
            ends = [[objective.total(c, rate) for rate in objective.rates()] for c in (nothing, everything)]
            assert (totals <= np.min(ends, 0) * (1 + 1e-6)).all(), search
    trivial = [min(objective.total(nothing, r), objective.total(everything, r)) for r in objective.rates()]
    assert level == "node" or (best < 0.98 * np.array(trivial)).any()  # something in between pays


@pytest.mark.parametrize("search", ["acdc", "edge-pruning"])
def test_paths_go_from_nothing_to_everything(search: str) -> None:
    explanation = found(search, "attention-only", "edge")
    bits = [explanation.searched.bits(c) for c in explanation.path.circuits]
    assert bits == sorted(bits)
    assert not explanation.path.circuits[0].any()
    assert (explanation.path.circuits[-1] == explanation.graph.pruned(explanation.graph.possible, True)).all()
    kept = [explanation.chosen(settings(task_of("attention-only"), 0.1, n)).sum() for n in (1e1, 1e7)]
    assert kept[0] < kept[1]


def test_acdcs_threshold_is_what_an_edges_bits_are_worth() -> None:
    """At each rate no single edge is left whose removal would lower change + rate * bits, tried in ACDC's own order."""
    explanation = found("acdc", "one-head", "edge")
    objective = Objective(explanation.searched, False)
    edges = np.argwhere(explanation.graph.possible)
    rate = objective.rates()[3]
    best = min(explanation.path.circuits, key=lambda c: objective.total(c, rate))
    for source, destination in edges:
        without = best.copy()
        without[source, destination] = False
        without = explanation.graph.pruned(without, constant=True)
        assert objective.total(without, rate) >= objective.total(best, rate) * (1 - 1e-9)


def test_hard_concrete_gates() -> None:
    """As often open as the formula says; Louizos et al. 2018, equation 12."""
    logits = jnp.linspace(-3.0, 3.0, 7)
    samples = np.stack([np.asarray(gates(logits, jax.random.key(i))) for i in range(2000)])
    assert ((samples >= 0) & (samples <= 1)).all()
    expected = 1.0 / (1.0 + np.exp(-(np.linspace(-3, 3, 7) - BETA * np.log(-GAMMA / ZETA))))
    assert np.asarray(probability(logits)) == pytest.approx(expected, rel=1e-5)
    assert (samples > 0).mean(0) == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("level", ["edge", "subspace"])
def test_the_learned_cost_is_the_cost(level: Any) -> None:
    """For gates of 0 and 1, the numbers of matrices that are kept, and the edges."""
    explanation = found("eap-ig", "attention-only", level)
    searched, costs = explanation.searched, Costs.of(explanation.searched)
    full = searched.bits(explanation.path.circuits[-1])
    for circuit in explanation.path.circuits[:: max(1, len(explanation.path.circuits) // 6)]:
        exact = searched.bits(circuit) - searched.bits(np.zeros_like(circuit))
        near = float(costs.bits(jnp.asarray(circuit, jnp.float32))) - float(costs.bits(jnp.zeros(circuit.shape)))
        assert near == pytest.approx(exact, rel=0.2, abs=0.03 * full)  # but for biases
    assert NUMBER > 0


def test_enumeration_has_its_limit() -> None:
    with pytest.raises(ExplanationError, match=r"2\^\d+ subsets"):
        found("enumeration", "attention-only", "edge")


def test_optimal_constants_leave_less_than_means() -> None:
    """On the data that they are fitted on, for the same circuit; and they travel in the message."""
    task = task_of("attention-only")
    edges = found("greedy", "attention-only", "edge").path.circuits[8]
    fitted = {a: Circuit(edges=edges, ablation=a).fit(task.for_fitting()) for a in ("mean", "optimal")}  # type: ignore[arg-type]
    constants = {a: e.searched.constants(edges) for a, e in fitted.items()}
    assert np.abs(constants["optimal"] - constants["mean"]).max() > 1e-3
    sections = {a: e.section(settings(task)) for a, e in fitted.items()}
    left = {}
    for name, section in sections.items():
        sample = task.fit
        found_logits = decoder_of(section).predict(sample.inputs, NoState(sample.inputs.n_tokens))
        log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (sample.outputs, found_logits))
        left[name] = float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    assert left["optimal"] < 0.95 * left["mean"]


def test_optimal_constants_need_predictions() -> None:
    with pytest.raises(ExplanationError, match="optimal ablation is fitted to predictions"):
        Circuit(ablation="optimal").fit(task_of("gpt2", "upstream of blocks.1.hook_resid_pre").for_fitting())
