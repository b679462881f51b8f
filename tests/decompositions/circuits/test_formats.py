"""Circuits in others' files: what is read, what is written back, what is refused."""

import json
import os
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from decompositions.circuits.formats import LoadedCircuit, load_circuit
from decompositions.circuits.formats.acdc import save_acdc
from decompositions.circuits.formats.auto_circuit import MASKS, SCORES, save_auto_circuit
from decompositions.circuits.formats.eap_ig import save_eap_ig
from decompositions.circuits.formats.edge_pruning import save_edge_pruning
from decompositions.circuits.formats.mib import SHARES, load_submission
from mdl.errors import ExplanationError, ModelError
from mdl.models.circuits.graph import Graph

SHARED = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "circuits"
GRAPH = Graph(2, 2, 2)
NAMES = ("input->a0.h1<q>", "input->a0.h1<k>", "input->a0.h1<v>", "a0.h1->m0", "m0->a1.h0<v>", "a1.h0->logits")
EDGES = GRAPH.mask(NAMES)


def names(edges: np.ndarray, graph: Graph = GRAPH) -> set[str]:
    return {graph.edge_name(i, j) for i, j in np.argwhere(edges).tolist()}


@pytest.fixture
def foreign_index() -> Iterator[type]:
    """ACDC's class under its real name, as pickles have it, while the test runs."""

    class TorchIndex:
        def __init__(self, places: list[int | None]) -> None:
            self.as_index = tuple(slice(None) if p is None else p for p in places)
            self.hashable_tuple = tuple(places)

        def __hash__(self) -> int:
            return hash(self.hashable_tuple)

    package, module = types.ModuleType("acdc"), types.ModuleType("acdc.TLACDCEdge")
    TorchIndex.__module__, TorchIndex.__qualname__ = "acdc.TLACDCEdge", "TorchIndex"
    module.TorchIndex = TorchIndex  # type: ignore[attr-defined]
    sys.modules |= {"acdc": package, "acdc.TLACDCEdge": module}
    yield TorchIndex
    del sys.modules["acdc"], sys.modules["acdc.TLACDCEdge"]


@pytest.mark.parametrize("ending", ["json", "pt"])
def test_eap_ig_round_trip(tmp_path: Path, ending: str) -> None:
    scores = np.where(GRAPH.possible, np.random.default_rng(0).normal(size=EDGES.shape), np.nan).astype(np.float32)
    path = tmp_path / f"graph.{ending}"
    save_eap_ig(path, LoadedCircuit(GRAPH, "test", EDGES, scores.astype(np.float64)), 8)
    found = load_circuit(path, GRAPH)
    assert found.format == "eap-ig"
    np.testing.assert_array_equal(found.chosen(), EDGES)
    np.testing.assert_array_equal(found.scores, scores)
    for other in (Graph(3, 2, 2), Graph(2, 3, 3), Graph(2, 2, 2, parallel=True)):
        with pytest.raises(ModelError, match="another architecture"):
            load_circuit(path, other)


def test_eap_ig_scores_alone(tmp_path: Path) -> None:
    """The largest n by size, dead ends pruned, as EAP-IG's apply_topn does."""
    table = {GRAPH.edge_name(i, j): {"score": 0.001} for i, j in np.argwhere(GRAPH.possible).tolist()}
    for rank, name in enumerate(NAMES):
        table[name] = {"score": (-1.0) ** rank * (2.0 - 0.1 * rank)}
    table["a0.h0->a1.h1<q>"] = {"score": 1.9}
    shape = {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"cfg": shape, "nodes": {"m0": {"in_graph": True, "neurons": [1]}}, "edges": table}))
    found = load_circuit(path, GRAPH)
    assert found.edges is None
    assert any("neurons" in note for note in found.notes)
    assert names(found.top(len(NAMES) + 1)) == set(NAMES)  # a0.h0 has no input: its edge is pruned
    assert found.top(len(NAMES) + 1, prune=False).sum() == len(NAMES) + 1
    with pytest.raises(ExplanationError, match="how many to take"):
        found.chosen()
    with pytest.raises(ExplanationError, match="path from input to logits"):
        found.top(1)
    with pytest.raises(ExplanationError, match="of a graph that has"):
        found.top(GRAPH.n_edges + 1)


