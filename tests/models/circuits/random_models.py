"""Random models of every architecture, with weights large enough for every edge to matter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdl.models.circuits.graph import Graph
from mdl.models.config import TransformerConfig
from mdl.models.transformer import Params

BASE: dict[str, Any] = {"n_layers": 2, "d_model": 12, "n_heads": 4, "d_head": 3, "d_vocab": 17, "n_ctx": 9, "d_mlp": 10}
ROTARY = {"positions": "rotary", "rotary_frequencies": (1.0,)}
GATED = {"norm": "rms", "gated_mlp": True, "activation": "silu", "n_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"tied": True},
    "scaled-by-layer": {"scale_by_inverse_layer": True, "activation": "relu"},
    "attention-only": {"d_mlp": 0, "norm": "none", "positions": "none"},
    "attention-only-norm": {"d_mlp": 0},
    "neox": {"parallel": True, "activation": "gelu", **ROTARY},
    "gpt-j": {"rotary_adjacent": True, "causal": False, **ROTARY},
    "llama": {**ROTARY, **GATED},
    "gemma2": {
        **(ROTARY | GATED),
        **{"post_norms": True, "attention_softcap": 2.0, "logit_softcap": 3.0, "windows": (3, None)},
        **{"embedding_scale": 3.5, "tied": True, "attention_scale": 0.4},
    },
    "post-norms-with-biases": {"post_norms": True},
    "final-rms": {"final_norm": "rms", "d_vocab_out": 5},
    "one-head": {"n_heads": 1, "d_mlp": 0, "norm": "none"},
}


def random_model(kind: str, seed: int = 0) -> tuple[TransformerConfig, Params]:
    """Random weights; biases and norms' weights everywhere the kind may have them."""
    config = TransformerConfig(**(BASE | KINDS[kind]))
    rng = np.random.default_rng(seed)
    d, h, g, e, n = config.d_model, config.n_heads, config.key_value_heads, config.d_head, config.d_mlp

    def draw(*shape: int, scale: float = 0.4) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    def norm() -> Params:
        weights = {"w": 1 + draw(d, scale=0.2)}
        return weights if config.norm == "rms" else {**weights, "b": draw(d)}

    def block() -> Params:
        heads = {f"W_{name}": draw(count, d, e) for name, count in zip("QKV", (h, g, g), strict=True)}
        biases = {f"b_{name}": draw(count, e) for name, count in zip("QKV", (h, g, g), strict=True)}
        out: Params = {"attn": {**heads, **biases, "W_O": draw(h, e, d)}, "ln1": norm()}
        if kind != "gemma2":
            out["attn"]["b_O"] = draw(d)
        if config.post_norms:
            out |= {"ln1_post": norm(), "ln2_post": norm()}
        if n:
            out |= {"ln2": norm(), "mlp": {"W_in": draw(d, n), "W_out": draw(n, d), "b_out": draw(d), "b_in": draw(n)}}
            if config.gated_mlp:
                out["mlp"]["W_gate"] = draw(d, n)
        return out

    params: Params = {"embed": {"W_E": draw(config.d_vocab, d)}, "ln_final": norm()}
    params["blocks"] = [block() for _ in range(config.n_layers)]
    if config.positions == "learned":
        params["pos_embed"] = {"W_pos": draw(config.n_ctx, d)}
    if not config.tied:
        params["unembed"] = {"W_U": draw(d, config.n_logits), "b_U": draw(config.n_logits)}
    return config, params


def tokens_of(config: TransformerConfig, seed: int = 1, batch: int = 2, positions: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.d_vocab, (batch, positions)).astype(np.int32)


def mask_of(graph: Graph, seed: int = 3, kept: float = 0.6) -> np.ndarray:
    """A random mask of edges."""
    return graph.possible & (np.random.default_rng(seed).random(graph.possible.shape) < kept)
