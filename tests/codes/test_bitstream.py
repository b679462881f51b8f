"""The stream gives back what was written, at its length, and refuses what is not a whole stream."""

import numpy as np
import pytest

from mdl.codes.bitstream import MAX_DIGIT, PROBABILITY_FLOOR, BitReader, BitWriter, uniform_digits
from mdl.errors import CodeError

# The bytes are the format: a change of them is a breaking change.
GOLDEN = "217e8146a25ac3d409"


def test_all_verbs_come_back_in_order():
    rng = np.random.default_rng(0)
    bits, chances = rng.integers(0, 2, 500), rng.uniform(0.01, 0.99, 500)
    small, large = rng.integers(0, 7, 40), rng.integers(0, 10**15, 40)
    table, symbols = np.array([0, 5, 0, 1, 900]), np.array([1, 4, 4, 3, 4])
    weights, rows = rng.uniform(0.0, 3.0, (30, 5)), rng.integers(0, 5, 30)
    writer = BitWriter()
    writer.bits(bits, chances)
    writer.uniform(small, 7)
    writer.bits(bits, 0.25)
    writer.categorical(symbols, table)
    writer.uniform(large, 10**15)
    writer.choices(rows, weights)
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(reader.bits(500, chances), bits)
    assert np.array_equal(reader.uniform(40, 7), small)
    assert np.array_equal(reader.bits(500, 0.25), bits)
    assert np.array_equal(reader.categorical(5, table), symbols)
    assert np.array_equal(reader.uniform(40, 10**15), large)
    assert np.array_equal(reader.choices(weights), rows)
    reader.finish()


def test_writing_twice_gives_the_same_bytes_and_golden_words():
    writer = BitWriter()
    writer.bits(np.array([1, 0, 1, 1, 0, 0, 0, 1]), 0.5)
    writer.uniform(np.array([5, 250]), 1000)
    assert writer.to_bytes() == writer.to_bytes()
    assert writer.information_bits == pytest.approx(8 + 2 * np.log2(1000), abs=1e-12)
    assert writer.to_bytes().hex() == GOLDEN


@pytest.mark.parametrize("p", [0.3, 0.01, 1e-3, 1e-4])
def test_sparse_decisions_cost_their_entropy(p):
    ones = (np.random.default_rng(1).random(300_000) < p).astype(np.int64)
    writer = BitWriter()
    writer.bits(ones, p)
    ideal = -(ones.sum() * np.log2(p) + (ones.size - ones.sum()) * np.log2(1 - p))
    assert writer.information_bits == pytest.approx(ideal, rel=1e-12)
    assert 0 <= 8 * len(writer.to_bytes()) - ideal < 64 + 1e-4 * ideal


@pytest.mark.parametrize("size", [1, 2, 1000, MAX_DIGIT, MAX_DIGIT + 1, 1_000_003, 2**40 + 7, 2**62 - 1])
def test_uniform_digits_waste_next_to_nothing(size):
    digits = uniform_digits(size)
    product = int(np.prod(np.array(digits, dtype=object)))
    assert size <= product <= size * (1 + 2**-11)
    assert max(digits) <= MAX_DIGIT
    values = np.random.default_rng(2).integers(0, size, 2000)
    writer = BitWriter()
    writer.uniform(values, size)
    data = writer.to_bytes()
    assert 8 * len(data) <= 2000 * np.log2(size) * 1.001 + 64
    reader = BitReader(data)
    assert np.array_equal(reader.uniform(2000, size), values)
    reader.finish()


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (lambda w: w.bits(np.array([1]), PROBABILITY_FLOOR / 2), "coder can resolve"),
        (lambda w: w.bits(np.array([1]), 1.0), "coder can resolve"),
        (lambda w: w.bits(np.array([1]), float("nan")), "coder can resolve"),
        (lambda w: w.bits(np.array([2]), 0.5), "0 or 1, not 2"),
        (lambda w: w.uniform(np.array([7]), 7), r"do not fit \[0, 7\)"),
        (lambda w: w.uniform(np.array([0]), 0), "between 1 and"),
        (lambda w: w.categorical(np.array([1]), np.array([3, 0])), "no frequency"),
        (lambda w: w.categorical(np.array([0]), np.array([0, 0])), "not all zero"),
    ],
)
def test_what_cannot_be_written_is_refused(verb, message):
    with pytest.raises(CodeError, match=message):
        verb(BitWriter())


def _written(n=400):
    writer = BitWriter()
    writer.bits(np.random.default_rng(3).integers(0, 2, n), 0.5)
    return writer.to_bytes()


def test_a_cut_stream_is_refused():
    data = _written()
    for keep in range(len(data)):
        with pytest.raises(CodeError):
            _read_all(data[:keep])
    with pytest.raises(CodeError, match="padded with zeros"):
        BitReader(data + b"\0")


def _read_all(data):
    reader = BitReader(data)
    reader.bits(400, 0.5)
    reader.finish()


def test_reading_too_much_or_too_little_is_refused():
    reader = BitReader(_written())
    reader.bits(399, 0.5)
    with pytest.raises(CodeError, match="goes on"):
        reader.finish()
    reader = BitReader(_written())
    reader.bits(400, 0.5)
    reader.bits(40, 0.5)
    with pytest.raises(CodeError, match="past the end"):
        reader.check()
    with pytest.raises(CodeError, match="bits where"):
        BitReader(_written()).bits(10**12, 0.5)
    with pytest.raises(CodeError, match="bits where"):
        BitReader(_written()).uniform(10**12, 1000)
    with pytest.raises(CodeError, match="as many probabilities"):
        BitReader(_written()).bits(3, np.array([0.5, 0.5]))


def test_one_wrong_byte_never_passes_for_the_same_symbols():
    data = _written()
    good = BitReader(data).bits(400, 0.5)
    for i in range(len(data)):
        bad = bytearray(data)
        bad[i] ^= 0x10
        try:
            reader = BitReader(bytes(bad))
            found = reader.bits(400, 0.5)
            reader.finish()
        except CodeError:
            continue
        assert not np.array_equal(found, good)
