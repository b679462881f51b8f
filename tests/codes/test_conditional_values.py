"""Values, columns and indices given what was decoded before: oracles, Kraft's sum, invariance, streams, damage."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl.codes import AdaptiveInteger, BitReader, BitWriter, IndexCode
from mdl.codes.conditional_columns import ConditionalColumnCode
from mdl.codes.conditional_indices import PRIORS, ConditionalIndexCode
from mdl.codes.conditional_values import ConditionalValueCode
from mdl.errors import CodeError


def side(n, ids=5, seed=0, length=20):
    """Token ids, and previous positions of sequences of one length."""
    tokens = np.random.default_rng(seed).integers(0, ids, n)
    positions = np.arange(n)
    return tokens, np.where(positions % length == 0, -1, positions - 1)


def sparse_values(n=300, features=12, seed=0, signed=False):
    """Values that depend on feature and token id, and stay alike while a feature stays on; pairs by token, feature."""
    rng = np.random.default_rng(seed)
    tokens, previous = side(n, 5, seed)
    typical = np.exp(rng.normal(2, 1.5, (5, features)))
    mask = rng.random((n, features)) < 0.3
    values = np.rint(typical[tokens] * np.exp(0.15 * rng.normal(size=mask.shape))).astype(np.int64) + 1
    if signed:
        values *= rng.choice([-1, 1], features)
    owner, found = np.nonzero(mask)
    return (owner, found), values[owner, found], np.full(owner.size, 4.0), tokens, previous


def ranked(support):
    """The support as a reader has it, and the pairs' order there: ranks of first use, ascending by token, then rank."""
    owner, features = support
    met = {}
    for feature in features:  # pairs are sorted by token, then feature
        met.setdefault(int(feature), len(met))
    ranks = np.array([met[int(f)] for f in features], dtype=np.int64)
    order = np.lexsort((ranks, owner))
    return (owner[order], ranks[order]), order


def slow_context(index, support, values, scales, tokens, previous):
    owner, features = support
    t, feature = owner[index], features[index]
    earlier = [i for i in range(len(values)) if owner[i] < t and features[i] == feature]
    pair = [abs(int(values[i])) for i in earlier if tokens[owner[i]] == tokens[t]]
    mean = (sum(abs(int(values[i])) for i in earlier) + scales[index]) / (len(earlier) + 1)
    expected = (sum(pair) + 0.5 * mean) / (len(pair) + 0.5)
    before = [int(values[i]) for i in earlier if owner[i] == previous[t]]
    if before:
        expected = (abs(before[0]) ** 3 * expected) ** 0.25
    level = min(max(math.floor(4 * math.log2(expected)), 0), 95)
    return (level * 3 + min(len(pair), 2)) * 3 + (0 if not before else 1 if before[0] > 0 else 2)


@pytest.mark.parametrize("signed", [False, True])
def test_contexts_of_values_are_those_of_the_rule(signed):
    support, values, scales, tokens, previous = sparse_values(60, 6, 1, signed)
    found = ConditionalValueCode(signed).contexts(support, values, scales, tokens, previous)
    args = (support, values, scales, tokens, previous)
    assert found.tolist() == [slow_context(i, *args) for i in range(values.size)]


@pytest.mark.parametrize("signed", [False, True])
def test_values_on_a_stream(stream, signed):
    support, values, scales, tokens, previous = sparse_values(signed=signed)
    code = ConditionalValueCode(signed)
    found = code.bits(support, values, scales, tokens, previous)
    assert found.per_token.sum() == pytest.approx(found.total, rel=1e-12)
    assert 0 < found.learning < found.total
    plain = AdaptiveInteger(signed=signed, with_zero=False)
    assert found.total < 0.9 * plain.bits(values, np.zeros(values.size, dtype=np.int64), 1).sum()
    reader = stream(lambda writer: code.write(writer, support, values, scales, tokens, previous), found.total)
    seen, order = ranked(support)
    assert np.array_equal(code.read(reader, seen, scales[order], tokens, previous), values[order])
    reader.finish()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.booleans(), st.dictionaries(st.integers(0, 9), st.integers(-(2**40), 2**40))),
        max_size=12,
    ),
    seed=st.integers(0, 100),
)
def test_values_round_trip_whatever_the_order_of_features(rows, seed):
    tokens = np.array([row[0] for row in rows], dtype=np.int64)
    previous = np.array([-1 if row[1] or t == 0 else t - 1 for t, row in enumerate(rows)], dtype=np.int64)
    entries = [(t, f, v or 1) for t, row in enumerate(rows) for f, v in sorted(row[2].items())]
    owner, features, values = (np.array([e[i] for e in entries], dtype=np.int64) for i in range(3))
    code, writer, scales = ConditionalValueCode(signed=True), BitWriter(), 1.0 + features
    args = (values, scales, tokens, previous)
    bits = code.bits((owner, features), *args).total
    permuted = np.random.default_rng(seed).permutation(10)
    assert code.bits((owner, permuted[features]), *args).total == pytest.approx(bits, abs=1e-9)
    code.write(writer, (owner, features), *args)
    assert writer.information_bits == pytest.approx(bits, abs=1e-6)
    seen, order = ranked((owner, features))
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(code.read(reader, seen, scales[order], tokens, previous), values[order])
    reader.finish()


