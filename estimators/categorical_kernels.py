r"""The evaluation where the outputs are logits of a label: KL is that of the label's distribution.

$$KL = \sum_v p_v (\log p_v - \log q_v), \quad p = \mathrm{softmax}(output)$$

The outputs are the region's own, nothing is behind them. Computed in float64 on the host: labels are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from estimators.kernels import Damage
from mdl.models.vectors import Vectors
from mdl.task import Activations, Region
from mdl.units import nats_to_bits

NOTE = "outputs of a network, logits of a label: KL is that of its distribution; no next token, so no CE recovered"


@dataclass(frozen=True)
class CategoricalEvaluator:
    """Rows of logits, with what `estimators.kernels.Evaluator` offers for transformers."""

    model: Vectors
    region: Region
    notes: tuple[str, ...] = (NOTE,)

    def reference(self, activations: Activations) -> np.ndarray:
        """M's own logits, [sequences, positions, labels]."""
        return activations.outputs

    def hidden(self, activations: Activations, values: np.ndarray) -> np.ndarray:
        """The logits with `values` [sequences, positions, labels] in the region's place."""
        return values

    def compare(self, activations: Activations, reference: np.ndarray, hidden: np.ndarray) -> Damage:
        """KL(M || M_E) of the label in bits, scored rows only; there is no next token to predict.

        Summed as q - p - p (log q - log p), no term of which is negative: the normalisers' errors cancel.
        """
        log_p, log_q = (
            log_softmax(logits[activations.scored].astype(np.float64), axis=-1) for logits in (reference, hidden)
        )
        p, delta = np.exp(log_p), log_q - log_p
        kl = np.sum(p * (np.expm1(delta) - delta), -1)
        return Damage(nats_to_bits(kl), np.full(len(kl), np.nan))

    def damage(self, activations: Activations, reference: np.ndarray, values: np.ndarray) -> Damage:
        """Replace the region's outputs by `values` [sequences, positions, labels] and compare with M."""
        return self.compare(activations, reference, self.hidden(activations, values))

    def score_gradients(self, activations: Activations, seed: int) -> np.ndarray:
        r"""Vectors whose second moment is the Fisher information, nats per unit, [n, labels], at the scored rows.

        $$g = \sum_v \epsilon_v \sqrt{p_v} (e_v - p), \quad \epsilon_v = \pm 1, \quad E[g g^T] = diag(p) - p p^T$$

        which is that of the gradient e_y - p for a label y ~ p, too. Where a model is certain of its labels, others are
        hardly ever drawn, and sampled gradients are nearly all zero; these are not.
        """
        p = np.exp(log_softmax(activations.outputs[activations.scored].astype(np.float64), axis=-1))
        weighted = np.random.default_rng(seed).choice((-1.0, 1.0), p.shape) * np.sqrt(p)
        return np.asarray(weighted - p * weighted.sum(-1, keepdims=True))

    def logits(self, activations: Activations, reference: np.ndarray) -> np.ndarray:
        """Logits from what `reference` returns, scored rows only, float32 [n, labels]."""
        return np.asarray(reference[activations.scored], np.float32)
