"""Two PCA baselines and an explained variance of the literature that are not what they are called, and the right ones.

- SAEBench's PCA (`custom_saes/pca_sae.py`) takes the components, one a row, for the matrix of its encoder, whose
  columns they should be. At full rank that is an exact rotation, so that nothing fails; a rank below it keeps the first
  r *coordinates'* mixtures in place of the first r components.
- Cunningham et al.'s (HoagyC/sparse_coding) fits PCA about the mean and applies it to activations that still have it.
- SAEBench's explained variance divides by E|x|^2 - (mean of x^2)^2 in place of E|x|^2 - |mean x|^2: squares, taken
  for the activations (SAELens mended the same in 6.45).
"""

from __future__ import annotations

import numpy as np


def components_of(outputs: np.ndarray) -> np.ndarray:
    """Principal axes of outputs [n, d] about their mean, one a row, [d, d], largest variance first."""
    centred = np.asarray(outputs, np.float64) - outputs.mean(0, dtype=np.float64)
    vectors = np.linalg.eigh(centred.T @ centred)[1]
    return vectors[:, ::-1].T


def pca(outputs: np.ndarray, components: np.ndarray, mean: np.ndarray, rank: int) -> np.ndarray:
    """PCA of a rank: (x - mean) V_r^T V_r + mean, V_r being the first rows; [n, d]."""
    rows = components[:rank]
    return (outputs - mean) @ rows.T @ rows + mean


def transposed_pca(outputs: np.ndarray, components: np.ndarray, mean: np.ndarray, rank: int) -> np.ndarray:
    """With components for the encoder's matrix: (x - mean) V[:, :r] V[:, :r]^T + mean; [n, d]."""
    columns = components[:, :rank]
    return (outputs - mean) @ columns @ columns.T + mean


def uncentred_pca(outputs: np.ndarray, components: np.ndarray, rank: int) -> np.ndarray:
    """Fitted about the mean, applied without it: x V_r^T V_r; [n, d]."""
    rows = components[:rank]
    return outputs @ rows.T @ rows


def published_explained_variance(outputs: np.ndarray, prediction: np.ndarray) -> float:
    """1 - E|x - x_E|^2 / (E|x|^2 - (mean of x^2)^2), the last mean over tokens and dimensions of [n, d].

    Not a share of anything: it depends on the unit of x, and exceeds 1 where the denominator is negative.
    """
    square = np.square(outputs, dtype=np.float64)
    residual = np.square(outputs - prediction, dtype=np.float64).sum(1).mean()
    return float(1.0 - residual / (square.sum(1).mean() - square.mean() ** 2))
