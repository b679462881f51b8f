"""What the tests of codes share: the check that a stream is as long as its code says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mdl.codes import BitReader, BitWriter


@pytest.fixture
def stream() -> Callable:
    """Write, compare the stream with the exact length (0.1 % and 64 bits), and hand back a reader of it."""

    def make(write: Callable[[BitWriter], object], bits: float) -> BitReader:
        writer = BitWriter()
        write(writer)
        data = writer.to_bytes()
        assert abs(writer.information_bits - bits) <= 1e-3 + 1e-9 * bits
        assert abs(8 * len(data) - bits) <= 64 + 0.001 * bits
        return BitReader(data)

    return make
