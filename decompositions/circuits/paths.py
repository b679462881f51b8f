"""Circuits from nothing to everything, of which the settings' N chooses one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from decompositions.circuits.searched import Searched
from mdl.models.circuits.graph import Graph
from mdl.models.sites import LOGITS
from mdl.protocols import Settings
from mdl.units import nats_to_bits

CIRCUITS = 40  # on a path, about


@dataclass(frozen=True, eq=False)
class Path:
    """Circuits, bool [sources, destinations] each, from small to large."""

    circuits: tuple[np.ndarray, ...]
    known: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def fixed(cls, edges: np.ndarray) -> Path:
        """One circuit, and nothing to choose."""
        return cls((np.asarray(edges, bool),))

    @classmethod
    def by(cls, graph: Graph, units: list[np.ndarray], nodes: bool) -> Path:
        """Circuits of the first units of an order, most important first; `units`: tables of edges, or of sources."""
        counts = sorted({round(len(units) * f) for f in np.linspace(0, 1, CIRCUITS)} | {len(units)})
        found: list[np.ndarray] = []
        for count in counts:
            together = np.logical_or.reduce([np.zeros_like(units[0]), *units[:count]])
            edges = graph.pruned(graph.induced(together) if nodes else together, constant=True)
            if not found or (edges != found[-1]).any():
                found.append(edges)
        return cls(tuple(found))

    def damage(self, searched: Searched, settings: Settings) -> list[float]:
        """Of each circuit, the KL in bits a token: measured, or, of a residual stream, to second order."""
        if len(self.circuits) == 1:
            return [0.0]
        errors = self._errors(searched)
        if searched.network.output == LOGITS:
            return [searched.share * nats_to_bits(float(kl)) for kl in errors]
        squares = np.square(errors @ settings.root.T.astype(np.float32)).sum(-1)
        return [nats_to_bits(float(s) / 2.0) for s in squares.mean((1, 2), dtype=np.float64)]

    def _errors(self, searched: Searched) -> np.ndarray:
        """KL of each circuit, nats a token [M], or the errors of the stream [M, B, K, d]: no setting changes them."""
        if "errors" not in self.known:
            logits = searched.network.output == LOGITS
            each = [searched.change(edges) if logits else searched.error(edges) for edges in self.circuits]
            self.known["errors"] = np.stack([np.asarray(e) for e in each])
        return self.known["errors"]
