"""Compression without insight: a region's own weights rounded, of low rank, or with fewer neurons.

What a shorter story about the weights has to beat. All are sent once and cost nothing a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from decompositions.weights.curvature import Curvatures, MeasuredCurvature
from decompositions.weights.dense import Description, WeightsExplanation
from decompositions.weights.pruning import Pruned, mlps, prune
from mdl.errors import ExplanationError
from mdl.protocols import Settings
from mdl.task import Task

RANK_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125)
KEPT_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Weights:
    """The region's weights, rounded. `quantiser`: "feedback" (errors are fed back along rows and columns), or
    "nearest" (each number by itself, a step for each row)."""

    quantiser: Literal["feedback", "nearest"] = "feedback"

    def fit(self, task: Task) -> WeightsExplanation:
        """**Raises:** `TaskError` for a region whose weights are not known."""
        curvature = MeasuredCurvature.of(task)
        own = whole(curvature)
        name = "weights" if self.quantiser == "feedback" else "weights (nearest)"
        return WeightsExplanation(name, curvature, _Always(own), self.quantiser)


def whole(curvature: MeasuredCurvature) -> Description:
    """The weights as they are."""
    matrices = {name: curvature.weights[name] for name in curvature.network.matrices}
    return Description(matrices, {n: w for n, w in curvature.weights.items() if n not in matrices})


@dataclass(frozen=True)
class _Always:
    """The same numbers whatever the settings."""

    description: Description

    def __call__(self, settings: Settings, curvature: Curvatures) -> Description:
        return self.description


@dataclass(frozen=True)
class LowRank:
    """Every matrix of the region by its truncated singular value decomposition, as two factors.

    **Arguments:** `rank`: of every matrix, at most; 0: the share of the full rank with the shortest total; `whiten`:
    what error is smallest, that of the outputs (in the metric) under the inputs' own second moments ("both"), of the
    products under these ("inputs"; Wang et al. 2024, arXiv:2403.07378), or of the weights ("no").
    """

    rank: int = 0
    whiten: Literal["both", "inputs", "no"] = "both"

    def fit(self, task: Task) -> WeightsExplanation:
        """**Raises:** `ExplanationError` for a negative rank; `TaskError` for a region without known weights."""
        if self.rank < 0:
            raise ExplanationError(f"low-rank: a rank of {self.rank}; give at least 1, or 0 to have it chosen")
        curvature = MeasuredCurvature.of(task)
        label = f"rank {self.rank}" if self.rank else "low rank"
        name = f"{label} weights" + ("" if self.whiten == "both" else f" (whitened: {self.whiten})")
        knobs = {} if self.rank else {"rank": RANK_SHARES}
        return WeightsExplanation(name, curvature, _Truncated(whole(curvature), self), own_knobs=knobs)


@dataclass
class _Truncated:
    """Truncated factors; each matrix is decomposed once a metric."""

    own: Description
    options: LowRank
    known: dict[int, tuple[Curvatures, dict[str, tuple[np.ndarray, np.ndarray]]]] = field(
        default_factory=dict, repr=False
    )

    def __call__(self, settings: Settings, curvature: Curvatures) -> Description:
        full = self._factors(curvature)
        share = settings.knobs.get("rank", 1.0)
        found: dict[str, np.ndarray | tuple[np.ndarray, np.ndarray]] = {}
        for name, (first, second) in full.items():
            rank = min(self.options.rank or max(1, round(share * len(second))), len(second))
            found[name] = (first[:, :rank], second[:rank])
        return Description(found, self.own.others)

    def _factors(self, curvature: Curvatures) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        known = self.known.get(id(curvature))
        if known is None:
            known = self.known[id(curvature)] = (curvature, {n: self._split(n, curvature) for n in self.own.matrices})
        return known[1]

    def _split(self, name: str, curvature: Curvatures) -> tuple[np.ndarray, np.ndarray]:
        matrix, sides = np.asarray(self.own.matrices[name], np.float64), curvature.matrices[name]
        left = np.eye(len(matrix)) if self.options.whiten == "no" else sides.left
        right = sides.right if self.options.whiten == "both" else np.eye(matrix.shape[1])
        u, values, v = np.linalg.svd(left @ matrix @ right, full_matrices=False)
        root = np.sqrt(values)
        return np.linalg.solve(left, u * root), np.linalg.solve(right.T, v.T * root).T


@dataclass(frozen=True)
class Neurons:
    """Fewer neurons: those whose loss costs least a bit saved are replaced by their mean, the others refitted for it.

    **Arguments:** `kept`: how many of all neurons of the region; 0: the share with the shortest total; `refit`: whether
    the other neurons' output weights make good what they can (optimal brain surgeon, Hassibi and Stork 1993).
    """

    kept: int = 0
    refit: bool = True

    def fit(self, task: Task) -> WeightsExplanation:
        """**Raises:** `ExplanationError` for a region without neurons, or fewer than are to be kept."""
        curvature = MeasuredCurvature.of(task)
        pairs = mlps(curvature.network)
        total = sum(curvature.network.matrices[pair.out][0] for pair in pairs)
        if not total:
            raise ExplanationError(f"neurons: the region {task.region.name!r} has none")
        if not 0 <= self.kept <= total:
            raise ExplanationError(f"neurons: {self.kept} of {total} are to be kept")
        shares = (self.kept / total,) if self.kept else KEPT_SHARES
        name = f"{self.kept} neurons" if self.kept else "fewer neurons"
        knobs: Mapping[str, tuple[float, ...]] = {} if self.kept else {"kept": KEPT_SHARES}
        fewer = _Fewer(whole(curvature), curvature, shares, self.refit)
        return WeightsExplanation(name if self.refit else f"{name} (mean-ablated)", curvature, fewer, own_knobs=knobs)


@dataclass
class _Fewer:
    """Pruned weights for each share of neurons; neurons are put in order once a metric."""

    own: Description
    curvature: MeasuredCurvature
    shares: tuple[float, ...]
    refit: bool
    known: dict[int, tuple[Curvatures, Pruned]] = field(default_factory=dict, repr=False)

    def __call__(self, settings: Settings, curvature: Curvatures) -> Description:
        if id(curvature) not in self.known:
            pruned = prune(self.curvature, curvature, self.shares, self.refit)
            self.known[id(curvature)] = (curvature, pruned)
        changed = self.known[id(curvature)][1].at(settings.knobs.get("kept", self.shares[0]))
        matrices = {name: changed.get(name, w) for name, w in self.own.matrices.items()}
        return Description(matrices, {name: changed.get(name, w) for name, w in self.own.others.items()})
