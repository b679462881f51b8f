"""Sparse codes by orthogonal matching pursuit: an encoder for a dictionary that has none, or in place of its own.

Rows of a dictionary are taken one by one, each time the one that overlaps most with what is left, and the coefficients
of all rows taken are fitted again after every step. Those of a rectified dictionary stay non-negative throughout.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

CHUNK_ELEMENTS = 1 << 21  # overlaps held at a time: 8 MB, which a cache holds
SWEEPS, LAST_SWEEPS = 3, 24  # of coordinate descent after a step, and after the last
SMALLEST_NORM = 1e-30


def pursue(atoms: np.ndarray, targets: np.ndarray, k: int, signed: bool) -> scipy.sparse.csr_array:
    r"""Coefficients [n, F], float32, of at most k rows of `atoms` [F, d] for each of `targets` [n, d].

    $$i_j = \arg\max_i \langle r, u_i \rangle$$ (`signed`: of its magnitude) is the row that step j takes, u being the
    unit rows and r the residual; then $$\min_c |x - \sum_{l \le j} c_l u_{i_l}|^2$$, over c >= 0 unless `signed`, by
    coordinate descent. A token to which nothing is left to add gets fewer than k; rows of norm zero are never used.

    **Source:** Pati, Rezaiifar and Krishnaprasad 1993, Asilomar Conference; Bruckstein, Elad and Zibulevsky 2008, IEEE
    Trans. Inf. Theory 54(11) (non-negative); Smith 2024, "Replacing SAE encoders with inference-time optimisation".
    """
    norms = np.maximum(np.linalg.norm(atoms, axis=1), SMALLEST_NORM)
    units = (atoms / norms[:, None]).astype(np.float32)
    size = max(1, CHUNK_ELEMENTS // max(len(atoms), 1))
    steps = min(k, len(atoms))
    rows, values = [np.zeros((0, steps), np.int64)], [np.zeros((0, steps), np.float32)]
    for start in range(0, len(targets), size):
        chosen, coefficients = _pursue_chunk(units, targets[start : start + size].astype(np.float32), steps, signed)
        rows.append(chosen)
        values.append(coefficients)
    tokens = np.repeat(np.arange(len(targets)), steps)
    indices = np.concatenate(rows).ravel()
    scaled = (np.concatenate(values).ravel() / norms[indices]).astype(np.float32)
    found = scipy.sparse.coo_array((scaled, (tokens, indices)), shape=(len(targets), len(atoms))).tocsr()
    found.eliminate_zeros()
    return found


def _pursue_chunk(units: np.ndarray, targets: np.ndarray, k: int, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The unit rows that each token takes, [n, k], and their coefficients."""
    n, width = targets.shape
    chosen = np.zeros((n, k), np.int64)
    taken = np.zeros((n, k, width), np.float32)
    grams, overlaps = np.zeros((k, k, n), np.float32), np.zeros((k, n), np.float32)
    coefficients = np.zeros((k, n), np.float32)
    residual = targets
    for j in range(k):
        overlap = residual @ units.T
        np.put_along_axis(overlap, chosen[:, :j], 0.0, axis=1)
        chosen[:, j] = np.argmax(np.abs(overlap, out=overlap) if signed else overlap, axis=1)
        taken[:, j] = units[chosen[:, j]]
        grams[j, : j + 1] = np.matmul(taken[:, : j + 1], taken[:, j, :, None])[:, :, 0].T
        grams[: j + 1, j] = grams[j, : j + 1]
        overlaps[j] = np.einsum("nd,nd->n", targets, taken[:, j])
        sweeps = LAST_SWEEPS if j == k - 1 else SWEEPS
        _refit(grams[: j + 1, : j + 1], overlaps[: j + 1], coefficients[: j + 1], signed, sweeps)
        residual = targets - np.matmul(coefficients[: j + 1].T[:, None, :], taken[:, : j + 1])[:, 0]
    return chosen, coefficients.T


def _refit(grams: np.ndarray, overlaps: np.ndarray, coefficients: np.ndarray, signed: bool, sweeps: int) -> None:
    """Coordinate descent, in place, on the least squares with Gram matrices [j, j, n] and overlaps [j, n].

    The newest coordinate goes first: the others are fitted already to what was there without it.
    """
    for _ in range(sweeps):
        for i in reversed(range(len(coefficients))):
            coefficients[i] += overlaps[i] - np.einsum("jn,jn->n", grams[i], coefficients)
            if not signed:
                np.maximum(coefficients[i], 0.0, out=coefficients[i])
