"""TransformerLens's `HookedTransformer` objects, attention-only models and models without norms included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdl.errors import ModelError
from mdl.models.config import TransformerConfig
from mdl.models.settings import activation, rotary_frequencies
from mdl.models.state_dict import StateDict
from mdl.models.transformer import Params

_NORMS = {"LN": "layer", "LNPre": "layer", "RMS": "rms", "RMSPre": "rms", None: "none"}
_POSITIONS = {"standard": "learned", "rotary": "rotary"}
# Settings that change what the model computes and that we do not have, with the value that means "not used".
_UNSUPPORTED: Mapping[str, Any] = {
    "use_qk_norm": False,
    "clip_qkv": None,
    "use_logn_attn": False,
    "use_dynamic_ntk_rope": False,
    "use_yarn_rope": False,
    "use_attention_sinks": False,
    "num_experts": None,
    "post_embedding_ln": False,
    "rotary_base_local": None,
    "load_in_4bit": False,
}
_POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


def is_hooked_transformer(source: object) -> bool:
    """Whether an object looks like a `HookedTransformer` (no import of TransformerLens)."""
    needed = ("cfg", "blocks", "embed", "unembed", "state_dict")
    return all(hasattr(source, name) for name in needed) and hasattr(source.cfg, "normalization_type")  # type: ignore[attr-defined]


def refuse_bridge(source: object) -> None:
    """**Raises:** `ModelError` for a `TransformerBridge`, whose weights keep the names of the model it wraps."""
    if type(source).__name__ == "TransformerBridge":
        raise ModelError(
            "a TransformerBridge is not read directly. Pass its original_model with the same weight processing as "
            "switches of load_model, or a HookedTransformer."
        )


def _check_supported(cfg: Any) -> None:
    used = {n: getattr(cfg, n, off) for n, off in _UNSUPPORTED.items() if getattr(cfg, n, off) not in (off, False)}
    if cfg.positional_embedding_type not in _POSITIONS:
        used["positional_embedding_type"] = cfg.positional_embedding_type
    if cfg.normalization_type not in _NORMS:
        used["normalization_type"] = cfg.normalization_type
    if not cfg.attn_only and (cfg.act_fn or "").endswith("_ln"):
        used["act_fn"] = cfg.act_fn
    if getattr(cfg, "original_architecture", None) in _POST_NORM:
        used["original_architecture"] = cfg.original_architecture
    if used:
        raise ModelError(
            f"this HookedTransformer uses {used}, which our transformer does not compute. Position embeddings "
            f"{sorted(_POSITIONS)} and normalisations {[*_NORMS]} are supported."
        )


def _frequencies(cfg: Any) -> tuple[float, ...]:
    if cfg.positional_embedding_type != "rotary":
        return ()
    entries: dict[str, Any] = {"rope_theta": cfg.rotary_base}
    factor = getattr(cfg, "rotary_scaling_factor", 1.0)
    if getattr(cfg, "use_NTK_by_parts_rope", False):
        entries |= {
            "rope_type": "llama3",
            "factor": cfg.NTK_by_parts_factor,
            "low_freq_factor": cfg.NTK_by_parts_low_freq_factor,
            "high_freq_factor": cfg.NTK_by_parts_high_freq_factor,
            "original_max_position_embeddings": cfg.NTK_original_ctx_len,
        }
    elif factor != 1.0:
        if cfg.use_local_attn:
            raise ModelError("rotary_scaling_factor together with local attention gives layers different frequencies.")
        entries |= {"rope_type": "linear", "factor": factor}
    return rotary_frequencies({"rope_parameters": entries}, cfg.rotary_dim)


def _softcap(value: float | None) -> float | None:
    return value if value is not None and value > 0 else None


def read_config(cfg: Any) -> TransformerConfig:
    """Our configuration from a `HookedTransformerConfig`.

    **Raises:** `ModelError` naming what our transformer does not compute.
    """
    _check_supported(cfg)
    windows = None
    if cfg.use_local_attn:
        windows = tuple(cfg.window_size if kind == "local" else None for kind in cfg.attn_types[: cfg.n_layers])
    final = "rms" if getattr(cfg, "final_rms", False) and cfg.normalization_type in ("LN", "LNPre") else None
    return TransformerConfig(
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        d_head=cfg.d_head,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        d_mlp=0 if cfg.attn_only else cfg.d_mlp,
        n_key_value_heads=cfg.n_key_value_heads,
        norm=_NORMS[cfg.normalization_type],
        final_norm=final,
        norm_eps=cfg.eps,
        positions=_POSITIONS[cfg.positional_embedding_type],
        rotary_frequencies=_frequencies(cfg),
        rotary_adjacent=bool(getattr(cfg, "rotary_adjacent_pairs", False)),
        activation="relu" if cfg.attn_only else activation(cfg.act_fn),
        gated_mlp=bool(cfg.gated_mlp) and not cfg.attn_only,
        parallel=bool(cfg.parallel_attn_mlp) and not cfg.attn_only,
        attention_scale=1.0 / float(cfg.attn_scale) if cfg.use_attn_scale else 1.0,
        attention_softcap=_softcap(cfg.attn_scores_soft_cap),
        logit_softcap=_softcap(cfg.output_logits_soft_cap),
        windows=windows,
        post_norms=bool(cfg.use_normalization_before_and_after),
        causal=cfg.attention_dir == "causal",
        scale_by_inverse_layer=bool(cfg.scale_attn_by_inverse_layer_idx),
        d_vocab_out=cfg.d_vocab_out,
    )


def _norm(kind: str, state: StateDict, name: str, d: int) -> dict[str, np.ndarray]:
    """Scale and bias as far as they are there: folded norms ("LNPre") have neither, RMSNorms no bias."""
    if kind == "none":
        return {}
    return {n: state.take(f"{name}.{n}", d) for n in "wb" if state.has(f"{name}.{n}")}


def _attention(config: TransformerConfig, state: StateDict, name: str) -> dict[str, np.ndarray]:
    d, e, heads = config.d_model, config.d_head, config.n_heads
    out = {"W_O": state.take(f"{name}.W_O", heads, e, d), "b_O": state.take(f"{name}.b_O", d)}
    # Grouped-query attention keeps its unexpanded keys and values under a leading underscore.
    shared, kv = ("", heads) if config.n_key_value_heads is None else ("_", config.n_key_value_heads)
    for n, stored, h in (("Q", "", heads), ("K", shared, kv), ("V", shared, kv)):
        out[f"W_{n}"] = state.take(f"{name}.{stored}W_{n}", h, d, e)
        out[f"b_{n}"] = state.take(f"{name}.{stored}b_{n}", h, e)
    return out


def _mlp(config: TransformerConfig, state: StateDict, name: str) -> dict[str, np.ndarray]:
    d, m = config.d_model, config.d_mlp
    out = {"W_in": state.take(f"{name}.W_in", d, m), "W_out": state.take(f"{name}.W_out", m, d)}
    out["b_out"] = state.take(f"{name}.b_out", d)
    # TransformerLens adds the bias of a gated MLP after the product.
    out["b_post" if config.gated_mlp else "b_in"] = state.take(f"{name}.b_in", m)
    if config.gated_mlp:
        out["W_gate"] = state.take(f"{name}.W_gate", d, m)
    return out


def _block(config: TransformerConfig, state: StateDict, name: str) -> dict[str, Any]:
    norms = ["ln1", "ln2"] if config.d_mlp else ["ln1"]
    norms += [f"{n}_post" for n in norms] if config.post_norms else []
    out: dict[str, Any] = {n: _norm(config.norm, state, f"{name}.{n}", config.d_model) for n in norms}
    out["attn"] = _attention(config, state, f"{name}.attn")
    if config.d_mlp:
        out["mlp"] = _mlp(config, state, f"{name}.mlp")
    return out


def _is_buffer(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("mask", "IGNORE", "rotary_sin", "rotary_cos")


def convert(source: Any) -> tuple[TransformerConfig, Params]:
    """Configuration and weights from a `HookedTransformer`, as it stands (processed or not).

    **Raises:** `ModelError` for what our transformer does not compute, and for tensors that do not fit.
    """
    config = read_config(source.cfg)
    state = StateDict({n: t for n, t in source.state_dict().items() if not _is_buffer(n)})
    d = config.d_model
    params: Params = {
        "embed": {"W_E": state.take("embed.W_E", config.d_vocab, d)},
        "blocks": [_block(config, state, f"blocks.{layer}") for layer in range(config.n_layers)],
        "ln_final": _norm(config.norm_before_unembedding, state, "ln_final", d),
        "unembed": {
            "W_U": state.take("unembed.W_U", d, config.n_logits),
            "b_U": state.take("unembed.b_U", config.n_logits),
        },
    }
    if config.positions == "learned":
        params["pos_embed"] = {"W_pos": state.take("pos_embed.W_pos", config.n_ctx, d)}
    state.finish("this HookedTransformer")
    return config, params
