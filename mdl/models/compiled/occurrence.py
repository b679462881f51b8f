"""Which values operations take: found by interpreting every input of a program."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mdl.errors import ModelError
from mdl.models.compiled.language import (
    PAD,
    Operation,
    Program,
    SequenceMap,
    Tokens,
    Value,
    interpret,
    operations,
)

MOST_INPUTS = 20_000  # of a program: all of them are interpreted


@dataclass
class Occurrence:
    """`values`: of each operation, at any position, but None; `pairs`: of each sequence map, what comes together."""

    order: list[Operation]
    values: dict[str, list[Value]] = field(default_factory=dict)
    pairs: dict[str, set[tuple[Value, Value]]] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> Occurrence:
        """In ascending order; tokens as in the vocabulary, PAD last.

        **Raises:** `ModelError` for more than MOST_INPUTS inputs.
        """
        if len(program.inputs) > MOST_INPUTS:
            raise ModelError(
                f"{program.name!r} has {len(program.inputs)} inputs, all of which are interpreted to see which values "
                f"occur; at most {MOST_INPUTS}. Take shorter sequences, or a smaller vocabulary."
            )
        found = cls(operations(program.output))
        seen: dict[str, set[Value]] = {operation.name: set() for operation in found.order}
        for tokens in program.inputs:
            known = interpret(program, tokens)
            for operation in found.order:
                seen[operation.name].update(known[operation.name])
                if isinstance(operation, SequenceMap):
                    both = zip(known[operation.x.name], known[operation.y.name], strict=True)
                    found.pairs.setdefault(operation.name, set()).update(both)
        tokens_first = [*program.vocabulary, PAD]
        for operation in found.order:
            found.values[operation.name] = _ordered(operation, seen[operation.name] - {None}, tokens_first)
        return found

    def shuffle(self, rng: np.random.Generator) -> None:
        """Values of each operation in another order."""
        for values in self.values.values():
            rng.shuffle(values)


def _ordered(operation: Operation, values: set[Value], tokens: list[Value]) -> list[Value]:
    """Ascending; where values are tokens, in the order of the vocabulary."""
    if isinstance(operation, Tokens) or PAD in values:
        return [t for t in tokens if t in values]
    return sorted(values, key=lambda v: (str(type(v)), v))
