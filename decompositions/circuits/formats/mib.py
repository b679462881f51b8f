"""MIB's submissions (Mueller et al. 2025, arXiv:2504.13151): a folder for a task and a model.

In it is one file of scores, or nine of circuits, of at most 0.1, 0.2, 0.5, 1, 2, 5, 10, 20 and 50 % of the edges; MIB's
README lists ten shares with 0 %, its code scores ten with 100 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from decompositions.circuits.formats.eap_ig import load_eap_ig
from decompositions.circuits.formats.loaded import LoadedCircuit
from mdl.errors import ExplanationError
from mdl.models.circuits.graph import Graph

FORMAT = "mib"
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""The shares of the edges at which circuits are asked for; the whole graph, share 1, is nobody's to submit."""


@dataclass(frozen=True)
class Submission:
    """A submission's files as circuits, by ascending number of edges; a single one with scores serves every share."""

    circuits: tuple[LoadedCircuit, ...]

    @property
    def scored(self) -> bool:
        """Whether it is one file of scores."""
        return len(self.circuits) == 1

    def at(self, share: float) -> np.ndarray:
        """The circuit for a share of the edges, bool [sources, destinations], without dead ends.

        Of scores the int(share * E) largest; a circuit that was submitted may be empty.

        **Raises:** `ExplanationError` for a share that is not one of `SHARES`
        where circuits were submitted, or too few edges to make a path.
        """
        if self.scored:
            graph = self.circuits[0].graph
            return self.circuits[0].top(int(share * graph.n_edges))
        if share not in SHARES:
            raise ExplanationError(f"a share of {share}; circuits were submitted for {', '.join(map(str, SHARES))}")
        return _edges(self.circuits[SHARES.index(share)])


def submission_files(folder: Path) -> list[Path]:
    """The circuit files of a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".json", ".pt"))


def load_submission(folder: Path, graph: Graph) -> Submission:
    """The submission in a folder.

    **Raises:** `ExplanationError` unless there is one file of scores or nine circuits, each within its share;
    `ModelError` for another model's.
    """
    files = submission_files(folder)
    if len(files) not in (1, len(SHARES)):
        raise ExplanationError(
            f"mib: {folder} has {len(files)} circuit files (json, pt); a submission is one file with scores or "
            f"{len(SHARES)} circuits. Give the folder of one task and model."
        )
    found = [load_eap_ig(path, graph) for path in files]
    if len(found) == 1:
        if found[0].scores is None:
            raise ExplanationError(f"mib: {files[0]} is alone and has no scores")
        return Submission(tuple(found))
    pairs = sorted(zip(found, files, strict=True), key=lambda pair: int(_edges(pair[0]).sum()))
    for share, (circuit, path) in zip(SHARES, pairs, strict=True):
        size, most = int(_edges(circuit).sum()), share * graph.n_edges
        if size > most:
            raise ExplanationError(f"mib: {path} has {size} edges, beyond {share:.1%} of {graph.n_edges}")
    return Submission(tuple(circuit for circuit, _ in pairs))


def _edges(circuit: LoadedCircuit) -> np.ndarray:
    """The edges of a submitted circuit; none is a circuit too, where a share is less than a path."""
    return np.zeros(circuit.graph.possible.shape, bool) if circuit.edges is None else circuit.edges
