"""Codes of edges: Kraft by enumeration, round trips, oracles, refusals, and a published circuit."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from decompositions.circuits.layout import edge_layout
from mdl.codes import BitReader, BitWriter, kt_bits
from mdl.codes.edge_layout import MAX_EDGES, EdgeLayout
from mdl.codes.edges import (
    MENU,
    decode_edges,
    edge_bits,
    edge_code_bits,
    edge_symbols,
    edges_of_symbols,
    encode_edges,
    list_bits,
)
from mdl.errors import CodeError, MessageError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.models.circuits.graph import Graph

IOI = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "circuits" / "mib" / "ioi-eap-ig.json"
SMALL = Graph(2, 3, 3)


def masks(layout: EdgeLayout, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    possible = layout.possible
    rows = rng.random(possible.shape[0]) < 0.4
    columns = rng.random(possible.shape[1]) < 0.4
    one = np.zeros_like(possible)
    one[tuple(np.argwhere(possible)[-1])] = True
    return {
        "empty": np.zeros_like(possible),
        "one": one,
        "full": possible.copy(),
        "random": possible & (rng.random(possible.shape) < 0.1),
        "half": possible & (rng.random(possible.shape) < 0.5),
        "block": possible & rows[:, None] & columns[None],
    }


@pytest.mark.parametrize("name", MENU)
def test_kraft_by_enumeration(name: str) -> None:
    """Over all 2^9 tables the chances add up to 1 at most; to 1 for a code that wastes nothing."""
    possible = np.array([[1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 0]], bool)
    classes = np.arange(12).reshape(3, 4) % 2
    layout = EdgeLayout(possible, classes, ((0,), (1, 2), None, (2,)))
    total = 0.0
    for flags in itertools.product((False, True), repeat=9):
        edges = np.zeros_like(possible)
        edges[possible] = flags
        total += 2.0 ** -MENU[name].bits(edges, layout)
    assert total <= 1.0 + 1e-9
    if name in ("sources", "destinations"):
        assert total == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["empty", "one", "full", "random", "half", "block"])
@pytest.mark.parametrize("name", MENU)
def test_each_code_writes_its_length_and_reads_back(name: str, kind: str) -> None:
    layout = edge_layout(SMALL)
    edges = masks(layout)[kind]
    writer = BitWriter()
    MENU[name].write(writer, edges, layout)
    assert writer.information_bits == pytest.approx(MENU[name].bits(edges, layout), abs=1e-6)
    reader = BitReader(writer.to_bytes())
    np.testing.assert_array_equal(MENU[name].read(reader, layout), edges)
    reader.finish()


@pytest.mark.parametrize("seed", range(4))
def test_streams_round_trip(seed: int) -> None:
    layout = EdgeLayout.plain(np.tri(6, 9, 2, dtype=bool).T.copy())
    for edges in masks(layout, seed).values():
        data = encode_edges(edges, layout)
        np.testing.assert_array_equal(decode_edges(data, layout), edges)
        assert 8 * len(data) <= edge_bits(edges, layout) + 64


def test_lengths_by_hand() -> None:
    layout = edge_layout(SMALL)
    edges = layout.possible.copy()
    edges[0] = False
    lengths = edge_code_bits(edges, layout)
    n = SMALL.n_edges
    first = int(layout.possible[0].sum())
    assert lengths["list"] == pytest.approx(math.log2(math.comb(n, first)) + 2 * math.floor(math.log2(n)), abs=12)
    assert lengths["sources"] == pytest.approx(
        sum(float(kt_bits(r.sum(), (p & ~r).sum())) for r, p in zip(edges, layout.possible, strict=True))
    )
    assert edge_bits(edges, layout) == pytest.approx(min(lengths.values()) + math.log2(len(MENU)))
    assert edge_bits(edges, layout, quick=True) >= edge_bits(edges, layout)


def test_the_list_grows_and_the_set_does_not() -> None:
    """log2 C(E, k) falls past E / 2; the list's length does not, and is 46.9 kbit for all of GPT-2 small."""
    n = Graph(12, 12, 12).n_edges
    k = np.arange(1, n + 1)
    assert (np.diff(list_bits(n, k)) >= 0).all()
    assert list_bits(n, n) == pytest.approx(46_866, abs=1)
    assert list_bits(32_923, 99) == pytest.approx(968, abs=0.6)
    layout = edge_layout(SMALL)
    full = MENU["list"].bits(layout.possible, layout)
    assert full < 20 < list_bits(SMALL.n_edges, SMALL.n_edges)


