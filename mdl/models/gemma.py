"""Gemma-2 checkpoints: soft-caps, alternating windows, norms before and after, scaled embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdl.errors import ModelError
from mdl.models.config import TransformerConfig
from mdl.models.llama import read_attention, read_mlp, read_unembedding
from mdl.models.settings import activation, attention_windows, required, rotary_frequencies
from mdl.models.state_dict import StateDict
from mdl.models.transformer import Params

MODEL_TYPES = ("gemma2",)


def read_config(config: Mapping[str, Any]) -> TransformerConfig:
    """Our configuration from Gemma-2's."""
    if config.get("use_bidirectional_attention"):
        raise ModelError("use_bidirectional_attention is set: that Gemma-2 is an encoder, no causal language model.")
    n_layers, d_model = required(config, "num_hidden_layers"), required(config, "hidden_size")
    d_head = config.get("head_dim", 256)
    alternating = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(n_layers)]
    return TransformerConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=required(config, "num_attention_heads"),
        d_head=d_head,
        d_vocab=required(config, "vocab_size"),
        n_ctx=required(config, "max_position_embeddings"),
        d_mlp=required(config, "intermediate_size"),
        n_key_value_heads=required(config, "num_key_value_heads"),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        positions="rotary",
        rotary_frequencies=rotary_frequencies(config, d_head),
        activation=activation(config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"),
        gated_mlp=True,
        attention_scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping", 50.0),
        logit_softcap=config.get("final_logit_softcapping", 30.0),
        windows=attention_windows(
            {"sliding_window": config.get("sliding_window", 4096)}, config.get("layer_types") or alternating, n_layers
        ),
        post_norms=True,
        embedding_scale=float(d_model) ** 0.5,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def convert(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[TransformerConfig, Params]:
    """Configuration and weights from config.json and the state dict of a Gemma-2; norms become `1 + w`.

    **Raises:** `ModelError` for entries or tensors that are missing, unexpected or do not fit.
    """
    config = read_config(settings)
    state = StateDict(tensors, "model.")
    biased = ("Q", "K", "V", "O") if settings.get("attention_bias", False) else ()
    norm = lambda name: {"w": 1.0 + state.take(f"{name}.weight", config.d_model)}  # noqa: E731
    blocks = []
    for name in (f"layers.{layer}" for layer in range(config.n_layers)):
        blocks.append(
            {
                "ln1": norm(f"{name}.input_layernorm"),
                "attn": read_attention(config, state, f"{name}.self_attn", biased),
                "ln1_post": norm(f"{name}.post_attention_layernorm"),
                "ln2": norm(f"{name}.pre_feedforward_layernorm"),
                "mlp": read_mlp(config, state, f"{name}.mlp", False),
                "ln2_post": norm(f"{name}.post_feedforward_layernorm"),
            }
        )
    params: Params = {
        "embed": {"W_E": state.take("embed_tokens.weight", config.d_vocab, config.d_model)},
        "blocks": blocks,
        "ln_final": norm("norm"),
        **read_unembedding(config, state),
    }
    state.finish("a Gemma-2")
    return config, params
