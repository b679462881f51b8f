"""GPT-2 under a mask of edges, edge by edge in float64 numpy: what the masked forward is checked against."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mdl.models.circuits.graph import Graph


def arrays(params: Any) -> Any:
    """The weights in float64."""
    if isinstance(params, dict):
        return {name: arrays(value) for name, value in params.items()}
    return [arrays(p) for p in params] if isinstance(params, list) else np.asarray(params, np.float64)


def layer_norm(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights["w"] + weights["b"]


def head(attn: dict[str, np.ndarray], h: int, q_in: np.ndarray, k_in: np.ndarray, v_in: np.ndarray) -> np.ndarray:
    q = q_in @ attn["W_Q"][h] + attn["b_Q"][h]
    k = k_in @ attn["W_K"][h] + attn["b_K"][h]
    v = v_in @ attn["W_V"][h] + attn["b_V"][h]
    out = np.zeros((len(q), attn["W_O"].shape[-1]))
    for t in range(len(q)):
        scores = [q[t] @ k[s] / math.sqrt(q.shape[1]) for s in range(t + 1)]
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        out[t] = sum(w * v[s] for s, w in enumerate(weights)) @ attn["W_O"][h]
    return out


def mlp(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    pre = x @ weights["W_in"] + weights["b_in"]
    post = 0.5 * pre * (1 + np.tanh(math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3)))
    return post @ weights["W_out"] + weights["b_out"]


def masked_forward(
    params: Any, graph: Graph, tokens: np.ndarray, mask: np.ndarray, ablated: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, V] and outputs of all sources [S, T, d] of one sequence; `ablated` [S, T, d], `mask` [S, D]."""
    rows = {name: i for i, name in enumerate(graph.sources)}
    outputs: dict[str, np.ndarray] = {
        "input": params["embed"]["W_E"][tokens] + params["pos_embed"]["W_pos"][: len(tokens)]
    }
    constant = np.zeros(outputs["input"].shape[-1])

    def read(destination: str) -> np.ndarray:
        column = graph.destinations.index(destination)
        total = np.zeros_like(outputs["input"]) + constant
        for source, value in outputs.items():
            kept = mask[rows[source], column]
            total = total + kept * value + (1 - kept) * ablated[rows[source]]
        return total

    for layer, block in enumerate(params["blocks"]):
        found = {}
        for h in range(graph.n_heads):
            inputs = [layer_norm(block["ln1"], read(f"a{layer}.h{h}<{x}>")) for x in "qkv"]
            found[f"a{layer}.h{h}"] = head(block["attn"], h, *inputs)
        outputs |= found
        constant = constant + block["attn"]["b_O"]
        outputs[f"m{layer}"] = mlp(block["mlp"], layer_norm(block["ln2"], read(f"m{layer}")))
    logits = layer_norm(params["ln_final"], read("logits")) @ params["embed"]["W_E"].T
    return logits, np.stack([outputs[name] for name in graph.sources])
