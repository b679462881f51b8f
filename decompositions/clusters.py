"""k-means: one index a token, one centroid an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.sparse

from mdl.alphabets import IndexAlphabet
from mdl.errors import ExplanationError, MessageError
from mdl.message import Section
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import IndexState, State
from mdl.static_rows import metric_rows, predict_columns
from mdl.task import Task


@dataclass(frozen=True)
class ClustersDecoder:
    """The centroid whose index was sent."""

    centroids: np.ndarray

    @classmethod
    def from_section(cls, section: Section) -> ClustersDecoder:
        """Parts: centroids [k, d]."""
        if section.header or len(section.parts) != 1:
            raise MessageError("a 'clusters' section has no header array and one part array (centroids)")
        return cls(section.parts[0].values())

    @property
    def alphabet(self) -> IndexAlphabet:
        return IndexAlphabet(len(self.centroids))

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        assert isinstance(state, IndexState)
        return self.centroids[state.indices]

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        return state.touched()

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        return 0.0


@dataclass(frozen=True)
class ClustersExplanation:
    """Centroids [k, d] and the share of fit tokens nearest to each."""

    centroids: np.ndarray
    frequency: np.ndarray
    name: str
    kind: str = "clusters"
    knobs: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {"static": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)}
    )

    @cached_property
    def prediction(self) -> np.ndarray | None:
        """Of columns from those before them; it does not depend on the settings."""
        return predict_columns(self.centroids)

    def section(self, settings: Settings) -> Section:
        rows = metric_rows(self.centroids, self.frequency, settings, self.prediction, frequency=self.frequency)
        return Section(self.kind, (), (rows,))

    def encode(self, decoder: ClustersDecoder, sample: Sample, settings: Settings) -> IndexState:
        """The centroid nearest in the metric in force: what is left to the residual coder is measured in it."""
        nearest = nearest_centroids(sample.outputs @ settings.root, decoder.centroids @ settings.root)
        return IndexState(nearest, len(decoder.centroids))


def nearest_centroids(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Index of the Euclidean nearest centroid, [n], in chunks of points."""
    half = 0.5 * np.sum(np.square(centroids), 1)
    chunks = np.array_split(points, max(1, len(points) // 8192))
    return np.concatenate([np.argmin(half - chunk @ centroids.T, 1) for chunk in chunks])


def lloyd(points: np.ndarray, k: int, rounds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """k-means by Lloyd's algorithm from random points; an emptied cluster is put on a random point.

    **Returns:** centroids [k, d] and counts [k] (Lloyd 1982, IEEE Trans. Inf. Theory 28(2), 129-137).
    """
    rng = np.random.default_rng(seed)
    centroids = points[rng.choice(len(points), k, replace=False)].astype(np.float32)
    for _ in range(rounds):
        index = nearest_centroids(points, centroids)
        counts = np.bincount(index, minlength=k)
        select = scipy.sparse.csr_array(
            (np.ones(len(index), np.float32), index, np.arange(len(index) + 1)), (len(index), k)
        )
        centroids = (select.T @ points) / np.maximum(counts, 1)[:, None]
        empty = np.flatnonzero(counts == 0)
        centroids[empty] = points[rng.choice(len(points), len(empty), replace=False)]
    return centroids, counts


@dataclass(frozen=True)
class Clusters:
    """k-means with k centroids, one index a token, coded adaptively."""

    k: int = 256
    rounds: int = 15
    seed: int = 0

    def fit(self, task: Task) -> ClustersExplanation:
        points = task.fit.outputs.astype(np.float32)
        if not 1 <= self.k <= len(points):
            raise ExplanationError(
                f"clusters: k = {self.k}, but there are {len(points)} tokens to fit on: take 1 <= k <= n"
            )
        centroids, counts = lloyd(points, self.k, self.rounds, self.seed)
        used = counts > 0
        return ClustersExplanation(centroids[used], counts[used] / len(points), f"clusters-{self.k}")
