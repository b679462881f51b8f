r"""Searches that weigh every circuit by what it costs: the circuit that minimises

$$\Delta + \lambda \cdot bits$$

for each of a ladder of exchange rates lambda, Delta being its change (`Searched.metric`) and bits what it takes to
state (`Searched.bits`). Under behaviour Delta is in nats a position that is asked for, and lambda = ln 2 / N for N
such positions: a bit of the message is worth ln 2 / N nats at each. So ACDC's threshold tau gets a unit: an edge that
frees b bits is dropped if the KL grows by less than tau = b ln 2 / N nats.

| search | how |
| --- | --- |
| acdc | readers from the logits back, sources from the last to the first: an edge goes if that lowers the sum |
| annealing | simulated annealing over single edges (or nodes), from everything |
| enumeration | all subsets: the optimum, for at most 20 of them |

**Sources:** Conmy et al. 2023 (ACDC), arXiv:2304.14997; Kirkpatrick et al. 1983 (annealing).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from decompositions.circuits.paths import Path
from decompositions.circuits.search import edges_of, units_of
from decompositions.circuits.searched import Searched
from mdl.errors import ExplanationError

ENUMERABLE = 20  # units: a million subsets
LADDER = tuple(4.0**k for k in range(-4, 3))  # of exchange rates, about the one at which all and nothing are equal
SWEEPS = 12  # of annealing: flips tried for each unit
COLDEST = 1e-3  # of the first temperature
SEED = 0


@dataclass(frozen=True, eq=False)
class Objective:
    """Change and bits of circuits, each worked out once. `nodes`: whether units are nodes."""

    searched: Searched
    nodes: bool
    known: dict[bytes, tuple[float, float]] = field(default_factory=dict, repr=False)

    @cached_property
    def units(self) -> list[np.ndarray]:
        """Tables of single edges, or of single nodes."""
        return units_of(self.searched.graph, self.nodes)

    def circuit(self, chosen: np.ndarray) -> np.ndarray:
        """Edges of some units [U], without dead ends."""
        graph = self.searched.graph
        always = np.arange(len(graph.sources)) == 0 if self.nodes else np.zeros_like(graph.possible)
        together = np.logical_or.reduce([always, *(u for u, on in zip(self.units, chosen, strict=True) if on)])
        return graph.pruned(edges_of(graph, together, self.nodes), constant=True)

    def of(self, edges: np.ndarray) -> tuple[float, float]:
        """Change and bits."""
        key = edges.tobytes()
        if key not in self.known:
            self.known[key] = (self.searched.change(edges), self.searched.bits(edges))
        return self.known[key]

    def total(self, edges: np.ndarray, rate: float) -> float:
        """Change + rate * bits."""
        change, bits = self.of(edges)
        return change + rate * bits

    def rates(self) -> tuple[float, ...]:
        """Exchange rates from dear to cheap: nothing is the best circuit at the first, about everything at the last."""
        graph = self.searched.graph
        everything = graph.pruned(graph.possible, constant=True)
        nothing = self.circuit(np.zeros(len(self.units), bool))
        level = self.of(nothing)[0] / max(self.of(everything)[1], 1.0)
        return tuple(level * f for f in sorted(LADDER, reverse=True))


def path_of(objective: Objective, found: list[np.ndarray]) -> Path:
    """Circuits from small to large, with nothing and everything among them."""
    ends = [objective.circuit(np.full(len(objective.units), on)) for on in (False, True)]
    distinct = {edges.tobytes(): edges for edges in (*ends, *found)}
    return Path(tuple(sorted(distinct.values(), key=lambda e: objective.of(e)[1])))


def by_threshold(searched: Searched, nodes: bool) -> Path:
    """ACDC, with the threshold that a bit is worth at each rate."""
    objective, found = Objective(searched, nodes), []
    count = len(objective.units)
    for rate in objective.rates():
        chosen = np.ones(count, bool)
        best = objective.total(objective.circuit(chosen), rate)
        for unit in _backwards(searched, nodes):
            chosen[unit] = False
            total = objective.total(objective.circuit(chosen), rate)
            if total < best:
                best = total
            else:
                chosen[unit] = True
        found.append(objective.circuit(chosen))
    return path_of(objective, found)


def _backwards(searched: Searched, nodes: bool) -> Iterator[int]:
    """Units, from those that are nearest to the logits: of edges by what they lead to, then by where they come from."""
    if nodes:
        yield from reversed(range(len(searched.graph.sources) - 1))
        return
    edges = np.argwhere(searched.graph.possible)
    yield from np.lexsort((edges[:, 0], edges[:, 1]))[::-1].tolist()


def by_annealing(searched: Searched, nodes: bool) -> Path:
    """From everything at each rate; the temperature falls geometrically from the mean rise of a few flips."""
    objective, found, rng = Objective(searched, nodes), [], np.random.default_rng(SEED)
    count = len(objective.units)
    for rate in reversed(objective.rates()):
        chosen = np.ones(count, bool)
        best = now = objective.total(objective.circuit(chosen), rate)
        kept, warmest = chosen.copy(), max(_mean_rise(objective, chosen, rate), 1e-30)
        for temperature in warmest * COLDEST ** np.linspace(0.0, 1.0, SWEEPS * count):
            unit = int(rng.integers(count))
            chosen[unit] ^= True
            total = objective.total(objective.circuit(chosen), rate)
            if total <= now or rng.random() < np.exp(-(total - now) / temperature):
                now = total
                if total < best:
                    best, kept = total, chosen.copy()
            else:
                chosen[unit] ^= True
        found.append(objective.circuit(kept))
    return path_of(objective, found)


def _mean_rise(objective: Objective, chosen: np.ndarray, rate: float) -> float:
    """Of the objective, over single flips of the first few units."""
    base, rises = objective.total(objective.circuit(chosen), rate), []
    for unit in np.linspace(0, len(chosen) - 1, min(8, len(chosen))).astype(int):
        flipped = chosen.copy()
        flipped[unit] ^= True
        rises.append(abs(objective.total(objective.circuit(flipped), rate) - base))
    return float(np.mean(rises))


def by_enumeration(searched: Searched, nodes: bool) -> Path:
    """Every circuit that no other one beats in both change and bits: whatever the rate, the optimum is among them.

    **Raises:** `ExplanationError` for more than ENUMERABLE units.
    """
    objective = Objective(searched, nodes)
    count = len(objective.units)
    if count > ENUMERABLE:
        raise ExplanationError(
            f"{count} {'nodes' if nodes else 'edges'} have 2^{count} subsets: enumeration takes at most {ENUMERABLE}. "
            "Take search=annealing, or level=node."
        )
    every: dict[bytes, np.ndarray] = {}
    for chosen in product((False, True), repeat=count):
        edges = objective.circuit(np.array(chosen))
        every.setdefault(edges.tobytes(), edges)
    best, front = np.inf, []
    for edges in sorted(every.values(), key=lambda e: (objective.of(e)[1], objective.of(e)[0])):
        if objective.of(edges)[0] < best:
            best = objective.of(edges)[0]
            front.append(edges)
    return path_of(objective, front)
