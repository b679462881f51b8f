"""SAEBench's `mdl` figure as published (sae_bench/evals/mdl/main.py, version 0.6), and with each of its defects mended.

    sum_i H(a_i > 0) + p_i H(bin of a_i)      bits a token, bins of equal width over [0, max(100, max a_i)]

for 8, 16, 32 and 64 bins, beside an error that the values quantised to the middles of their bins cause; of those whose
error is below 0.2 the shortest counts. What it does besides, each a switch of `Mends`:

1. `range_from_data`: the largest activation starts at 100, so that most bins of most features are empty.
2. `zero_stays_zero`: zero is quantised to the middle of the first bin, so that every feature is on at every token: the
   error halves as bins double, for it measures that and nothing else.
3. `entropy_given_on`: the entropy of values is that over all tokens, zeros included, and is then weighed by p_i.
4. `top_k_in_length`: k is applied when the error is looked at, and not when the length is.
5. `relative_error`: what is called mse_loss, and compared with the threshold, is sqrt(MSE) / d, which depends on the
   unit and the width; mended, it is the share of the variance that is left.
6. `any_sign_fires`: a feature is on where a_i > 0, and bins begin at 0: of PCA and AbsTopK codes half is left out.
7. `outside_counts`: bins come from other batches than the length; values above them drop out of the histogram.

Not mended, for the figure has no place for it: bits of the error, of the dictionary, of the tables. BOS is not left out
there; the positions that are scored here leave special tokens out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from scipy.special import xlogy

from estimators.published.histogram import binary_entropy, counted_entropy, features_of, value_ranges
from mdl.units import nats_to_bits

SOURCE = "SAEBench 0.6, evals/mdl/main.py"
BINS = (8, 16, 32, 64)
THRESHOLD = 0.2  # on what is called mse_loss
FIRST_MAXIMUM = 100.0
ERROR_TOKENS = 2048  # at most so many, evenly spaced, for the error (one of its buffers has 524,288)


@dataclass(frozen=True)
class Mends:
    """Which defects are mended; none is in what is published."""

    range_from_data: bool = False
    zero_stays_zero: bool = False
    entropy_given_on: bool = False
    top_k_in_length: bool = False
    relative_error: bool = False
    any_sign_fires: bool = False
    outside_counts: bool = False

    @classmethod
    def all(cls) -> Mends:
        """Every one."""
        return cls(True, True, True, True, True, True, True)


@dataclass(frozen=True)
class Dictionary:
    """What decodes: coefficients [n, F] @ `rows` [F, d] + `bias` [d]."""

    rows: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class SAEBenchLength:
    """`bits` a token, and the error of the quantised values, for one number of bins."""

    bins: int
    bits: float
    error: float


@dataclass(frozen=True)
class Edges:
    """Bins of equal width from `low` to `high`, [F] each."""

    low: np.ndarray
    high: np.ndarray
    bins: int

    @classmethod
    def of(cls, codes: scipy.sparse.csr_array, bins: int, mends: Mends) -> Edges:
        """From the codes of calibration data."""
        return cls.over(*value_ranges(codes), bins, mends)

    @classmethod
    def over(cls, low: np.ndarray, high: np.ndarray, bins: int, mends: Mends) -> Edges:
        """From the least and the largest value of each feature and 0, [F] each."""
        low = low if mends.any_sign_fires else np.zeros_like(low)
        return cls(low, high if mends.range_from_data else np.maximum(high, FIRST_MAXIMUM), bins)

    @property
    def width(self) -> np.ndarray:
        """Of one bin, [F]; 1 where the range is empty."""
        size = (self.high - self.low) / self.bins
        return np.where(size > 0, size, 1.0)

    def inside(self, values: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Whether values are in the range."""
        return (values >= self.low[features]) & (values <= self.high[features])

    def histogram_bin(self, values: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Closed on the left, as torch.histogram has them; what is outside goes to the bin at that end."""
        index = np.floor((values - self.low[features]) / self.width[features])
        return np.clip(index, 0, self.bins - 1).astype(np.int64)

    def middles(self, values: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Middles of the values' bins, closed on the right, as torch.bucketize has them."""
        index = np.clip(np.ceil((values - self.low[features]) / self.width[features]), 1, self.bins)
        return self.low[features] + (index - 0.5) * self.width[features]


def saebench_sweep(
    codes: scipy.sparse.csr_array,
    dictionary: Dictionary,
    outputs: np.ndarray,
    mends: Mends | None = None,
    *,
    k: int | None = None,
    calibration: scipy.sparse.csr_array | None = None,
    bins: Sequence[int] = BINS,
) -> list[SAEBenchLength]:
    """Length and error for each number of bins.

    **Arguments:** `codes` [n, F]: activations, stored where they are not zero; `outputs` [n, d]: what is reconstructed;
    `k`: how many of a token's largest activations are kept (None: all); `calibration`: other activations, from which
    the bins are made (None: the same).
    """
    mends = mends or Mends()
    kept = codes if k is None else top_k(codes, k)
    measured = kept if mends.top_k_in_length else codes
    base = codes if calibration is None else calibration
    some = slice(None, None, -(-codes.shape[0] // ERROR_TOKENS))
    kept, outputs = kept[some], outputs[some]
    found, ranges = [], value_ranges(base)
    for number in bins:
        edges = Edges.over(*ranges, number, mends)
        error = quantisation_error(kept, dictionary, outputs, edges, mends)
        found.append(SAEBenchLength(number, description_length(measured, edges, mends), error))
    return found


def pick_minimum(lengths: Sequence[SAEBenchLength], threshold: float = THRESHOLD) -> SAEBenchLength:
    """The shortest whose error is below the threshold; where none is, the shortest of all."""
    viable = [x for x in lengths if x.error < threshold]
    return min(viable or lengths, key=lambda x: x.bits)


def description_length(codes: scipy.sparse.csr_array, edges: Edges, mends: Mends) -> float:
    """sum_i H(on_i) + p_i H(value_i), bits a token."""
    n, width = codes.shape
    features, values = features_of(codes), codes.data.astype(np.float64)
    fires = values != 0 if mends.any_sign_fires else values > 0
    share = np.bincount(features[fires], minlength=width) / n
    counted = fires if mends.entropy_given_on else np.ones(len(values), bool)
    counted = counted if mends.outside_counts else counted & edges.inside(values, features)
    index = edges.histogram_bin(values, features)
    if mends.entropy_given_on:
        total = counted_entropy(features[counted], index[counted], width, edges.bins)
        entropy = total / np.maximum(np.bincount(features[counted], minlength=width), 1)
    else:
        entropy = _entropy_with_zeros(features, index, counted, codes.shape, edges)
    return float(np.sum(binary_entropy(share) + share * entropy))


def _entropy_with_zeros(
    features: np.ndarray, index: np.ndarray, counted: np.ndarray, shape: tuple[int, int], edges: Edges
) -> np.ndarray:
    """H of the histogram over all tokens, bits, [F]: what is not stored is zero, and is in the histogram too."""
    n, width = shape
    zeros = n - np.bincount(features, minlength=width)
    home = edges.histogram_bin(np.zeros(width), np.arange(width))
    keys = features[counted] * edges.bins + index[counted]
    counts = np.bincount(keys, minlength=width * edges.bins).reshape(width, edges.bins).astype(np.float64)
    counts[np.arange(width), home] += zeros
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1.0)
    return -nats_to_bits(xlogy(share, share).sum(1))


def quantisation_error(
    codes: scipy.sparse.csr_array, dictionary: Dictionary, outputs: np.ndarray, edges: Edges, mends: Mends
) -> float:
    """What it calls mse_loss, sqrt(MSE) / d; mended: the mean square error over the outputs' variance."""
    features = features_of(codes)
    middles = edges.middles(codes.data.astype(np.float64), features)
    base = np.asarray(dictionary.bias, np.float64)
    if not mends.zero_stays_zero:
        rest = edges.middles(np.zeros(codes.shape[1]), np.arange(codes.shape[1]))
        base, middles = base + rest @ dictionary.rows, middles - rest[features]
    quantised = scipy.sparse.csr_array((middles, codes.indices, codes.indptr), shape=codes.shape)
    left = outputs - (quantised @ dictionary.rows.astype(np.float64) + base)
    square = float(np.mean(np.square(left)))
    if mends.relative_error:
        return square / float(np.square(outputs - outputs.mean(0)).mean())
    return float(np.sqrt(square)) / outputs.shape[1]


def top_k(codes: scipy.sparse.csr_array, k: int) -> scipy.sparse.csr_array:
    """The k largest positive activations of each token."""
    token = np.repeat(np.arange(codes.shape[0]), np.diff(codes.indptr))
    order = np.lexsort((-codes.data, token))
    rank = np.arange(len(order)) - codes.indptr[token[order]]
    chosen = order[(rank < k) & (codes.data[order] > 0)]
    pairs = (token[chosen], codes.indices[chosen])
    return scipy.sparse.csr_array((codes.data[chosen], pairs), shape=codes.shape)
