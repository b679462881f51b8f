"""The evaluation where M's output is Gaussian, N(output, sigma^2 I): KL(M || M_E) is |error|^2 / (2 sigma^2) nats.

The output is the region's own, for `mdl.models.vectors` has nothing behind it. A model that computes its outputs from
inputs would compare f(values) with f(outputs) in `hidden`, and nothing else here would change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from estimators.kernels import Damage
from mdl.errors import TaskError
from mdl.models.vectors import Vectors
from mdl.task import Activations, Region
from mdl.units import nats_to_bits

NOTE = "KL is |error|^2 / (2 sigma^2) nats (Gaussian noise); no next token, so no CE recovered"
ROWS_NOTE, NETWORK_NOTE = f"rows of numbers: {NOTE}; no FLOPs", f"outputs of a network: {NOTE}"


@dataclass(frozen=True)
class GaussianEvaluator:
    """Rows of numbers, with what `estimators.kernels.Evaluator` offers for transformers."""

    model: Vectors
    region: Region

    @property
    def notes(self) -> tuple[str, ...]:
        """What goes into every score."""
        return (ROWS_NOTE if self.model.network is None else NETWORK_NOTE,)

    @property
    def noise(self) -> float:
        """sigma; 1 where no tolerance was stated, and it cancels."""
        return 1.0 if self.model.noise is None else self.model.noise

    def reference(self, activations: Activations) -> np.ndarray:
        """The means of M's own outputs, [sequences, positions, d]."""
        return activations.outputs

    def hidden(self, activations: Activations, values: np.ndarray) -> np.ndarray:
        """The means of the outputs with `values` [sequences, positions, d] in the region's place."""
        return values

    def compare(self, activations: Activations, reference: np.ndarray, hidden: np.ndarray) -> Damage:
        """|error|^2 / (2 sigma^2 ln 2) bits, scored rows only, in float64; there is no next token to predict."""
        error = np.subtract(hidden, reference, dtype=np.float64)[activations.scored] / self.noise
        return Damage(nats_to_bits(np.square(error).sum(-1) / 2.0), np.full(len(error), np.nan))

    def damage(self, activations: Activations, reference: np.ndarray, values: np.ndarray) -> Damage:
        """Replace the region's outputs by `values` [sequences, positions, d] and compare with M, scored rows only."""
        return self.compare(activations, reference, self.hidden(activations, values))

    def score_gradients(self, activations: Activations, seed: int) -> np.ndarray:
        """d log p(y) / d output = (y - output) / sigma^2 at the scored rows, nats per unit, [n, d]."""
        shape = (activations.n_tokens, activations.outputs.shape[-1])
        return np.random.default_rng(seed).standard_normal(shape) / self.noise

    def logits(self, activations: Activations, reference: np.ndarray) -> np.ndarray:
        """**Raises:** `TaskError`: a Gaussian output has none."""
        raise TaskError("vectors have no logits: their output is Gaussian, and nothing can be sampled token by token")
