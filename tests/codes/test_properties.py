"""Properties of every code on drawn symbols: round trip, exact length, Kraft's sum, and quantisers by precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl.codes import (
    AdaptiveInteger,
    BitReader,
    BitWriter,
    DiscretisedGaussian,
    DiscretisedLaplace,
    IndexCode,
    IntroductionCode,
    TableCode,
    count_bits,
    dead_zone_dequantise,
    dead_zone_quantise,
    dequantise,
    dirichlet_bits,
    enumerative_bits,
    kt_bits,
    kt_support_bits,
    read_adaptive_bits,
    read_count,
    read_enumerative,
    read_signed_count,
    signed_count_bits,
    uniform_quantise,
    write_adaptive_bits,
    write_count,
    write_enumerative,
    write_signed_count,
)
from mdl.codes.arrays import MENU, BucketCode, OneClassCode, read_shortest, write_shortest
from mdl.codes.bitstream import ONE_BY_ONE
from mdl.codes.integers import elias_delta_bits, elias_gamma_bits, elias_omega_bits
from mdl.codes.tables import FrequencyTable
from mdl.errors import CodeError

ARRAY_CODES = [TableCode(), DiscretisedLaplace(), DiscretisedGaussian(), BucketCode(), OneClassCode()]
few = settings(max_examples=15, deadline=None, derandomize=True)
small = st.lists(st.integers(-3, 3) | st.integers(-900, 900), min_size=1, max_size=60)
counts = st.integers(0, 2**62 - 3) | st.integers(0, 40)


def name(code: object) -> str:
    return type(code).__name__


def sent(write: Callable[[BitWriter], object], bits: float) -> BitReader:
    """A reader of what was written; the stream is as long as stated, to 0.1 % and 64 bits."""
    writer = BitWriter()
    write(writer)
    data = writer.to_bytes()
    assert writer.information_bits == pytest.approx(bits, abs=1e-6, rel=1e-9)
    assert abs(8 * len(data) - bits) <= 64 + 0.001 * bits
    return BitReader(data)


def table_bits(code: object, values: np.ndarray) -> float:
    """The whole length of an array code."""
    return float(code.bits(values))


@few
@given(counts, st.integers(-(2**61) + 1, 2**61 - 2) | st.integers(-9, 9))
def test_counts_are_exact(count: int, signed: int) -> None:
    def write(writer: BitWriter) -> None:
        write_count(writer, count)
        write_signed_count(writer, signed)

    reader = sent(write, count_bits(count) + signed_count_bits(signed))
    assert (read_count(reader), read_signed_count(reader)) == (count, signed)
    reader.finish()


@pytest.mark.parametrize("bits", [elias_gamma_bits, elias_delta_bits, elias_omega_bits])
def test_kraft_of_integers_nears_one_from_below(bits: Callable) -> None:
    sums = [math.fsum((2.0 ** -bits(np.arange(1, n))).tolist()) for n in (10, 1000, 100_000)]
    assert 0.5 < sums[0] < sums[1] < sums[2] < 1.0


def test_kraft_of_counts() -> None:
    assert 0.8 < math.fsum(2.0 ** -count_bits(n) for n in range(20_000)) < 1.0
    assert 0.8 < math.fsum(2.0 ** -signed_count_bits(n) for n in range(-10_000, 10_000)) < 1.0


@few
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=80))
def test_adaptive_decisions_are_exact(pairs: list[tuple[int, int]]) -> None:
    contexts, bits = (np.array([p[i] for p in pairs], dtype=np.int64) for i in range(2))
    ones = np.bincount(contexts, bits, 4)
    length = float(kt_bits(ones, np.bincount(contexts, minlength=4) - ones).sum())
    reader = sent(lambda writer: write_adaptive_bits(writer, contexts, bits), length)
    order = iter([*contexts.tolist(), None])
    assert read_adaptive_bits(reader, lambda _: next(order)) == bits.tolist()
    reader.finish()


@pytest.mark.parametrize("n", [1, 4, 9])
def test_kraft_of_mixtures_is_one(n: int) -> None:
    """Over all sequences of a length; by counts, each with its number of sequences."""
    assert math.fsum(math.comb(n, k) * 2.0 ** -float(kt_bits(k, n - k)) for k in range(n + 1)) == pytest.approx(1.0)
    triples = [(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]
    ways = [math.factorial(n) / math.prod(math.factorial(c) for c in t) for t in triples]
    lengths = dirichlet_bits(np.array(triples))
    assert math.fsum(w * 2.0**-b for w, b in zip(ways, lengths, strict=True)) == pytest.approx(1.0)


@few
@given(
    st.lists(st.tuples(st.integers(-(2**40), 2**40) | st.integers(-4, 4), st.integers(0, 2)), max_size=50),
    st.booleans(),
    st.booleans(),
)
def test_adaptive_integers_are_exact(pairs: list[tuple[int, int]], signed: bool, with_zero: bool) -> None:
    values, classes = (np.array([p[i] for p in pairs], dtype=np.int64) for i in range(2))
    values = values if signed else np.abs(values)
    values = values if with_zero else np.where(values == 0, 1, values)
    code = AdaptiveInteger(signed, with_zero)
    length = float(code.bits(values, classes, 3).sum())
    reader = sent(lambda writer: code.write(writer, values, classes, 3), length)
    assert np.array_equal(code.read(reader, classes, 3), values)
    reader.finish()
    assert code.bits(values, classes, 3) == pytest.approx(code.bits(values[::-1], classes[::-1], 3), abs=1e-6)


@pytest.mark.parametrize("with_zero", [True, False])
def test_kraft_of_adaptive_pairs(with_zero: bool) -> None:
    """Over pairs of integers up to 30, every fifth first one: never more than one."""
    values = [v for v in range(-30, 31) if v or with_zero]
    code, classes = AdaptiveInteger(with_zero=with_zero), np.zeros(2, np.int64)
    some = itertools.product(values[::5], values)
    total = math.fsum(2.0 ** -float(code.bits(np.array(pair), classes, 1)[0]) for pair in some)
    assert 0.0 < total < 1.0


@pytest.mark.parametrize("code", ARRAY_CODES, ids=name)
@few
@given(values=small)
def test_array_codes_are_exact(code: object, values: list[int]) -> None:
    array = np.array(values)
    reader = sent(lambda writer: code.write(writer, array), table_bits(code, array))
    assert np.array_equal(code.read(reader, array.size), array)
    reader.finish()
    shares = code.symbol_bits(array)
    assert shares.shape == array.shape
    assert shares.min() >= 0
    # What is not a symbol's is the table's or the parameters'.
    assert shares.sum() <= table_bits(code, array) + 1e-6


@pytest.mark.parametrize("code", ARRAY_CODES, ids=name)
@few
@given(values=small, seed=st.integers(0, 5))
def test_array_codes_do_not_mind_the_order(code: object, values: list[int], seed: int) -> None:
    array = np.array(values)
    order = np.random.default_rng(seed).permutation(array.size)
    assert table_bits(code, array[order]) == pytest.approx(table_bits(code, array), abs=1e-6)
    assert code.symbol_bits(array[order]) == pytest.approx(code.symbol_bits(array)[order], abs=1e-6)


@few
@given(values=st.lists(st.integers(-(2**59), 2**59) | st.integers(-40, 40), min_size=1, max_size=40))
def test_the_menu_takes_the_shortest_that_can_carry_them(values: list[int]) -> None:
    array = np.array(values, dtype=np.int64)
    lengths = []
    for code in MENU:
        try:
            lengths.append(table_bits(code, array))
        except CodeError:
            lengths.append(math.inf)
    reader = sent(lambda writer: write_shortest(writer, array), math.log2(len(MENU)) + min(lengths))
    assert np.array_equal(read_shortest(reader, array.size), array)
    reader.finish()


@few
@given(levels=st.lists(st.integers(0, 40), min_size=1, max_size=50), coarseness=st.sampled_from([1, 2, 4]))
def test_kraft_of_a_table_is_one(levels: list[int], coarseness: int) -> None:
    levels[0] = max(levels[0], 1)
    lengths = FrequencyTable(0, np.array(levels), coarseness).lengths()
    assert math.fsum((2.0**-lengths).tolist()) == pytest.approx(1.0)


@pytest.mark.parametrize("code", [DiscretisedLaplace(), DiscretisedGaussian()], ids=name)
@pytest.mark.parametrize("largest", [1, 9, 300])
def test_kraft_of_the_families_is_one(code: object, largest: int) -> None:
    """One of each symbol that the parameters allow."""
    values = np.arange(-largest, largest + 1)
    assert math.fsum((2.0 ** -code.symbol_bits(values)).tolist()) == pytest.approx(1.0)


@few
@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_sets_are_exact(drawn: tuple[int, set[int]]) -> None:
    n, members = drawn[0], np.array(sorted(drawn[1]), dtype=np.int64)
    writer = BitWriter()
    write_enumerative(writer, members, n)
    assert 0 <= writer.information_bits - enumerative_bits(n, members.size) < 1 + 1e-6
    reader = BitReader(writer.to_bytes())
    assert np.array_equal(read_enumerative(reader, n, members.size), members)
    reader.finish()
    assert float(kt_support_bits(n, members.size)) >= float(enumerative_bits(n, members.size))


@few
@given(rows=st.lists(st.sets(st.integers(0, 40), max_size=12), min_size=1, max_size=20))
def test_introductions_are_exact(rows: list[set[int]]) -> None:
    tokens = np.array([t for t, row in enumerate(rows) for _ in row], dtype=np.int64)
    features = np.array([f for row in rows for f in sorted(row)], dtype=np.int64)
    bits = IntroductionCode().bits((tokens, features), len(rows))
    assert bits.per_token.sum() == pytest.approx(bits.total, abs=1e-6)
    sent(lambda writer: IntroductionCode().write(writer, (tokens, features), len(rows)), bits.total)


@few
@given(indices=st.lists(st.integers(0, 5) | st.integers(0, 10**6), min_size=1, max_size=60))
def test_indices_are_exact(indices: list[int]) -> None:
    array = np.array(indices)
    total, shares = IndexCode().bits(array)
    assert shares.sum() == pytest.approx(total, abs=1e-6)
    reader = sent(lambda writer: IndexCode().write(writer, array), total)
    ranks = IndexCode().read(reader, array.size)
    assert ((ranks[:, None] == ranks[None, :]) == (array[:, None] == array[None, :])).all()
    reader.finish()


finite = st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=1, max_size=60)


@few
@given(values=finite, octave=st.integers(-8, 3))
def test_quantisers_are_within_half_a_step_and_finer_is_never_shorter(values: list[float], octave: int) -> None:
    """A uniform quantiser of half the step is at most half as wrong in the worst case, and tells no less."""
    array, step = np.array(values), 2.0**octave
    levels, finer = uniform_quantise(array, step), uniform_quantise(array, step / 2)
    assert np.abs(dequantise(levels, step) - array).max() <= step / 2 * (1 + 1e-9)
    assert np.abs(dequantise(finer, step / 2) - array).max() <= step / 4 * (1 + 1e-9)
    one_class = np.zeros(array.size, np.int64)
    distinct = np.unique(finer).size - np.unique(levels).size
    assert distinct >= -1 - 2 * int((np.abs(array / step) % 1 == 0.5).sum())
    assert np.abs(finer).max() >= np.abs(levels).max()
    raw = [AdaptiveInteger().context_counts(q, one_class, 1)[2][0] for q in (levels, finer)]
    assert raw[1] >= raw[0]


@pytest.mark.parametrize("code", ARRAY_CODES, ids=name)
def test_rates_rise_by_a_bit_an_octave(code: object) -> None:
    """At high rate half the step is one bit more a value, under every array code: monotone in precision."""
    values = np.random.default_rng(0).laplace(size=6000)
    rates = [table_bits(code, uniform_quantise(values, 2.0**-octave)) / values.size for octave in range(-1, 6)]
    steps = np.diff(rates)
    assert (steps > 0).all()
    assert steps[-2:] == pytest.approx(1.0, abs=0.15)


@few
@given(values=finite, rounding=st.floats(0.1, 0.5))
def test_dead_zones_shrink_levels_and_keep_signs(values: list[float], rounding: float) -> None:
    array = np.array(values)
    dead, full = dead_zone_quantise(array, 0.5, rounding), uniform_quantise(array, 0.5)
    assert (np.abs(dead) <= np.abs(full)).all()
    assert ((dead == 0) | (np.sign(dead) == np.sign(array))).all()
    assert np.array_equal(dead_zone_dequantise(dead, 0.5, np.zeros(3)), dead * 0.5)
    tighter = dead_zone_quantise(array, 0.5, rounding / 2)
    assert (np.abs(tighter) <= np.abs(dead)).all()


@few
@given(values=small)
def test_readers_account_for_their_work(values: list[int]) -> None:
    """Writer and reader count the same work, and a reader stops at its limit."""
    array = np.array(values)
    for code in ARRAY_CODES:
        writer = BitWriter()
        code.write(writer, array)
        reader = BitReader(writer.to_bytes(), work_limit=writer.work)
        assert np.array_equal(code.read(reader, array.size), array)
        if writer.work:
            with pytest.raises(CodeError, match="units of work"):
                code.read(BitReader(writer.to_bytes(), work_limit=writer.work - 1), array.size)
    assert OneClassCode().bits(array) > 0
    assert writer.work == ONE_BY_ONE * array.size


def test_a_damaged_level_beyond_all_tables_is_refused() -> None:
    """2**62 - 1 times a coarseness of 8 wraps around in 64 bits."""
    writer = BitWriter()
    write_signed_count(writer, 0)
    write_count(writer, 1)
    writer.uniform(np.array([3]), 4)
    AdaptiveInteger().write(writer, np.array([2**62 - 1, -5]), np.zeros(2, np.int64), 1)
    with pytest.raises(CodeError, match="a table of levels"):
        TableCode().read(BitReader(writer.to_bytes()), 3)
