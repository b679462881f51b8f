"""The explanations compared, those that can be refitted on little data, and where each keeps its static rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from decompositions.baselines import Affine, AffineExplanation, TableExplanation, TokenTable
from decompositions.clusters import Clusters, ClustersExplanation
from decompositions.dictionary import DictionaryExplanation, fit_dictionary
from decompositions.pca import PCA, PCAExplanation
from decompositions.random_dictionary import pursue
from estimators.variational import StatedRows
from mdl.protocols import Inputs, Sample, Settings
from mdl.score import EMBEDDED_REGION
from mdl.task import Task

MLP = "blocks.1.mlp"
TOKENS_A_ROW = 16  # a centroid or an atom for so many tokens, up to the full number
EXACT = 1e15  # the N for which rows are stated exactly


@dataclass(frozen=True)
class GrowingClusters:
    """k-means with a centroid for 16 tokens, up to k."""

    k: int = 256

    def fit(self, task: Task) -> ClustersExplanation:
        found = Clusters(k=min(self.k, max(1, len(task.fit.outputs) // TOKENS_A_ROW)), rounds=8).fit(task)
        return replace(found, name=f"clusters-{self.k}")


@dataclass(frozen=True)
class LearntDictionary:
    """Unit atoms by alternating matching pursuit (`k` steps) and least squares (the method of optimal directions).

    As many atoms as one for 16 tokens, up to `features`; `some` tokens to learn from at most. **Source:** Engan, Aase
    and Husoy 1999 (ICASSP).
    """

    features: int = 256
    k: int = 4
    rounds: int = 6
    some: int = 8192

    def fit(self, task: Task) -> DictionaryExplanation:
        outputs = np.asarray(task.fit.outputs, np.float32)
        bias = outputs.mean(0)
        some = outputs[:: max(1, -(-len(outputs) // self.some))]
        count = min(self.features, max(1, len(outputs) // TOKENS_A_ROW))
        atoms = _unit((some - bias)[np.random.default_rng(0).choice(len(some), count, replace=False)])
        for _ in range(self.rounds):
            atoms = self._better(atoms, some, bias)
        encoder = partial(pursue, atoms, bias, min(self.k, count))
        return fit_dictionary(f"dictionary-{self.features}", atoms, bias, encoder, outputs, signed=True)

    def _better(self, atoms: np.ndarray, some: np.ndarray, bias: np.ndarray) -> np.ndarray:
        codes = pursue(atoms, bias, min(self.k, len(atoms)), some)
        gram = np.asarray((codes.T @ codes).todense(), np.float64)
        gram += 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
        found = np.linalg.solve(gram, np.asarray(codes.T @ (some - bias), np.float64))
        unused = np.flatnonzero(np.asarray((codes != 0).sum(0)).ravel() == 0)
        worst = np.argsort(np.square(some - bias - codes @ atoms).sum(1), kind="stable")[::-1]
        found[unused] = (some - bias)[worst[: len(unused)]]
        return _unit(found)


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


@dataclass(frozen=True)
class Family:
    """A decomposition that can be refitted, and the region that it explains."""

    name: str
    region: str
    decomposition: Any


def families() -> list[Family]:
    return [
        Family("token-table", EMBEDDED_REGION, TokenTable()),
        Family("pca-24", EMBEDDED_REGION, PCA(rank=24)),
        Family("clusters-256", EMBEDDED_REGION, GrowingClusters()),
        Family("dictionary-256", EMBEDDED_REGION, LearntDictionary()),
        Family("affine", MLP, Affine()),
    ]


def stated_rows(explanation: Any, settings: Settings) -> StatedRows:
    """The static rows of an explanation of one of these families, those that its section has at these settings."""
    if isinstance(explanation, TableExplanation):
        kept = explanation.rounded(settings).symbols.any(1)
        used = explanation.frequency[kept]
        return StatedRows("parts", 1, explanation.rows[kept], used, used)
    if isinstance(explanation, ClustersExplanation):
        return StatedRows("parts", 0, explanation.centroids, explanation.frequency, explanation.frequency)
    if isinstance(explanation, DictionaryExplanation):
        kept = explanation.kept(settings)[0]
        use = explanation.statistics
        return StatedRows("parts", 0, explanation.atoms[kept], use.energy[kept], use.frequency[kept])
    if isinstance(explanation, AffineExplanation):
        return StatedRows("header", 0, explanation.matrix, explanation.energy)
    assert isinstance(explanation, PCAExplanation)
    exact = explanation.section(replace(settings, horizon=EXACT)).parts[0].values()
    nowhere = Inputs(np.zeros((0, 1), np.int64), np.zeros((0, 1), bool))
    codes = explanation.encode(None, Sample(nowhere, explanation.some), settings).values  # type: ignore[arg-type]
    energy = np.maximum(np.square(codes, dtype=np.float64).mean(0), 1e-6)
    return StatedRows("parts", 0, exact.astype(np.float64), energy)
