"""GPT-NeoX checkpoints (Pythia)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdl.models.config import TransformerConfig
from mdl.models.settings import activation, required, rotary_frequencies
from mdl.models.state_dict import StateDict
from mdl.models.transformer import Params

MODEL_TYPES = ("gpt_neox",)


def read_config(config: Mapping[str, Any]) -> TransformerConfig:
    """Our configuration from GPT-NeoX's."""
    d_model, n_heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    d_head = d_model // n_heads
    fraction = config.get("rotary_pct", 0.25)
    return TransformerConfig(
        n_layers=required(config, "num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_head,
        d_vocab=required(config, "vocab_size"),
        n_ctx=required(config, "max_position_embeddings"),
        d_mlp=required(config, "intermediate_size"),
        norm_eps=config.get("layer_norm_eps", 1e-5),
        positions="rotary",
        rotary_frequencies=rotary_frequencies(config, d_head, "rotary_emb_base", fraction),
        activation=activation(config.get("hidden_act", "gelu")),
        parallel=bool(config.get("use_parallel_residual", True)),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _norm(state: StateDict, name: str, d: int) -> dict[str, np.ndarray]:
    return {"w": state.take(f"{name}.weight", d), "b": state.take(f"{name}.bias", d)}


def _attention(config: TransformerConfig, state: StateDict, name: str, biased: bool) -> dict[str, np.ndarray]:
    d, h, e = config.d_model, config.n_heads, config.d_head
    # The outputs of the fused map are interleaved: for each head its query, key and value.
    fused = state.take(f"{name}.query_key_value.weight", 3 * d, d).reshape(h, 3, e, d).transpose(1, 0, 3, 2)
    out = {f"W_{n}": fused[i] for i, n in enumerate("QKV")}
    out["W_O"] = state.take(f"{name}.dense.weight", d, d).T.reshape(h, e, d)
    if biased:
        bias = state.take(f"{name}.query_key_value.bias", 3 * d).reshape(h, 3, e)
        out |= {f"b_{n}": bias[:, i] for i, n in enumerate("QKV")}
        out["b_O"] = state.take(f"{name}.dense.bias", d)
    return out


def _block(config: TransformerConfig, state: StateDict, name: str, biased: bool) -> dict[str, Any]:
    d, m = config.d_model, config.d_mlp
    return {
        "ln1": _norm(state, f"{name}.input_layernorm", d),
        "attn": _attention(config, state, f"{name}.attention", biased),
        "ln2": _norm(state, f"{name}.post_attention_layernorm", d),
        "mlp": {
            "W_in": state.take(f"{name}.mlp.dense_h_to_4h.weight", m, d).T,
            "b_in": state.take(f"{name}.mlp.dense_h_to_4h.bias", m),
            "W_out": state.take(f"{name}.mlp.dense_4h_to_h.weight", d, m).T,
            "b_out": state.take(f"{name}.mlp.dense_4h_to_h.bias", d),
        },
    }


def convert(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[TransformerConfig, Params]:
    """Configuration and weights from config.json and the state dict of a GPT-NeoX.

    **Raises:** `ModelError` for entries or tensors that are missing, unexpected or do not fit.
    """
    config = read_config(settings)
    state = StateDict(tensors, "gpt_neox.")
    biased = bool(settings.get("attention_bias", True))
    params: Params = {
        "embed": {"W_E": state.take("embed_in.weight", config.d_vocab, config.d_model)},
        "blocks": [_block(config, state, f"layers.{layer}", biased) for layer in range(config.n_layers)],
        "ln_final": _norm(state, "final_layer_norm", config.d_model),
    }
    if config.tied:
        state.skip("embed_out.weight", "lm_head.weight")
    else:
        # transformers renamed the unembedding; checkpoints have either name.
        name = "lm_head.weight" if state.has("lm_head.weight") else "embed_out.weight"
        params["unembed"] = {"W_U": state.take(name, config.d_vocab, config.d_model).T}
    state.finish("a GPT-NeoX")
    return config, params
