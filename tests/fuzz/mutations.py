"""Ways to damage messages, from single bits to whole arrays, and to forge them from nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np

import mdl.codes.lattice
import mdl.message
from mdl.codes import AdaptiveInteger, BitWriter, write_count, write_signed_count
from mdl.codes.arrays import MENU
from mdl.codes.lattice import Lattice
from mdl.codes.tables import COARSENESS, MAX_SPAN
from mdl.errors import CodeError, MessageError
from mdl.message import CHECKSUM_BYTES, MAGIC, ON_LATTICE, STEPS_DIFFER, QuantisedArray, Section, encode_message, sealed

KINDS = (
    *("special", "constant", "table", "affine", "clusters", "components", "dictionary", "random-dictionary"),
    *(
        "skip-dictionary",
        "program",
        "token-pairs",
        "sum",
        "predictor",
        "block-sparse",
        "transcoder",
        "weights",
        "parts",
        "circuit",
        "fourier",
        "fourier-weights",
        "sparse",
    ),
)
EXTREMES = (0, 1, -1, 7, 255, 4096, 1 << 20, 10**9, 1 << 31, 1 << 53, 1 << 60, (1 << 62) - 1)
MOST_BYTES = 2000  # of a mutated message: longer ones only take longer


@dataclass(frozen=True)
class Corpus:
    """Sections of real messages, and the messages without magic and checksum."""

    sections: tuple[tuple[Section, ...], ...]
    streams: tuple[bytes, ...]

    @classmethod
    def of(cls, messages: Sequence[Sequence[Section]]) -> Corpus:
        datas = [encode_message(list(sections)).data for sections in messages]
        streams = tuple(data[len(MAGIC) : -CHECKSUM_BYTES] for data in datas)
        return cls(tuple(tuple(sections) for sections in messages), streams)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _flip(data: bytearray, rng: random.Random, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _edit(data: bytearray, rng: random.Random, other: bytes) -> None:
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(len(data))] = rng.choice((0, 255, rng.randrange(256)))


def _insert(data: bytearray, rng: random.Random, other: bytes) -> None:
    place = rng.randrange(len(data) + 1)
    data[place:place] = rng.choice((rng.randbytes(rng.randrange(1, 9)), bytes(rng.randrange(1, 40)), b"\xff" * 8))


def _delete(data: bytearray, rng: random.Random, other: bytes) -> None:
    place = rng.randrange(len(data))
    del data[place : place + rng.randrange(1, 9)]


def _truncate(data: bytearray, rng: random.Random, other: bytes) -> None:
    del data[rng.randrange(len(data)) :]


def _extend(data: bytearray, rng: random.Random, other: bytes) -> None:
    data += rng.choice((rng.randbytes(rng.randrange(1, 40)), bytes(rng.randrange(1, 9)), other))


def _splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]


def _overwrite(data: bytearray, rng: random.Random, other: bytes) -> None:
    start = rng.randrange(len(other))
    piece = other[start : start + rng.randrange(1, 32)]
    place = rng.randrange(len(data))
    data[place : place + len(piece)] = piece


BYTE_MUTATIONS: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (
    _flip,
    _flip,
    _edit,
    _insert,
    _delete,
    _truncate,
    _extend,
    _splice,
    _overwrite,
)


def _mutated(data: bytes, rng: random.Random, other: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if found:
            rng.choice(BYTE_MUTATIONS)(found, rng, other)
    return bytes(found[:MOST_BYTES])


def damaged_bytes(corpus: Corpus, rng: random.Random) -> bytes:
    """The whole file damaged, magic and checksum with the rest: the checksum nearly always tells."""
    data, other = (sealed(MAGIC + rng.choice(corpus.streams)) for _ in range(2))
    return _mutated(data, rng, other)


def damaged_stream(corpus: Corpus, rng: random.Random) -> bytes:
    """The stream damaged, under a checksum that is right."""
    return sealed(MAGIC + _mutated(rng.choice(corpus.streams), rng, rng.choice(corpus.streams)))


def random_bytes(corpus: Corpus, rng: random.Random) -> bytes:
    """Bytes without sense, behind what a stream begins with or not, under a checksum that is right."""
    head = rng.choice(corpus.streams)[: rng.choice((0, 2, 4, 8))]
    return sealed(MAGIC + head + rng.randbytes(rng.randrange(120)))


# ---- sections --------------------------------------------------------------------------------------------------------


def _any_integer(rng: random.Random) -> int:
    size = rng.choice((rng.randrange(64), rng.choice(EXTREMES), rng.getrandbits(rng.randrange(1, 62))))
    return size if rng.random() < 0.7 else -size


def _array(array: QuantisedArray, rng: random.Random) -> QuantisedArray:
    """The array with some symbols, steps, its lattice or its shape changed."""
    symbols, exponents = array.symbols.copy(), array.exponents.copy()
    way = rng.randrange(8)
    if way < 3 and symbols.size:
        for _ in range(rng.choice((1, 1, 4))):
            symbols[rng.randrange(len(symbols)), rng.randrange(symbols.shape[1])] = _any_integer(rng)
    elif way == 3 and len(exponents):
        exponents[rng.randrange(len(exponents))] = rng.choice((rng.randrange(-700, 700), _any_integer(rng) // 4))
    elif way == 4:
        exponents[:] = rng.choice((rng.randrange(-700, 700), _any_integer(rng) // 4))
    elif way == 5:
        shape = tuple(rng.choice((0, 1, 2, 3, 4, 40)) for _ in range(2))
        symbols = np.resize(symbols, shape) if symbols.size else np.zeros(shape, np.int64)
        exponents = np.resize(exponents, shape[0]) if exponents.size else np.zeros(shape[0], np.int64)
    elif way == 6:
        symbols, exponents = symbols.T.copy(), np.zeros(symbols.shape[1], np.int64)
    else:
        symbols, exponents = np.zeros((1, 1), np.int64) + _any_integer(rng), np.zeros(1, np.int64)
    return QuantisedArray(symbols, exponents, _lattice(array.lattice, symbols.shape[1], rng))


def _lattice(lattice: Lattice | None, width: int, rng: random.Random) -> Lattice | None:
    """The lattice, fitted to the width; or one that is changed, new or gone."""
    way = rng.randrange(8)
    if way == 0 or (lattice is None and way != 1) or not width:
        return None
    if lattice is None:
        lattice = Lattice(np.zeros(width, np.int64), np.zeros(width, np.int64))
    columns, spreads = np.resize(lattice.columns, width), np.resize(lattice.spreads, width)
    prediction = lattice.prediction
    if way == 2:
        prediction = None
    elif way < 5 or (prediction is not None and len(prediction) != width):
        prediction = np.full((width, width), rng.choice((0, 1, 16, -16, 400, _any_integer(rng))))
        prediction[rng.randrange(width)] = _any_integer(rng)
    for values in (columns, spreads):
        if rng.random() < 0.3:
            values[rng.randrange(width)] = rng.choice((rng.randrange(-1100, 1100), _any_integer(rng)))
    return Lattice(columns, spreads, None if prediction is None else np.tril(prediction, -1))


def _arrays(arrays: tuple[QuantisedArray, ...], rng: random.Random) -> tuple[QuantisedArray, ...]:
    found, way = list(arrays), rng.randrange(6)
    if not found or way == 5:
        found.insert(rng.randrange(len(found) + 1), QuantisedArray.from_integers(np.arange(rng.randrange(3))))
    elif way < 3:
        place = rng.randrange(len(found))
        found[place] = _array(found[place], rng)
    elif way == 3:
        del found[rng.randrange(len(found))]
    else:
        rng.shuffle(found)
    return tuple(found)


def _section(section: Section, rng: random.Random) -> Section:
    way = rng.randrange(8)
    if way == 0:
        return replace(section, kind=rng.choice(KINDS))
    if way == 1:
        return Section(section.kind, section.parts, section.header)
    if way < 5:
        return replace(section, header=_arrays(section.header, rng))
    parts = _arrays(section.parts, rng)
    rows = min((len(a.symbols) for a in parts), default=0)
    return replace(section, parts=tuple(a.rows(np.arange(rows)) for a in parts))


def damaged_sections(corpus: Corpus, rng: random.Random) -> bytes:
    """Well-formed messages whose sections are changed: kinds, shapes, symbols, steps, under any code of the menu.

    The sender's own checks are off, as a forger's would be.
    """
    sections = list(rng.choice(corpus.sections))
    if sections and rng.random() < 0.8:
        sections = [rng.choice(sections)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if sections:
            place = rng.randrange(len(sections))
            sections[place] = _section(sections[place], rng)
    with unchecked(rng):
        try:
            return encode_message(sections).data
        except (MessageError, CodeError):  # what no code can carry, such as an integer beyond 2**62
            return damaged_stream(corpus, rng)


def _no_check(array: QuantisedArray) -> None:
    """What a forger leaves out."""


def _no_limit(size: int) -> int:
    return 1 << 62


@contextmanager
def unchecked(rng: random.Random) -> Iterator[None]:
    """A sender that checks nothing and takes any code that can carry an array, mostly the quickest."""

    def write_any(writer: BitWriter, values: np.ndarray) -> np.ndarray:
        narrow = np.abs(values).max() < MAX_SPAN // 2
        index = rng.choices(range(len(MENU)), [1 if narrow else 0, 0.5 * narrow, 0.5 * narrow, 0.3, 5])[0]
        writer.uniform(np.array([index]), len(MENU))
        MENU[index].write(writer, values)
        return np.zeros(values.size)

    with (
        mock.patch.object(QuantisedArray, "check", _no_check),
        mock.patch.object(mdl.message, "work_limit", _no_limit),
        mock.patch.object(mdl.message, "write_shortest", write_any),
        mock.patch.object(mdl.codes.lattice, "write_shortest", write_any),
    ):
        yield


# ---- streams forged from nothing -------------------------------------------------------------------------------------


def _any_count(rng: random.Random) -> int:
    return rng.choice((rng.randrange(6), rng.randrange(300), abs(rng.choice(EXTREMES[:8])), rng.getrandbits(40)))


def _forge_table(writer: BitWriter, rng: random.Random) -> None:
    """A table of any span; certain where one level is not zero."""
    span = rng.choices((1, 2, 30, MAX_SPAN, _any_count(rng) + 1), (6, 3, 3, 1, 1))[0]
    write_signed_count(writer, _any_integer(rng) // 4)
    write_count(writer, span - 1)
    writer.uniform(np.array([rng.randrange(len(COARSENESS))]), len(COARSENESS))
    levels = np.zeros(min(span, MAX_SPAN), np.int64)
    for _ in range(rng.choice((1, 2, 20))):
        levels[rng.randrange(len(levels))] = rng.choice((1, 1, 40, rng.randrange(200), abs(_any_integer(rng)) // 4))
    if rng.random() < 0.3:
        levels[:] = levels.max()
    AdaptiveInteger().write(writer, np.diff(levels, prepend=0), np.zeros(len(levels), np.int64), 1)


def _forge_code(writer: BitWriter, rng: random.Random) -> None:
    code = rng.randrange(len(MENU))
    writer.uniform(np.array([code]), len(MENU))
    if code in (1, 2):
        writer.uniform(np.array([rng.randrange(256)]), 256)
        write_count(writer, rng.choice((1, 2000, 2047, _any_count(rng))))
    elif code == 4:
        size = rng.choices((10, 1000, 16384), (20, 4, 1))[0]
        zeros = np.full(size, rng.choice((0, 0, 1, -5)), np.int64)
        AdaptiveInteger().write(writer, zeros, np.zeros(size, np.int64), 1)
    else:
        _forge_table(writer, rng)


def _forge_array(writer: BitWriter, rng: random.Random) -> None:
    rows, columns = rng.choice(
        ((1, _any_count(rng)), (_any_count(rng), _any_count(rng)), (1, rng.randrange(1100)), (128, 128), (4, 4))
    )
    write_count(writer, rows)
    write_count(writer, columns)
    write_signed_count(writer, rng.choice((0, -20, rng.randrange(-700, 700), _any_integer(rng) // 4)))
    form = rng.choices(range(4), (5, 2, 2, 1))[0]
    writer.uniform(np.array([form]), 4)
    for _ in range(1 + 2 * (form & STEPS_DIFFER)):
        _forge_code(writer, rng)
    if form & ON_LATTICE:
        writer.uniform(np.array([rng.randrange(2)]), 2)
        for _ in range(rng.choice((1, 3, 4, 8))):
            _forge_code(writer, rng)


def forged_stream(corpus: Corpus, rng: random.Random) -> bytes:
    """A stream that follows the format as far as it pleases: enormous shapes, tables that make symbols certain."""
    writer = BitWriter()
    write_count(writer, rng.choice((1, 1, 2, _any_count(rng))))
    name = np.frombuffer(rng.choice(KINDS).encode(), np.uint8).astype(np.int64)
    write_count(writer, rng.choice((len(name), len(name), _any_count(rng))))
    writer.uniform(name, 128)
    header = rng.choice((0, 1, 2))
    write_count(writer, rng.choice((header, header, _any_count(rng))))
    for _ in range(header):
        _forge_array(writer, rng)
    parts = rng.choice((0, 1, 3, 12))
    write_count(writer, parts)
    for _ in range(parts):
        _forge_array(writer, rng)
    writer.bits(np.array([rng.randrange(2) for _ in range(rng.randrange(64))], dtype=np.int64), 0.5)
    return sealed(MAGIC + writer.to_bytes())


STRATEGIES: tuple[tuple[Callable[[Corpus, random.Random], bytes], float], ...] = (
    (damaged_bytes, 0.12),
    (damaged_stream, 0.6),
    (damaged_sections, 0.12),
    (forged_stream, 0.05),
    (random_bytes, 0.11),
)
