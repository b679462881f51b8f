"""The adaptive integer code against a sequential oracle, on streams, and at its speed."""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl.codes import AdaptiveInteger, BitReader, BitWriter
from mdl.codes.adaptive_integer import RAW, WIDE_ROUND
from mdl.errors import CodeError


def slow_decisions(value, signed, with_zero):
    """One value's decisions from the definition: (name of the context, bit); None stands for a raw bit."""
    found = []
    if with_zero:
        found.append(("zero", int(value != 0)))
        if value == 0:
            return found
    if signed:
        found.append(("sign", int(value < 0)))
    digits = f"{abs(value):b}"
    c = len(digits) - 1
    found += [(("exponent", j), int(j < c)) for j in range(c + 1)]
    for i, digit in enumerate(digits[1:]):
        found.append((("digit", c, digits[1 : 1 + i]) if i < 3 else None, int(digit)))
    return found


def slow_bits(values, classes, n_classes, signed, with_zero):
    counts, p = {}, [Fraction(1) for _ in range(n_classes)]
    for value, owner in zip(values, classes, strict=True):
        for context, bit in slow_decisions(value, signed, with_zero):
            k, n = counts.get((owner, context), (0, 0))
            chance = Fraction(1, 2) if context is None else Fraction(2 * k + 1, 2 * n + 2)
            p[owner] *= chance if bit else 1 - chance
            counts[owner, context] = (k + bit, n + 1)
    return [math.log2(x.denominator) - math.log2(x.numerator) for x in p]


def draw(n, n_classes, scale=9.0, seed=0):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, n_classes, n)
    return np.rint(rng.laplace(size=n) * scale / (1 + classes)).astype(np.int64), classes


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("with_zero", [True, False])
def test_bits_are_those_of_the_sequential_rule(signed, with_zero):
    values, classes = draw(300, 3)
    values = values if signed else np.abs(values)
    values = values if with_zero else np.where(values == 0, 17, values)
    code = AdaptiveInteger(signed, with_zero)
    expected = slow_bits(values.tolist(), classes.tolist(), 4, signed, with_zero)
    assert code.bits(values, classes, 4) == pytest.approx(expected, abs=1e-9)
    assert code.bits(values, classes, 4)[3] == 0.0


def test_probabilities_of_first_symbols_sum_to_at_most_one():
    one_class = np.zeros(1, dtype=np.int64)
    lengths = [AdaptiveInteger().bits(np.array([v]), one_class, 1)[0] for v in range(-300, 301)]
    assert 0.98 < math.fsum(2.0**-bits for bits in lengths) < 1.0


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(-5, 5) | st.integers(-(2**62) + 1, 2**62 - 1), max_size=60),
    n_classes=st.sampled_from([1, 3, 40]),
    seed=st.integers(0, 5),
)
def test_round_trip(values, n_classes, seed):
    array = np.array(values, dtype=np.int64)
    classes = np.random.default_rng(seed).integers(0, n_classes, array.size)
    writer = BitWriter()
    AdaptiveInteger().write(writer, array, classes, n_classes)
    assert writer.information_bits == pytest.approx(AdaptiveInteger().bits(array, classes, n_classes).sum(), abs=1e-6)
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(AdaptiveInteger().read(reader, classes, n_classes), array)
    reader.finish()


@pytest.mark.parametrize(("n", "n_classes"), [(20_000, 50), (4000, 1), (3000, WIDE_ROUND)])
@pytest.mark.parametrize(("signed", "with_zero"), [(True, True), (False, True), (True, False), (False, False)])
def test_stream_is_as_long_as_the_exact_length(stream, n, n_classes, signed, with_zero):
    values, classes = draw(n, n_classes, scale=100.0)
    values = values if signed else np.abs(values)
    values = values if with_zero else np.where(values == 0, 3, values)
    code = AdaptiveInteger(signed, with_zero)
    bits = code.bits(values, classes, n_classes).sum()
    reader = stream(lambda writer: code.write(writer, values, classes, n_classes), bits)
    assert np.array_equal(code.read(reader, classes, n_classes), values)
    reader.finish()


