"""The language: operations that give a value for each position of a sequence, and a plain interpreter of them.

| operation | value at a position | encoding |
| --- | --- | --- |
| `Tokens`, `Indices` | the token; the position, from 0 | one coordinate a value |
| `Map(f, x)` | f(x) | either |
| `SequenceMap(f, x, y)` | f(x, y) | either |
| `Linear(a, x, b, y)` | a x + b y | one direction |
| `Aggregate(selector, x)` | of the selected positions: their mean, or their common value | as x |
| `SelectorWidth(selector)` | how many positions are selected | one coordinate a value |
| `Select(keys, queries, predicate)` | (no value) which positions each position looks at | |

A sequence shorter than the program's longest is filled up with PAD, which is a token like others: what comes of it at
the places of real tokens is part of the program. A value may be None: no coordinate is on.

**Source:** Weiss, Goldberg and Yahav 2021, "Thinking like transformers", arXiv:2106.06981.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from mdl.errors import ModelError

BOS, PAD = "<bos>", "<pad>"
Encoding: TypeAlias = Literal["categorical", "numerical"]
Value: TypeAlias = (
    Any  # a hashable constant; of numerical operations an integer or a Fraction, so that equal values are equal
)


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token."""

    name: str = "tokens"
    encoding: Encoding = "categorical"


@dataclass(frozen=True, eq=False)
class Indices:
    """The position, from 0 for the first token behind the start."""

    name: str = "indices"
    encoding: Encoding = "categorical"


@dataclass(frozen=True, eq=False)
class Map:
    """`function` of the value of `x`, at every position."""

    name: str
    function: Callable[[Value], Value]
    x: Operation
    encoding: Encoding = "categorical"


@dataclass(frozen=True, eq=False)
class SequenceMap:
    """`function` of the values of `x` and `y`, both categorical. **Raises:** `ModelError` if one is numerical."""

    name: str
    function: Callable[[Value, Value], Value]
    x: Operation
    y: Operation
    encoding: Encoding = "categorical"

    def __post_init__(self) -> None:
        if "numerical" in (self.x.encoding, self.y.encoding):
            raise ModelError(
                f"sequence map {self.name!r} of {self.x.name!r} ({self.x.encoding}) and {self.y.name!r} "
                f"({self.y.encoding}): both have to be categorical. Map the numerical one to categories, or use Linear."
            )


@dataclass(frozen=True, eq=False)
class Linear:
    """`a` x + `b` y, of two numerical operations. **Raises:** `ModelError` if one is categorical."""

    name: str
    a: int | Fraction
    x: Operation
    b: int | Fraction
    y: Operation
    encoding: Encoding = "numerical"

    def __post_init__(self) -> None:
        if "categorical" in (self.x.encoding, self.y.encoding):
            raise ModelError(f"{self.name!r} adds {self.x.name!r} and {self.y.name!r}, of which one is categorical")


@dataclass(frozen=True, eq=False)
class Select:
    """Position q looks at the positions k with `predicate(keys[k], queries[q])`.

    **Raises:** `ModelError` if keys or queries are numerical: one head compares categories.
    """

    keys: Operation
    queries: Operation
    predicate: Callable[[Value, Value], bool]

    def __post_init__(self) -> None:
        if "numerical" in (self.keys.encoding, self.queries.encoding):
            raise ModelError(
                f"a selector of keys {self.keys.name!r} ({self.keys.encoding}) and queries {self.queries.name!r} "
                f"({self.queries.encoding}): it compares categories with categories. Map the numerical one to "
                "categories first."
            )


@dataclass(frozen=True, eq=False)
class Aggregate:
    """What a selector looks at of `x`: the mean of a numerical operation (0 where nothing is selected), or the one
    value that all selected positions have (None where nothing is selected)."""

    name: str
    selector: Select
    x: Operation

    @property
    def encoding(self) -> Encoding:
        return self.x.encoding


@dataclass(frozen=True, eq=False)
class SelectorWidth:
    """How many positions are selected."""

    name: str
    selector: Select
    encoding: Encoding = "categorical"


Operation: TypeAlias = Tokens | Indices | Map | SequenceMap | Linear | Aggregate | SelectorWidth


