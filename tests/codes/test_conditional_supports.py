"""Supports given token ids and the previous support: an oracle, Kraft's sum, invariance, streams, damage."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from mdl.codes import AdaptiveInteger, BitReader, BitWriter, IntroductionCode
from mdl.codes.conditional_supports import CEILING, FLOOR, PRIORS, ConditionalSupportCode, SupportParameters
from mdl.codes.contexts import check_side, quarter_octave, quarter_power
from mdl.errors import CodeError


def sequences(lengths):
    """The previous position of each position, for sequences of these lengths."""
    previous = np.arange(sum(lengths)) - 1
    previous[np.cumsum([0, *lengths[:-1]])] = -1
    return previous


def draw(n, features, seed=0, ids=12):
    """A mask whose features depend on the token id, and stay on from one position to the next; ids; previous."""
    rng = np.random.default_rng(seed)
    tokens = rng.zipf(1.5, n) % ids
    chance = rng.random((ids, features)) ** 8
    mask = rng.random((n, features)) < chance[tokens]
    for t in range(1, n):
        mask[t] |= mask[t - 1] & (rng.random(features) < 0.5)
    return mask, tokens, sequences([n // 3, n - n // 3])


def slow_bits(mask, tokens, previous, parameters):
    """The rule token by token, feature by feature, in dictionaries; without the numbers of new features."""
    probability_bits, met, history = 0.0, {}, []
    for t, row in enumerate(mask.tolist()):
        starts = previous[t] == -1
        before = history[-1][2] if not starts else None
        start = max(s for s in range(t + 1) if previous[s] == -1)
        for feature, first in met.items():
            seen = range(first + 1, t)
            ones, n = sum(mask[s, feature] for s in seen) + 0.5, len(seen) + 1.0
            p = ones / n
            q = 1 - p

            def odds(on, chances, prior, p=p, q=q):
                return (on + PRIORS[prior] * p) / (chances - on + PRIORS[prior] * q)

            same = [s for s in range(t) if tokens[s] == tokens[t]]
            o = odds(sum(mask[s, feature] for s in same), len(same), parameters.token)
            last = -1 if starts else tokens[t - 1]
            if not starts:
                follows = [s for s in seen if previous[s] != -1 and mask[s - 1, feature]]
                if not before[feature]:
                    follows = [s for s in seen if s not in follows]
                r = odds(sum(mask[s, feature] for s in follows), len(follows), parameters.previous) * q / p
                o *= r ** (parameters.previous_weight / 4)
                weights = {s: 0.8 ** (t - 1 - s) for s in range(start, t)}
                recent = sum(w for s, w in weights.items() if mask[s, feature])
                r = odds(recent, sum(weights.values()), parameters.recency) * q / p
                o *= r ** (parameters.recency_weight / 4)
            same = [s for s in range(t) if (-1 if previous[s] == -1 else tokens[s - 1]) == last]
            r = odds(sum(mask[s, feature] for s in same), len(same), parameters.preceding) * q / p
            o *= r ** (parameters.preceding_weight / 4)
            chance = min(max(o / (1 + o), FLOOR), CEILING)
            probability_bits -= math.log2(chance if row[feature] else 1 - chance)
        for feature in np.flatnonzero(mask[t]):
            met.setdefault(int(feature), t)
        history.append((t, tokens[t], row))
    return probability_bits


@pytest.mark.parametrize("values", [SupportParameters(), SupportParameters(5, 1, 7, 2, 5, 6, 3)])
@pytest.mark.parametrize("seed", range(2))
def test_the_length_is_that_of_the_rule_spelt_out(seed, values):
    mask, tokens, previous = draw(40, 7, seed, ids=4)
    code = ConditionalSupportCode(values)
    found = code.bits(sparse.csr_array(mask), tokens, previous)
    expected = slow_bits(mask, tokens, previous, values)
    assert found.total - found.introductions - values.bits == pytest.approx(expected, rel=1e-9)
    assert found.per_token.sum() == pytest.approx(found.total, rel=1e-12)
    assert code.total_bits(sparse.csr_array(mask), tokens, previous) == pytest.approx(found.total, rel=1e-12)
    assert 0 < found.learning < found.total


@pytest.mark.parametrize("previous", [[-1, 0, 1], [-1, 0, -1]])
def test_kraft_given_how_many_features_are_new(previous):
    """Over all supports in which two features appear at the first token and one at the second: exactly 1."""
    tokens, total = np.array([3, 3, 5]), 0.0
    for flags in product([0, 1], repeat=5):
        mask = np.array([[1, 1, 0], [*flags[:2], 1], flags[2:]])
        found = ConditionalSupportCode().bits(sparse.csr_array(mask), tokens, np.array(previous))
        total += 2.0 ** -(found.total - found.introductions - SupportParameters().bits)
    assert total == pytest.approx(1.0, abs=1e-12)


def test_kraft_over_the_numbers_of_new_features_too():
    code, tokens, previous, total = ConditionalSupportCode(), np.array([0, 0]), np.array([-1, 0]), 0.0
    for first, second in product(range(6), repeat=2):
        for flags in product([0, 1], repeat=first):
            mask = np.zeros((2, 10), dtype=int)
            mask[0, :first], mask[1, :first], mask[1, first : first + second] = 1, flags, 1
            total += 2.0 ** (code.parameters.bits - code.total_bits(sparse.csr_array(mask), tokens, previous))
    assert 0.5 < total < 1.0


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.sets(st.integers(0, 20), max_size=8)), max_size=14),
    parameters=st.lists(st.integers(0, 7), min_size=7, max_size=7),
    seed=st.integers(0, 100),
)
def test_round_trip_exactness_and_blindness_to_the_order_of_features(rows, parameters, seed):
    n = len(rows)
    tokens = np.array([row[0] for row in rows], dtype=np.int64)
    previous = np.array([-1 if row[1] or t == 0 else t - 1 for t, row in enumerate(rows)], dtype=np.int64)
    pairs = [(t, f) for t, row in enumerate(rows) for f in sorted(row[2])]
    support = tuple(np.array([pair[i] for pair in pairs], dtype=np.int64) for i in (0, 1))
    code, writer = ConditionalSupportCode(SupportParameters(*parameters)), BitWriter()
    bits = code.total_bits(support, tokens, previous)
    permuted = np.random.default_rng(seed).permutation(21) * 5
    assert code.total_bits((support[0], permuted[support[1]]), tokens, previous) == pytest.approx(bits, abs=1e-9)
    order = code.write(writer, support, tokens, previous)
    assert writer.information_bits == pytest.approx(bits, abs=1e-4)
    data = writer.to_bytes()
    assert abs(8 * len(data) - bits) <= 64 + 0.001 * bits
    reader = BitReader(data)
    _, (found, ranks) = ConditionalSupportCode.read(reader, tokens, previous)
    reader.finish()
    assert sorted(zip(found.tolist(), order[ranks].tolist(), strict=True)) == pairs
    assert n == 0 or found.size == len(pairs)


def test_what_the_receiver_knows_is_worth_bits(stream):
    mask, tokens, previous = draw(200, 80, 3)
    support = np.nonzero(mask)
    code = ConditionalSupportCode.fit(support, tokens, previous)
    bits = code.bits(support, tokens, previous).total
    assert bits <= ConditionalSupportCode().total_bits(support, tokens, previous)
    assert bits < 0.8 * IntroductionCode().bits(support, 200).total
    order = []
    reader = stream(lambda writer: order.append(code.write(writer, support, tokens, previous)), bits)
    _, (found, ranks) = ConditionalSupportCode.read(reader, tokens, previous)
    reader.finish()
    rebuilt = np.zeros_like(mask)
    rebuilt[found, order[0][ranks]] = True
    assert np.array_equal(rebuilt, mask)


def test_where_the_receiver_knows_nothing_of_use_little_is_lost():
    """One token id and independent positions: the contexts say nothing, and cost only what it takes to find out."""
    mask = np.random.default_rng(0).random((500, 40)) < np.geomspace(0.3, 0.01, 40)
    tokens = np.zeros(500, dtype=np.int64)
    bits = ConditionalSupportCode().total_bits(sparse.csr_array(mask), tokens, sequences([500]))
    assert bits < 1.1 * IntroductionCode().bits(sparse.csr_array(mask), 500).total


def test_damaged_streams_are_refused():
    mask, tokens, previous = draw(100, 40, 1)
    writer = BitWriter()
    ConditionalSupportCode().write(writer, sparse.csr_array(mask), tokens, previous)
    data = writer.to_bytes()
    more = np.r_[tokens, tokens]
    with pytest.raises(CodeError):
        _read(data, more, sequences([200]))
    with pytest.raises(CodeError):
        _read(data[4:], tokens, previous)
    with pytest.raises(CodeError):
        _read(data, tokens[:75], previous[:75])
    rng, refused = np.random.default_rng(0), 0
    for _ in range(10):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            _read(bytes(broken), tokens, previous)
        except CodeError:
            refused += 1
    assert refused >= 9  # the rest are other supports: a stream has marks, and no checksum


def _read(data, tokens, previous):
    reader = BitReader(data)
    ConditionalSupportCode.read(reader, tokens, previous)
    reader.finish()


@pytest.mark.parametrize(
    ("tokens", "previous", "message"),
    [
        ([1, 2], [-1, 0], "2 previous positions for 3 tokens"),
        ([1, 2, 3], [-1, 0, 0], "position 2 follows 0"),
        ([1, 2, 3], [0, 0, 1], "position 0 follows 0"),
        ([1, -2, 3], [-1, 0, 1], "token id -2"),
    ],
)
def test_side_knowledge_that_does_not_fit_is_refused(tokens, previous, message):
    with pytest.raises(CodeError, match=message):
        check_side(np.array(tokens), np.array(previous), 3)


def test_parameters_outside_the_grid_are_refused():
    with pytest.raises(CodeError, match=r"\[0, 8\)"):
        SupportParameters(token=8)


def test_powers_and_octaves_by_square_roots():
    x = np.geomspace(1e-6, 1e6, 400)
    for quarters in range(8):
        assert np.broadcast_to(quarter_power(x, quarters), 400) == pytest.approx(x ** (quarters / 4), rel=1e-14)
    assert np.array_equal(quarter_octave(x), np.floor(4 * np.log2(x)))
    assert quarter_octave(np.array([1.0, 2.0, 0.5])).tolist() == [0, 4, -4]


def test_new_features_have_contexts_by_how_often_the_id_was_met():
    """Without features met before, the stream is the numbers of new features alone."""
    mask = sparse.csr_array(np.eye(6, dtype=int)[:, :6])
    tokens = np.array([0, 0, 0, 1, 2, 0])
    found = ConditionalSupportCode().bits(mask, tokens, sequences([6]))
    expected = AdaptiveInteger(signed=False).bits(np.ones(6, dtype=np.int64), np.array([0, 1, 2, 0, 0, 2]), 3).sum()
    assert found.introductions == pytest.approx(expected)
