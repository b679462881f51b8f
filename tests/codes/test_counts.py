"""Krichevsky and Trofimov's code: the reference table, a sequential oracle, Kraft's sum, and the stream."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from mdl.codes import (
    bernoulli_complexity,
    dirichlet_bits,
    enumerative_bits,
    kt_bits,
    kt_sequence_probabilities,
    kt_support_bits,
    plug_in_bits,
    read_adaptive_bits,
    write_adaptive_bits,
)
from mdl.codes.counts import running_counts
from mdl.errors import CodeError


@pytest.mark.parametrize(
    ("n", "k", "choose", "kt", "enumerated", "nml", "plug_in", "tolerance"),
    [
        (10, 3, 6.907, 10.840, 10.366, 11.033, 8.813, 6e-4),
        (1000, 10, 77.802, 86.108, 87.769, 86.126, 80.793, 6e-4),
        (24576, 32, 349.026, 360.475, 363.611, 360.478, 352.855, 6e-4),
        (10**6, 1000, 11401.45, 11418.05, 11421.38, 11418.05, 11407.76, 6e-3),
    ],
)
def test_reference_table_of_sparse_masks(n, k, choose, kt, enumerated, nml, plug_in, tolerance):
    def near(value):
        return pytest.approx(value, abs=tolerance)

    assert enumerative_bits(n, k) == near(choose)
    assert kt_support_bits(n, k) == kt_bits(k, n - k) == near(kt)
    assert math.log2(n + 1) + enumerative_bits(n, k) == near(enumerated)
    assert plug_in_bits(k, n - k) == near(plug_in)
    assert plug_in_bits(k, n - k) + math.log2(bernoulli_complexity(n)) == near(nml)


@pytest.mark.parametrize(("n", "complexity"), [(1, 2), (2, 2.5), (10, 4.660216), (100, 13.209961), (1000, 40.303213)])
def test_shtarkov_sums(n, complexity):
    assert bernoulli_complexity(n) == pytest.approx(complexity, abs=1e-6)


def slow_kt(bits):
    """The sequential rule in exact rational arithmetic."""
    p, ones = Fraction(1), 0
    for n, bit in enumerate(bits):
        chance = Fraction(2 * ones + 1, 2 * n + 2)
        p *= chance if bit else 1 - chance
        ones += bit
    return p


def test_closed_form_is_the_sequential_rule_and_sums_to_one():
    total = Fraction(0)
    for bits in itertools.product((0, 1), repeat=7):
        p = slow_kt(bits)
        total += p
        assert kt_bits(sum(bits), 7 - sum(bits)) == pytest.approx(-math.log2(p), abs=1e-12)
    assert total == 1


def test_nothing_costs_nothing_and_regret_is_bounded():
    assert kt_bits(0, 0) == 0.0
    k = np.arange(0, 1001)
    regret = kt_bits(k, 1000 - k) - plug_in_bits(k, 1000 - k)
    assert regret.min() > 0
    assert regret.max() <= 0.5 * np.log2(1000) + 1


def test_dirichlet():
    assert dirichlet_bits(np.array([3, 7])) == pytest.approx(float(kt_bits(3, 7)), abs=1e-12)
    sequence, counts, p = [0, 2, 2, 1, 2, 0], [0, 0, 0, 0], Fraction(1)
    for n, symbol in enumerate(sequence):
        p *= Fraction(2 * counts[symbol] + 1, 2 * n + 4)
        counts[symbol] += 1
    assert dirichlet_bits(np.array(counts)) == pytest.approx(-math.log2(p), abs=1e-12)


def slow_probabilities(contexts, bits):
    ones, totals, found = {}, {}, []
    for context, bit in zip(contexts, bits, strict=True):
        found.append((ones.get(context, 0) + 0.5) / (totals.get(context, 0) + 1))
        ones[context] = ones.get(context, 0) + bit
        totals[context] = totals.get(context, 0) + 1
    return found


def test_sequence_probabilities_match_the_oracle():
    rng = np.random.default_rng(0)
    contexts, bits = rng.integers(-3, 9, 700), rng.integers(0, 2, 700)
    p = kt_sequence_probabilities(contexts, bits)
    assert p.tolist() == slow_probabilities(contexts.tolist(), bits.tolist())
    spent = -np.log2(np.where(bits == 1, p, 1 - p)).sum()
    closed = sum(kt_bits(bits[contexts == c].sum(), (1 - bits[contexts == c]).sum()) for c in np.unique(contexts))
    assert spent == pytest.approx(closed, abs=1e-9)
    empty = np.zeros(0, dtype=np.int64)
    assert running_counts(empty, empty)[0].size == 0


def test_adaptive_bits_on_a_stream(stream):
    rng = np.random.default_rng(1)
    bits = (rng.random(5000) < 0.1).astype(np.int64)
    contexts = np.r_[0, bits[:-1]]  # the context is the previous decision, as only the reader can tell
    p = kt_sequence_probabilities(contexts, bits)
    length = -np.log2(np.where(bits == 1, p, 1 - p)).sum()
    reader = stream(lambda writer: write_adaptive_bits(writer, contexts, bits), length)
    left = itertools.count(5000, -1)
    found = read_adaptive_bits(reader, lambda previous: (previous or 0) if next(left) else None)
    assert found == bits.tolist()
    reader.finish()


def test_reading_on_past_the_end_is_refused(stream):
    reader = stream(lambda writer: write_adaptive_bits(writer, np.array([0]), np.array([1])), 1.0)
    left = itertools.count(200, -1)
    with pytest.raises(CodeError, match="past the end"):
        read_adaptive_bits(reader, lambda previous: next(left) or None)
