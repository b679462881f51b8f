"""Sparse tables under a code book: round trips, lengths, what structure is worth, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.sparse_tables import MOST_PLACES, SparseTablesReader, SparseTablesWriter, rounded
from mdl.codes.supports import enumerative_bits
from mdl.errors import CodeError


def sent(tables: list[tuple[np.ndarray, np.ndarray]]) -> tuple[SparseTablesWriter, BitWriter]:
    collected, writer = SparseTablesWriter(), BitWriter()
    for values, possible in tables:
        collected.add(values, possible)
    collected.finish(writer)
    return collected, writer


def received(data: bytes, masks: list[np.ndarray]) -> list[np.ndarray]:
    stream = BitReader(data)
    reader = SparseTablesReader(stream)
    found = [reader.table(possible) for possible in masks]
    book = reader.book()
    stream.finish()
    return [book[numbers] for numbers in found]


def random_tables(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    tables = []
    for shape in ((5, 7), (1, 1), (0, 3), (4, 1), (9, 9)):
        possible = rng.random(shape) < 0.8
        values = rng.choice([1.0, -0.5, 100.0, 0.375, -3.0e-5], shape).astype(np.float32).astype(np.float64)
        tables.append((values * (rng.random(shape) < 0.3) * possible, possible))
    return tables


@pytest.mark.parametrize("seed", range(6))
def test_what_is_written_is_read_at_its_length(seed: int) -> None:
    tables = random_tables(seed)
    collected, writer = sent(tables)
    assert writer.information_bits == pytest.approx(collected.bits(), abs=1e-6)
    data = writer.to_bytes()
    assert 0 <= 8 * len(data) - collected.bits() < 64
    for (values, _), found in zip(tables, received(data, [p for _, p in tables]), strict=True):
        np.testing.assert_array_equal(values, found)


def test_nothing_is_nearly_free() -> None:
    collected, writer = sent([(np.zeros((30, 40)), np.ones((30, 40), bool))])
    assert collected.bits() < 8
    np.testing.assert_array_equal(received(writer.to_bytes(), [np.ones((30, 40), bool)])[0], 0)


def test_structure_is_shorter_than_a_list_of_places() -> None:
    """A copy of a subspace, and a permutation, against log2 C(n, k) of any set of as many places."""
    rng, mask = np.random.default_rng(0), np.ones((32, 32), bool)
    flat = float(enumerative_bits(1024, 32))
    copied = sent([(np.eye(32), mask)])[0].bits()
    permuted = sent([(np.eye(32)[rng.permutation(32)], mask)])[0].bits()
    assert copied < 0.2 * flat
    assert permuted < flat
    assert permuted > 117.6  # log2 32!


def test_possible_places_alone_are_paid() -> None:
    values, everywhere = np.zeros((40, 40)), np.ones((40, 40), bool)
    rows = np.random.default_rng(1).choice(40, 5, replace=False)
    values[rows] = np.random.default_rng(2).random((5, 40)) < 0.3
    some = np.zeros_like(everywhere)
    some[rows] = True
    assert sent([(values, some)])[0].bits() < sent([(values, everywhere)])[0].bits() - 5


def test_rounding() -> None:
    values = np.array([[100.0, 1.0, -0.3, 0.0, 2.0**-20]])
    np.testing.assert_array_equal(rounded(values, 0), [[128.0, 1.0, -0.25, 0.0, 2.0**-20]])
    np.testing.assert_array_equal(rounded(values, 4), [[100.0, 1.0, -0.296875, 0.0, 2.0**-20]])
    assert np.abs(rounded(values, 10) / np.where(values, values, 1) - (values != 0)).max() <= 2.0**-11


def test_refusals() -> None:
    one = np.ones((1, 1))
    with pytest.raises(CodeError, match="1 numbers are in places that are said to be zero"):
        sent([(one, np.zeros((1, 1), bool))])
    with pytest.raises(CodeError, match="at most 24 binary digits"):
        sent([(one / 3, np.ones((1, 1), bool))])
    with pytest.raises(CodeError, match="24 binary digits"):
        sent([(one * np.inf, np.ones((1, 1), bool))])
    with pytest.raises(CodeError, match=f"more than {MOST_PLACES} places"):
        sent([(np.zeros((1025, 1024)), np.ones((1025, 1024), bool))])


@pytest.mark.parametrize("seed", range(3))
def test_damaged_streams_end_in_one_error_or_in_tables(seed: int) -> None:
    tables = random_tables(seed)
    data, rng = sent(tables)[1].to_bytes(), np.random.default_rng(seed)
    refused = 0
    for _ in range(60):
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        try:
            received(bytes(flipped), [p for _, p in tables])
        except CodeError:
            refused += 1
    assert refused > 40
