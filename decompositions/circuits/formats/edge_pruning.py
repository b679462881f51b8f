"""Edge Pruning's circuits (Bhaskar et al. 2024, arXiv:2406.16778): edges.json, a list of [from, to].

Sources: `tok_embeds`, `pos_embeds`, `a0.h1`, `m0`; destinations: `a2.h3.q`, `m5`, `resid_post`. The embeddings are
joined in our one `input`. Trained without embedding nodes, a circuit reads the embedding everywhere, and the file has
no edge from it: those edges are put in. Edges inside a head (`a0.h1.q` to `a0.h1`, which its drawing script adds) are
dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from decompositions.circuits.formats.interpbench import is_pairs
from decompositions.circuits.formats.loaded import Gathering, LoadedCircuit, plain_graph
from mdl.errors import ExplanationError
from mdl.models.circuits.graph import INPUT, LETTERS, LOGITS, Graph

FORMAT = "edge-pruning"
EMBEDDINGS = ("tok_embeds", "pos_embeds", "embeds")
OUTPUT = "resid_post"


def load_edge_pruning(path: Path, graph: Graph) -> LoadedCircuit:
    """An edges.json. **Raises:** `ExplanationError` for what is none, `ModelError` for another model's."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ExplanationError(f"{path} is no json file: {error}") from error
    return from_pairs(content, graph)


def from_pairs(content: Any, graph: Graph) -> LoadedCircuit:
    """As `load_edge_pruning`, from what the file holds."""
    if not is_pairs(content):
        raise ExplanationError("edge-pruning: edges.json is a list of pairs [from, to], with one or more in it")
    found = Gathering(graph, FORMAT)
    for parent, child in content:
        if _letter(parent):
            found.drop("edges inside a head dropped")
            continue
        found.add(INPUT if parent in EMBEDDINGS else parent, _destination(child), True)
    named = {parent for parent, _ in content if parent in EMBEDDINGS}
    if named:
        return found.done((f"{' and '.join(sorted(named))} joined in one source, 'input'",) if len(named) > 1 else ())
    found.edges[graph.sources.index(INPUT)] = graph.possible[graph.sources.index(INPUT)]
    found.edges = graph.pruned(found.edges)
    return found.done(("no embedding node in the file: every kept node reads the embedding; dead ends pruned",))


def save_edge_pruning(path: Path, graph: Graph, edges: np.ndarray) -> None:
    """Write edges, bool [sources, destinations], `input` as both embeddings. **Raises:** as `plain_graph`."""
    plain_graph(graph, "Edge Pruning")
    pairs = []
    for source, destination in np.argwhere(edges).tolist():
        name, child = graph.sources[source], graph.destinations[destination]
        child = OUTPUT if child == LOGITS else f"{child[:-3]}.{child[-2]}" if child.endswith(">") else child
        pairs += [[parent, child] for parent in (EMBEDDINGS[:2] if name == INPUT else (name,))]
    path.write_text(json.dumps(pairs, indent=4))


def _letter(name: str) -> str:
    """q, k or v, of the name of a head's input."""
    head, _, letter = name.rpartition(".")
    return letter if head and letter in LETTERS else ""


def _destination(name: str) -> str:
    if name == OUTPUT:
        return LOGITS
    letter = _letter(name)
    return f"{name[:-2]}<{letter}>" if letter else name
