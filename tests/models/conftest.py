"""Tiny random models of every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

SHARED = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 61,
}
ROTARY = {"rope_theta": 10000.0, "rope_type": "default"}
LLAMA3 = {
    "rope_theta": 100.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}

# name -> (configuration class, its arguments)
FAMILIES = {
    "gpt2": ("GPT2", {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 32}),
    "gpt2-variants": (
        "GPT2",
        {
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 61,
            "n_positions": 32,
            "n_inner": 40,
            "tie_word_embeddings": False,
        }
        | {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
    ),
    "neox": ("GPTNeoX", dict(**SHARED, max_position_embeddings=32)),
    "neox-sequential": (
        "GPTNeoX",
        dict(**SHARED, max_position_embeddings=32, use_parallel_residual=False, attention_bias=False),
    ),
    "llama": ("Llama", dict(**SHARED, num_key_value_heads=2, rope_parameters=LLAMA3, max_position_embeddings=128)),
    "llama-biases": (
        "Llama",
        dict(**SHARED, num_key_value_heads=4, attention_bias=True, mlp_bias=True, head_dim=8, tie_word_embeddings=True)
        | {"rope_parameters": LINEAR},
    ),
    "mistral": ("Mistral", dict(**SHARED, num_key_value_heads=2, sliding_window=5, max_position_embeddings=64)),
    "qwen2": (
        "Qwen2",
        dict(**SHARED, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
    "gemma2": (
        "Gemma2",
        dict(**SHARED, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=12, sliding_window=4)
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
}


def torch_model(family: str) -> transformers.PreTrainedModel:
    """A randomly initialised transformers model whose biases and norms are not trivial either."""
    kind, arguments = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**arguments, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    torch.manual_seed(3)
    config._attn_implementation = "eager"
    name = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 61, (2, 20)).astype(np.int32)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, object]]:
    """Each family saved by transformers: (model, folder)."""
    out = {}
    for family in FAMILIES:
        model, folder = torch_model(family), tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        out[family] = (model, folder)
    return out
