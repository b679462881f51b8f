"""Two stages under integer weights: exact lengths, streams that keep to them, and a leak below any KL of interest."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest

from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.tokens import MAX_VOCABULARY, STREAM_SPREAD_BITS, TokenCode, _fractional_powers
from mdl.errors import CodeError
from mdl.units import nats_to_bits

FILLING = np.arange(4) * 123_456_789
SMALL = [1, 2, 3, 7, 16, 17, 40]
# The bytes are the format: a change of them is a breaking change.
GOLDEN = "1a5ac3b71c1828"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def peaked(n: int, vocabulary: int, top: float, seed: int) -> np.ndarray:
    """Log-probabilities of rows that put nearly all on one token: logits of unit spread, and one of `top`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, vocabulary))
    logits[np.arange(n), rng.integers(0, vocabulary, n)] = top
    return log_softmax(logits)


def draw(log_p: np.ndarray, draws: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    cumulative = np.exp(log_p).cumsum(1)
    found = [np.searchsorted(row, rng.random(draws) * row[-1], side="right") for row in cumulative]
    return np.minimum(np.array(found), log_p.shape[1] - 1)


def ideal_bits(log_p: np.ndarray, tokens: np.ndarray) -> float:
    return float(-nats_to_bits(np.take_along_axis(log_p, tokens, 1)).sum())


def content(reader: BitReader) -> float:
    """Bits that the coder still holds, to a fraction of a bit."""
    words, state = reader._coder.pos()
    return 32 * words + math.log2(int(state))


def consumed(log_q: np.ndarray, tokens: np.ndarray) -> float:
    """What tokens take of a stream, without its marks and its padding, bits; they must come back."""
    rows = TokenCode(log_q.shape[1]).rows(log_q)
    writer = BitWriter()
    rows.write(writer, tokens)
    writer.uniform(FILLING, 1 << 30)  # what is encoded first: lengths of an almost empty coder are a bit off
    reader = BitReader(writer.to_bytes())
    before = content(reader)
    assert np.array_equal(rows.read(reader, tokens.shape[1]), tokens)
    after = content(reader)
    assert np.array_equal(reader.uniform(len(FILLING), 1 << 30), FILLING)
    reader.finish()
    return before - after


@pytest.mark.parametrize("vocabulary", [*SMALL, 2048, 50257])
@pytest.mark.parametrize("draws", [1, 3])
def test_tokens_come_back_at_their_length(vocabulary, draws, stream):
    rng = np.random.default_rng(vocabulary)
    logits = 3 * rng.normal(size=(20, vocabulary)).astype(np.float32)
    tokens = rng.integers(0, vocabulary, (20, draws))
    tokens[0] = vocabulary - 1
    rows = TokenCode(vocabulary).rows(logits)
    bits = rows.bits(tokens)
    assert bits.shape == tokens.shape
    reader = stream(lambda w: rows.write(w, tokens), float(bits.sum()))
    assert np.array_equal(rows.read(reader, draws), tokens)
    reader.finish()


@pytest.mark.parametrize("vocabulary", SMALL)
def test_kraft_by_enumeration(vocabulary):
    logits = 8 * np.random.default_rng(0).normal(size=(30, vocabulary))
    every = np.broadcast_to(np.arange(vocabulary), (30, vocabulary))
    sums = np.exp2(-TokenCode(vocabulary).rows(logits).bits(every)).sum(1)
    assert np.allclose(sums, 1.0, rtol=1e-12)


@pytest.mark.parametrize("vocabulary", [2, 40, 300])
def test_weights_are_those_of_a_slow_oracle(vocabulary):
    """ceil(2^(B + d)) with d on the grid, in 40 decimal digits."""
    getcontext().prec = 40
    logits = 6 * np.random.default_rng(1).normal(size=(4, vocabulary))
    logits[0, 0] = -np.inf
    found = TokenCode(vocabulary).rows(logits).weights.reshape(4, -1)
    largest = 52 - math.ceil(math.log2(vocabulary))
    for row in range(4):
        for token in range(vocabulary):
            gap = nats_to_bits(logits[row, token] - logits[row].max())
            exponent = -largest - 1 if math.isinf(gap) else Decimal(round(gap * 65536)) / 65536
            expected = max(1, math.ceil(Decimal(2) ** (largest + exponent)))
            assert abs(found[row, token] - expected) <= 1 + 4e-15 * expected
    assert (found[:, vocabulary:] == 0).all()
    assert (found.max(1) == 2.0**largest).all()
    assert (found == np.rint(found)).all()
    assert found.sum(1).max() <= 2.0**52


def test_powers_are_exact_to_rounding():
    exponents = np.arange(1 << 16) / (1 << 16)
    assert np.abs(_fractional_powers() / np.exp2(exponents) - 1).max() < 2e-15


def test_the_tolerance_by_vocabulary():
    found = [TokenCode(v).tolerance_bits for v in (1, 2048, 50257, 256_000, MAX_VOCABULARY)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(2**-16, rel=1e-6)
    assert found[1] == pytest.approx(2.31e-5, rel=1e-2)
    assert found[2] == pytest.approx(5.49e-5, rel=1e-2)
    assert found[4] < 6e-4


@pytest.mark.parametrize("top", [8.0, 14.0, 40.0])
@pytest.mark.parametrize("vocabulary", [2048, 50257])
def test_the_leak_keeps_to_the_tolerance(vocabulary, top):
    """Coded length less -log2 p of what was sent, measured on the coder's state to a fraction of a bit."""
    log_p = peaked(24, vocabulary, top, seed=3)
    tokens = draw(log_p, 250, seed=4)
    leak = (consumed(log_p, tokens) - ideal_bits(log_p, tokens)) / tokens.size
    shortfall = TokenCode(vocabulary).own_shortfall_bits
    assert TokenCode(vocabulary).rows(log_p).shortfall_bits(np.exp(log_p), log_p).max() <= shortfall
    assert -shortfall <= leak <= TokenCode(vocabulary).tolerance_bits
    assert shortfall < 1e-4


def test_one_stage_leaks_a_kl_worth():
    """Why there are two: the same peaked rows of 50,257 under one table lose forty times the tolerance and more."""
    log_p = peaked(24, 50257, 40.0, seed=3)
    tokens = log_p.argmax(1)
    writer = BitWriter()
    writer.choices(tokens, np.exp(log_p))
    reader = BitReader(writer.to_bytes())
    before = content(reader)
    assert np.array_equal(reader.choices(np.exp(log_p)), tokens)
    leak = (before - content(reader)) / tokens.size
    assert leak > 40 * TokenCode(50257).tolerance_bits
    assert leak > 0.0025


@pytest.mark.parametrize(("vocabulary", "top"), [(2048, 12.5), (50257, 15.7)])
def test_a_small_kl_is_resolved(vocabulary, top):
    """Below .005 bit on peaked predictions: the coded difference is the sampled log-ratio, to twice the tolerance."""
    log_p = peaked(24, vocabulary, top, seed=5)
    log_q = log_softmax(log_p + 0.4 * np.random.default_rng(6).normal(size=log_p.shape))
    kl = nats_to_bits(np.sum(np.exp(log_p) * (log_p - log_q), 1)).mean()
    assert 1e-3 < kl < 5e-3
    tokens = draw(log_p, 250, seed=7)
    difference = (consumed(log_q, tokens) - consumed(log_p, tokens)) / tokens.size
    ratio = (ideal_bits(log_q, tokens) - ideal_bits(log_p, tokens)) / tokens.size
    slack = max(TokenCode(vocabulary).rows(rows).shortfall_bits(np.exp(log_p), rows).mean() for rows in (log_p, log_q))
    assert abs(difference - ratio) <= TokenCode(vocabulary).tolerance_bits + slack
    assert abs(difference - ratio) < 0.02 * kl


def test_what_the_floors_take_is_bounded():
    """A token of probability 2^-72 costs at most some 48 bits: where M expects it, the code falls short of the KL."""
    log_q = np.zeros((1, 100))
    log_q[0, 7] = -50.0
    log_q = log_softmax(log_q)
    rows = TokenCode(100).rows(log_q)
    tokens = np.full((1, 400), 7)
    short = -nats_to_bits(log_q[0, 7]) - consumed(log_q, tokens) / tokens.size
    sure = np.zeros((1, 100))
    sure[0, 7] = 1.0
    assert short > 20
    assert short - 1e-4 <= rows.shortfall_bits(sure, log_q)[0] <= short + 2
    spread = np.exp(log_q)
    assert 0 <= rows.shortfall_bits(spread, log_q)[0] <= TokenCode(100).own_shortfall_bits


def test_ends_of_streams_differ_by_less_than_the_spread():
    rng = np.random.default_rng(8)
    ends = []
    for n in range(1, 400):
        logits = rng.normal(size=(n % 30 + 1, 50))
        writer = BitWriter()
        TokenCode(50).rows(logits).write(writer, rng.integers(0, 50, (n % 30 + 1, 2)))
        ends.append(8 * len(writer.to_bytes()) - writer.information_bits)
    assert max(ends) - min(ends) < STREAM_SPREAD_BITS


def test_a_constant_makes_no_difference_and_the_bytes_are_golden():
    logits = np.arange(24, dtype=np.float64).reshape(2, 12) % 5 / 4
    tokens = np.array([[3, 11], [0, 7]])
    found = []
    for shift in (0.0, 1024.0):
        writer = BitWriter()
        TokenCode(12).rows(logits + shift).write(writer, tokens)
        found.append(writer.to_bytes().hex())
    assert found[0] == found[1] == GOLDEN


def test_a_probability_of_zero_is_coded():
    logits = np.array([[0.0, -np.inf, 1.0], [-np.inf, 2.0, -np.inf]])
    rows = TokenCode(3).rows(logits)
    bits = rows.bits(np.array([[1], [0]]))
    assert (bits > 49).all()
    writer = BitWriter()
    rows.write(writer, np.array([[1], [0]]))
    assert np.array_equal(rows.read(BitReader(writer.to_bytes()), 1), [[1], [0]])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: TokenCode(0), "between 1 and 1048576 tokens, not 0"),
        (lambda: TokenCode(MAX_VOCABULARY + 1), "not 1048577"),
        (lambda: TokenCode(5).rows(np.zeros((2, 4))), "rows of 4 log-probabilities for 5"),
        (lambda: TokenCode(2).rows(np.array([[0.0, np.nan]])), "1 of 1 rows .* hold NaN"),
        (lambda: TokenCode(2).rows(np.array([[0.0, np.inf], [0.0, 0.0]])), "1 of 2 rows"),
        (lambda: TokenCode(2).rows(np.full((1, 2), -np.inf)), "1 of 1 rows"),
        (lambda: TokenCode(4).rows(np.zeros((1, 4))).bits(np.array([[4]])), r"from 4 to 4 leave \[0, 4\)"),
        (lambda: TokenCode(4).rows(np.zeros((1, 4))).bits(np.array([[-1]])), "from -1 to -1 leave"),
        (lambda: TokenCode(4).rows(np.zeros((3, 4))).bits(np.array([[1]])), "tokens for 1 rows under 3"),
    ],
)
def test_what_makes_no_sense_is_refused(action, message):
    with pytest.raises(CodeError, match=message):
        action()


def test_a_damaged_stream_gives_other_tokens_or_an_error():
    rng = np.random.default_rng(9)
    rows = TokenCode(50).rows(rng.normal(size=(40, 50)))
    tokens = rng.integers(0, 50, (40, 1))
    writer = BitWriter()
    rows.write(writer, tokens)
    data = writer.to_bytes()
    for place in range(len(data)):
        bad = bytearray(data)
        bad[place] ^= 0x08
        try:
            reader = BitReader(bytes(bad))
            found = rows.read(reader, 1)
            reader.finish()
        except CodeError:
            continue
        assert not np.array_equal(found, tokens)
    for keep in range(len(data)):
        with pytest.raises(CodeError):
            _read(rows, data[:keep])


def _read(rows, data):
    reader = BitReader(data)
    rows.read(reader, 1)
    reader.finish()
