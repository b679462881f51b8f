"""MDL-SAE's closed forms and its entropy."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import scipy.sparse

from estimators.published.mdl_sae import (
    dense_bound_bits,
    independent_feature_bits,
    one_hot_bound_bits,
    unordered_bound_bits,
    upper_bound_bits,
)


def entropy(symbols: list[float]) -> float:
    return -sum(c / len(symbols) * math.log2(c / len(symbols)) for c in Counter(symbols).values())


def sparse_codes(tokens: int = 200, width: int = 7, signed: bool = False) -> scipy.sparse.csr_array:
    rng = np.random.default_rng(5)
    values = rng.integers(1, 9, (tokens, width)) * (rng.random((tokens, width)) < np.linspace(0.02, 1.0, width))
    return scipy.sparse.csr_array(np.where(rng.random(values.shape) < 0.5 * signed, -1.0, 1.0) * values)


def test_the_figures_for_gpt2_are_closed_forms() -> None:
    assert dense_bound_bits(768) == 5376
    assert round(upper_bound_bits(65, 25_000)) == 1405
    assert upper_bound_bits(65, 25_000) == pytest.approx(1404.6, abs=0.05)
    assert round(one_hot_bound_bits(896, 50_257)) == 13_993


def test_naming_a_set_costs_what_sets_there_are() -> None:
    exact = math.log2(math.comb(25_000, 65))
    assert unordered_bound_bits(65, 25_000, 0) == pytest.approx(exact, rel=1e-9)
    assert exact == pytest.approx(647, abs=1)
    assert unordered_bound_bits(65, 25_000) == pytest.approx(1102, abs=1)


@pytest.mark.parametrize("signed", [False, True])
def test_the_entropy_is_that_of_counting(signed: bool) -> None:
    codes = sparse_codes(signed=signed)
    expected = 0.0
    for column in codes.toarray().T:
        on = column[column != 0].tolist()
        expected += entropy((column != 0).tolist())
        expected += len(on) / len(column) * entropy(on) if on else 0.0
    assert independent_feature_bits(codes) == pytest.approx(expected, rel=1e-12)


def test_values_are_conditioned_on_being_on() -> None:
    """A feature that is 1 whenever it is on costs H(p) and nothing for its value."""
    codes = scipy.sparse.csr_array(np.repeat([[1.0], [0.0]], [50, 150], axis=0))
    assert independent_feature_bits(codes) == pytest.approx(entropy([1] * 50 + [0] * 150))


def test_coarser_bins_are_cheaper_and_one_bin_is_free() -> None:
    codes = sparse_codes(600)
    lengths = [independent_feature_bits(codes, bits) for bits in range(8)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(lengths))
    support = sum(entropy((c != 0).tolist()) for c in codes.toarray().T)
    assert lengths[0] == pytest.approx(support)


def test_scaling_a_feature_changes_nothing() -> None:
    codes = sparse_codes()
    scaled = codes.multiply(np.array([[0.5, 2.0, 4.0, 1.0, 8.0, 0.25, 16.0]])).tocsr()
    assert independent_feature_bits(scaled) == pytest.approx(independent_feature_bits(codes), rel=1e-12)
