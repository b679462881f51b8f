"""The description length of block-sparse featurizers (arXiv 2606.25234, section 3.3 and appendix C).

    L_delta = log2 C(G, l) + sum_g p_g sum_j r(s_gj) + sum_a r(lambda_a) + G k (d - k) / (2 N) log2 N      bits a token

with G blocks of k directions, of which l are on; s_gj the eigenvalues of a block's covariance when it is on; lambda_a
those of the covariance of what is left; r(v) = (1/2) log2(v / delta)_+ or, as it is evaluated there, the smooth
(1/2) log2(1 + v / delta). An SAE is the case k = 1.

What it leaves open is charged nowhere: it is the rate of Gaussians, not the length of a code; delta in code space is
delta in activation space for orthonormal directions only; both the code and the residual spend delta; features are
named as if all were equally frequent, and how many are on is not sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from estimators.published.histogram import features_of
from mdl.codes.supports import enumerative_bits
from mdl.errors import ExplanationError

SOURCE = "arXiv 2606.25234, sec. 3.3 and app. C"


@dataclass(frozen=True)
class BlockSparseLength:
    """The four terms, bits a token."""

    support: float
    codes: float
    residual: float
    dictionary: float

    @property
    def total(self) -> float:
        """Their sum, bits a token."""
        return self.support + self.codes + self.residual + self.dictionary


def gaussian_rate_bits(variances: np.ndarray, distortion: float, smooth: bool) -> np.ndarray:
    """(1/2) log2(v / delta)_+, or (1/2) log2(1 + v / delta): bits of each component at distortion delta."""
    ratio = np.asarray(variances, np.float64) / distortion
    return 0.5 * np.log2(1.0 + ratio if smooth else np.maximum(ratio, 1.0))


def target_distortion(outputs: np.ndarray, r_squared: float) -> float:
    """delta = (1 - R^2) times the variance of outputs [n, d], a dimension (their levels: R^2 of 0.99 to 0.8)."""
    return float((1.0 - r_squared) * np.square(outputs - outputs.mean(0), dtype=np.float64).mean())


@dataclass(frozen=True)
class Spectra:
    """What the length depends on: of each block how often it is on, `share` [G], and the eigenvalues of what it then
    adds, `variances` [G, k]; `residual` [d]: those of what is left."""

    share: np.ndarray
    variances: np.ndarray
    residual: np.ndarray

    @classmethod
    def of(cls, codes: scipy.sparse.csr_array, rows: np.ndarray, residual: np.ndarray, block: int = 1) -> Spectra:
        """Of a dictionary of G blocks.

        **Arguments:** `codes` [n, G k]: coefficients, those of a block side by side, stored where they are on; `rows`
        [G k, d]: their directions, of any length; `residual` [n, d]: outputs less predictions; `block`: k.

        **Raises:** `ExplanationError` unless blocks divide the dictionary.
        """
        if codes.shape[1] % block:
            raise ExplanationError(f"{codes.shape[1]} features in blocks of {block}: blocks are of one size")
        centred = residual - residual.mean(0)
        spectrum = np.linalg.eigvalsh(centred.T @ centred / max(len(residual), 1))
        return cls(*block_variances(codes, rows, block), np.maximum(spectrum, 0.0))

    def length(self, distortion: float, horizon: float, smooth: bool = False) -> BlockSparseLength:
        """L_delta.

        **Arguments:** `distortion`: delta, mean square error a dimension; `horizon`: N, the tokens that share the
        dictionary; `smooth`: the form of the rate.

        **Raises:** `ExplanationError` unless delta is positive.
        """
        if not distortion > 0:
            raise ExplanationError(f"a distortion of {distortion:g}: at none, real numbers take infinitely many bits")
        (blocks, block), width = self.variances.shape, len(self.residual)
        return BlockSparseLength(
            support=float(enumerative_bits(blocks, min(self.share.sum(), blocks))),
            codes=float(self.share @ gaussian_rate_bits(self.variances, distortion, smooth).sum(1)),
            residual=float(gaussian_rate_bits(self.residual, distortion, smooth).sum()),
            dictionary=0.5 * blocks * block * (width - block) / horizon * float(np.log2(horizon)),
        )


def block_variances(codes: scipy.sparse.csr_array, rows: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each block is on, p [G], and the eigenvalues [G, k] of the covariance of what it then adds."""
    n, blocks = codes.shape[0], codes.shape[1] // block
    token = np.repeat(np.arange(n), np.diff(codes.indptr))
    features = features_of(codes)
    # One line for each block that is on at a token: its k coefficients.
    lines = token * blocks + features // block
    pairs, line = (lines, np.arange(len(lines))) if block == 1 else np.unique(lines, return_inverse=True)
    values = np.zeros((len(pairs), block))
    values[line, features % block] = codes.data
    owner = pairs % blocks
    count = np.bincount(owner, minlength=blocks)
    seen = np.maximum(count, 1)[:, None]
    mean = np.stack([np.bincount(owner, values[:, j], blocks) for j in range(block)], 1) / seen
    centred = values - mean[owner]
    products = (centred[:, :, None] * centred[:, None, :]).reshape(len(pairs), block * block)
    covariance = np.stack([np.bincount(owner, products[:, j], blocks) for j in range(block * block)], 1) / seen
    directions = rows.astype(np.float64).reshape(blocks, block, -1)
    gram = directions @ directions.transpose(0, 2, 1)
    # The eigenvalues of D^T C D are those of S^(1/2) C S^(1/2), S = D D^T.
    roots, vectors = np.linalg.eigh(gram)
    half = vectors * np.sqrt(np.maximum(roots, 0.0))[:, None, :] @ vectors.transpose(0, 2, 1)
    found = np.linalg.eigvalsh(half @ covariance.reshape(blocks, block, block) @ half)
    return count / max(n, 1), np.maximum(found, 0.0)
