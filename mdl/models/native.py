"""Any transformer of ours as a folder: config.json with the fields of `TransformerConfig`, and its weights.

The weights are float32 in model.safetensors, under their TransformerLens names, in the shapes in which the model runs.
What other formats cannot say (no norms, no MLPs, attention that looks ahead, other outputs than inputs) this one can.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from mdl.errors import ModelError, did_you_mean
from mdl.models.config import TransformerConfig
from mdl.models.model import Model, named_weights
from mdl.models.operators import Operator
from mdl.models.settings import activation
from mdl.models.state_dict import StateDict
from mdl.models.transformer import Params

MODEL_TYPE = "mdl-transformer"
MODEL_TYPES = (MODEL_TYPE,)
SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_vocab", "n_ctx")
# Of a field's annotation, what JSON may hold there.
_KINDS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}

Shape = tuple[int, ...]


def save_model(model: Model, folder: str | Path) -> None:
    """Write a transformer to a folder that `load_model` and `mdl compare --model` read: the same fingerprint again.

    Each file is written beside its place and renamed, config.json last.

    **Raises:** `ModelError` for weights that are no float32 arrays, not finite, or not those that the configuration
    asks for, before anything is written.
    """
    from safetensors.numpy import save_file

    tensors = dict(named_weights(model.params))
    for name, weight in tensors.items():
        if isinstance(weight, Operator) or weight.dtype != np.float32:
            kind = type(weight).__name__ if isinstance(weight, Operator) else str(weight.dtype)
            raise ModelError(f"{name!r} is {kind}; weights are saved as float32, so that they are read as they were")
    arrays = {name: np.ascontiguousarray(weight) for name, weight in tensors.items()}
    settings = {"model_type": MODEL_TYPE, **asdict(model.config)}
    convert(json.loads(json.dumps(settings)), arrays)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model.tokenizer is not None:
        _renamed(folder / "tokenizer.json", lambda path: model.tokenizer.save(str(path)))
    _renamed(folder / "model.safetensors", lambda path: save_file(arrays, path))
    text = json.dumps(settings, indent=2) + "\n"
    _renamed(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def _renamed(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".partial")
    write(temporary)
    temporary.replace(path)


def read_config(settings: Mapping[str, Any]) -> TransformerConfig:
    """Our configuration from its own fields.

    **Raises:** `ModelError` for fields that are missing, unknown, of another type, or of no size.
    """
    known = {field.name: field for field in fields(TransformerConfig)}
    given = {name: value for name, value in settings.items() if name != "model_type"}
    for name in given:
        if name not in known:
            raise ModelError(
                f"config.json has {name!r}, which is no field of an {MODEL_TYPE} model.{did_you_mean(name, known)} "
                "It was probably written by a later version, or by hand."
            )
    missing = [name for name, field in known.items() if field.default is MISSING and name not in given]
    if missing:
        raise ModelError(f"config.json of an {MODEL_TYPE} model lacks {', '.join(missing)}.")
    values = {name: _value(name, str(known[name].type), value) for name, value in given.items()}
    too_small = [name for name in SIZES if values[name] < 1] + ["d_mlp"] * (values.get("d_mlp", 0) < 0)
    if too_small:
        raise ModelError(f"config.json: {', '.join(f'{n} is {values[n]}' for n in too_small)}; sizes are at least 1.")
    if values.get("d_vocab_out", 1) is not None and values.get("d_vocab_out", 1) < 1:
        raise ModelError(f"config.json: d_vocab_out is {values['d_vocab_out']}; it is the number of logits.")
    config = TransformerConfig(**values)
    activation(config.activation)
    return config


def _value(name: str, kind: str, value: Any) -> Any:
    """What JSON holds, as a field of this annotation: "int", "float | None", "tuple[int | None, ...] | None"."""
    bare = kind.removesuffix(" | None")
    if value is None and bare != kind:
        return None
    if bare.startswith("tuple["):
        if not isinstance(value, list):
            raise _wrong(name, kind, value)
        inner = bare.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_value(name, inner, entry) for entry in value)
    fits = isinstance(value, _KINDS[bare]) and (bare == "bool" or not isinstance(value, bool))
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong(name, kind, value)
    return value


def _wrong(name: str, kind: str, value: Any) -> ModelError:
    return ModelError(f"config.json: {name} is {value!r}, where a field of type {kind} is expected.")


def shapes(config: TransformerConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Name and shape of the weights that a model of this configuration has, and of those that it may have."""
    d, e = config.d_model, config.d_head
    needed: dict[str, Shape] = {"embed.W_E": (config.d_vocab, d)}
    allowed: dict[str, Shape] = {"unembed.b_U": (config.n_logits,)}
    if config.positions == "learned":
        needed["pos_embed.W_pos"] = (config.n_ctx, d)
    if not config.tied:
        needed["unembed.W_U"] = (d, config.n_logits)
    for layer in range(config.n_layers):
        for name, heads in (("Q", config.n_heads), ("K", config.key_value_heads), ("V", config.key_value_heads)):
            needed[f"blocks.{layer}.attn.W_{name}"] = (heads, d, e)
            allowed[f"blocks.{layer}.attn.b_{name}"] = (heads, e)
        needed[f"blocks.{layer}.attn.W_O"] = (config.n_heads, e, d)
        allowed[f"blocks.{layer}.attn.b_O"] = (d,)
        if config.d_mlp:
            _mlp_shapes(config, f"blocks.{layer}.mlp", needed, allowed)
    for norm in _norms(config):
        allowed |= {f"{norm}.w": (d,), f"{norm}.b": (d,)}
    return needed, allowed


def _mlp_shapes(config: TransformerConfig, prefix: str, needed: dict[str, Shape], allowed: dict[str, Shape]) -> None:
    d, m = config.d_model, config.d_mlp
    needed |= {f"{prefix}.W_in": (d, m), f"{prefix}.W_out": (m, d)}
    allowed |= {f"{prefix}.b_in": (m,), f"{prefix}.b_out": (d,)}
    if config.gated_mlp:
        needed[f"{prefix}.W_gate"] = (d, m)
        allowed |= {f"{prefix}.b_gate": (m,), f"{prefix}.b_post": (m,)}


def _norms(config: TransformerConfig) -> list[str]:
    """Names of the norms that may have a scale and a bias."""
    each = [] if config.norm == "none" else ["ln1", *(["ln2"] if config.d_mlp else [])]
    each += [f"{name}_post" for name in each] if config.post_norms else []
    found = [f"blocks.{layer}.{name}" for layer in range(config.n_layers) for name in each]
    return found + ([] if config.norm_before_unembedding == "none" else ["ln_final"])


def convert(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[TransformerConfig, Params]:
    """Configuration and weights from config.json and tensors under TransformerLens's names.

    **Raises:** `ModelError` for fields or tensors that are missing, unexpected, do not fit, or are not finite.
    """
    config = read_config(settings)
    state, params = StateDict(tensors), _empty(config)
    needed, allowed = shapes(config)
    for name, shape in {**needed, **{n: s for n, s in allowed.items() if state.has(n)}}.items():
        *path, last = name.split(".")
        place = params["blocks"][int(path[1])] if path[0] == "blocks" else params
        for key in path[2:] if path[0] == "blocks" else path:
            place = place.setdefault(key, {})
        place[last] = state.take(name, *shape)
    state.finish(f"an {MODEL_TYPE} model of this configuration")
    return config, params


def _empty(config: TransformerConfig) -> Params:
    return {"blocks": [{} for _ in range(config.n_layers)]}
