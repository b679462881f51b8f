"""ACDC's circuits (Conmy et al. 2023, arXiv:2304.14997): `save_subgraph`'s pth and `save_edges`'s pkl.

Both name a child hook and a parent hook, each with an index such as (None, None, head). Apart from edges of the
residual stream they hold edges inside nodes, which are dropped: hook_q_input to hook_q to hook_result, for which ACDC
counts 32,923 edges of GPT-2 small, 432 more than there are; and an MLP's input to its output. A pth lists edges with
whether they are present, and need not list absent ones, which a run removes; a pkl lists those that are present, with
the change of the metric at which each was kept.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from decompositions.circuits.formats.hooks import EMBEDDINGS, destinations_of, source_of
from decompositions.circuits.formats.loaded import Gathering, LoadedCircuit, plain_graph
from decompositions.circuits.formats.pickles import Index, read_pickle, read_torch
from mdl.errors import ExplanationError
from mdl.models.circuits.graph import INPUT, LETTERS, LOGITS, Graph

FORMAT = "acdc"
INSIDE = "edges inside a head or an MLP dropped (ACDC counts them, no choice is in them)"


def load_acdc(path: Path, graph: Graph) -> LoadedCircuit:
    """A pth of `save_subgraph`. **Raises:** `ExplanationError`, `ModelError` for what is none, or another model's."""
    return from_subgraph(read_torch(path), graph)


def load_acdc_edges(path: Path, graph: Graph) -> LoadedCircuit:
    """A pkl of `save_edges`. **Raises:** as `load_acdc`."""
    return from_edges(read_pickle(path), graph)


def from_subgraph(content: Any, graph: Graph) -> LoadedCircuit:
    """As `load_acdc`, from what the file holds."""
    if not is_subgraph(content):
        raise ExplanationError("acdc: a pth maps (child hook, index, parent hook, index) to whether the edge is there")
    found = Gathering(graph, FORMAT)
    for (child, child_index, parent, parent_index), present in content.items():
        _add(found, child, child_index, parent, parent_index, bool(present), None)
    found.check_all_named()
    return found.done(_embeddings({key[2] for key, present in content.items() if present}))


def from_edges(content: Any, graph: Graph) -> LoadedCircuit:
    """As `load_acdc_edges`, from what the file holds."""
    if not is_edge_list(content):
        raise ExplanationError("acdc: a pkl is a list of ((child hook, index, parent hook, index), effect)")
    found = Gathering(graph, FORMAT)
    for (child, child_index, parent, parent_index), effect in content:
        score = None if effect is None else float(effect)
        _add(found, child, child_index, parent, parent_index, True, score)
    return found.done(_embeddings({key[2] for key, _ in content}))


def is_subgraph(content: Any) -> bool:
    """Whether an object is what `save_subgraph` saves."""
    return isinstance(content, dict) and bool(content) and all(_is_edge(key) for key in content)


def is_edge_list(content: Any) -> bool:
    """Whether an object is what `save_edges` saves."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(pair, tuple) and len(pair) == 2 and _is_edge(pair[0]) for pair in content)
    )


def save_acdc(path: Path, graph: Graph, edges: np.ndarray, mlp_input: str = "hook_mlp_in") -> None:
    """Write a pth with every edge of the graph, and those inside nodes, as `load_subgraph` wants it.

    **Arguments:** `edges`: bool [sources, destinations]; `mlp_input`: the hook of an MLP's input, `hook_resid_mid` in
    old versions. **Raises:** `ModelError` for grouped keys and values, or neurons.
    """
    import torch

    plain_graph(graph, "ACDC")
    content: OrderedDict[tuple[Any, ...], bool] = OrderedDict()
    for source, destination in np.argwhere(graph.possible):
        child = _child(graph, graph.destinations[destination], mlp_input)
        content[(*child, *_parent(graph.sources[source]))] = bool(edges[source, destination])
    for layer in range(graph.n_layers):
        block = f"blocks.{layer}"
        if graph.mlps:
            content[(f"{block}.hook_mlp_out", (None,), f"{block}.{mlp_input}", (None,))] = True
        for head in range(graph.n_heads):
            index = (None, None, head)
            for letter in LETTERS:
                content[(f"{block}.attn.hook_{letter}", index, f"{block}.hook_{letter}_input", index)] = True
                content[(f"{block}.attn.hook_result", index, f"{block}.attn.hook_{letter}", index)] = True
    torch.save(content, path)


def _is_edge(key: Any) -> bool:
    return isinstance(key, tuple) and len(key) == 4 and isinstance(key[0], str) and isinstance(key[2], str)


def _add(
    found: Gathering, child: str, child_index: Any, parent: str, parent_index: Any, kept: bool, score: float | None
) -> None:
    source = source_of(found.graph, parent, _head(parent_index))
    if source is None:
        found.drop(INSIDE)
        return
    for destination in destinations_of(found.graph, child, _head(child_index)):
        found.add(source, destination, kept, score)


def _head(index: Any) -> int | None:
    """The head of an index such as (None, None, 3), or of a TorchIndex of it."""
    places = index.hashable_tuple if isinstance(index, Index) else index
    if not isinstance(places, tuple) or not all(p is None or isinstance(p, int) for p in places):
        raise ExplanationError(f"acdc: an index {places!r}; heads are written (None, None, head)")
    numbers = [p for p in places if p is not None]
    return numbers[-1] if numbers else None


def _embeddings(parents: set[str]) -> tuple[str, ...]:
    """A note if token and position embeddings are nodes of their own."""
    apart = sorted(parents & set(EMBEDDINGS[1:]))
    return (f"{' and '.join(apart)} joined in one source, 'input'",) if apart else ()


def _parent(source: str) -> tuple[str, tuple[Any, ...]]:
    if source == INPUT:
        return EMBEDDINGS[0], (None,)
    if source.startswith("m"):
        return f"blocks.{source[1:]}.hook_mlp_out", (None,)
    layer, head = source[1:].split(".h")
    return f"blocks.{layer}.attn.hook_result", (None, None, int(head))


def _child(graph: Graph, destination: str, mlp_input: str) -> tuple[str, tuple[Any, ...]]:
    if destination == LOGITS:
        return f"blocks.{graph.n_layers - 1}.hook_resid_post", (None,)
    if destination.startswith("m"):
        return f"blocks.{destination[1:]}.{mlp_input}", (None,)
    layer, head = destination[1:-3].split(".h")
    return f"blocks.{layer}.hook_{destination[-2]}_input", (None, None, int(head))
