"""The graph: published counts, names, order, and what pruning leaves."""

from __future__ import annotations

import numpy as np
import pytest

from mdl.errors import ModelError
from mdl.models.circuits.graph import LOGITS, Graph
from tests.models.circuits.random_models import KINDS, random_model

GPT2 = Graph(12, 12, 12)
TINY = Graph(2, 4, 2)


def test_gpt2_has_the_published_sizes_and_places() -> None:
    """157 sources, 445 destinations, 32,491 edges (EAP-IG); its places: 1 + l(H+1) + h, l(3H+1) + {q,k,v}H + h."""
    assert (len(GPT2.sources), len(GPT2.destinations), GPT2.n_edges) == (157, 445, 32_491)
    assert GPT2.sources[1 + 3 * 13 + 5] == "a3.h5"
    assert GPT2.destinations[3 * 37 + 2 * 12 + 5] == "a3.h5<v>"
    assert GPT2.edge("m0->a4.h3<v>") == (13, 4 * 37 + 24 + 3)
    assert GPT2.edge_name(*GPT2.edge("input->logits")) == "input->logits"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("neurons", [False, True])
def test_pieces_and_inputs_tile_the_names(kind: str, neurons: bool) -> None:
    graph = Graph.of(random_model(kind)[0], neurons)
    covered = [graph.sources[i] for piece in graph.pieces for i in range(piece.start, piece.stop)]
    assert tuple(covered) == graph.sources
    halves = (False, True) if graph.mlps else (False,)
    parts = [graph.inputs(layer, mlp) for layer in range(graph.n_layers) for mlp in halves]
    read = [
        graph.destinations[i] for part in (*parts, graph.inputs(graph.n_layers)) for i in range(part.start, part.stop)
    ]
    assert tuple(read) == graph.destinations
    assert read[-1] == LOGITS
    for layer in range(graph.n_layers):
        for mlp in halves:
            before = graph.pieces[graph.written_before(layer, mlp) - 1].stop
            columns = graph.possible[:, graph.inputs(layer, mlp)]
            assert columns[:before].all()
            assert not columns[before:].any()
    assert graph.written_before(graph.n_layers) == len(graph.pieces)


def test_edges_that_there_are_not_are_refused() -> None:
    with pytest.raises(ModelError, match="Did you mean"):
        TINY.edge("a0.h9->logits")
    with pytest.raises(ModelError, match="computed before"):
        TINY.edge("m1->a0.h0<q>")
    with pytest.raises(ModelError, match="is no edge"):
        TINY.edge("a0.h0")


def test_pruning_leaves_what_joins_input_and_logits() -> None:
    """A head without kept values still depends on the tokens where ablated values differ between positions."""
    kept = TINY.mask(["input->a0.h1<q>", "a0.h1->m1", "m1->logits", "input->m0", "a0.h0->logits"])
    names = {TINY.edge_name(*e) for e in np.argwhere(TINY.pruned(kept)).tolist()}
    assert names == {"input->a0.h1<q>", "a0.h1->m1", "m1->logits"}
    assert not TINY.pruned(kept, constant=True).any()


def test_induced_edges_join_kept_nodes() -> None:
    nodes = np.isin(TINY.sources, ["input", "a1.h2", "m1"])
    names = {TINY.edge_name(*e) for e in np.argwhere(TINY.induced(nodes)).tolist()}
    inputs = {f"input->{d}" for d in ("a1.h2<q>", "a1.h1<k>", "a1.h1<v>", "m1", "logits")}
    assert names == inputs | {"a1.h2->m1", "a1.h2->logits", "m1->logits"}
