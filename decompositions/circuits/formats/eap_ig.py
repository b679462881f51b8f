"""EAP-IG's graphs (Hanna et al. 2024, arXiv:2403.17806), which MIB takes over: json and pt.

Both hold the model's shape, for each edge a score and whether it is in the graph, and sometimes which neurons (of all
d_model of a node's output) are; neurons are dropped, with a note.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from decompositions.circuits.formats.loaded import Gathering, LoadedCircuit, plain_graph
from decompositions.circuits.formats.pickles import read_torch
from mdl.errors import ExplanationError, ModelError
from mdl.models.circuits.graph import ARROW, LOGITS, Graph

FORMAT = "eap-ig"
_JSON_KEYS, _PT_KEYS = ("cfg", "edges"), ("cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph")


def load_eap_ig(path: Path, graph: Graph) -> LoadedCircuit:
    """A json or pt file. **Raises:** `ExplanationError` for what is none, `ModelError` for another model's."""
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ExplanationError(f"{path} is no json file: {error}") from error
        return from_json(content, graph)
    return from_tensors(read_torch(path), graph)


def is_json(content: Any) -> bool:
    """Whether an object is what `to_json` writes."""
    return isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in _JSON_KEYS)


def is_tensors(content: Any) -> bool:
    """Whether an object is what `to_pt` saves."""
    return isinstance(content, dict) and all(key in content for key in _PT_KEYS)


def from_json(content: Any, graph: Graph) -> LoadedCircuit:
    """As `load_eap_ig`, from what a json holds."""
    if not is_json(content):
        raise ExplanationError(f"eap-ig: a json has the objects {', '.join(_JSON_KEYS)}")
    _check_shape(content["cfg"], graph)
    found = Gathering(graph, FORMAT)
    decided = False
    for name, edge in content["edges"].items():
        source, arrow, destination = name.partition(ARROW)
        if not arrow or not isinstance(edge, dict):
            raise ExplanationError(f"eap-ig: an edge {name!r} with {edge!r}; expected 'a0.h1->m3' with an object")
        decided |= "in_graph" in edge
        score = edge.get("score")
        found.add(source, destination, bool(edge.get("in_graph", False)), None if score is None else float(score))
    neurons = sum(isinstance(node, dict) and "neurons" in node for node in content.get("nodes", {}).values())
    return found.done(_neurons(neurons), decided)


def from_tensors(content: Any, graph: Graph) -> LoadedCircuit:
    """As `load_eap_ig`, from what a pt holds."""
    if not is_tensors(content):
        raise ExplanationError(f"eap-ig: a pt has {', '.join(_PT_KEYS)}")
    _check_shape(content["cfg"], graph)
    sources, destinations = list(content["src_nodes"]), list(content["dst_nodes"])
    scores = content["edges_scores"].double().numpy()
    kept = content["edges_in_graph"].bool().numpy()
    if not scores.shape == kept.shape == (len(sources), len(destinations)):
        raise ExplanationError(
            f"eap-ig: scores {scores.shape} and edges {kept.shape} of {len(sources)} sources and "
            f"{len(destinations)} destinations"
        )
    found = Gathering(graph, FORMAT)
    # Cells that are no edges hold zeros; one that is marked as in the graph is an edge that the model lacks.
    rows = {name: i for i, name in enumerate(graph.sources)}
    for i, j in np.argwhere(_joined(sources, destinations, graph) | kept):
        if sources[i] not in rows:
            raise ModelError(f"eap-ig: the model has no source {sources[i]!r}: a circuit of another architecture")
        found.add(sources[i], destinations[j], bool(kept[i, j]), float(scores[i, j]))
    return found.done(_neurons(int("neurons_in_graph" in content)))


def save_eap_ig(path: Path, circuit: LoadedCircuit, d_model: int) -> None:
    """Write a json or pt by the file's ending; edges without a score get 0, d_model is only written down.

    **Raises:** `ModelError` for grouped keys and values, neurons, or layers without MLPs, which the format cannot name.
    """
    graph = circuit.graph
    plain_graph(graph, "EAP-IG")
    if not graph.mlps:
        raise ModelError("EAP-IG's graphs have an MLP in every layer; this model has none")
    edges = np.zeros(graph.possible.shape, bool) if circuit.edges is None else circuit.edges
    scores = np.zeros(edges.shape) if circuit.scores is None else np.nan_to_num(circuit.scores)
    shape = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": d_model,
    }
    if path.suffix == ".json":
        path.write_text(json.dumps(_as_json(graph, edges, scores, shape)))
        return
    import torch

    content = {
        "cfg": shape,
        "src_nodes": list(graph.sources),
        "dst_nodes": list(graph.destinations),
        "edges_scores": torch.tensor(scores, dtype=torch.float32),
        "edges_in_graph": torch.tensor(edges),
        "nodes_in_graph": torch.tensor(_nodes(graph, edges)),
    }
    torch.save(content, path)


def _as_json(graph: Graph, edges: np.ndarray, scores: np.ndarray, shape: dict[str, Any]) -> dict[str, Any]:
    nodes = {name: {"in_graph": bool(on)} for name, on in zip(graph.sources, _nodes(graph, edges), strict=True)}
    table = {
        graph.edge_name(i, j): {"score": float(scores[i, j]), "in_graph": bool(edges[i, j])}
        for i, j in np.argwhere(graph.possible).tolist()
    }
    return {"cfg": shape, "nodes": {**nodes, LOGITS: {"in_graph": True}}, "edges": table}


def _nodes(graph: Graph, edges: np.ndarray) -> np.ndarray:
    """Sources that have an edge, and the owners of destinations that have one."""
    nodes = np.asarray(edges.any(1))
    for owner, fed in zip(graph.owners, np.asarray(edges.any(0)), strict=True):
        if fed and owner is not None:
            nodes[list(owner)] = True
    return nodes


def _joined(sources: list[str], destinations: list[str], graph: Graph) -> np.ndarray:
    """Which cells of the file's table are edges of the graph, bool."""
    helper = Gathering(graph, FORMAT)
    rows = {name: i for i, name in enumerate(graph.sources)}
    columns = {name: j for j, name in enumerate(graph.destinations)}
    table = np.zeros((len(sources), len(destinations)), bool)
    at = [columns.get(helper.grouped(name), -1) for name in destinations]
    for i, name in enumerate(sources):
        if name in rows:
            table[i] = [j >= 0 and bool(graph.possible[rows[name], j]) for j in at]
    return table


def _check_shape(shape: Any, graph: Graph) -> None:
    given = {key: shape.get(key) for key in ("n_layers", "n_heads", "parallel_attn_mlp")}
    own = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel}
    different = [f"{key} {given[key]} in place of {own[key]}" for key in own if given[key] not in (None, own[key])]
    if different:
        raise ModelError(f"eap-ig: a circuit of another architecture: {', '.join(different)}")


def _neurons(count: int) -> tuple[str, ...]:
    return ("which neurons of nodes are in the graph dropped: whole nodes are taken",) if count else ()
