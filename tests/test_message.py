"""Messages: round trips, sums of shares, refusals; and nothing but `MessageError` for damaged bytes."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mdl.message
from mdl.codes import AdaptiveInteger, BitWriter, write_count, write_signed_count
from mdl.codes.arrays import ADAPTIVE_LIMIT, MENU
from mdl.codes.lattice import LARGEST_COEFFICIENT, MOST_PREDICTED, Lattice
from mdl.codes.tables import COARSENESS
from mdl.errors import MessageError
from mdl.message import (
    CHECKSUM_BYTES,
    LARGEST_EXPONENT,
    MAGIC,
    NAME,
    STEPS_PER_OCTAVE,
    VERSION,
    Message,
    QuantisedArray,
    Section,
    decode_message,
    encode_message,
    sealed,
    step_exponent,
    work_limit,
)


@st.composite
def quantised(draw: st.DrawFn, rows: int | None = None) -> QuantisedArray:
    """Any integers, a few octaves of steps."""
    shape = (draw(st.integers(0, 6)) if rows is None else rows, draw(st.integers(0, 5)))
    largest = draw(st.sampled_from([1, 3, 100, 10**6]))
    symbols = draw(arrays(np.int64, shape, elements=st.integers(-largest, largest)))
    base = draw(st.integers(-90, 40))
    octaves = draw(arrays(np.int64, shape[0], elements=st.integers(0, 3)))
    return QuantisedArray(symbols, base + STEPS_PER_OCTAVE * octaves if symbols.size else np.zeros(shape[0], np.int64))


RUNAWAY = Lattice(
    np.zeros(200, np.int64), np.zeros(200, np.int64), np.tril(np.full((200, 200), LARGEST_COEFFICIENT), -1)
)


@st.composite
def section(draw: st.DrawFn) -> Section:
    rows = draw(st.integers(0, 5))
    header = tuple(draw(st.lists(quantised(), max_size=2)))
    parts = tuple(draw(st.lists(quantised(rows), max_size=2)))
    return Section(draw(st.text("abcdefgh-", max_size=20)), header, parts)


def assert_same(a: Section, b: Section) -> None:
    assert a.kind == b.kind
    for ours, theirs in ((a.header, b.header), (a.parts, b.parts)):
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            assert np.array_equal(x.symbols, y.symbols)
            assert np.array_equal(x.exponents, y.exponents)
            assert x.values().dtype == np.float32
            assert np.array_equal(x.values(), y.values())


def dictionary(features: int = 60, width: int = 12) -> list[Section]:
    rng = np.random.default_rng(0)
    rows = QuantisedArray.from_values(rng.normal(size=(features, width)), np.exp2(rng.uniform(-6, -2, features)))
    classes = QuantisedArray.from_integers(rng.integers(0, 4, features))
    mean = QuantisedArray.from_values(rng.normal(size=width), 1e-3)
    return [Section("special", (mean,)), Section("dictionary", (mean,), (rows, classes))]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(section(), max_size=3))
def test_round_trip_and_shares(sections: list[Section]) -> None:
    message = encode_message(sections)
    for sent, received in zip(sections, decode_message(message.data), strict=True):
        assert_same(sent, received)
    assert [len(bits) for bits in message.part_bits] == [s.n_parts for s in sections]
    parts = sum(float(bits.sum()) for bits in message.part_bits)
    assert message.header_bits + parts == pytest.approx(8 * len(message.data), abs=1e-9)
    assert message.whole_bits == 8 * len(message.data)
    assert all((bits >= 0).all() for bits in message.part_bits)


def test_shares_of_a_dictionary_add_up_to_the_file() -> None:
    message = encode_message(dictionary())
    assert message.header_bits + sum(b.sum() for b in message.part_bits) == 8 * len(message.data)
    assert 0 < message.header_bits < 0.5 * message.whole_bits
    assert abs(message.whole_bits - message.information_bits) <= 64 + 0.001 * message.information_bits
    assert (message.part_bits[1] > 0).all()


def test_a_row_of_finer_step_costs_more() -> None:
    rng = np.random.default_rng(1)
    steps = np.where(np.arange(80) < 40, 2.0**-3, 2.0**-7)
    rows = QuantisedArray.from_values(rng.normal(size=(80, 20)), steps)
    bits = encode_message([Section("x", (), (rows,))]).part_bits[0]
    # Four octaves finer: four bits a number more.
    assert bits[40:].mean() - bits[:40].mean() == pytest.approx(80, rel=0.1)


def test_the_order_of_parts_does_not_change_the_length() -> None:
    before = dictionary()
    order = np.random.default_rng(3).permutation(before[1].n_parts)
    after = encode_message([before[0], before[1].reordered(order)])
    first = encode_message(before)
    assert abs(after.whole_bits - first.whole_bits) <= 32
    assert np.allclose(after.part_bits[1], first.part_bits[1][order])
    assert_same(decode_message(after.data)[1], before[1].reordered(order))


@pytest.mark.parametrize("size", [50, ADAPTIVE_LIMIT + 1000])
def test_wide_alphabets(size: int) -> None:
    rng = np.random.default_rng(2)
    symbols = rng.integers(-(2**40), 2**40, (size // 10, 10))
    message = encode_message([Section("wide", (), (QuantisedArray(symbols, np.zeros(len(symbols), np.int64)),))])
    assert np.array_equal(decode_message(message.data)[0].parts[0].symbols, symbols)
    assert 41 * symbols.size < message.whole_bits < 41.1 * symbols.size + 10_000


def test_an_outlier_beside_many_small_integers() -> None:
    """One symbol far from the others must not make all of them dear: twelve digits of a million are raw otherwise."""
    symbols = np.random.default_rng(3).integers(-2, 3, (200, 100))
    symbols[17, 4] = 2**20
    message = encode_message([Section("outlier", (), (QuantisedArray.from_integers(symbols),))])
    assert np.array_equal(decode_message(message.data)[0].parts[0].symbols, symbols)
    assert message.whole_bits < 4 * symbols.size


def test_empty_messages_and_arrays() -> None:
    assert decode_message(encode_message([]).data) == []
    for shape in [(0, 0), (0, 5), (3, 0)]:
        array = QuantisedArray(np.zeros(shape, np.int64), np.zeros(shape[0], np.int64))
        received = decode_message(encode_message([Section("e", (array,), (array,))]).data)[0]
        assert received.header[0].symbols.shape == received.parts[0].symbols.shape == shape


def test_values_are_rounded_to_half_a_step() -> None:
    values = np.random.default_rng(4).normal(size=(30, 7))
    steps = np.exp2(np.random.default_rng(5).uniform(-8, 0, 30))
    array = QuantisedArray.from_values(values, steps)
    used = np.exp2(array.exponents / STEPS_PER_OCTAVE)
    assert (np.abs(array.values() - values) <= used[:, None] / 2 * (1 + 1e-5)).all()
    assert (np.abs(np.log2(used / steps)) <= 0.5 + 0.5 / STEPS_PER_OCTAVE + 1e-9).all()
    assert len(np.unique(array.exponents % STEPS_PER_OCTAVE)) == 1
    assert step_exponent(0.25) == -8


def test_a_vector_of_integers_is_a_column() -> None:
    array = QuantisedArray.from_integers(np.array([3, -1, 4]))
    assert array.symbols.shape == (3, 1)
    assert array.values().ravel().tolist() == [3.0, -1.0, 4.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(MessageError, match="1 of 4 values to be sent are NaN or infinite"):
        QuantisedArray.from_values(np.array([[1.0, bad], [0.0, 2.0]]), 0.1)


def test_absurdly_fine_steps_are_refused() -> None:
    with pytest.raises(MessageError, match=r"values of up to 2 in steps of down to 1e-20: more than 2\^60"):
        QuantisedArray.from_values(np.array([[1.0, 2.0]]), 1e-20)


def test_part_arrays_have_one_row_a_part() -> None:
    arrays_of_two = QuantisedArray.from_integers(np.arange(4)), QuantisedArray.from_integers(np.arange(3))
    with pytest.raises(MessageError, match=r"\[4, 3\] rows; row i of each must be part i"):
        encode_message([Section("x", (), arrays_of_two)])


def refusal_or_sections(data: bytes) -> list[Section] | None:
    """What comes of decoding; any other exception than `MessageError` fails the test."""
    try:
        return decode_message(data)
    except MessageError:
        return None


def test_every_truncation_is_refused() -> None:
    data = encode_message(dictionary(20, 6)).data
    for length in range(len(data)):
        with pytest.raises(MessageError, match="not a message" if length < len(MAGIC) else "damaged or truncated"):
            decode_message(data[:length])


def test_every_flipped_bit_is_noticed() -> None:
    """CRC-32 notices every single flipped bit, and every burst of up to 32 bits."""
    data = encode_message(dictionary(20, 6)).data
    for bit in range(8 * len(MAGIC), 8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MessageError, match="its checksum is not that of its content"):
            decode_message(bytes(damaged))


@pytest.mark.parametrize("position", range(len(NAME)))
def test_another_magic_is_refused(position: int) -> None:
    data = bytearray(encode_message(dictionary()).data)
    data[position] ^= 0x20
    with pytest.raises(MessageError, match="not a message: begins with"):
        decode_message(bytes(data))


@pytest.mark.parametrize("version", [0, 1, VERSION + 1, 255])
def test_another_version_names_both(version: int) -> None:
    data = encode_message(dictionary()).data
    other = NAME + bytes([version]) + data[len(MAGIC) :]
    for content in (other, sealed(other[:-CHECKSUM_BYTES])):
        with pytest.raises(MessageError, match=f"of version {version}; this program reads version {VERSION}"):
            decode_message(content)


def test_bytes_after_the_end_are_refused() -> None:
    data = encode_message(dictionary()).data
    with pytest.raises(MessageError):
        decode_message(data + b"x")
    with pytest.raises(MessageError):
        decode_message(sealed(data[:-CHECKSUM_BYTES] + b"x"))


def test_flipped_bits_under_a_right_checksum_end_in_a_refusal_or_in_other_numbers() -> None:
    """A forger's flipped bit is either noticed or decodes to something else; there is no other exception."""
    data, rng = encode_message(dictionary(20, 6)).data[:-CHECKSUM_BYTES], np.random.default_rng(6)
    noticed, started = 0, time.process_time()
    for _ in range(150):
        damaged = bytearray(data)
        damaged[rng.integers(len(MAGIC), len(data))] ^= 1 << int(rng.integers(8))
        noticed += refusal_or_sections(sealed(bytes(damaged))) is None
    assert noticed > 100
    assert time.process_time() - started < 30


