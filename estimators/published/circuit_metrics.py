r"""How others grade circuits: MIB's CPR and CMD under both conventions, AUROC of edge scores, overlap of edge sets.

With f the faithfulness of a circuit, (m(C) - m(empty)) / (m(M) - m(empty)), at ten sizes x_1 < ... < x_10,

    CPR = sum_i (x_{i+1} - x_i) (f_i + f_{i+1}) / 2        CMD = the same of |1 - f|

*Fixed axis*: x are the shares that were asked for, .001 to 1, as `evaluation.py` and the leaderboard have it.
*Self-normalised*: x are the edges that were left after pruning, over the largest number of them, as in the paper's
tables. They differ by an order of magnitude: EAP's CMD on GPT-2's IOI is .214 under the first and .03 under the second.
A figure without its convention says nothing.

MIB's `compare_graphs` counts a reference edge that is in the circuit and that the other graph does not even list as a
true positive (and one that is not, as a false positive), so that a graph which lists nothing has a recall of 1. Here
both are tables of one graph, and an edge that is not named is not in the circuit.

Sources: Mueller et al. 2025, arXiv:2504.13151 (MIB), its repository; Gupta et al. 2024, arXiv:2407.14494 (InterpBench).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from mdl.errors import ExplanationError

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The sizes at which MIB asks for circuits, as shares of the edges."""

FIXED_AXIS, SELF_NORMALISED = "fixed axis", "self-normalised"


@dataclass(frozen=True)
class Areas:
    """**Arguments:** `cpr`: area under the faithfulness, larger is better; `cmd`: area between it and 1, smaller is
    better; `convention`: of the axis, without which neither can be compared."""

    cpr: float
    cmd: float
    convention: str


def fixed_axis_areas(faithfulness: np.ndarray) -> Areas:
    """CPR and CMD over the shares that were asked for, `SHARES`; their largest sum is .999.

    **Arguments:** `faithfulness`: [10], at `SHARES`, ascending. **Raises:** `ExplanationError` for another number.
    """
    return _areas(np.array(SHARES), faithfulness, FIXED_AXIS)


def self_normalised_areas(faithfulness: np.ndarray, edges: np.ndarray) -> Areas:
    """CPR and CMD over the numbers of edges that circuits have, divided by the largest.

    **Arguments:** `faithfulness` and `edges` (counts, weighted ones too): [n], by ascending number of edges.

    **Raises:** `ExplanationError` for lengths that differ, fewer than two circuits, counts that fall or are all 0.
    """
    counts = np.asarray(edges, np.float64)
    if counts.size < 2 or (np.diff(counts) < 0).any() or counts[-1] <= 0:
        raise ExplanationError(f"edge counts {counts.tolist()}: two or more, ascending, the last of them above 0")
    return _areas(counts / counts[-1], faithfulness, SELF_NORMALISED)


def edge_auroc(scores: np.ndarray, truth: np.ndarray, possible: np.ndarray) -> float:
    """The chance that an edge of the true circuit has the larger |score| than one outside it, ties counted half.

    The area under the curve of true against false positive rates over all thresholds. An edge without a score (NaN)
    ranks below all others.

    **Arguments:** float, bool, bool [sources, destinations]. **Raises:** `ExplanationError` for shapes that differ, a
    truth with edges that are not possible, or without edges on either side.
    """
    _same_graph(truth, possible)
    if scores.shape != possible.shape:
        raise ExplanationError(f"scores {scores.shape} of a graph {possible.shape}")
    inside = truth[possible]
    positive, negative = int(inside.sum()), int((~inside).sum())
    if not positive or not negative:
        raise ExplanationError(f"{positive} edges in the true circuit, {negative} outside: a rate needs both")
    size = np.abs(scores[possible].astype(np.float64))
    ranks = rankdata(np.where(np.isnan(size), -1.0, size))
    return float((ranks[inside].sum() - positive * (positive + 1) / 2.0) / (positive * negative))


@dataclass(frozen=True)
class Overlap:
    """Counts of edges, and the rates of them that are printed.

    **Arguments:** `both`, `only_found`, `only_true`, `neither`: numbers of possible edges.
    """

    both: int
    only_found: int
    only_true: int
    neither: int

    @property
    def iou(self) -> float:
        """Edges of both over edges of either; 1 for two empty circuits."""
        either = self.both + self.only_found + self.only_true
        return self.both / either if either else 1.0

    @property
    def true_positive_rate(self) -> float:
        """The share of the true circuit that was found; 1 for an empty one."""
        return self.both / (self.both + self.only_true) if self.both + self.only_true else 1.0

    @property
    def false_positive_rate(self) -> float:
        """The share of the edges outside the true circuit that were found; 0 if there is none."""
        return self.only_found / (self.only_found + self.neither) if self.only_found + self.neither else 0.0

    @property
    def precision(self) -> float:
        """The share of what was found that is true; 1 if nothing was found."""
        return self.both / (self.both + self.only_found) if self.both + self.only_found else 1.0


def edge_overlap(found: np.ndarray, truth: np.ndarray, possible: np.ndarray) -> Overlap:
    """How many edges two circuits share: bool [sources, destinations], each within `possible`.

    **Raises:** `ExplanationError` for shapes that differ, or edges that are not possible.
    """
    _same_graph(found, possible)
    _same_graph(truth, possible)
    a, b = found[possible], truth[possible]
    return Overlap(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def _areas(axis: np.ndarray, faithfulness: np.ndarray, convention: str) -> Areas:
    values = np.asarray(faithfulness, np.float64)
    if values.shape != axis.shape:
        raise ExplanationError(f"{values.size} faithfulness values at {axis.size} sizes: one for each, in their order")
    width = np.diff(axis)
    gap = np.abs(1.0 - values)
    cpr = float((width * (values[1:] + values[:-1])).sum() / 2.0)
    return Areas(cpr, float((width * (gap[1:] + gap[:-1])).sum() / 2.0), convention)


def _same_graph(edges: np.ndarray, possible: np.ndarray) -> None:
    if edges.shape != possible.shape or edges.dtype != bool or possible.dtype != bool:
        raise ExplanationError(f"edges {edges.shape} of {edges.dtype} for a graph {possible.shape} of {possible.dtype}")
    if (edges & ~possible).any():
        raise ExplanationError(f"{int((edges & ~possible).sum())} edges that are not possible: two different graphs?")
