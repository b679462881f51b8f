"""MDL-SAE: an SAE as a lossy code for activations (Ayonrinde, Pearce and Sharkey 2024, arXiv 2410.11179).

    upper bound            L0 (B + log2 D)
    independent features   sum_i H(on_i) + p_i H(value_i | on_i)

bits a token, D being the width of the dictionary and B the bits of a value. Neither charges the dictionary, the error
that is left, or the tables that the entropies stand for (they are those of the very tokens that are coded).
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

from estimators.published.histogram import entropy_given_on, on_entropy
from mdl.codes.supports import enumerative_bits

VALUE_BITS = 7  # B of the paper's GPT-2 figures
SOURCE = "Ayonrinde et al. 2024, arXiv 2410.11179"


def upper_bound_bits(l0: float | int, width: int, value_bits: float | int = VALUE_BITS) -> float:
    """L0 (B + log2 D): every active feature is named by itself; 1,405 bits for 65 of 25,000 at 7 bits a value."""
    return float(l0 * (value_bits + np.log2(width)))


def unordered_bound_bits(l0: float | int, width: int, value_bits: float | int = VALUE_BITS) -> float:
    """L0 B + log2 C(D, L0): the same, but for the order of the features, which nobody asked for; 1,102 for 1,405."""
    return float(l0 * value_bits + enumerative_bits(width, l0))


def dense_bound_bits(width: int, value_bits: float | int = VALUE_BITS) -> float:
    """d B: all neurons as they are; 5,376 bits for 768 neurons at 7 bits."""
    return float(width * value_bits)


def one_hot_bound_bits(symbols: int, alphabet: int) -> float:
    """n log2 V: n symbols out of V that are named; 13,993 bits for 896 of 50,257."""
    return float(symbols * np.log2(alphabet))


def independent_feature_bits(codes: scipy.sparse.csr_array, value_bits: int = VALUE_BITS) -> float:
    """sum_i H(on_i) + p_i H(value_i | on_i), bits a token, of codes [n, D] whose stored entries are those that are on.

    Values of a feature are put into 2^B bins of equal width between the least and the largest of them and 0. The
    entropies are those of the sample itself.
    """
    on = on_entropy(codes).sum()
    return float(on + entropy_given_on(codes, 1 << value_bits).sum())