def forged(rows: int, columns: int, code: int, symbol: int = 0) -> bytes:
    """A message with one array of any shape, under a table in which one symbol is certain (code 0), or zeros (4)."""
    writer = BitWriter()
    for count in (1, 0, 1, rows, columns):
        write_count(writer, count)
    write_signed_count(writer, 0)
    writer.uniform(np.array([0]), 4)
    writer.uniform(np.array([code]), len(MENU))
    if code == 0:
        write_signed_count(writer, symbol)
        write_count(writer, 0)
        writer.uniform(np.array([0]), len(COARSENESS))
        AdaptiveInteger().write(writer, np.array([1]), np.zeros(1, np.int64), 1)
    write_count(writer, 0)
    return sealed(MAGIC + writer.to_bytes())


def test_a_certain_symbol_may_be_repeated_within_the_limit() -> None:
    assert (decode_message(forged(100, 1000, 0, symbol=7))[0].header[0].symbols == 7).all()


@pytest.mark.parametrize("code", [0, 4])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1 << 28, 1), (1 << 14, 1 << 14), (1 << 11, 1 << 10), (0, 1 << 60), (1 << 60, 0), (1 << 61, 1 << 61)],
)
def test_forged_shapes_take_neither_time_nor_memory(rows: int, columns: int, code: int) -> None:
    data = forged(rows, columns, code)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(MessageError, match="units of work asked of a reader that allows"):
        decode_message(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < 0.5
    assert peak < 1 << 20


def test_the_limit_is_for_the_whole_message() -> None:
    """Many arrays, each of which would pass."""
    array = QuantisedArray.from_integers(np.zeros((300, 1000), np.int64))
    assert decode_message(encode_message([Section("x", (array,) * 3)]).data)[0].header[2].symbols.shape == (300, 1000)
    with pytest.raises(MessageError, match="Leave rows of zeros out"):
        encode_message([Section("x", (array,) * 4)])


def test_work_grows_with_the_bytes() -> None:
    assert work_limit(1000) - work_limit(0) == 1000 * (work_limit(1) - work_limit(0)) > 0
    # A thousandth of the entries is not zero: 0.011 bit an element in 1.2 million elements.
    symbols = (np.random.default_rng(8).random((1200, 1000)) < 1e-2).astype(np.int64)
    message = encode_message([Section("x", (QuantisedArray.from_integers(symbols),))])
    assert np.array_equal(decode_message(message.data)[0].header[0].symbols, symbols)


@pytest.mark.parametrize(
    ("symbols", "exponents", "match"),
    [
        ([[1]], [LARGEST_EXPONENT + 1], r"steps from 2\^\(505/4\)"),
        ([[1], [1]], [0, -LARGEST_EXPONENT - 1], "which float32 has"),
        ([[4]], [LARGEST_EXPONENT], "infinite in float32"),
        ([[1 << 60, 0]], [300], "infinite in float32"),
        ([[1]], [10**9], "which float32 has"),
    ],
)
def test_steps_and_values_are_float32_numbers(symbols: list, exponents: list, match: str) -> None:
    array = QuantisedArray(np.array(symbols), np.array(exponents))
    with pytest.raises(MessageError, match=match):
        encode_message([Section("x", (array,))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantisedArray, "check", lambda self: None)
        data = encode_message([Section("x", (array,))]).data
    with pytest.raises(MessageError):
        decode_message(data)


def test_extreme_steps_and_values_pass() -> None:
    array = QuantisedArray(np.array([[3], [1], [-(1 << 60)]]), np.array([LARGEST_EXPONENT, -LARGEST_EXPONENT, 0]))
    received = decode_message(encode_message([Section("x", (array,))]).data)[0].header[0]
    assert_same(Section("x", (array,)), Section("x", (received,)))
    assert np.isfinite(received.values()).all()
    assert (received.values() != 0).all()


def on_lattice(rows: int = 30, width: int = 5, predicted: bool = True, seed: int = 0) -> QuantisedArray:
    rng = np.random.default_rng(seed)
    prediction = np.tril(rng.integers(-20, 20, (width, width)), -1) if predicted else None
    lattice = Lattice(rng.integers(-9, 9, width), rng.integers(-3, 30, width), prediction)
    return QuantisedArray(rng.integers(-40, 40, (rows, width)), rng.integers(-30, 30, rows), lattice)


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(30, 5), (1, 1), (3, 1), (0, 4), (4, 0)])
def test_rows_on_a_lattice_come_back(rows: int, width: int, predicted: bool) -> None:
    array = on_lattice(rows, width, predicted)
    message = encode_message([Section("x", (), (array,))])
    received = decode_message(message.data)[0].parts[0]
    if rows * width:
        for ours, theirs in zip(array.integer_arrays(), received.integer_arrays(), strict=True):
            assert np.array_equal(ours, theirs)
    assert received.values().tobytes() == array.values().tobytes()
    assert message.part_bits[0].shape == (rows,)
    order = np.random.default_rng(1).permutation(rows)
    again = Section("x", (), (array,)).reordered(order).parts[0]
    assert np.array_equal(again.values(), array.values()[order])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: replace(a, lattice=replace(a.lattice, columns=a.lattice.columns + 500)), "steps of up to"),
        (lambda a: replace(a, lattice=replace(a.lattice, spreads=a.lattice.spreads - 1100)), "spreads of up to"),
        (lambda a: replace(a, lattice=replace(a.lattice, prediction=a.lattice.prediction << 20)), "coefficients of up"),
        (lambda a: replace(a, exponents=a.exponents + 490), "which float32 has"),
        (lambda a: replace(a, exponents=a.exponents + 470, symbols=a.symbols << 8), "infinite in float32"),
        (lambda a: replace(a, exponents=a.exponents + (1 << 59)), "which float32 has"),
        (lambda a: replace(on_lattice(2, 200), lattice=RUNAWAY), "beyond floating point"),
    ],
)
def test_lattices_that_no_receiver_takes_are_refused(change, match: str) -> None:
    """By the sender, and by the receiver of what a sender without checks writes."""
    section = Section("x", (change(on_lattice()),))
    with pytest.raises(MessageError, match=match):
        encode_message([section])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantisedArray, "check", lambda self: None)
        data = encode_message([section]).data
    with pytest.raises(MessageError):
        decode_message(data)


