"""What others' formulas say of a decoded explanation, for the table: bits a token, at the setting of the score.

MDL-SAE and SAEBench charge the state alone, and block-sparse featurizers all three columns; every one is an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from estimators.published import block_sparse, mdl_sae, saebench
from estimators.published.saebench import Dictionary, Mends
from mdl.ledger import Published
from mdl.state import DenseState, JoinedState, SparseState, State

CONSTANT = 1e-3  # of the outputs' spread: what may be left between a sum of terms and a prediction, and be rounding


@dataclass(frozen=True)
class Terms:
    """Decoded symbols as real numbers.

    **Arguments:** `coefficients` [n, F]: stored where symbols are not zero; `rows` [F, d]: what they multiply, None for
    a decoder that does not say (coefficients are the integers then).
    """

    coefficients: scipy.sparse.csr_array
    rows: np.ndarray | None

    @classmethod
    def of(cls, state: State, additive: tuple[scipy.sparse.csr_array, np.ndarray] | None) -> Terms | None:
        """Of a sparse or dense state (or the first of several); None of any other."""
        first = state.streams[0] if isinstance(state, JoinedState) else state
        if additive is not None and isinstance(first, SparseState | DenseState):
            return cls(additive[0].astype(np.float64), np.asarray(additive[1]))
        if isinstance(first, SparseState):
            return cls(first.matrix().astype(np.float64), None)
        if isinstance(first, DenseState):
            return cls(scipy.sparse.csr_array(first.values).astype(np.float64), None)
        return None

    @property
    def l0(self) -> float:
        """Coefficients on, a token."""
        return self.coefficients.nnz / max(self.coefficients.shape[0], 1)


def published_figures(
    terms: Terms | None, outputs: np.ndarray, prediction: np.ndarray, values: np.ndarray, horizon: float
) -> Mapping[str, Published]:
    """Every formula that applies, by the name that the table shows; none where a state is neither sparse nor dense.

    **Arguments:** `outputs` [n, d]: M's own; `prediction`: the explanation's; `values`: with the residual coder's
    correction; `horizon`: N, over which the block-sparse code spreads the dictionary.
    """
    if terms is None or not min(terms.coefficients.shape):
        return {}
    found = _mdl_sae(terms)
    if terms.rows is not None:
        outputs = np.asarray(outputs, np.float64)
        found |= _saebench(terms.coefficients, terms.rows, outputs, prediction)
        found |= _block_sparse(terms, outputs, prediction, values, horizon)
    return found


def _mdl_sae(terms: Terms) -> dict[str, Published]:
    l0, width, b = terms.l0, terms.coefficients.shape[1], mdl_sae.VALUE_BITS
    bound = mdl_sae.upper_bound_bits(l0, width)
    unordered = mdl_sae.unordered_bound_bits(min(l0, width), width)
    entropy = mdl_sae.independent_feature_bits(terms.coefficients)
    return {
        "MDL-SAE bound": Published(bound, f"L0 ({b} + log2 D), D = {width}", mdl_sae.SOURCE),
        "MDL-SAE bound, unordered": Published(unordered, f"{b} L0 + log2 C(D, L0), D = {width}", "Cover 1973"),
        "MDL-SAE entropy": Published(entropy, f"sum H(on) + p H(value | on), {1 << b} bins", mdl_sae.SOURCE),
    }


def _saebench(
    coefficients: scipy.sparse.csr_array, rows: np.ndarray, outputs: np.ndarray, prediction: np.ndarray
) -> dict[str, Published]:
    """As published and with every defect mended, for rows of unit norm; nothing where the rest of the prediction is not
    constant (side information of tokens), which the figure knows nothing of."""
    constant = prediction - coefficients @ rows.astype(np.float64)
    bias = constant.mean(0)
    if np.abs(constant - bias).max() > CONSTANT * outputs.std():
        return {}
    norm = np.linalg.norm(rows.astype(np.float64), axis=1)
    codes = coefficients.copy()
    codes.data = codes.data * norm[codes.indices]
    dictionary = Dictionary(rows / np.maximum(norm, np.finfo(np.float32).tiny)[:, None], bias)
    found = {}
    for name, mends in (("SAEBench mdl", Mends()), ("SAEBench mdl, mended", Mends.all())):
        best = saebench.pick_minimum(saebench.saebench_sweep(codes, dictionary, outputs, mends))
        what = "MSE/variance" if mends.relative_error else "sqrt(MSE)/d"
        code = f"sum H(on) + p H(bin), {best.bins} bins, {what} = {best.error:.2g}"
        found[name] = Published(best.bits, code, saebench.SOURCE)
    return found


def _block_sparse(
    terms: Terms, outputs: np.ndarray, prediction: np.ndarray, values: np.ndarray, horizon: float
) -> dict[str, Published]:
    """At the mean square error a dimension of the decoded values, whatever it is."""
    assert terms.rows is not None
    distortion = float(np.square(outputs - values).mean())
    if not distortion:
        return {}
    spectra = block_sparse.Spectra.of(terms.coefficients, terms.rows, outputs - prediction)
    found = {}
    for name, smooth in (("block-sparse", False), ("block-sparse, smooth", True)):
        length = spectra.length(distortion, horizon, smooth)
        rate = "1/2 log2(1 + v/delta)" if smooth else "1/2 log2(v/delta)+"
        code = f"k = 1, {rate}, delta = {distortion:.3g}, N = {horizon:g}"
        found[name] = Published(length.total, code, block_sparse.SOURCE)
    return found
