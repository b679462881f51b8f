"""Sparse supports and indices: oracles, invariances and streams."""

import math
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from mdl.codes import (
    AdaptiveInteger,
    BitReader,
    BitWriter,
    IndexCode,
    IntroductionCode,
    enumerative_bits,
    kt_bits,
    read_enumerative,
    write_enumerative,
)
from mdl.codes.supports import MAX_TOKENS, read_flags, write_flags
from mdl.errors import CodeError


def draw(n_tokens, n_features, per_token, seed=0):
    """A mask with a few common features and many rare ones."""
    rng = np.random.default_rng(seed)
    chance = 1.0 / np.arange(1, n_features + 1)
    return rng.random((n_tokens, n_features)) < per_token * chance / chance.sum()


def slow_introduction_bits(mask):
    """The sequential rule, feature by feature and token by token."""
    probability, met = Fraction(1), {}
    news = []
    for row in mask.tolist():
        for feature, (ones, chances) in met.items():
            p = Fraction(2 * ones + 1, 2 * chances + 2)
            probability *= p if row[feature] else 1 - p
            met[feature] = (ones + row[feature], chances + 1)
        new = [feature for feature, on in enumerate(row) if on and feature not in met]
        met.update(dict.fromkeys(new, (0, 0)))
        news.append(len(new))
    bits = AdaptiveInteger(signed=False).bits(np.array(news), np.zeros(len(news), dtype=np.int64), 1)[0]
    return math.log2(probability.denominator) - math.log2(probability.numerator) + bits


@pytest.mark.parametrize("seed", range(4))
def test_introduction_bits_are_those_of_the_sequential_rule(seed):
    mask = draw(40, 15, 2.0, seed)
    found = IntroductionCode().bits(sparse.csr_array(mask), 40)
    assert found.total == pytest.approx(slow_introduction_bits(mask), abs=1e-9)
    assert found.per_token.sum() == pytest.approx(found.total, rel=1e-12)
    assert 0 < found.learning < found.total
    assert 0 < found.introductions < found.total


def test_a_matrix_and_pairs_are_the_same_support():
    mask = draw(200, 30, 3.0)
    tokens, features = np.nonzero(mask)
    shuffled = np.random.default_rng(1).permutation(tokens.size)
    a = IntroductionCode().bits(sparse.csr_array(mask.astype(np.float32)), 200)
    b = IntroductionCode().bits((tokens[shuffled], features[shuffled]), 200)
    assert a.total == b.total
    assert np.array_equal(a.per_token, b.per_token)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_features_does_not_matter(seed):
    mask = draw(300, 50, 4.0)
    order = np.random.default_rng(seed).permutation(50)
    a = IntroductionCode().bits(sparse.csr_array(mask), 300)
    b = IntroductionCode().bits(sparse.csr_array(mask[:, order]), 300)
    assert a.total == b.total
    assert a.per_token == pytest.approx(b.per_token, abs=1e-9)


def test_a_feature_that_is_never_on_changes_nothing():
    mask = draw(300, 50, 4.0)
    more = np.zeros((300, 5000), dtype=bool)
    more[:, 1000:1050] = mask
    a = IntroductionCode().bits(sparse.csr_array(mask), 300)
    b = IntroductionCode().bits(sparse.csr_array(more), 300)
    assert a.total == b.total
    assert np.array_equal(a.per_token, b.per_token)


def test_common_features_cost_what_krichevsky_and_trofimov_say():
    mask = np.zeros((1000, 1), dtype=bool)
    mask[::100] = True
    found = IntroductionCode().bits(sparse.csr_array(mask), 1000)
    assert found.total - found.introductions == pytest.approx(float(kt_bits(9, 990)), abs=1e-9)
    assert found.per_token[1] == pytest.approx(found.per_token[2], abs=1e-9)
    assert found.per_token[100] > found.per_token[101] + 5


@pytest.mark.parametrize(("n", "features", "per_token"), [(600, 400, 6.0), (50, 3, 1.5), (300, 40, 39.0)])
def test_introduction_stream(stream, n, features, per_token):
    mask = draw(n, features, per_token)
    support, code = np.nonzero(mask), IntroductionCode()
    order = []
    bits = code.bits(support, n).total
    reader = stream(lambda writer: order.append(code.write(writer, support, n)), bits)
    tokens, ranks = code.read(reader, n)
    reader.finish()
    rebuilt = np.zeros_like(mask)
    rebuilt[tokens, order[0][ranks]] = True
    assert np.array_equal(rebuilt, mask)
    assert tokens.size == mask.sum()


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.sets(st.integers(0, 40), max_size=30), max_size=12))
def test_introduction_round_trip(rows):
    pairs = [(t, f) for t, row in enumerate(rows) for f in row]
    support = tuple(np.array([pair[i] for pair in pairs], dtype=np.int64) for i in (0, 1))
    writer, n = BitWriter(), len(rows)
    order = IntroductionCode().write(writer, support, n)
    assert writer.information_bits == pytest.approx(IntroductionCode().bits(support, n).total, abs=1e-4)
    reader = BitReader(writer.to_bytes())
    tokens, ranks = IntroductionCode().read(reader, n)
    reader.finish()
    assert sorted(zip(tokens.tolist(), order[ranks].tolist(), strict=True)) == sorted(pairs)
    assert np.array_equal(np.unique(ranks, return_index=True)[1], np.sort(np.unique(ranks, return_index=True)[1]))


