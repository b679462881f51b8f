"""Llama, Mistral and Qwen2 checkpoints: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdl.models.config import TransformerConfig
from mdl.models.settings import activation, attention_windows, required, rotary_frequencies
from mdl.models.state_dict import StateDict
from mdl.models.transformer import Params

MODEL_TYPES = ("llama", "mistral", "qwen2")


def _layer_types(config: Mapping[str, Any], n_layers: int) -> list[str] | None:
    """Which layers see a window only: all of Mistral's, the later ones of Qwen2's, none of Llama's."""
    if config["model_type"] == "mistral":
        return ["sliding_attention"] * n_layers
    if config["model_type"] == "qwen2" and config.get("use_sliding_window", False):
        first = config.get("max_window_layers", 28)
        default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(n_layers)]
        return config.get("layer_types") or default
    return None


def read_config(config: Mapping[str, Any]) -> TransformerConfig:
    """Our configuration from Llama's, Mistral's or Qwen2's."""
    d_model, n_heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    d_head = config.get("head_dim") or d_model // n_heads
    n_layers = required(config, "num_hidden_layers")
    return TransformerConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_head,
        d_vocab=required(config, "vocab_size"),
        n_ctx=required(config, "max_position_embeddings"),
        d_mlp=required(config, "intermediate_size"),
        n_key_value_heads=config.get("num_key_value_heads") or n_heads,
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        positions="rotary",
        rotary_frequencies=rotary_frequencies(config, d_head),
        activation=activation(config.get("hidden_act", "silu")),
        gated_mlp=True,
        windows=attention_windows(config, _layer_types(config, n_layers), n_layers),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def read_attention(
    config: TransformerConfig, state: StateDict, name: str, biased: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """`q_proj`, `k_proj`, `v_proj`, `o_proj`; `biased` names those ("Q", "K", "V", "O") that have a bias."""
    d, e = config.d_model, config.d_head
    heads = {"Q": config.n_heads, "K": config.key_value_heads, "V": config.key_value_heads}
    out: dict[str, np.ndarray] = {}
    for n, h in heads.items():
        projection = f"{name}.{n.lower()}_proj"
        out[f"W_{n}"] = state.take(f"{projection}.weight", h * e, d).reshape(h, e, d).transpose(0, 2, 1)
        if n in biased:
            out[f"b_{n}"] = state.take(f"{projection}.bias", h * e).reshape(h, e)
    out["W_O"] = state.take(f"{name}.o_proj.weight", d, config.n_heads * e).T.reshape(config.n_heads, e, d)
    if "O" in biased:
        out["b_O"] = state.take(f"{name}.o_proj.bias", d)
    return out


def read_mlp(config: TransformerConfig, state: StateDict, name: str, biased: bool) -> dict[str, np.ndarray]:
    """`gate_proj`, `up_proj`, `down_proj`."""
    d, m = config.d_model, config.d_mlp
    out = {
        "W_gate": state.take(f"{name}.gate_proj.weight", m, d).T,
        "W_in": state.take(f"{name}.up_proj.weight", m, d).T,
        "W_out": state.take(f"{name}.down_proj.weight", d, m).T,
    }
    if biased:
        out["b_gate"] = state.take(f"{name}.gate_proj.bias", m)
        out["b_in"] = state.take(f"{name}.up_proj.bias", m)
        out["b_out"] = state.take(f"{name}.down_proj.bias", d)
    return out


def read_unembedding(config: TransformerConfig, state: StateDict) -> Params:
    """The untied unembedding, or nothing."""
    if config.tied:
        state.skip("lm_head.weight")
        return {}
    return {"unembed": {"W_U": state.take("lm_head.weight", config.d_vocab, config.d_model).T}}


def convert(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[TransformerConfig, Params]:
    """Configuration and weights from config.json and the state dict of a Llama, Mistral or Qwen2.

    **Raises:** `ModelError` for entries or tensors that are missing, unexpected or do not fit.
    """
    config = read_config(settings)
    state = StateDict(tensors, "model.")
    biased: tuple[str, ...] = ("Q", "K", "V", "O") if settings.get("attention_bias", False) else ()
    if settings["model_type"] == "qwen2":
        biased = ("Q", "K", "V")
    mlp_biased = bool(settings.get("mlp_bias", False))
    blocks = []
    for name in (f"layers.{layer}" for layer in range(config.n_layers)):
        blocks.append(
            {
                "ln1": {"w": state.take(f"{name}.input_layernorm.weight", config.d_model)},
                "attn": read_attention(config, state, f"{name}.self_attn", biased),
                "ln2": {"w": state.take(f"{name}.post_attention_layernorm.weight", config.d_model)},
                "mlp": read_mlp(config, state, f"{name}.mlp", mlp_biased),
            }
        )
    params: Params = {
        "embed": {"W_E": state.take("embed_tokens.weight", config.d_vocab, config.d_model)},
        "blocks": blocks,
        "ln_final": {"w": state.take("norm.weight", config.d_model)},
        **read_unembedding(config, state),
    }
    state.finish(f"a {settings['model_type']} model")
    return config, params
