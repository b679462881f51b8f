"""A compiled program with data: sequences of all lengths, and the circuits that are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mdl.data import Dataset
from mdl.models.circuits.graph import Graph
from mdl.models.compiled import PROGRAMS, Compiled, compile_program
from mdl.models.compiled.truth import varying_edges, weight_true_edges
from mdl.task import Task, build_task

PER_LENGTH = 80  # distinct sequences of each length, or all that there are
SHARES = (0.6, 0.15)  # to fit and to tune on; the rest is scored
SPECIAL = (0, 1)  # BOS and PAD: not scored
SHARPEST = (50, 200)  # between which attention's sharpness is drawn
ZERO, MEAN = "zero", "mean"
TRIES = 1000


@dataclass(frozen=True)
class Case:
    """What a seed draws: the order of token ids, of subspaces and of values in them, the sharpness of attention; which
    sequences there are, and which of them are fitted on, tuned on and scored."""

    compiled: Compiled
    task: Task
    seed: int

    @classmethod
    def of(cls, program: str, seed: int) -> Case:
        """One of PROGRAMS."""
        rng = np.random.default_rng([seed, 1])
        compiled = compile_program(PROGRAMS[program](), seed, float(rng.integers(*SHARPEST)))
        tokens = compiled.encode(_sequences(compiled, rng))
        cuts = np.cumsum([round(share * len(tokens)) for share in SHARES])
        parts = np.split(tokens, cuts)
        groups = tuple(np.arange(len(part)) for part in parts)
        description = {"data": f"inputs of {compiled.program.name}", "special_tokens": list(SPECIAL), "seed": seed}
        data = Dataset(parts[0], parts[1], parts[2], (groups[0], groups[1], groups[2]), SPECIAL, description)
        return cls(compiled, build_task(compiled.model, "model", data, lambda *_: None), seed)

    def truth(self, ablation: str) -> np.ndarray:
        """Zero ablation: what the weights join. Mean ablation: of this, what carries more than a constant."""
        if ablation == ZERO:
            return weight_true_edges(self.compiled.model)
        return varying_edges(self.compiled.model, self.task.fit_activations.tokens)

    def random(self, size: int) -> np.ndarray:
        """As many edges drawn at random, without dead ends; drawn anew until something is left."""
        graph, rng = Graph.of(self.compiled.model.config), np.random.default_rng([self.seed, 2])
        places = np.argwhere(graph.possible)
        for _ in range(TRIES):
            edges = np.zeros(graph.possible.shape, bool)
            edges[tuple(places[rng.choice(len(places), size, replace=False)].T)] = True
            edges = graph.pruned(edges, constant=True)
            if edges.any():
                return edges
        return graph.mask(["input->logits"])


def _sequences(compiled: Compiled, rng: np.random.Generator) -> list[tuple[object, ...]]:
    """Up to PER_LENGTH of each length, in random order."""
    found: list[tuple[object, ...]] = []
    for length in range(1, compiled.program.longest + 1):
        here = [s for s in compiled.program.inputs if len(s) == length]
        found += [here[i] for i in rng.permutation(len(here))[:PER_LENGTH]]
    return [found[i] for i in rng.permutation(len(found))]
