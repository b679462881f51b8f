"""The circuit of a model as its weights have it: which sources write what which destinations read.

For models without norms, whose weights are sparse in the coordinates of the residual stream (compiled ones): in a
trained model every product of two matrices is something, and every edge is weight-true.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mdl.errors import ModelError
from mdl.models.circuits.graph import INPUT, LOGITS, Graph
from mdl.models.circuits.outputs import source_outputs
from mdl.models.model import Model

EVEN = 1e-4  # a message that varies by less, of its own size, is a constant


def weight_true_edges(model: Model) -> Bool[np.ndarray, "sources destinations"]:
    """Edges s -> d with W_out(s) W_in(d) != 0, without dead ends: the truth under zero ablation.

    An edge that is not among them carries nothing whatever the input, so that the circuit computes what the model does;
    each of those that are carries something that its reader does not ignore.

    **Raises:** `ModelError` for a model with norms, of which every channel reads every other.
    """
    if (model.config.norm, model.config.norm_before_unembedding) != ("none", "none"):
        raise ModelError(f"{model.name!r} has norms: there every reader reads every channel, and all edges are true")
    graph = Graph.of(model.config)
    found = np.zeros(graph.possible.shape, bool)
    reads = [_reads(model, name) for name in graph.destinations]
    for s, source in enumerate(graph.sources):
        written = _writes(model, source)
        for d in np.flatnonzero(graph.possible[s]):
            found[s, d] = bool((written @ reads[d]).any())
    return graph.pruned(found, constant=True)


def varying_edges(model: Model, tokens: Int[np.ndarray, "b t"]) -> Bool[np.ndarray, "sources destinations"]:
    """Weight-true edges whose message, what the source writes as the reader sees it, is not the same at all positions
    of all sequences: the truth under mean ablation, which sends what is constant as a constant.

    **Raises:** as `weight_true_edges`.
    """
    edges, graph = weight_true_edges(model), Graph.of(model.config)
    outputs = np.asarray(source_outputs(model.config, model.params, tokens, graph), np.float64)
    for s, d in np.argwhere(edges):
        message = outputs[:, s].reshape(-1, outputs.shape[-1]) @ _reads(model, graph.destinations[d])
        edges[s, d] = bool((np.ptp(message, axis=0) > EVEN * np.abs(message).max()).any())
    return graph.pruned(edges, constant=True)


def _writes(model: Model, source: str) -> np.ndarray:
    """Rows of which every output of a source is a combination, [r, d]."""
    if source == INPUT:
        tables = [
            model.params[part][name]
            for part, name in (("embed", "W_E"), ("pos_embed", "W_pos"))
            if part in model.params
        ]
        return np.concatenate([np.asarray(t, np.float64) for t in tables])
    layer, _, head = source[1:].partition(".h")
    block: dict[str, Any] = model.params["blocks"][int(layer)]
    rows = block["attn"]["W_O"][int(head)] if head else block["mlp"]["W_out"]
    bias = [] if head else [np.atleast_2d(block["mlp"]["b_out"])] if "b_out" in block["mlp"] else []
    return np.concatenate([np.asarray(rows, np.float64), *bias])


def _reads(model: Model, destination: str) -> np.ndarray:
    """The matrix by which a destination reads, [d, e]."""
    if destination == LOGITS:
        unembed = model.params["embed"]["W_E"].T if model.config.tied else model.params["unembed"]["W_U"]
        return np.asarray(unembed, np.float64)
    layer, _, head = destination[1:].partition(".h")
    block: dict[str, Any] = model.params["blocks"][int(layer)]
    if head:
        number, letter = head[:-1].split("<")
        return np.asarray(block["attn"][f"W_{letter.upper()}"][int(number)], np.float64)
    gate = [block["mlp"]["W_gate"]] if "W_gate" in block["mlp"] else []
    return np.concatenate([np.asarray(w, np.float64) for w in (block["mlp"]["W_in"], *gate)], 1)
