"""Speed, length and overhead of the codes, against general compressors and raw floats, on the same arrays.

python -m experiments.codes_benchmark.run [--out results.json] [--size 1000000] [--sequences 48]
"""

from __future__ import annotations

import json
import lzma
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow
from rich.console import Console
from rich.table import Table

from experiments.codes_benchmark.arrays import Coded, embedded, synthetic

ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """One code on one array: million symbols a second of processor time, bits a symbol.

    `ideal_bits`: -log2 p of the code's own model a symbol, None for what has no model; `overhead`: bytes of the stream
    over it, as a fraction; `against_ours`: length over that of our code.
    """

    array: str
    code: str
    symbols: int
    bytes: int
    encode_million_per_second: float
    decode_million_per_second: float
    bits_per_symbol: float
    ideal_bits: float | None
    overhead: float | None
    against_ours: float


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the shortest processor time of some rounds, in seconds."""
    best = np.inf
    for _ in range(ROUNDS):
        start = time.process_time()
        found = call()
        best = min(best, time.process_time() - start)
    return found, max(best, 1e-9)


def narrowest(values: np.ndarray) -> np.ndarray:
    """The same integers in the narrowest type that holds them all: what a general compressor should be given."""
    kinds = [np.int8, np.int16, np.int32, np.int64]
    return values.astype(next(k for k in kinds if np.iinfo(k).min <= values.min() and values.max() <= np.iinfo(k).max))


def row(coded: Coded, code: str, size: int, encode: float, decode: float, ideal: float | None, ours: int) -> Row:
    bits, n = 8.0 * size, coded.symbols
    return Row(
        array=coded.name,
        code=code,
        symbols=n,
        bytes=size,
        encode_million_per_second=n / encode / 1e6,
        decode_million_per_second=n / decode / 1e6,
        bits_per_symbol=bits / n,
        ideal_bits=None if ideal is None else ideal / n,
        overhead=None if ideal is None else bits / ideal - 1.0,
        against_ours=size / ours,
    )


def measure(coded: Coded) -> list[Row]:
    """Our code, zstd at level 19, xz at its default level 6, raw float16 and float32, each decoded and compared."""
    (data, information), encode = timed(coded.write)
    found, decode = timed(lambda: coded.read(data))
    assert np.array_equal(found, coded.values), coded.name
    rows = [row(coded, coded.code, len(data), encode, decode, information, len(data))]
    plain = narrowest(coded.values)
    zstd = pyarrow.Codec("zstd", compression_level=19)
    raw = plain.tobytes()
    packers: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Any]]] = {
        f"zstd -19 on {plain.dtype}": (
            lambda: zstd.compress(raw, asbytes=True),
            lambda b: zstd.decompress(b, decompressed_size=len(raw), asbytes=True),
        ),
        f"xz -6 on {plain.dtype}": (lambda: lzma.compress(raw), lzma.decompress),
    }
    for name, (pack, unpack) in packers.items():
        packed, encode = timed(pack)
        back, decode = timed(lambda unpack=unpack, packed=packed: unpack(packed))
        assert back == raw, name
        rows.append(row(coded, name, len(packed), encode, decode, None, len(data)))
    for kind in (np.float16, np.float32):
        written, encode = timed(lambda kind=kind: coded.values.astype(kind).tobytes())
        _, decode = timed(lambda kind=kind, written=written: np.frombuffer(written, kind).astype(np.int64))
        rows.append(row(coded, f"raw {np.dtype(kind)}", len(written), encode, decode, None, len(data)))
    return rows


def table(rows: list[Row]) -> Table:
    found = Table(title="Million symbols a second of processor time; bits a symbol", title_justify="left")
    for name in ("array", "code"):
        found.add_column(name)
    for name in ("symbols", "encode M/s", "decode M/s", "bits", "over its ideal", "against ours"):
        found.add_column(name, justify="right")
    last = ""
    for r in rows:
        if r.array != last and last:
            found.add_section()
        found.add_row(
            r.array if r.array != last else "",
            r.code,
            f"{r.symbols:,}",
            f"{r.encode_million_per_second:.3g}",
            f"{r.decode_million_per_second:.3g}",
            f"{r.bits_per_symbol:.3f}",
            "" if r.overhead is None else f"{100 * r.overhead:.3f} %",
            f"{r.against_ours:.2f}",
        )
        last = r.array
    return found


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).with_name("results.json"))
@click.option("--size", default=1_000_000, show_default=True, help="Symbols of the synthetic arrays.")
@click.option("--sequences", default=48, show_default=True, help="Held-out sequences of 255 tokens.")
def main(out: Path, size: int, sequences: int) -> None:
    """Time the codes, print the table, write the figures."""
    rows = [r for coded in (*synthetic(size), *embedded(sequences)) for r in measure(coded)]
    Console(width=150).print(table(rows))
    out.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