def test_kraft_of_values():
    """Three values of one feature, each from 1 to 7: the code keeps the rest for the larger ones."""
    tokens, previous = np.array([0, 1, 0]), np.array([-1, 0, 1])
    support, scales = (np.arange(3), np.zeros(3, dtype=np.int64)), np.ones(3)
    total = sum(
        2.0 ** -ConditionalValueCode().bits(support, np.array(v), scales, tokens, previous).total
        for v in product(range(1, 8), repeat=3)
    )
    assert 0.1 < total < 1.0


def test_zeros_are_refused():
    support, values, scales, tokens, previous = sparse_values()
    with pytest.raises(CodeError, match="a zero"):
        ConditionalValueCode().bits(support, 0 * values, scales, tokens, previous)


def columns(n=300, width=4, seed=0):
    rng = np.random.default_rng(seed)
    tokens, previous = side(n, 5, seed)
    drift = np.cumsum(rng.normal(size=(n, width)), 0)
    return np.rint(rng.normal(0, 6, (5, width))[tokens] + drift % 5 + rng.normal(size=(n, width))).astype(np.int64), (
        tokens,
        previous,
    )


@pytest.mark.parametrize("blend", range(4))
def test_columns_on_a_stream(stream, blend):
    values, known = columns()
    code = ConditionalColumnCode(blend)
    found = code.bits(values, *known)
    assert found.per_token.sum() == pytest.approx(found.total, rel=1e-12)
    reader = stream(lambda writer: code.write(writer, values, *known), found.total)
    assert np.array_equal(ConditionalColumnCode.read(reader, 4, *known)[1], values)
    reader.finish()


def test_columns_are_shorter_for_what_is_known():
    values, known = columns(1000)
    plain = AdaptiveInteger().bits(values.ravel(), np.tile(np.arange(4), 1000), 4).sum()
    code = ConditionalColumnCode.fit(values, *known)
    assert code.bits(values, *known).total < 0.8 * plain
    assert code.bits(values, *known).total == min(ConditionalColumnCode(b).bits(values, *known).total for b in range(4))