def test_grouped_keys_and_values_are_joined(tmp_path: Path) -> None:
    grouped = Graph(2, 2, 1)
    table = {"input->a0.h0<k>": {"score": 1.0, "in_graph": True}, "input->a0.h1<k>": {"score": 0.5, "in_graph": False}}
    path = tmp_path / "grouped.json"
    path.write_text(json.dumps({"cfg": {"n_layers": 2, "n_heads": 2}, "nodes": {}, "edges": table}))
    found = load_circuit(path, grouped)
    assert names(found.chosen(), grouped) == {"input->a0.h0<k>"}
    assert found.scores is not None
    assert found.scores[grouped.edge("input->a0.h0<k>")] == 1.5
    with pytest.raises(ModelError, match="no way to write grouped"):
        save_eap_ig(tmp_path / "out.json", LoadedCircuit(grouped, "test", grouped.possible.copy()), 8)


def test_acdc_pth(tmp_path: Path) -> None:
    path = tmp_path / "subgraph.pth"
    save_acdc(path, GRAPH, EDGES)
    found = load_circuit(path, GRAPH)
    assert found.format == "acdc"
    np.testing.assert_array_equal(found.chosen(), EDGES)
    # Two heads in two layers: 12 edges into hook_q and the like, 12 on to hook_result, 2 inside MLPs.
    assert found.notes == ("26 edges inside a head or an MLP dropped (ACDC counts them, no choice is in them)",)
    content = torch.load(path, weights_only=True)
    assert content[("blocks.1.hook_v_input", (None, None, 0), "blocks.0.hook_mlp_out", (None,))] is True
    with pytest.raises(ExplanationError, match="last layer is 2: a circuit of another architecture"):
        load_circuit(path, Graph(3, 2, 2))
    with pytest.raises(ModelError, match="another architecture"):
        load_circuit(path, Graph(2, 1, 1))


def test_acdc_pth_of_a_smaller_model_is_refused(tmp_path: Path) -> None:
    """All its nodes exist in the larger one, so that only what it does not say tells."""
    shallow = Graph(GRAPH.n_layers - 1, GRAPH.n_heads, GRAPH.key_value_heads)
    save_acdc(tmp_path / "shallow.pth", shallow, shallow.possible)
    with pytest.raises(ExplanationError, match="another architecture"):
        load_circuit(tmp_path / "shallow.pth", GRAPH)
    narrow = Graph(GRAPH.n_layers, GRAPH.n_heads - 1, GRAPH.key_value_heads - 1, GRAPH.mlps)
    save_acdc(tmp_path / "narrow.pth", narrow, narrow.possible)
    with pytest.raises(ModelError, match=f"names {narrow.n_edges} of the model's {GRAPH.n_edges} edges"):
        load_circuit(tmp_path / "narrow.pth", GRAPH)


def test_acdc_counts_432_more_edges_of_gpt2() -> None:
    heads, graph = 12 * 12, Graph(12, 12, 12)
    assert graph.n_edges + 3 * heads == 32_923


def test_acdc_with_two_embeddings(tmp_path: Path) -> None:
    head, path = (None, None, 0), tmp_path / "two.pth"
    save_acdc(path, GRAPH, np.zeros_like(GRAPH.possible))
    content = torch.load(path, weights_only=False)
    content[("blocks.0.hook_q_input", head, "hook_embed", (None,))] = True
    content[("blocks.0.hook_q_input", head, "hook_pos_embed", (None,))] = False
    content[("blocks.0.hook_k_input", head, "hook_pos_embed", (None,))] = True
    content[("blocks.0.hook_resid_mid", (None,), "hook_embed", (None,))] = True
    torch.save(content, path)
    found = load_circuit(path, GRAPH)
    assert names(found.chosen()) == {"input->a0.h0<q>", "input->a0.h0<k>", "input->m0"}
    assert "joined in one source" in found.notes[0]


def test_acdc_pkl(tmp_path: Path, foreign_index: type) -> None:
    whole, head = foreign_index([None]), foreign_index([None, None, 1])
    edges = [
        (("blocks.1.hook_resid_post", whole, "blocks.1.attn.hook_result", head), 0.25),
        (("blocks.1.hook_q_input", head, "blocks.0.hook_resid_pre", whole), np.float32(0.5)),
        (("blocks.1.attn.hook_q", head, "blocks.1.hook_q_input", head), None),
    ]
    path = tmp_path / "edges.pkl"
    path.write_bytes(pickle.dumps(edges))
    found = load_circuit(path, GRAPH)
    assert names(found.chosen()) == {"a1.h1->logits", "input->a1.h1<q>"}
    assert found.scores is not None
    assert found.scores[GRAPH.edge("input->a1.h1<q>")] == 0.5
    assert any(note.startswith("1 edges inside") for note in found.notes)