def test_flags_cost_their_probabilities(stream):
    rng = np.random.default_rng(0)
    for size in (1, 15, 16, 17, 500):
        p = np.exp(rng.uniform(-9, -0.01, size))
        on = rng.random(size) < p
        bits = float(-np.log2(np.where(on, p, 1 - p)).sum())
        reader = stream(lambda writer, on=on, p=p: write_flags(writer, on, p), bits)
        assert np.array_equal(read_flags(reader, p), on)
        reader.finish()


def test_flags_that_are_nearly_certain_are_written():
    p, on = np.full(64, 1 - 1e-5), np.ones(64, dtype=bool)
    on[:16] = False  # a block that is off although each of its features is nearly always on
    writer = BitWriter()
    write_flags(writer, on, p)
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(read_flags(reader, p), on)
    reader.finish()


@pytest.mark.parametrize(
    ("support", "n", "message"),
    [
        ((np.array([0, 0]), np.array([1, 1])), 1, "twice"),
        ((np.array([3]), np.array([1])), 3, "3 tokens"),
        ((np.array([0]), np.array([1])), MAX_TOKENS + 1, "split the data"),
        (sparse.csr_array(np.eye(3)), 4, "3 rows for 4"),
    ],
)
def test_supports_that_do_not_fit_are_refused(support, n, message):
    with pytest.raises(CodeError, match=message):
        IntroductionCode().bits(support, n)


def test_cut_supports_are_refused():
    mask, writer = draw(200, 100, 5.0), BitWriter()
    IntroductionCode().write(writer, sparse.csr_array(mask), 200)
    data = writer.to_bytes()
    with pytest.raises(CodeError):
        BitReader(data[:-8])
    with pytest.raises(CodeError):
        _read_support(data, 260)
    with pytest.raises(CodeError):
        _read_support(data[4:], 200)  # the other end is missing


def _read_support(data, n):
    reader = BitReader(data)
    IntroductionCode().read(reader, n)
    reader.finish()


def test_enumeration_is_a_bijection():
    seen = set()
    for members in combinations(range(7), 3):
        writer = BitWriter()
        write_enumerative(writer, np.array(members[::-1]), 7)
        assert writer.information_bits == math.ceil(math.log2(35)) == 6
        seen.add(writer.to_bytes())
        reader = BitReader(writer.to_bytes())
        assert tuple(read_enumerative(reader, 7, 3).tolist()) == members
        reader.finish()
    assert len(seen) == 35


@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (5, 5), (10, 3), (1000, 10), (1000, 990), (24576, 32)])
def test_enumeration_wastes_less_than_a_bit(n, k):
    members = np.sort(np.random.default_rng(0).choice(n, k, replace=False)).astype(np.int64)
    writer = BitWriter()
    write_enumerative(writer, members, n)
    assert -1e-6 <= writer.information_bits - enumerative_bits(n, k) < 1
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(read_enumerative(reader, n, k), members)
    reader.finish()


def test_enumeration_refuses():
    with pytest.raises(CodeError, match="distinct"):
        write_enumerative(BitWriter(), np.array([1, 1]), 5)
    with pytest.raises(CodeError, match="no set of 6"):
        read_enumerative(BitReader(BitWriter().to_bytes()), 5, 6)


def slow_index_probability(indices):
    probability, uses = Fraction(1), {}
    for t, index in enumerate(indices):
        if t:
            p_new = Fraction(2 * (len(uses) - 1) + 1, 2 * (t - 1) + 2)
            probability *= (1 - p_new) * Fraction(uses[index], t) if index in uses else p_new
        uses[index] = uses.get(index, 0) + 1
    return probability


def test_index_bits_are_those_of_the_sequential_rule_and_sum_to_one():
    total = Fraction(0)
    for indices in product(range(5), repeat=5):
        by_first_use = {}
        if [by_first_use.setdefault(i, len(by_first_use)) for i in indices] != list(indices):
            continue  # the same sequence of ranks
        p = slow_index_probability(indices)
        total += p
        assert IndexCode().bits(np.array(indices))[0] == pytest.approx(-math.log2(p), abs=1e-9)
    assert total == 1


def test_index_code_is_about_the_entropy_and_blind_to_names(stream):
    rng = np.random.default_rng(0)
    indices = rng.zipf(1.4, 6000) % 300
    bits, shares = IndexCode().bits(indices)
    assert shares.sum() == pytest.approx(bits, rel=1e-12)
    assert IndexCode().bits(rng.permutation(300)[indices] + 10**6)[0] == bits
    frequency = np.bincount(indices) / indices.size
    entropy = -(frequency[frequency > 0] * np.log2(frequency[frequency > 0])).sum() * indices.size
    assert IndexCode().learning_bits(indices) == pytest.approx(bits - entropy, abs=1e-6)
    assert -300 * 12 < bits - entropy < 300 * 12
    order = []
    reader = stream(lambda writer: order.append(IndexCode().write(writer, indices)), bits)
    assert np.array_equal(order[0][IndexCode().read(reader, 6000)], indices)
    reader.finish()


@settings(max_examples=40, deadline=None)
@given(indices=st.lists(st.integers(0, 6) | st.integers(0, 1000), max_size=50))
def test_index_round_trip(indices):
    array, writer = np.array(indices, dtype=np.int64), BitWriter()
    order = IndexCode().write(writer, array)
    assert writer.information_bits == pytest.approx(IndexCode().bits(array)[0], abs=1e-6)
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(order[IndexCode().read(reader, array.size)], array)
    reader.finish()


def test_reading_more_indices_than_were_written_is_refused():
    writer = BitWriter()
    IndexCode().write(writer, np.arange(300) % 7)
    with pytest.raises(CodeError):
        _read_indices(writer.to_bytes(), 3000)


def _read_indices(data, n):
    reader = BitReader(data)
    IndexCode().read(reader, n)
    reader.finish()