@pytest.mark.parametrize("blend", [0, 2])
def test_contexts_of_columns_are_those_of_the_rule(blend):
    values, (tokens, previous) = columns(60, 2)
    found = ConditionalColumnCode(blend).contexts(values, tokens, previous)

    def mean(t, j):
        same = [int(values[s, j]) for s in range(t) if tokens[s] == tokens[t]]
        return sum(same) / (len(same) + 1)

    for t, j in product(range(60), range(2)):
        expected = mean(t, j)
        if previous[t] != -1:
            expected += blend / 4 * (values[t - 1, j] - mean(t - 1, j))
        size = abs(expected)
        level = 0 if size < 0.25 else min(math.floor(math.log2(4 * size)) + 1, 12)
        assert found[t, j] == 25 * j + 12 + math.copysign(level, expected)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(-5, 5) | st.integers()), max_size=20),
    blend=st.integers(0, 3),
)
def test_columns_round_trip(rows, blend):
    tokens = np.array([row[0] for row in rows], dtype=np.int64)
    previous = np.array([-1 if row[1] or t == 0 else t - 1 for t, row in enumerate(rows)], dtype=np.int64)
    clipped = [max(min(row[2], 2**61), -(2**61)) for row in rows]
    values = np.array([[v, -v // 3] for v in clipped], dtype=np.int64).reshape(-1, 2)
    code, writer = ConditionalColumnCode(blend), BitWriter()
    code.write(writer, values, tokens, previous)
    assert writer.information_bits == pytest.approx(
        code.bits(values, tokens, previous).total, abs=1e-6 + 2.0 * (not rows)
    )
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(ConditionalColumnCode.read(reader, 2, tokens, previous)[1], values)
    reader.finish()


def test_kraft_of_columns():
    tokens, previous = np.array([0, 1, 0]), np.array([-1, 0, 1])
    total = sum(
        2.0 ** (2.0 - ConditionalColumnCode().bits(np.array(v)[:, None], tokens, previous).total)
        for v in product(range(-3, 4), repeat=3)
    )
    assert 0.1 < total < 1.0


def slow_index_bits(ranks, tokens, previous, code):
    bits, uses = 0.0, []
    for t, rank in enumerate(ranks):
        met = len(uses)
        new = (met - 0.5) / t if met else 1.0
        same = [s for s in range(t) if tokens[s] == tokens[t]]
        a, b = PRIORS[code.token], PRIORS[code.previous]
        weights = []
        for cluster in range(met):
            p = uses[cluster] / t * (1 - new)
            weight = (sum(ranks[s] == cluster for s in same) + a * p) / (len(same) + a)
            if previous[t] != -1:
                after = [s for s in range(t) if previous[s] != -1 and ranks[s - 1] == ranks[t - 1]]
                pulled = (sum(ranks[s] == cluster for s in after) + b * p) / (len(after) + b)
                weight *= (pulled / p) ** (code.weight / 4)
            weights.append(weight)
        weights.append(a * new / (len(same) + a))
        bits += math.log2(sum(weights)) - math.log2(weights[rank])
        if rank == met:
            uses.append(0)
        uses[rank] += 1
    return bits


@pytest.mark.parametrize("code", [ConditionalIndexCode(), ConditionalIndexCode(0, 7, 2)])
def test_index_bits_are_those_of_the_rule_and_sum_to_one(code):
    tokens, previous, total = np.array([0, 1, 0, 0, 1]), np.array([-1, 0, -1, 2, 3]), 0.0
    for indices in product(range(5), repeat=5):
        by_first_use = {}
        if [by_first_use.setdefault(i, len(by_first_use)) for i in indices] != list(indices):
            continue  # the same sequence of ranks
        bits = code.total_bits(np.array(indices), tokens, previous) - 9.0
        assert bits == pytest.approx(slow_index_bits(indices, tokens, previous, code), abs=1e-9)
        total += 2.0**-bits
    assert total == pytest.approx(1.0, abs=1e-12)


def test_indices_on_a_stream(stream):
    rng = np.random.default_rng(0)
    tokens, previous = side(1200, 40, 1)
    indices = np.where(rng.random(1200) < 0.3, rng.integers(0, 60, 1200), tokens * 7 % 60).astype(np.int64)
    code = ConditionalIndexCode.fit(indices[:200], tokens[:200], previous[:200])
    found = code.bits(indices, tokens, previous)
    assert found.total == pytest.approx(code.total_bits(indices, tokens, previous))
    assert found.per_token.sum() == pytest.approx(found.total, rel=1e-12)
    assert 0 <= found.learning < found.total < 0.8 * IndexCode().bits(indices)[0]
    order = []
    reader = stream(lambda writer: order.append(code.write(writer, indices, tokens, previous)), found.total)
    assert np.array_equal(order[0][ConditionalIndexCode.read(reader, tokens, previous)[1]], indices)
    reader.finish()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 6)), max_size=30),
    parameters=st.lists(st.integers(0, 7), min_size=3, max_size=3),
)
def test_indices_round_trip_and_names_do_not_matter(rows, parameters):
    tokens, indices = (np.array([row[i] for row in rows], dtype=np.int64) for i in (0, 2))
    previous = np.array([-1 if row[1] or t == 0 else t - 1 for t, row in enumerate(rows)], dtype=np.int64)
    code, writer = ConditionalIndexCode(*parameters), BitWriter()
    order = code.write(writer, indices, tokens, previous)
    bits = code.bits(indices, tokens, previous).total
    assert writer.information_bits == pytest.approx(bits, abs=1e-6)
    assert code.total_bits(100 - 3 * indices, tokens, previous) == pytest.approx(bits, abs=1e-9)
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(order[ConditionalIndexCode.read(reader, tokens, previous)[1]], indices)
    reader.finish()


def test_damaged_streams_are_refused():
    support, values, scales, tokens, previous = sparse_values()
    matrix, known = columns()
    indices = np.arange(300) * 7 % 31
    seen, order = ranked(support)
    value, column, index = ConditionalValueCode(), ConditionalColumnCode(), ConditionalIndexCode()
    cases = [
        (lambda w: value.write(w, support, values, scales, tokens, previous),
         lambda r: value.read(r, seen, scales[order], tokens, previous)),
        (lambda w: column.write(w, matrix, *known), lambda r: column.read(r, 4, *known)),
        (lambda w: index.write(w, indices, tokens, previous), lambda r: index.read(r, tokens, previous)),
    ]  # fmt: skip
    for write, read in cases:
        writer = BitWriter()
        write(writer)
        data = writer.to_bytes()
        middle = len(data) // 2
        for broken in (data[:-8], data[4:], data[:middle] + data[middle + 4 :]):
            with pytest.raises(CodeError):
                _read(read, broken)


def _read(read, data):
    reader = BitReader(data)
    read(reader)
    reader.finish()


@pytest.mark.parametrize("make", [lambda: ConditionalColumnCode(4), lambda: ConditionalIndexCode(token=8)])
def test_parameters_outside_the_grid_are_refused(make):
    with pytest.raises(CodeError):
        make()
