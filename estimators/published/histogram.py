"""Empirical entropies of sparse codes, feature by feature, in one pass over what is on."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from scipy.special import xlogy

from mdl.units import nats_to_bits

BLOCK = 1 << 22  # counts held at once: features x bins


def features_of(codes: scipy.sparse.csr_array) -> np.ndarray:
    """The feature of each stored entry, [nnz]."""
    return codes.indices.astype(np.int64)


def on_counts(codes: scipy.sparse.csr_array) -> np.ndarray:
    """How many tokens have each feature on, [D]."""
    return np.bincount(features_of(codes), minlength=codes.shape[1])


def binary_entropy(p: np.ndarray) -> np.ndarray:
    """H(p) in bits of events of probability p."""
    return -nats_to_bits(xlogy(p, p) + xlogy(1.0 - p, 1.0 - p))


def on_entropy(codes: scipy.sparse.csr_array) -> np.ndarray:
    """H(on_i) of each feature, bits, [D]."""
    return binary_entropy(on_counts(codes) / max(codes.shape[0], 1))


def value_ranges(codes: scipy.sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value of each feature and 0, [D] and [D]."""
    low, high = np.zeros(codes.shape[1]), np.zeros(codes.shape[1])
    features = features_of(codes)
    np.minimum.at(low, features, codes.data)
    np.maximum.at(high, features, codes.data)
    return low, high


def entropy_given_on(codes: scipy.sparse.csr_array, bins: int) -> np.ndarray:
    """p_i H(value_i | on_i) of each feature, bits a token, [D]; equal bins over the range of `value_ranges`."""
    low, high = value_ranges(codes)
    features = features_of(codes)
    width = np.maximum(high - low, np.finfo(np.float64).tiny)[features]
    index = np.minimum(np.floor((codes.data - low[features]) / width * bins), bins - 1).astype(np.int64)
    return counted_entropy(features, index, codes.shape[1], bins) / max(codes.shape[0], 1)


def counted_entropy(features: np.ndarray, index: np.ndarray, width: int, bins: int) -> np.ndarray:
    """m_i H_i in bits, [width]: of each feature's m_i entries, in `bins` bins."""
    step = max(1, BLOCK // bins)
    found = np.zeros(width)
    for start in range(0, width, step):
        chosen = (features >= start) & (features < start + step) if width > step else slice(None)
        size = min(step, width - start)
        keys = (features[chosen] - start) * bins + index[chosen]
        counts = np.bincount(keys, minlength=size * bins).reshape(size, bins).astype(np.float64)
        total = counts.sum(1)
        found[start : start + size] = nats_to_bits(xlogy(total, total) - xlogy(counts, counts).sum(1))
    return found
