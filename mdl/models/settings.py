"""Reading a Hugging Face config.json: required entries, activations, rotary frequencies, attention windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdl.errors import ModelError, did_you_mean
from mdl.models.transformer import ACTIVATIONS

_ACTIVATION_NAMES = {
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}


def required(config: Mapping[str, Any], name: str) -> Any:
    """An entry without which the checkpoint cannot be read."""
    if config.get(name) is None:
        raise ModelError(
            f"config.json has no {name!r}, which a {config.get('model_type')!r} model needs."
            f"{did_you_mean(name, config)} It was probably written for another model type."
        )
    return config[name]


def activation(name: str) -> str:
    """Our name for an activation function of transformers or TransformerLens.

    **Raises:** `ModelError` for one that is not built in.
    """
    ours = _ACTIVATION_NAMES.get(name, name)
    if ours not in ACTIVATIONS:
        known = sorted({*ACTIVATIONS, *_ACTIVATION_NAMES})
        raise ModelError(f"activation function {name!r} is not among {known}.{did_you_mean(name, known)}")
    return ours


def _rotary_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of transformers 5 (`rope_parameters`) or earlier (`rope_scaling`), as one flat mapping."""
    entries = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [value for value in entries.values() if isinstance(value, Mapping)]
    if nested:
        if any(value != nested[0] for value in nested):
            raise ModelError(f"rotary settings differ between layer types ({dict(entries)}), which is not supported.")
        entries = nested[0]
    return dict(entries)


def rotary_frequencies(
    config: Mapping[str, Any], d_head: int, theta_name: str = "rope_theta", fraction: float = 1.0
) -> tuple[float, ...]:
    """Angular frequency, in radians per position, of each rotated pair of channels.

    `theta**(-2i/d)` over the rotated `d = fraction * d_head` channels; "linear" divides by a factor; "llama3" divides
    the long wavelengths, keeps the short ones, and interpolates between (Llama 3.1).

    **Raises:** `ModelError` for another kind of scaling.

    **Source:** Su et al. 2021, eq. 15; transformers, `modeling_rope_utils`.
    """
    entries = _rotary_entries(config)
    kind = entries.get("rope_type") or entries.get("type") or "default"
    theta = entries.get("rope_theta") or config.get(theta_name) or 10_000.0
    partial = entries.get("partial_rotary_factor") or config.get("partial_rotary_factor") or fraction
    rotated = int(d_head * partial)
    base = 1.0 / float(theta) ** (np.arange(0, rotated, 2) / rotated)
    if kind == "linear":
        base = base / _scaling_entry(entries, "factor")
    elif kind == "llama3":
        trained = entries.get("original_max_position_embeddings") or required(config, "max_position_embeddings")
        base = _llama3(base, entries, trained)
    elif kind != "default":
        raise ModelError(f"rotary scaling {kind!r} is not supported; 'default', 'linear' and 'llama3' are.")
    return tuple(float(f) for f in base.astype(np.float32))


def _scaling_entry(entries: Mapping[str, Any], name: str) -> float:
    if name not in entries:
        raise ModelError(f"the rotary scaling {dict(entries)} has no {name!r}; config.json is probably incomplete.")
    return float(entries[name])


def _llama3(base: np.ndarray, entries: Mapping[str, Any], trained: int) -> np.ndarray:
    factor, low, high = (_scaling_entry(entries, k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = trained * base / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return base * ((1 - smooth) / factor + smooth)


def attention_windows(
    config: Mapping[str, Any], layer_types: list[str] | None, n_layers: int
) -> tuple[int | None, ...] | None:
    """The window of each layer, from its type, or None when every layer sees everything."""
    width = config.get("sliding_window")
    if layer_types is None or width is None:
        return None
    unknown = {kind for kind in layer_types if kind not in ("sliding_attention", "full_attention")}
    if unknown:
        raise ModelError(f"layer types {sorted(unknown)} are not supported; sliding and full attention are.")
    windows = tuple(int(width) if kind == "sliding_attention" else None for kind in layer_types[:n_layers])
    return None if all(window is None for window in windows) else windows
