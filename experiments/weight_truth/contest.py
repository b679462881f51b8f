"""One toy, one seed: totals of the truth and its rivals at every N, and where one part overtakes the truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decompositions.weights import parts
from decompositions.weights.components import Components
from decompositions.weights.factors import Factors
from estimators.accounting import SurpriseAccounting
from experiments.weight_truth.cases import Case, match
from mdl import plugins
from mdl.ledger import Score
from mdl.models.vectors import VECTORS
from mdl.protocols import Explanation
from mdl.score import load_data
from mdl.task import BEHAVIOUR, Task, build_task

HORIZONS = (1.0, 4.0, 32.0, 256.0)  # for which precisions are chosen; a sender takes the message that is shorter at N
GRID = np.unique(np.round(np.logspace(0, 4, 81), 3))
TRUTH, WHOLE, WEIGHTS, NOTHING = "truth", "one part", "weights", "nothing"


@dataclass(frozen=True)
class Line:
    """What a contestant's messages cost at every N of the grid, bits; the shortest of them."""

    totals: np.ndarray
    records: tuple[dict[str, float], ...]

    @classmethod
    def of(cls, scores: Sequence[Score]) -> Line:
        totals = np.min([[float(s.total(n)) for n in GRID] for s in scores], axis=0)
        return cls(totals, tuple(_record(s) for s in scores))


def _record(score: Score) -> dict[str, float]:
    """What a prediction of the curve needs."""
    return {
        "horizon": score.horizon,
        "rate": score.rate,
        "l0": score.beside["l0"],
        "header_bits": score.static.header_bits,
        "whole_bits": score.static.whole_bits,
        "kl_bits": score.kl_bits,
    }


def contest(case: Case, further: Mapping[str, Factors] | None = None) -> dict[str, Any]:
    """Scores of everything under behaviour, as plain numbers. `further`: other decompositions to be compared."""
    model = case.model
    network, weights = model.network, model.weights
    assert network is not None
    assert weights is not None
    named = {TRUTH: case.truth.factors, WHOLE: parts.whole(network, weights), **case.rivals, **(further or {})}
    task = build_task(model, VECTORS, load_data(model), lambda *_: None)
    components = [
        Components(object=f, name=name, gates=case.gates).fit(task.for_fitting()) for name, f in named.items()
    ]
    others = [plugins.make_decomposition(name).fit(task.for_fitting()) for name in (NOTHING, WEIGHTS)]
    scores: dict[str, list[Score]] = {}
    for horizon in HORIZONS:
        for score in _scores(task, horizon, components, others):
            scores.setdefault(score.explanation, []).append(score)
    lines = {name: Line.of(found) for name, found in scores.items()}
    counts = {name: f.n_components for name, f in named.items()}
    return {
        "grid": GRID.tolist(),
        "totals": {name: line.totals.round(2).tolist() for name, line in lines.items()},
        "records": {name: list(line.records) for name, line in lines.items()},
        "components": counts,
        "cosines": {name: match(f, case.truth.factors).mean_cosine for name, f in named.items()},
        "crossing": crossing(lines[TRUTH].totals, lines[WHOLE].totals),
        "predicted": predicted_crossing(lines, counts),
    }


def _scores(
    task: Task, horizon: float, components: Sequence[Explanation], others: Sequence[Explanation]
) -> Iterator[Score]:
    """Of everything, with precisions for one horizon. All components are scored at whatever settings the search found
    for any of them: what a part more or less costs is a few bits, and luck in the search is as much."""
    estimator = SurpriseAccounting(task, horizon)
    found = {e.name: estimator.score(e, [BEHAVIOUR], [], lambda *_: None)[0].score for e in (*components, *others)}
    yield from found.values()
    tried = {e.name: dict(found[e.name].settings) for e in components}
    for explanation in components:
        own = [tried[explanation.name]]
        for settings in tried.values():
            if settings not in own:
                own.append(settings)
                yield estimator.score_at(explanation, settings).score


def crossing(truth: np.ndarray, whole: np.ndarray) -> float | None:
    """The N at which one part becomes shorter for good; 0 if it is from the start, None if it never is."""
    ahead = np.flatnonzero(truth < whole)
    if not len(ahead):
        return 0.0
    last = int(ahead[-1])
    if last == len(GRID) - 1:
        return None
    gaps = truth[last : last + 2] - whole[last : last + 2]
    share = gaps[0] / (gaps[0] - gaps[1])
    return float(np.exp((1 - share) * np.log(GRID[last]) + share * np.log(GRID[last + 1])))


def predicted_crossing(lines: Mapping[str, Line], counts: Mapping[str, int]) -> float | None:
    """The same from sizes and frequencies alone: parts of equal size, each used with the mean frequency f = L0 / C.

    static(N) = header + (message - header) (1 - (1 - f)^N)
    """
    found = {}
    for name in (TRUTH, WHOLE):
        totals = []
        for r in lines[name].records:
            f = min(r["l0"] / counts[name], 1.0 - 1e-9)
            paid = -np.expm1(GRID * np.log1p(-f))
            totals.append(r["header_bits"] + (r["whole_bits"] - r["header_bits"]) * paid + GRID * r["rate"])
        found[name] = np.min(totals, axis=0)
    return crossing(found[TRUTH], found[WHOLE])


def verdict(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the truth is shorter than every rival (not one part, weights, nothing) from N = 1 to the crossing."""
    grid, totals = np.array(cell["grid"]), {k: np.array(v) for k, v in cell["totals"].items()}
    end = cell["crossing"]
    upto = grid <= max(grid[-1] if end is None else end, 1.0)
    rivals = [name for name in totals if name not in (TRUTH, WHOLE, WEIGHTS, NOTHING)]
    margins = {name: float((totals[name] - totals[TRUTH])[upto].min()) for name in rivals}
    lost = sorted(name for name, margin in margins.items() if margin <= 0)
    return {"wins": not lost, "lost_to": lost, "margins": margins}
