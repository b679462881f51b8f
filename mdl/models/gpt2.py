"""GPT-2 checkpoints: read, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdl.errors import ModelError
from mdl.models.config import TransformerConfig
from mdl.models.model import Model
from mdl.models.settings import activation, required
from mdl.models.state_dict import StateDict
from mdl.models.transformer import Params

MODEL_TYPES = ("gpt2",)
END_OF_TEXT = "<|endoftext|>"


def read_config(config: Mapping[str, Any]) -> TransformerConfig:
    """Our configuration from GPT-2's."""
    if config.get("add_cross_attention"):
        raise ModelError("add_cross_attention is set: a GPT-2 with cross-attention is no decoder-only model.")
    d_model, n_heads = required(config, "n_embd"), required(config, "n_head")
    return TransformerConfig(
        n_layers=required(config, "n_layer"),
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_model // n_heads,
        d_vocab=required(config, "vocab_size"),
        n_ctx=config.get("n_positions") or required(config, "n_ctx"),
        d_mlp=config.get("n_inner") or 4 * d_model,
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation(config.get("activation_function", "gelu_new")),
        attention_scale=None if config.get("scale_attn_weights", True) else 1.0,
        scale_by_inverse_layer=bool(config.get("scale_attn_by_inverse_layer_idx", False)),
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def _norm(state: StateDict, name: str, d: int) -> dict[str, np.ndarray]:
    return {"w": state.take(f"{name}.weight", d), "b": state.take(f"{name}.bias", d)}


def _block(config: TransformerConfig, state: StateDict, name: str) -> dict[str, Any]:
    d, h, e, m = config.d_model, config.n_heads, config.d_head, config.d_mlp
    # Conv1D stores [inputs, outputs], and the outputs are all queries, then all keys, then all values.
    fused = state.take(f"{name}.attn.c_attn.weight", d, 3 * d).reshape(d, 3, h, e).transpose(1, 2, 0, 3)
    bias = state.take(f"{name}.attn.c_attn.bias", 3 * d).reshape(3, h, e)
    return {
        "ln1": _norm(state, f"{name}.ln_1", d),
        "attn": {
            **{f"W_{n}": fused[i] for i, n in enumerate("QKV")},
            **{f"b_{n}": bias[i] for i, n in enumerate("QKV")},
            "W_O": state.take(f"{name}.attn.c_proj.weight", d, d).reshape(h, e, d),
            "b_O": state.take(f"{name}.attn.c_proj.bias", d),
        },
        "ln2": _norm(state, f"{name}.ln_2", d),
        "mlp": {
            "W_in": state.take(f"{name}.mlp.c_fc.weight", d, m),
            "b_in": state.take(f"{name}.mlp.c_fc.bias", m),
            "W_out": state.take(f"{name}.mlp.c_proj.weight", m, d),
            "b_out": state.take(f"{name}.mlp.c_proj.bias", d),
        },
    }


def convert(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[TransformerConfig, Params]:
    """Configuration and weights from config.json and the state dict of a GPT-2.

    **Raises:** `ModelError` for entries or tensors that are missing, unexpected or do not fit.
    """
    config = read_config(settings)
    state = StateDict(tensors, "transformer.")
    params: Params = {
        "embed": {"W_E": state.take("wte.weight", config.d_vocab, config.d_model)},
        "pos_embed": {"W_pos": state.take("wpe.weight", config.n_ctx, config.d_model)},
        "blocks": [_block(config, state, f"h.{layer}") for layer in range(config.n_layers)],
        "ln_final": _norm(state, "ln_f", config.d_model),
    }
    if config.tied:
        state.skip("lm_head.weight")
    else:
        params["unembed"] = {"W_U": state.take("lm_head.weight", config.d_vocab, config.d_model).T}
    state.finish("a GPT-2")
    return config, params


def _check_is_gpt2(config: TransformerConfig) -> None:
    plain = TransformerConfig(
        n_layers=config.n_layers,
        d_model=config.d_model,
        n_heads=config.n_heads,
        d_head=config.d_model // config.n_heads,
        d_vocab=config.d_vocab,
        n_ctx=config.n_ctx,
        d_mlp=config.d_mlp,
        norm_eps=config.norm_eps,
        activation=config.activation,
        scale_by_inverse_layer=config.scale_by_inverse_layer,
        tied=True,
    )
    differing = [n for n in plain.__dataclass_fields__ if getattr(plain, n) != getattr(config, n)]
    if differing or config.d_mlp == 0:
        shown = {name: getattr(config, name) for name in differing or ("d_mlp",)}
        raise ModelError(f"this is no GPT-2 with a tied unembedding, so it cannot be saved as one: {shown}.")


def _settings(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layers,
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "n_inner": config.d_mlp,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,
        "vocab_size": config.d_vocab,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_by_inverse_layer_idx": config.scale_by_inverse_layer,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": dtype,
    }


def _flat(config: TransformerConfig, params: Params) -> dict[str, np.ndarray]:
    """GPT-2's names and shapes; a bias or norm that was not there becomes what it stood for."""
    d, heads = config.d_model, (config.n_heads, config.d_head)
    get = lambda part, name, empty: np.asarray(part[name]) if name in part else empty  # noqa: E731
    out = {"wte": np.asarray(params["embed"]["W_E"]), "wpe": np.asarray(params["pos_embed"]["W_pos"])}
    flat = {f"transformer.{name}.weight": value for name, value in out.items()}

    def norm(name: str, part: Params) -> None:
        flat[f"transformer.{name}.weight"] = get(part, "w", np.ones(d, np.float32))
        flat[f"transformer.{name}.bias"] = get(part, "b", np.zeros(d, np.float32))

    def linear(name: str, weight: np.ndarray, bias: np.ndarray) -> None:
        flat[f"transformer.{name}.weight"], flat[f"transformer.{name}.bias"] = weight, bias.reshape(-1)

    for layer, block in enumerate(params["blocks"]):
        attn, mlp, name = block["attn"], block["mlp"], f"h.{layer}"
        fused = np.stack([np.asarray(attn[f"W_{n}"]) for n in "QKV"]).transpose(2, 0, 1, 3).reshape(d, 3 * d)
        bias = np.stack([get(attn, f"b_{n}", np.zeros(heads, np.float32)) for n in "QKV"])
        linear(f"{name}.attn.c_attn", fused, bias)
        linear(f"{name}.attn.c_proj", np.asarray(attn["W_O"]).reshape(d, d), get(attn, "b_O", np.zeros(d, np.float32)))
        linear(f"{name}.mlp.c_fc", np.asarray(mlp["W_in"]), get(mlp, "b_in", np.zeros(config.d_mlp, np.float32)))
        linear(f"{name}.mlp.c_proj", np.asarray(mlp["W_out"]), get(mlp, "b_out", np.zeros(d, np.float32)))
        norm(f"{name}.ln_1", block.get("ln1", {}))
        norm(f"{name}.ln_2", block.get("ln2", {}))
    norm("ln_f", params.get("ln_final", {}))
    return flat


def save_gpt2_checkpoint(
    model: Model, folder: str | Path, dtype: str = "float16", tokenizer: Any | None = None
) -> None:
    """Write a Hugging Face GPT-2 checkpoint that transformers' auto classes load.

    **Arguments:** `dtype`: "float16" or "float32"; `tokenizer`: a `tokenizers.Tokenizer`, by default the model's own.
    Token 0 begins and ends texts.

    **Raises:** `ModelError` when the model is no GPT-2 with a tied unembedding, or a weight overflows `dtype`.
    """
    from safetensors.numpy import save_file

    if dtype not in ("float16", "float32"):
        raise ModelError(f"dtype {dtype!r} is not 'float16' or 'float32'.")
    _check_is_gpt2(model.config)
    tensors = {}
    for name, weight in _flat(model.config, model.params).items():
        with np.errstate(over="ignore"):
            tensors[name] = np.ascontiguousarray(weight.astype(dtype))
        if not np.isfinite(tensors[name]).all():
            raise ModelError(f"{name!r} reaches {np.abs(weight).max():.3g}, beyond {dtype}. Save it as float32.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write = lambda name, entries: (folder / name).write_text(json.dumps(entries, indent=2) + "\n")  # noqa: E731
    write("config.json", _settings(model.config, dtype))
    write("generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    tokenizer = tokenizer or model.tokenizer
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        special = {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "unk")}
        length = {"model_max_length": model.config.n_ctx, "clean_up_tokenization_spaces": False}
        write("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special, **length})
