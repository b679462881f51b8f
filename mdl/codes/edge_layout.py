"""What both ends of a code of edges know: which edges are possible, which are alike, whose inputs they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mdl.errors import CodeError, MessageError

MAX_EDGES = 1 << 21
"""More possible edges would take probabilities that the coder cannot resolve."""


@dataclass(frozen=True)
class EdgeLayout:
    """What both ends know of the table.

    **Arguments:** `possible`: bool [sources, destinations]; `classes`: int, of the same shape, which edges are alike
    (all 0: nothing is known); `owners`: of every destination, the sources whose input it is (None: of none, as the
    logits). A circuit without dead ends has no edge to a destination of which no owner has one.

    **Raises:** `CodeError` for shapes that differ, owners that do not exist, more than 2^21 possible edges.
    """

    possible: np.ndarray
    classes: np.ndarray
    owners: tuple[tuple[int, ...] | None, ...]

    def __post_init__(self) -> None:
        shape = self.possible.shape
        if (
            self.possible.dtype != bool
            or len(shape) != 2
            or self.classes.shape != shape
            or len(self.owners) != shape[1]
        ):
            raise CodeError(
                f"possible edges {shape} of {self.possible.dtype}, classes {self.classes.shape} and {len(self.owners)} "
                "owners: a bool and an integer table of sources by destinations, and an owner for each destination"
            )
        if any(i < 0 or i >= shape[0] for owner in self.owners for i in owner or ()):
            raise CodeError(f"an owner that is none of {shape[0]} sources")
        if self.n_possible > MAX_EDGES:
            raise CodeError(f"{self.n_possible} possible edges; at most {MAX_EDGES}: take nodes in place of neurons")

    @classmethod
    def plain(cls, possible: np.ndarray) -> EdgeLayout:
        """Nothing is known but which edges are possible."""
        return cls(possible, np.zeros(possible.shape, np.int64), (None,) * possible.shape[1])

    @property
    def n_possible(self) -> int:
        return int(self.possible.sum())

    def check(self, edges: np.ndarray) -> None:
        """**Raises:** `MessageError` for a table of another shape, or edges that are not possible."""
        if edges.dtype != bool or edges.shape != self.possible.shape:
            raise MessageError(
                f"edges {edges.shape} of {edges.dtype} in place of bool {self.possible.shape}: the circuit of another "
                "model?"
            )
        beyond = int((edges & ~self.possible).sum())
        if beyond:
            raise MessageError(f"{beyond} of {int(edges.sum())} edges are not possible in this graph; prune them first")
