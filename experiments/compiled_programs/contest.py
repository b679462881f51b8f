"""One compiled program, one seed: totals of the weight-true circuit and of its rivals, per ablation and N."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from decompositions.circuits.circuit import Circuit
from decompositions.circuits.sparse_sender import SparseCircuit, SparseCircuitExplanation
from estimators.accounting import SurpriseAccounting
from experiments.compiled_programs.cases import MEAN, ZERO, Case
from experiments.compiled_programs.descent import descend
from mdl import plugins
from mdl.protocols import Decomposition, Explanation, Settings
from mdl.task import BEHAVIOUR

HORIZONS = (1e3, 1e4, 1e6)
TRUTH, PRUNED = "truth", "truth, pruned by bits"
YARDSTICKS, WEIGHTS = ("nothing", "token-table"), "weights"
SPARSE, ROUNDED = " (sparse)", " (rounded)"
BYTE = 8.0


def contest(case: Case, ablations: tuple[str, ...] = (ZERO, MEAN), rounded: bool = True) -> dict[str, Any]:
    """Everything scored under behaviour on the whole model, as plain numbers. `rounded`: also what codes dense weights,
    the yardstick `weights` and the truth under that coder, which are slow."""
    fitting = case.task.for_fitting()
    known = [plugins.make_decomposition(name).fit(fitting) for name in (*YARDSTICKS, *([WEIGHTS] if rounded else []))]
    known.append(SparseCircuit(name=f"all edges{SPARSE}").fit(fitting))
    estimators = _estimators(case)
    shared = {e.name: _scores(e, estimators) for e in known}
    cell: dict[str, Any] = {"horizons": list(HORIZONS), "sharpness": float(case.compiled.sharpness)}
    for ablation in ablations:
        rivals = _rivals(case, ablation, rounded)
        scores = {**shared, **{e.name: _scores(e, estimators) for e in rivals}}
        cell[ablation] = {"truth_edges": int(case.truth(ablation).sum()), "scores": scores}
    return cell


def _rivals(case: Case, ablation: Any, rounded: bool) -> list[Explanation]:
    truth = case.truth(ablation)
    fitting = case.task.for_fitting()
    found: dict[str, Decomposition] = {
        TRUTH + SPARSE: SparseCircuit(edges=truth, ablation=ablation),
        "ACDC" + SPARSE: SparseCircuit("acdc", ablation),
        "greedy" + SPARSE: SparseCircuit("greedy", ablation),
        "EAP-IG" + SPARSE: SparseCircuit("eap-ig", ablation),
        "random" + SPARSE: SparseCircuit(edges=case.random(int(truth.sum())), ablation=ablation),
    }
    if rounded:
        found[TRUTH + ROUNDED] = Circuit(edges=truth, ablation=ablation, level="subspace")
    fitted = [_named(name, d.fit(fitting)) for name, d in found.items()]
    own = fitted[0]
    assert isinstance(own, SparseCircuitExplanation)
    for horizon in HORIZONS:
        fewer = descend(own, truth, horizon)
        if fewer.any() and (fewer != truth).any():  # with no edge left it is "nothing", which competes anyway
            name = f"{PRUNED} for N = {horizon:g}{SPARSE}"
            fitted.append(_named(name, SparseCircuit(edges=fewer, ablation=ablation).fit(fitting)))
    return fitted


def _named(name: str, explanation: Explanation) -> Explanation:
    return replace(explanation, name=name)  # type: ignore[type-var]


def _scores(explanation: Explanation, estimators: Mapping[float, SurpriseAccounting]) -> list[dict[str, Any]]:
    """Of the message for each N: its bits, its rate, and its total at every N.

    Sparse circuits choose their digits themselves, so that there is one evaluation, and the constants at BOS and PAD
    are of one precision for all of them.
    """
    found = []
    for horizon, estimator in estimators.items():
        if isinstance(explanation, SparseCircuitExplanation):
            settings = {"metric": estimator.bench.metrics[0].name, "step": explanation.spread, "static": 1.0}
            scored = estimator.score_at(explanation, settings)
        else:
            scored = estimator.score(explanation, [BEHAVIOUR], [], lambda *_: None)[0]
        totals = [float(scored.score.total(n)) for n in HORIZONS]
        record: dict[str, Any] = {"for": horizon, "message_bits": 8.0 * len(scored.message)}
        record |= {"rate": scored.score.rate, "totals": totals}
        if isinstance(explanation, SparseCircuitExplanation):
            known = Settings(horizon, explanation.spread, np.eye(1), corrected=False)
            record["edges"] = int(explanation.sent(known)[1].sum())
        found.append(record)
    return found


def _estimators(case: Case) -> dict[float, SurpriseAccounting]:
    """One for each N, on one bench: what it compiled serves all."""
    found = {n: SurpriseAccounting(case.task, n) for n in HORIZONS}
    first = found[HORIZONS[0]].bench
    for horizon, estimator in found.items():
        estimator.bench = first.at(horizon)
    return found


def totals(scores: Mapping[str, list[dict[str, Any]]], place: int) -> dict[str, float]:
    """The shortest of each contestant's messages at one N, bits."""
    return {name: min(r["totals"][place] for r in records) for name, records in scores.items()}


def verdict(cell: Mapping[str, Any], ablation: str, place: int) -> dict[str, Any]:
    """Whether the weight-true circuit is the shortest at an N, or within a byte of it; and the shortest rival."""
    found = totals(cell[ablation]["scores"], place)
    own = found.pop(TRUTH + SPARSE)
    found.pop(TRUTH + ROUNDED, None)
    best = min(found, key=lambda name: found[name])
    return {"total": own, "margin": found[best] - own, "wins": found[best] >= own - BYTE, "rival": best}
