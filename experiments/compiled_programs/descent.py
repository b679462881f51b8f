"""A circuit made smaller while its total falls: what it takes, for one N, to beat the circuit that one starts from."""

from __future__ import annotations

import numpy as np

from decompositions.circuits.sparse import write_sparse
from decompositions.circuits.sparse_sender import DIGITS, SparseCircuitExplanation
from mdl.units import nats_to_bits

WORTH = 400.0  # bits: a removal that harms by more at N is not looked at


def descend(explanation: SparseCircuitExplanation, edges: np.ndarray, horizon: float) -> np.ndarray:
    """Edges left when no single removal (with the dead ends that it leaves) shortens static + N KL on the fit data that
    circuits are searched on."""
    circuit = explanation.circuit
    graph, searched = circuit.graph, circuit.searched
    now = edges

    def harm(masks: np.ndarray) -> np.ndarray:
        return np.asarray(nats_to_bits(np.asarray(searched.changes(masks), np.float64)) * horizon)

    def static(chosen: np.ndarray) -> float:
        return write_sparse(*explanation.rounded(chosen, DIGITS))[1]

    best = static(now) + float(harm(now[None])[0])
    while now.any():
        candidates = {}
        for source, destination in np.argwhere(now):
            fewer = now.copy()
            fewer[source, destination] = False
            fewer = graph.pruned(fewer, constant=True)
            candidates[fewer.tobytes()] = fewer
        masks = np.stack(list(candidates.values()))
        found = harm(masks)
        totals = [
            h + static(m) if h < found.min() + WORTH and h < best else np.inf for h, m in zip(found, masks, strict=True)
        ]
        place = int(np.argmin(totals))
        if totals[place] >= best:
            return now
        best, now = totals[place], masks[place]
    return now
