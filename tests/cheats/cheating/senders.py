"""The sender's side of the cheats: explanations of ours with something slipped in. Any code may run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decompositions.baselines import Nothing, TokenTable
from decompositions.clusters import Clusters
from mdl.message import QuantisedArray, Section
from mdl.protocols import Explanation, Sample, Settings
from mdl.state import IndexState, NoState, State
from mdl.task import Task


@dataclass
class Altered:
    """An honest explanation whose section or state goes through a function of the cheat's."""

    base: Explanation
    name: str
    kind: str = ""
    change_section: Callable[[Section, Settings], Section] = lambda section, settings: section
    change_state: Callable[[State, Any, Sample], Any] = lambda state, decoder, sample: state
    knobs: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kind, self.knobs = self.kind or self.base.kind, self.knobs or self.base.knobs

    def section(self, settings: Settings) -> Section:
        stated = self.base.section(settings)
        return self.change_section(Section(self.kind, stated.header, stated.parts), settings)

    def encode(self, decoder: Any, sample: Sample, settings: Settings) -> Any:
        return self.change_state(self.base.encode(decoder, sample, settings), decoder, sample)


@dataclass
class Fitted:
    """A decomposition that is a function."""

    make: Callable[[Task], Any]

    def fit(self, task: Task) -> Any:
        return self.make(task)


def clusters(name: str, **changes: Any) -> Fitted:
    """Eight centroids, altered."""
    return Fitted(lambda task: Altered(Clusters(k=8).fit(task), name, **changes))


def table(name: str, **changes: Any) -> Fitted:
    """A token table, altered."""
    return Fitted(lambda task: Altered(TokenTable().fit(task), name, **changes))


def nothing(name: str, **changes: Any) -> Fitted:
    """The mean, altered."""
    return Fitted(lambda task: Altered(Nothing().fit(task), name, **changes))


@dataclass
class Rows:
    """Rows for a third party's decoder, which is told nothing: a mean, keys and rows, all of a fixed step."""

    name: str
    kind: str
    mean: np.ndarray
    keys: np.ndarray
    rows: np.ndarray
    step: float = 0.25
    knobs: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def section(self, settings: Settings) -> Section:
        parts = (QuantisedArray.from_integers(self.keys), QuantisedArray.from_values(self.rows, self.step))
        return Section(self.kind, (QuantisedArray.from_values(self.mean, self.step),), parts)

    def encode(self, decoder: Any, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)


def means_by_key(keys: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The overall mean, the distinct keys, and each one's mean output beyond the overall one."""
    distinct, index = np.unique(keys, return_inverse=True)
    mean, counts = outputs.mean(0), np.bincount(index)
    sums = np.zeros((len(distinct), outputs.shape[1]))
    np.add.at(sums, index, outputs - mean)
    return mean, distinct, sums / counts[:, None]


def one_a_token(n: int, value: int = 0) -> IndexState:
    return IndexState(np.full(n, value), value + 1)
