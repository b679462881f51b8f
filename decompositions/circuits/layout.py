"""What the code of edges may know of a graph: which edges are possible, which are alike, whose inputs they are."""

from __future__ import annotations

import numpy as np

from mdl.codes.edge_layout import EdgeLayout
from mdl.models.circuits.graph import INPUT, LOGITS, Graph

_SOURCE_KINDS, _DESTINATION_KINDS = 3, 5  # input, head, MLP; q, k, v, MLP, logits


def edge_layout(graph: Graph) -> EdgeLayout:
    """The layout of a graph: edges are alike whose ends are of the same kinds and as many layers apart.

    Kinds: input, head, MLP of a source; q, k, v, MLP, logits of a destination; the logits are in the layer after the
    last, the input before the first.
    """
    kinds = np.array([_source_kind(name) for name in graph.sources])
    reads = np.array([_destination_kind(name) for name in graph.destinations])
    layers = np.array([_layer(name, -1) for name in graph.sources])
    depths = np.array([_layer(name, graph.n_layers) for name in graph.destinations])
    apart = np.maximum(depths[None] - layers[:, None], 0)
    classes = (apart * _SOURCE_KINDS + kinds[:, None]) * _DESTINATION_KINDS + reads[None]
    return EdgeLayout(graph.possible, classes.astype(np.int64), graph.owners)


def _source_kind(name: str) -> int:
    return 0 if name == INPUT else 1 if name.startswith("a") else 2


def _destination_kind(name: str) -> int:
    if name == LOGITS:
        return 4
    return "qkv".index(name[-2]) if name.endswith(">") else 3


def _layer(name: str, outside: int) -> int:
    return outside if name in (INPUT, LOGITS) else int(name[1:].partition(".")[0])