def test_a_forged_lattice_takes_neither_time_nor_memory() -> None:
    """Certain symbols, and a prediction of certain coefficients: a few bytes that ask for a basis of 1024 x 1024."""
    width = MOST_PREDICTED
    still = np.zeros(width, np.int64)
    array = QuantisedArray(
        np.zeros((3, width), np.int64), still[:3], Lattice(still, still, np.zeros((width, width), int))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantisedArray, "check", lambda self: None)
        patch.setattr(mdl.message, "work_limit", lambda size: 1 << 40)
        data = encode_message([Section("x", (array,))]).data
    assert len(data) < 100
    tracemalloc.start()
    with pytest.raises(MessageError, match="units of work asked of a reader that allows"):
        decode_message(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    with pytest.raises(MessageError, match="Leave rows of zeros out"):
        encode_message([Section("x", (array,))])


@pytest.mark.parametrize("name", ["columns", "spreads", "prediction"])
def test_a_lattice_is_made_of_integers(name: str) -> None:
    array = on_lattice()
    lattice = replace(array.lattice, **{name: getattr(array.lattice, name) + 0.1234567})
    with pytest.raises(MessageError, match="lattice integers of type float64: a message carries integers"):
        encode_message([Section("x", (replace(array, lattice=lattice),))])


def test_symbols_on_a_lattice_are_no_plain_integers() -> None:
    array = replace(on_lattice(), exponents=np.zeros(30, np.int64))
    with pytest.raises(MessageError, match="steps other than 1"):
        array.integers("ids", -40, 40, 5)


@pytest.mark.parametrize("kind", ["caf\u00e9", "x" * 65])
def test_kinds_are_short_ascii_names(kind: str) -> None:
    with pytest.raises(MessageError, match="no name of up to 64 ASCII characters"):
        encode_message([Section(kind)])


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(MessageError, match="need an exponent for each row"):
        encode_message([Section("x", (QuantisedArray(np.zeros((2, 2), np.int64), np.zeros(3, np.int64)),))])


def test_arrays_of_plain_integers_and_vectors_say_what_is_wrong() -> None:
    array = QuantisedArray.from_integers(np.array([[1, 2], [3, 4]]))
    assert np.array_equal(array.integers("ids", 1, 4, 2), array.symbols)
    for arguments, match in [
        ((0, 3, 2), r"ids has values from 1 to 4; they lie in \[0, 3\]"),
        ((1, 4, 1), "2 columns"),
    ]:
        with pytest.raises(MessageError, match=match):
            array.integers("ids", *arguments)
    with pytest.raises(MessageError, match="steps other than 1"):
        QuantisedArray(array.symbols, np.array([0, 4])).integers("ids", 0, 9, 2)
    with pytest.raises(MessageError, match="the mean is one vector, not 2 rows"):
        array.vector("the mean")


@pytest.mark.parametrize("features", [200, 800])
def test_overhead_of_long_messages(features: int) -> None:
    """Above 100 kbit the file is within 0.5 % of its information, marks, padding and checksum included."""
    message = encode_message(dictionary(features, 96))
    assert message.whole_bits > 100_000
    assert 0 <= message.whole_bits - message.information_bits < 0.005 * message.information_bits
    assert decode_message(message.data)[1].parts[0].symbols.shape == (features, 96)


@settings(max_examples=150, deadline=5000, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_quickly(data: bytes) -> None:
    found = refusal_or_sections(sealed(MAGIC + data))
    # A stream of nothing at all is a handful of bytes; anything longer that decodes would be a miracle.
    assert found is None or len(data) < 12


def test_a_message_is_what_the_file_is(tmp_path) -> None:
    message = encode_message(dictionary())
    (tmp_path / "message.mdl").write_bytes(message.data)
    assert isinstance(message, Message)
    assert (tmp_path / "message.mdl").stat().st_size * 8 == message.whole_bits
