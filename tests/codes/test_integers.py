"""Integer codes: the printed lengths, codewords counted by eye, Kraft's sum, and round trips."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl.codes import BitReader, BitWriter, count_bits, read_count, unzigzag, write_count, zigzag
from mdl.codes import integers as codes
from mdl.codes.integers import floor_log2, rissanen_bits, rissanen_sum
from mdl.errors import CodeError

NAMES = ["gamma", "delta", "omega"]


def bits_of(name, values):
    return getattr(codes, f"elias_{name}_bits")(np.asarray(values))


# Elias 1975, counted from the codewords; the larger ones from the project's table of reference values.
@pytest.mark.parametrize(
    ("n", "gamma", "delta", "omega"),
    [(1, 1, 1, 1), (4, 5, 5, 6), (10, 7, 8, 7), (100, 13, 11, 13), (1000, 19, 16, 17), (10**6, 39, 28, 31)],
)
def test_elias_lengths(n, gamma, delta, omega):
    assert [bits_of(name, [n])[0] for name in NAMES] == [gamma, delta, omega]


def test_codewords_as_printed():
    assert [codes.elias_gamma_codeword(n) for n in (1, 2, 3, 8)] == ["1", "010", "011", "0001000"]
    assert [codes.elias_delta_codeword(n) for n in (1, 2, 3, 8)] == ["1", "0100", "0101", "00100000"]
    assert [codes.elias_omega_codeword(n) for n in (1, 2, 4, 16)] == ["0", "100", "101000", "10100100000"]


@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_those_of_the_codewords_and_prefix_free(name):
    words = [getattr(codes, f"elias_{name}_codeword")(n) for n in range(1, 2000)]
    assert [len(w) for w in words] == bits_of(name, np.arange(1, 2000)).tolist()
    ordered = sorted(words)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))
    assert math.fsum(2.0 ** -len(w) for w in words) < 1.0


# The reference points were computed with the constant 2.865064; this code derives 2.865108.
@pytest.mark.parametrize(("n", "bits"), [(1, 1.52), (4, 4.52), (10, 7.37), (100, 12.88), (1000, 17.32), (10**6, 29.06)])
def test_rissanen_lengths(n, bits):
    assert rissanen_bits(np.array([n]))[0] == pytest.approx(bits, abs=0.0051)


def test_kraft_constant_is_derived_not_copied():
    def weight(n):
        total, term = 0.0, math.log2(n)
        while term > 0:
            total, term = total + term, math.log2(term)
        return 2.0**-total

    # A shorter head than the function's own, and only the first correction of the tail.
    head = math.fsum(weight(n) for n in range(1, 2**16 + 1))
    tail = math.log(2) ** 5 / (1 - math.log(2)) - weight(2**16) / 2
    assert math.isclose(head + tail, rissanen_sum(), abs_tol=1e-9)
    assert rissanen_sum() == pytest.approx(2.8651084, abs=5e-8)
    assert not math.isclose(rissanen_sum(), 2.865064, abs_tol=4e-5)


def test_rissanen_kraft_sum_stays_below_one():
    lengths = rissanen_bits(np.arange(1, 200_000))
    assert 0.6 < np.exp2(-lengths).sum() < 1.0


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.integers(1, 2**62 - 1) | st.integers(1, 20), max_size=20))
def test_round_trip(name, values):
    array = np.array(values, dtype=np.int64)
    writer = BitWriter()
    getattr(codes, f"write_elias_{name}")(writer, array)
    assert writer.information_bits == bits_of(name, array).sum()
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(getattr(codes, f"read_elias_{name}")(reader, len(values)), array)
    reader.finish()


def test_floor_log2_is_exact_beside_powers_of_two():
    powers = 2 ** np.arange(1, 62, dtype=np.int64)
    assert np.array_equal(floor_log2(powers), np.arange(1, 62))
    assert np.array_equal(floor_log2(powers - 1), np.arange(1, 62) - 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**60), 2**60))
def test_zigzag_and_signed_counts(n):
    assert int(unzigzag(zigzag(np.array([n])))[0]) == n
    writer = BitWriter()
    codes.write_signed_count(writer, n)
    assert writer.information_bits == codes.signed_count_bits(n)
    assert codes.read_signed_count(BitReader(writer.to_bytes())) == n


def test_zigzag_order():
    assert zigzag(np.array([0, -1, 1, -2, 2])).tolist() == [0, 1, 2, 3, 4]


def test_counts():
    assert count_bits(0) == 1.0
    writer = BitWriter()
    for n in (0, 1, 7, 10**12):
        write_count(writer, n)
    assert writer.information_bits == sum(map(count_bits, (0, 1, 7, 10**12)))
    reader = BitReader(writer.to_bytes())
    assert [read_count(reader) for _ in range(4)] == [0, 1, 7, 10**12]
    reader.finish()


def test_refusals():
    with pytest.raises(CodeError, match="1 to 2"):
        bits_of("gamma", [0])
    with pytest.raises(CodeError, match="zigzag"):
        write_count(BitWriter(), -1)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_stream_is_refused(name):
    writer = BitWriter()
    getattr(codes, f"write_elias_{name}")(writer, np.full(50, 10**6))
    data = writer.to_bytes()
    for keep in range(4, len(data), 8):
        with pytest.raises(CodeError):
            _read_all(name, data[:keep])


def _read_all(name, data):
    reader = BitReader(data)
    getattr(codes, f"read_elias_{name}")(reader, 50)
    reader.finish()
