"""InterpBench's true circuits (Gupta et al. 2024, arXiv:2407.14494): edges.pkl, a list of pairs of hook names.

A pair is (parent, child), a head written behind its hook: ("blocks.0.attn.hook_result[2]", "blocks.1.hook_q_input[0]").
A head as a whole that is a child stands for its three inputs; edges inside a node are dropped.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from decompositions.circuits.formats.acdc import INSIDE
from decompositions.circuits.formats.hooks import destinations_of, source_of
from decompositions.circuits.formats.loaded import Gathering, LoadedCircuit
from decompositions.circuits.formats.pickles import read_pickle
from mdl.errors import ExplanationError
from mdl.models.circuits.graph import Graph

FORMAT = "interpbench"
_NODE = re.compile(r"([\w.]+)(?:\[(?:.*?)(\d+)\])?(?:\[:\])?")


def load_interpbench(path: Path, graph: Graph) -> LoadedCircuit:
    """The circuit of an edges.pkl. **Raises:** `ExplanationError`, `ModelError` for what is none or another's."""
    return from_pairs(read_pickle(path), graph)


def is_pairs(content: Any) -> bool:
    """Whether an object is a list of pairs of names."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(p, (tuple, list)) and len(p) == 2 and all(isinstance(n, str) for n in p) for p in content)
    )


def from_pairs(content: Any, graph: Graph) -> LoadedCircuit:
    """As `load_interpbench`, from what the file holds."""
    if not is_pairs(content):
        raise ExplanationError("interpbench: edges.pkl is a list of pairs of hook names, parent and child")
    found = Gathering(graph, FORMAT)
    for parent, child in content:
        source = source_of(graph, *_node(parent))
        if source is None:
            found.drop(INSIDE)
            continue
        for destination in destinations_of(graph, *_node(child)):
            found.add(source, destination, True)
    return found.done()


def _node(name: str) -> tuple[str, int | None]:
    match = _NODE.fullmatch(name)
    if match is None:
        raise ExplanationError(
            f"interpbench: {name!r} is no hook with a head behind it, as in 'blocks.0.hook_q_input[2]'"
        )
    return match[1], None if match[2] is None else int(match[2])
