"""All searches for circuits, by name: from a region's network on some data, and whether units are nodes, to a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from decompositions.circuits.edge_pruning import by_pruning
from decompositions.circuits.paths import Path
from decompositions.circuits.search import by_attribution, by_patching, greedily
from decompositions.circuits.searched import Searched
from decompositions.circuits.subsets import by_annealing, by_enumeration, by_threshold

SEARCHES: Mapping[str, Callable[[Searched, bool], Path]] = {
    "eap-ig": by_attribution,
    "exact": by_patching,
    "greedy": greedily,
    "acdc": by_threshold,
    "annealing": by_annealing,
    "edge-pruning": by_pruning,
    "enumeration": by_enumeration,
}