def test_interpbench_pkl(tmp_path: Path) -> None:
    pairs = [
        ("hook_embed", "blocks.0.hook_mlp_in"),
        ("blocks.0.hook_mlp_out", "blocks.1.hook_q_input[1]"),
        ("blocks.0.attn.hook_result[0]", "blocks.1.attn.hook_result[1]"),
        ("blocks.1.hook_q_input[1]", "blocks.1.attn.hook_result[1]"),
        ("blocks.1.attn.hook_result[1]", "blocks.1.hook_resid_post"),
    ]
    path = tmp_path / "edges.pkl"
    path.write_bytes(pickle.dumps(pairs))
    found = load_circuit(path, GRAPH)
    assert found.format == "interpbench"
    whole = {f"a0.h0->a1.h1<{letter}>" for letter in "qkv"}
    assert names(found.chosen()) == {"input->m0", "m0->a1.h1<q>", "a1.h1->logits"} | whole
    path.write_bytes(pickle.dumps([("blocks.0.attn.hook_result", "blocks.0.hook_mlp_in")]))
    with pytest.raises(ExplanationError, match="names no head"):
        load_circuit(path, GRAPH)


@pytest.mark.parametrize("masks", [False, True])
def test_auto_circuit_round_trip(tmp_path: Path, masks: bool) -> None:
    path = tmp_path / "scores.pt"
    save_auto_circuit(path, GRAPH, EDGES, masks)
    found = load_circuit(path, GRAPH)
    assert found.format == (MASKS if masks else SCORES)
    np.testing.assert_array_equal(found.chosen(), EDGES)
    with pytest.raises((ModelError, ExplanationError), match=r"another architecture|in place of"):
        load_circuit(path, Graph(2, 3, 3))


def test_auto_circuit_masks_are_inverted_when_it_is_said(tmp_path: Path) -> None:
    """Floats 0 and 1 under plain names: PruneScores have 1 for kept, patch masks 1 for ablated."""
    path = tmp_path / "scores.pt"
    save_auto_circuit(path, GRAPH, EDGES, masks=True)
    content = {name.removesuffix(".patch_mask"): v for name, v in torch.load(path, weights_only=True).items()}
    assert content["blocks.0.hook_mlp_in"].tolist() == [1.0, 1.0, 0.0]  # of input, a0.h0 and a0.h1 the last is kept
    torch.save(content, path)
    with pytest.raises(ExplanationError, match="nothing that says whether 1 is kept"):
        load_circuit(path, GRAPH)
    np.testing.assert_array_equal(load_circuit(path, GRAPH, MASKS).chosen(), EDGES)
    np.testing.assert_array_equal(load_circuit(path, GRAPH, SCORES).chosen(), GRAPH.possible & ~EDGES)


def test_auto_circuit_scores_by_position(tmp_path: Path) -> None:
    content = {"blocks.0.hook_q_input": torch.tensor([[[0.1], [0.2]], [[-0.7], [0.0]]])}
    torch.save(content, tmp_path / "scores.pt")
    found = load_circuit(tmp_path / "scores.pt", GRAPH)
    assert found.scores is not None
    assert found.scores[GRAPH.edge("input->a0.h0<q>")] == pytest.approx(-0.7)
    assert found.scores[GRAPH.edge("input->a0.h1<q>")] == pytest.approx(0.2)
    assert found.notes == ("2 positions joined: an edge is kept if it is at one of them",)


def test_edge_pruning(tmp_path: Path) -> None:
    path = tmp_path / "edges.json"
    save_edge_pruning(path, GRAPH, EDGES)
    pairs = json.loads(path.read_text())
    assert ["pos_embeds", "a0.h1.q"] in pairs
    assert ["a1.h0", "resid_post"] in pairs
    found = load_circuit(path, GRAPH)
    assert found.format == "edge-pruning"
    np.testing.assert_array_equal(found.chosen(), EDGES)
    path.write_text(json.dumps([["a0.h1.q", "a0.h1"], ["a0.h1", "resid_post"]]))
    found = load_circuit(path, GRAPH)
    assert names(found.chosen()) == {*(f"input->a0.h1<{x}>" for x in "qkv"), "a0.h1->logits", "input->logits"}
    assert any("every kept node reads the embedding" in note for note in found.notes)


