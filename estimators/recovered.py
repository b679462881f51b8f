"""Figures that people know, printed beside a score and never part of it: SAELens's definitions, on decoded predictions.

    CE recovered = (CE_zero - CE_E) / (CE_zero - CE_M)          KL recovered = (KL_zero - KL_E) / KL_zero
    explained variance = 1 - sum |x - x_E|^2 / sum |x - mean x|^2

(sae_lens/evals.py 6.54, `get_recons_loss` and `get_sparsity_and_variance_metrics`.) The ablation is zero,
not the mean, and it is of special positions too; otherwise those are neither replaced nor scored there, and here they
carry their constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from estimators.kernels import Damage


@dataclass(frozen=True)
class Baselines:
    """Damage of the model's own outputs (none) and of zero ablation, on the same tokens."""

    clean: Damage
    zero: Damage


def recovered(damage: Damage, baselines: Baselines) -> dict[str, float]:
    """CE and KL recovered, and the loss increase in bits a token; KL alone where no position predicts a next token."""
    kl, kl_zero = float(np.mean(damage.kl_bits)), float(np.mean(baselines.zero.kl_bits))
    kl_recovered = (kl_zero - kl) / kl_zero if kl_zero else float("nan")
    if np.isnan(baselines.clean.loss_bits).all():
        return {"kl_recovered": kl_recovered}
    loss, clean, zero = (float(np.nanmean(d.loss_bits)) for d in (damage, baselines.clean, baselines.zero))
    return {
        "ce_recovered": (zero - loss) / (zero - clean) if zero != clean else float("nan"),
        "kl_recovered": kl_recovered,
        "loss_increase_bits": loss - clean,
    }


def explained_variance(outputs: np.ndarray, prediction: np.ndarray) -> float:
    """1 - residual sum of squares / total sum of squares about the mean, over all tokens and dimensions of [n, d]."""
    residual = np.sum(np.square(outputs - prediction, dtype=np.float64))
    return float(1.0 - residual / np.sum(np.square(outputs - outputs.mean(0), dtype=np.float64)))
