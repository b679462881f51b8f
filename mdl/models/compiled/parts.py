r"""Operations as heads and neurons, in coordinates of the residual stream.

The stream has a coordinate for each value of a categorical operation, a direction for each numerical one, and two more:
`one`, which every token has, and `start`, which BOS alone has. Nothing has a bias: constants come from `one`.

**Source:** Lindner et al. 2023, "Tracr", arXiv:2301.05062, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mdl.models.compiled.language import (
    Aggregate,
    Linear,
    Map,
    Operation,
    Select,
    SelectorWidth,
    SequenceMap,
    Value,
)

ONE, START = "one", "start"


@dataclass(frozen=True)
class Head:
    """What one head computes, `name`; matrices [d, e] but for `output` [e, d]."""

    name: str
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray


@dataclass(frozen=True)
class Neurons:
    """What neurons of one MLP compute, `name`; `read` [d, n], `write` [n, d]."""

    name: str
    read: np.ndarray
    write: np.ndarray


def inverse_name(operation: SelectorWidth) -> str:
    """The direction that the head of a width writes."""
    return f"1 / (1 + {operation.name})"


@dataclass(frozen=True)
class Space:
    """Where everything is in the stream: `coordinates` of each operation, one a value of `values` where it is
    categorical; `sharpness`: scores of attention where a selector's predicate holds; `silent`: staircases that
    are to be zero at the start (`silent_at_start`)."""

    width: int
    coordinates: Mapping[str, slice]
    values: Mapping[str, list[Value]]
    pairs: Mapping[str, set[tuple[Value, Value]]]
    sharpness: float
    silent: frozenset[str] = frozenset()

    def at(self, name: str, value: Value = None) -> int:
        """The coordinate of a value of a categorical operation, or of what has only one."""
        first: int = self.coordinates[name].start
        return first if value is None else first + self.values[name].index(value)

    def rows(self, count: int) -> np.ndarray:
        """Zeros [d, count]."""
        return np.zeros((self.width, count))

    def result(self, operation: Operation, value: Value) -> np.ndarray:
        """What stands for a value of an operation in the stream, [d]."""
        row = np.zeros(self.width)
        if operation.encoding == "numerical":
            row[self.at(operation.name)] = float(value or 0)
        elif value is not None:
            row[self.at(operation.name, value)] = 1.0
        return row

    # -- heads ---------------------------------------------------------------------------------------------------------

    def aggregate(self, operation: Aggregate) -> Head:
        """Looks where the selector says, at the start where that is nowhere; copies a subspace."""
        x = operation.x
        values = [None] if x.encoding == "numerical" else self.values[operation.name]
        value, output = self.rows(len(values)), self.rows(len(values))
        for column, v in enumerate(values):
            value[self.at(x.name, v), column] = output[self.at(operation.name, v), column] = 1.0
        return Head(operation.name, *self._looks(operation.selector, 0.5), value, output.T)

    def width_head(self, operation: SelectorWidth) -> Head:
        """Looks at the start as much as at each selected position, and copies `start`: 1 / (1 + width)."""
        value, output = self.rows(1), self.rows(1)
        value[self.at(START)] = output[self.at(inverse_name(operation))] = 1.0
        return Head(inverse_name(operation), *self._looks(operation.selector, 1.0), value, output.T)

    def _looks(self, selector: Select, at_start: float) -> tuple[np.ndarray, np.ndarray]:
        """Query and key: the one-hot of the query's value times the sharpness, the table of the predicate."""
        keys, queries = self.values[selector.keys.name], self.values[selector.queries.name]
        query, key = self.rows(len(queries) + 1), self.rows(len(queries) + 1)
        for column, q in enumerate(queries):
            query[self.at(selector.queries.name, q), column] = self.sharpness
            for k in keys:
                key[self.at(selector.keys.name, k), column] = float(bool(selector.predicate(k, q)))
        query[self.at(ONE), -1], key[self.at(START), -1] = self.sharpness, at_start
        return query, key

    # -- neurons -------------------------------------------------------------------------------------------------------

    def neurons(self, operation: Map | SequenceMap | Linear | SelectorWidth) -> Neurons:
        """Of what an MLP computes."""
        match operation:
            case SelectorWidth():
                steps = [(1.0 / (1 + v), v) for v in self.values[operation.name]]
                return self._staircase(operation, inverse_name(operation), steps)
            case Map() if operation.x.encoding == "numerical":
                steps = [(float(v), operation.function(v)) for v in self.values[operation.x.name]]
                return self._staircase(operation, operation.x.name, steps)
            case Map():
                values = self.values[operation.x.name]
                return self._table(
                    operation, [((self.at(operation.x.name, v),), operation.function(v)) for v in values]
                )
            case SequenceMap():
                return self._pairs(operation)
            case Linear():
                read, write = self.rows(2), self.rows(2)
                for term, factor in ((operation.x, operation.a), (operation.y, operation.b)):
                    read[self.at(term.name)] += factor, -factor
                write[self.at(operation.name)] = 1.0, -1.0
                return Neurons(operation.name, read, write.T)

    def _pairs(self, operation: SequenceMap) -> Neurons:
        x, y, met = operation.x.name, operation.y.name, self.pairs[operation.name]
        both = [(a, b) for a in self.values[x] for b in self.values[y] if (a, b) in met]
        return self._table(operation, [((self.at(x, a), self.at(y, b)), operation.function(a, b)) for a, b in both])

    def _table(self, operation: Operation, entries: list[tuple[tuple[int, ...], Value]]) -> Neurons:
        """A neuron for each value, or pair of values: relu(a), relu(a + b - one)."""
        written = [self.result(operation, value) for _, value in entries]
        used = [i for i, row in enumerate(written) if row.any()]
        read, write = self.rows(len(used)), self.rows(len(used))
        for column, i in enumerate(used):
            places = entries[i][0]
            read[list(places), column] = 1.0
            read[self.at(ONE), column] += 1.0 - len(places)
            write[:, column] = written[i]
        return Neurons(operation.name, read, write.T)

    def _staircase(self, operation: Operation, x: str, values: list[tuple[float, Value]]) -> Neurons:
        """A function of one direction: constant at first, then a step wherever it changes, between two values.

        relu(g (x - t) + 1/2) - relu(g (x - t) - 1/2) is 0 below t - 1/2g and 1 above t + 1/2g; g is the least power of
        two that is at least twice the inverse of the smallest gap between values.
        """
        values = sorted(values, key=lambda v: v[0])
        gap = min((b[0] - a[0] for a, b in pairwise(values)), default=1.0)
        slope = 2.0 ** np.ceil(np.log2(2.0 / gap))
        constant = np.eye(self.width)[self.at(ONE)]
        read, write = [constant], [self.result(operation, values[0][1])]
        for (low, before), (high, after) in pairwise(values):
            change = self.result(operation, after) - self.result(operation, before)
            for half in (0.5, -0.5):
                row = (half - slope * (low + high) / 2) * constant
                row[self.at(x)] += slope
                read.append(row)
                write.append(change * np.sign(half))
        used = [i for i, row in enumerate(write) if row.any()]
        rows = np.array(read)[used]
        if operation.name in self.silent:
            most = np.abs(rows).sum(1).max() * max(1.0, *(abs(v[0]) for v in values))
            rows[:, self.at(START)] = -(2.0 ** np.ceil(np.log2(most)))
        return Neurons(operation.name, rows.T, np.array(write)[used])


def silent_at_start(order: list[Operation]) -> frozenset[str]:
    """Staircases that have to be zero at the start, where they would be constants: what a selector has as keys, or an
    aggregate copies, would there be a value of no token, which positions could look at."""
    found: set[str] = set()

    def silence(operation: Operation) -> None:
        match operation:
            case SelectorWidth():
                found.add(operation.name)
            case Map() if operation.x.encoding == "numerical":
                found.add(operation.name)
            case Map() | SequenceMap():  # a pair is on where both are
                silence(operation.x)
            case Linear():
                silence(operation.x)
                silence(operation.y)
            case Aggregate():  # without a query it looks at the start
                silence(operation.selector.queries)
                silence(operation.x)

    for operation in order:
        if isinstance(operation, Aggregate | SelectorWidth):
            silence(operation.selector.keys)
        if isinstance(operation, Aggregate):
            silence(operation.x)
    return frozenset(found)