def test_a_submission(tmp_path: Path) -> None:
    graph = Graph(4, 4, 4)
    scores = np.where(graph.possible, np.random.default_rng(1).normal(size=graph.possible.shape), np.nan)
    whole = LoadedCircuit(graph, "test", None, scores)
    one, nine = tmp_path / "ioi_gpt2", tmp_path / "nine"
    one.mkdir()
    nine.mkdir()
    save_eap_ig(one / "importances.json", whole, 8)
    for i, share in enumerate(SHARES):
        n = int(share * graph.n_edges)
        edges = np.zeros(graph.possible.shape, bool) if share < 0.1 else whole.top(n)
        save_eap_ig(nine / f"circuit_{i}.pt", LoadedCircuit(graph, "test", edges, scores), 8)
    scored, decided = load_submission(one, graph), load_submission(nine, graph)
    assert scored.scored
    assert not decided.scored
    np.testing.assert_array_equal(scored.at(0.2), decided.at(0.2))
    assert not decided.at(0.001).any()
    assert load_circuit(one, graph).scores is not None
    with pytest.raises(ExplanationError, match="a submission of 9 circuits"):
        load_circuit(nine, graph)
    (nine / "circuit_0.pt").unlink()
    with pytest.raises(ExplanationError, match="has 8 circuit files"):
        load_submission(nine, graph)
    save_eap_ig(nine / "circuit_0.pt", LoadedCircuit(graph, "test", graph.possible.copy(), scores), 8)
    with pytest.raises(ExplanationError, match="beyond"):
        load_submission(nine, graph)


class Harmful:
    """What an attacker pickles: a call to be made while reading."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("ending", ["pkl", "pth"])
def test_a_pickle_that_wants_to_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"edges.{ending}"
    if ending == "pkl":
        path.write_bytes(pickle.dumps([(("blocks.0.hook_q_input", Harmful(), "hook_embed", None), 0.0)]))
    else:
        torch.save({("a", None, "b", None): Harmful()}, path)
    with pytest.raises(ExplanationError, match=r"wants to import posix\.mkdir|wants to import nt\.mkdir"):
        load_circuit(path, GRAPH)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ("m1->a0.h0<q>", "no edge joins them"),
        ("a5.h0->logits", "no source 'a5.h0'"),
        ("a0.h0->a1.h0<w>", "no destination"),
    ],
)
def test_edges_that_the_model_lacks(tmp_path: Path, edge: str, message: str) -> None:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps({"cfg": {}, "nodes": {}, "edges": {edge: {"score": 1.0, "in_graph": True}}}))
    with pytest.raises(ModelError, match=message):
        load_circuit(path, GRAPH)


def test_empty_and_unknown_files(tmp_path: Path) -> None:
    path = tmp_path / "edges.json"
    path.write_text("[]")
    with pytest.raises(ExplanationError, match="an empty circuit"):
        load_circuit(path, GRAPH)
    path.write_text(json.dumps({"cfg": {}, "edges": {"input->m0": {"in_graph": False}}}))
    with pytest.raises(ExplanationError, match="an empty circuit"):
        load_circuit(path, GRAPH)
    path.write_text('{"a": 1}')
    with pytest.raises(ExplanationError, match="no format of a circuit"):
        load_circuit(path, GRAPH)
    path.write_text(json.dumps({"cfg": {}, "nodes": {}, "edges": {"input->m0": {"score": [], "in_graph": True}}}))
    with pytest.raises(ExplanationError, match="not their types"):
        load_circuit(path, GRAPH)
    path.write_text("{")
    with pytest.raises(ExplanationError, match="no json"):
        load_circuit(path, GRAPH)
    with pytest.raises(ExplanationError, match="no file or folder"):
        load_circuit(tmp_path / "nothing.pt", GRAPH)
    for ending in ("pkl", "pt"):
        (tmp_path / f"noise.{ending}").write_bytes(b"\x80\x02noise")
        with pytest.raises(ExplanationError, match="damaged"):
            load_circuit(tmp_path / f"noise.{ending}", GRAPH)
    with pytest.raises(ExplanationError, match="Did you mean 'edge-pruning'"):
        load_circuit(path, GRAPH, "edge-prunning")


@pytest.mark.skipif(not SHARED.exists(), reason="shared/data/circuits is not here")
def test_mibs_example() -> None:
    graph = Graph(12, 12, 12)
    found = load_circuit(SHARED / "mib" / "ioi-eap-ig.json", graph)
    assert found.chosen().sum() == 756
    assert found.scores is not None
    assert np.isfinite(found.scores[graph.possible]).all()
    assert not (graph.pruned(found.chosen()) != found.chosen()).any()
    with pytest.raises(ModelError, match="n_layers 12 in place of 2"):
        load_circuit(SHARED / "mib" / "ioi-eap-ig.json", GRAPH)