def test_what_is_no_circuit_is_refused() -> None:
    layout = edge_layout(SMALL)
    beyond = layout.possible.copy()
    beyond[-1, 0] = True
    with pytest.raises(MessageError, match=r"1 of .* edges are not possible"):
        encode_edges(beyond, layout)
    with pytest.raises(MessageError, match="another model"):
        edge_bits(layout.possible[:-1], layout)
    with pytest.raises(MessageError, match="another model"):
        edge_bits(layout.possible.astype(int), layout)
    with pytest.raises(CodeError, match="possible edges"):
        EdgeLayout(layout.possible, layout.classes[:-1], layout.owners)
    with pytest.raises(CodeError, match="owner"):
        EdgeLayout.plain(layout.possible).__class__(layout.possible, layout.classes, ((99,),) * len(layout.owners))
    with pytest.raises(CodeError, match=str(MAX_EDGES)):
        EdgeLayout.plain(np.ones((MAX_EDGES // 1024 + 1, 1024), bool))


def test_damaged_streams_are_refused() -> None:
    layout = edge_layout(SMALL)
    edges = masks(layout)["random"]
    data = encode_edges(edges, layout)
    for bad in (b"", data[:-1], data[:4], data + b"\x07", data + data, bytes(len(data))):
        with pytest.raises(MessageError, match="damaged edges"):
            decode_edges(bad, layout)
    with pytest.raises(MessageError, match="damaged edges"):
        decode_edges(data, edge_layout(Graph(2, 2, 2)))


def test_flipped_bits_give_edges_or_an_error() -> None:
    """Whatever the bytes: a table of possible edges, or one `MessageError`."""
    layout = edge_layout(SMALL)
    data = encode_edges(masks(layout)["random"], layout)
    refused = 0
    for bit in range(0, 8 * len(data), 3):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert not (decode_edges(bytes(damaged), layout) & ~layout.possible).any()
        except MessageError:
            refused += 1
    assert refused > 0


def test_edges_in_a_message() -> None:
    layout = edge_layout(Graph(4, 6, 6))
    edges = masks(layout)["random"]
    symbols = edge_symbols(edges, layout)
    whole = encode_message([Section("circuit", (QuantisedArray.from_integers(symbols),))])
    bare = encode_message([Section("circuit", (QuantisedArray.from_integers(symbols[:0]),))])
    assert whole.information_bits - bare.information_bits < edge_bits(edges, layout) + 100
    received = decode_message(whole.data)[0].header[0].symbols
    np.testing.assert_array_equal(edges_of_symbols(received, layout), edges)
    for bad in (symbols[:-1], symbols + 1, symbols[:-8]):
        with pytest.raises(MessageError, match=r"bits of edges|damaged edges"):
            edges_of_symbols(bad, layout)


def test_a_kept_node_without_edges_is_refused() -> None:
    """Gates say more than the edges: a forged stream, not a circuit."""
    possible = np.ones((2, 2), bool)
    layout = EdgeLayout.plain(possible)
    writer = BitWriter()
    writer.uniform(np.array([list(MENU).index("nodes")]), len(MENU))
    flags, chances = np.ones(4, bool), np.array([0.5, 0.75, 0.5, 0.75])
    writer.bits(flags, chances)
    writer.bits(np.zeros(4, bool), np.array([0.5, 0.25, 0.5 / 3, 0.125]))
    with pytest.raises(MessageError, match="has none"):
        decode_edges(writer.to_bytes(), layout)


@pytest.mark.skipif(not IOI.exists(), reason="shared/data/circuits is not here")
def test_a_published_circuit() -> None:
    """MIB's example: 756 of 32,491 edges; the codes measured before were 5,173, 4,390, 3,776 and 3,195 bits long."""
    graph = Graph(12, 12, 12)
    found = json.loads(IOI.read_text())["edges"]
    assert graph.n_edges == len(found) == 32_491
    edges = graph.mask(name for name, edge in found.items() if edge["in_graph"])
    assert edges.sum() == 756
    plain, layout = EdgeLayout.plain(graph.possible), edge_layout(graph)
    bare = edge_code_bits(edges, plain)
    assert bare["sources"] == pytest.approx(4390, abs=1)
    assert bare["gated"] == pytest.approx(3195, abs=1)
    assert edge_bits(edges, layout) < edge_bits(edges, plain) < 3195
    data = encode_edges(edges, layout)
    assert 8 * len(data) < 3195
    np.testing.assert_array_equal(decode_edges(data, layout), edges)