@pytest.mark.parametrize("scale", [4.0, 1e12])  # by a dense table, and by sorting
def test_shares_sum_to_the_length(scale):
    values, classes = draw(5000, 6, scale=scale)
    code = AdaptiveInteger()
    bits, shares = code.bits(values, classes, 6), code.symbol_bits(values, classes, 6)
    assert np.bincount(classes, shares, 6) == pytest.approx(bits, rel=1e-9)
    one = (classes == 2) & (values == values[classes == 2][0])
    assert np.unique(shares[one]).size == 1
    elsewhere = code.symbol_bits(values, classes, 6, totals=2.0 * bits)
    assert np.bincount(classes, elsewhere, 6) == pytest.approx(2.0 * bits, rel=1e-9)


def test_both_histograms_agree():
    values, classes = draw(4000, 5)
    far = np.r_[values, 2**50]
    code, owners = AdaptiveInteger(), np.r_[classes, 5]
    assert np.array_equal(code.bits(values, classes, 5), code.bits(far, owners, 6)[:5])


def test_learning_is_positive_and_a_small_part():
    values, classes = draw(20_000, 2)
    bits, learning = AdaptiveInteger().bits(values, classes, 2), AdaptiveInteger().learning_bits(values, classes, 2)
    assert (learning > 0).all()
    assert (learning < 0.02 * bits).all()


def test_length_is_near_the_entropy_of_a_laplacian():
    values, classes = draw(100_000, 1, scale=20.0)
    frequency = np.unique(values, return_counts=True)[1] / values.size
    entropy = -(frequency * np.log2(frequency)).sum() * values.size
    assert entropy < AdaptiveInteger().bits(values, classes, 1)[0] < 1.003 * entropy


def test_empty():
    none = np.zeros(0, dtype=np.int64)
    assert AdaptiveInteger().bits(none, none, 3).tolist() == [0, 0, 0]
    assert AdaptiveInteger().symbol_bits(none, none, 3).size == 0
    writer = BitWriter()
    AdaptiveInteger().write(writer, none, none, 3)
    reader = BitReader(writer.to_bytes())
    assert AdaptiveInteger().read(reader, none, 3).size == 0
    reader.finish()


def test_decisions_are_those_of_the_definition():
    for value in (0, 1, -2, 5, -13, 100, 2**40 + 12345):
        found = [(c[0], b[0]) for i, c, b in AdaptiveInteger().decisions(np.array([value])) if i.size]
        expected = slow_decisions(value, True, True)
        assert [int(bit) for _, bit in found] == [bit for _, bit in expected]
        assert [context == RAW for context, _ in found] == [context is None for context, _ in expected]


@pytest.mark.parametrize(
    ("code", "values", "classes", "message"),
    [
        (AdaptiveInteger(signed=False), [-1], [0], "signed=True"),
        (AdaptiveInteger(with_zero=False), [0], [0], "with_zero=True"),
        (AdaptiveInteger(), [2**62], [0], "leave the code's range"),
        (AdaptiveInteger(), [1], [2], r"not in \[0, 2\)"),
    ],
)
def test_refusals(code, values, classes, message):
    with pytest.raises(CodeError, match=message):
        code.bits(np.array(values), np.array(classes), 2)


@pytest.mark.parametrize("n_classes", [1, 30])
def test_a_cut_stream_is_refused(n_classes):
    values, classes = draw(500, n_classes, scale=50.0)
    writer = BitWriter()
    AdaptiveInteger().write(writer, values, classes, n_classes)
    data = writer.to_bytes()
    for keep in range(4, len(data), 40):
        with pytest.raises(CodeError):
            BitReader(data[:keep])
    with pytest.raises(CodeError):
        _read_all(data, np.r_[classes, classes], n_classes)


def _read_all(data, classes, n_classes):
    reader = BitReader(data)
    AdaptiveInteger().read(reader, classes, n_classes)
    reader.finish()


def test_a_million_symbols_take_no_time():
    values, classes = draw(1_000_000, 200, scale=300.0)
    start = time.process_time()
    AdaptiveInteger().bits(values, classes, 200)
    assert time.process_time() - start < 1.0