@dataclass(frozen=True, eq=False)
class Program:
    """An operation as output, and the inputs that it is for.

    **Arguments:** `vocabulary`: of tokens, without BOS and PAD; `longest`: tokens a sequence; `inputs`: all of them,
    each a tuple of tokens of any length from 1 to `longest`.
    """

    name: str
    output: Operation
    vocabulary: tuple[Value, ...]
    longest: int
    inputs: tuple[tuple[Value, ...], ...]

    def padded(self, tokens: Sequence[Value]) -> list[Value]:
        """The sequence at full length. **Raises:** `ModelError` if it is too long, or has an unknown token."""
        if len(tokens) > self.longest:
            raise ModelError(f"{self.name!r} takes sequences of up to {self.longest} tokens, not {len(tokens)}")
        for token in tokens:
            if token not in self.vocabulary:
                raise ModelError(f"{self.name!r} knows no token {token!r}: its vocabulary is {list(self.vocabulary)}")
        return [*tokens, *(PAD for _ in range(self.longest - len(tokens)))]


def dependencies(operation: Operation) -> tuple[Operation, ...]:
    """What an operation reads."""
    match operation:
        case Map():
            return (operation.x,)
        case SequenceMap() | Linear():
            return operation.x, operation.y
        case Aggregate():
            return operation.selector.keys, operation.selector.queries, operation.x
        case SelectorWidth():
            return operation.selector.keys, operation.selector.queries
        case _:
            return ()


def operations(output: Operation) -> list[Operation]:
    """All operations that `output` needs, each after what it reads.

    **Raises:** `ModelError` for two of one name: a name is a subspace.
    """
    found: list[Operation] = []

    def visit(operation: Operation) -> None:
        if operation in found:
            return
        for one in dependencies(operation):
            visit(one)
        found.append(operation)

    visit(output)
    names = [operation.name for operation in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ModelError(f"several operations are called {', '.join(twice)}: every one needs a name of its own")
    return found


def interpret(program: Program, tokens: Sequence[Value]) -> dict[str, list[Value]]:
    """Values of every operation at every position, by name, `longest` each: what the compiled model has to compute.

    **Raises:** `ModelError` for tokens that the program does not take, and for an aggregate of several categories.
    """
    values: dict[str, list[Value]] = {}
    padded = program.padded(tokens)
    for operation in operations(program.output):
        values[operation.name] = _values(operation, padded, values)
    return values


def _values(operation: Operation, tokens: list[Value], known: dict[str, list[Value]]) -> list[Value]:
    match operation:
        case Tokens():
            return list(tokens)
        case Indices():
            return list(range(len(tokens)))
        case Map():
            return [None if v is None else operation.function(v) for v in known[operation.x.name]]
        case SequenceMap():
            pairs = zip(known[operation.x.name], known[operation.y.name], strict=True)
            return [None if a is None or b is None else operation.function(a, b) for a, b in pairs]
        case Linear():
            pairs = zip(known[operation.x.name], known[operation.y.name], strict=True)
            return [operation.a * x + operation.b * y for x, y in pairs]
        case SelectorWidth():
            return [len(looked) for looked in selected(operation.selector, known)]
        case Aggregate():
            values = known[operation.x.name]
            return [_aggregated(operation, [values[k] for k in ks]) for ks in selected(operation.selector, known)]


def selected(selector: Select, known: dict[str, list[Value]]) -> list[list[int]]:
    """For every position those that it looks at; no position has to do with None."""
    keys, queries = known[selector.keys.name], known[selector.queries.name]
    return [
        [k for k, key in enumerate(keys) if None not in (key, query) and selector.predicate(key, query)]
        for query in queries
    ]


def _aggregated(operation: Aggregate, values: list[Value]) -> Value:
    if operation.encoding == "numerical":
        return Fraction(sum(values)) / len(values) if values else Fraction(0)
    if len(set(values)) > 1:
        raise ModelError(
            f"{operation.name!r} aggregates {sorted(map(repr, set(values)))}: a categorical aggregate is of positions "
            "with one value in common. Change the selector, or make the values numerical."
        )
    return values[0] if values else None
