"""`load_model`: from what people have to a `Model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mdl.errors import ModelError, did_you_mean
from mdl.models import checkpoint, gemma, gpt2, gpt_neox, llama, native, torch_path, transformer_lens, weights
from mdl.models.config import TransformerConfig
from mdl.models.model import Model, fingerprint_of
from mdl.models.torch_path import TorchModel
from mdl.models.transformer import Params
from mdl.models.vectors import NETWORK_FILE, Vectors

DTYPES = ("float32", "float64", "bfloat16", "float16")
PROCESSING = ("fold_layer_norm", "center_writing_weights", "center_unembed", "fold_value_biases")  # in this order
_ADAPTERS = (gpt2, gpt_neox, llama, gemma, native)


def _adapters() -> dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[TransformerConfig, Params]]]:
    return {kind: module.convert for module in _ADAPTERS for kind in module.MODEL_TYPES}


def _convert(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[TransformerConfig, Params]:
    kind, adapters = settings.get("model_type"), _adapters()
    if kind not in adapters:
        raise ModelError(
            f"model_type {kind!r} has no adapter; supported: {sorted(adapters)}.{did_you_mean(str(kind), adapters)} "
            "Load such a model with its own library and pass the object: a torch module runs through the slower "
            "torch path."
        )
    if settings.get("quantization_config"):
        raise ModelError("config.json has a quantization_config: give the checkpoint in full or half precision.")
    return adapters[kind](settings, tensors)


def _from_folder(source: str | Path) -> tuple[TransformerConfig, Params, str, Any | None]:
    folder = checkpoint.find_checkpoint(source)
    settings = checkpoint.read_json(folder / "config.json")
    if settings.get("model_type") not in _adapters():
        _convert(settings, {})  # says what is supported, before any weight is read
    config, params = _convert(settings, checkpoint.read_tensors(folder))
    name = str(source) if not Path(source).expanduser().is_dir() else folder.resolve().name
    return config, params, name, checkpoint.read_tokenizer(folder)


def _backend_tokenizer(source: Any) -> Any | None:
    tokenizer = getattr(source, "tokenizer", None)
    return getattr(tokenizer, "backend_tokenizer", None)


def _from_object(source: Any) -> tuple[TransformerConfig, Params, str, Any | None] | TorchModel:
    import torch

    transformer_lens.refuse_bridge(source)
    if transformer_lens.is_hooked_transformer(source):
        config, params = transformer_lens.convert(source)
        return config, params, source.cfg.model_name, _backend_tokenizer(source)
    if not isinstance(source, torch.nn.Module):
        raise ModelError(
            f"a {type(source).__name__} is no model: give a checkpoint's folder, a hub name, a transformers model, a "
            "TransformerLens HookedTransformer, or a torch module."
        )
    described: Any = getattr(source, "config", None)
    settings = described.to_dict() if hasattr(described, "to_dict") else {}
    if settings.get("model_type") in _adapters():
        config, params = _convert(settings, source.state_dict())
        name = getattr(described, "name_or_path", "") or type(source).__name__
        return config, params, name, None
    return torch_path.wrap(source, _backend_tokenizer(source))


def _processed(
    config: TransformerConfig, params: Params, steps: Mapping[str, bool]
) -> tuple[TransformerConfig, Params]:
    """The chosen steps, in TransformerLens's order."""
    for name in PROCESSING:
        if steps[name]:
            config, params = getattr(weights, name)(config, params)
    if steps["fold_value_biases"] and steps["center_writing_weights"]:
        config, params = weights.center_writing_weights(config, params)
    return config, params


def load_model(
    source: str | Path | object,
    *,
    center_writing_weights: bool = False,
    fold_layer_norm: bool = False,
    center_unembed: bool = False,
    fold_value_biases: bool = False,
    dtype: str = "float32",
) -> Model | TorchModel | Vectors:
    """A model from a checkpoint folder, a hub name, or an object; rows of numbers from an .npy file; a toy model from
    the folder that `Vectors.save` wrote.

    **Arguments:** `source`: a folder with config.json and weights (GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Gemma-2, or
    what `mdl.models.native.save_model` wrote); a Hugging Face hub name; a transformers model; a TransformerLens
    `HookedTransformer`; or another `torch.nn.Module`, which is wrapped in a `TorchModel`. The four switches are
    TransformerLens's weight processing, as a published autoencoder's configuration names it
    (`model_from_pretrained_kwargs`); without them the weights stay as they are.
    `dtype`: what the weights are held and run in; half-precision checkpoints become float32 first.

    **Raises:** `ModelError`: unknown model type, unreadable files, missing, unexpected or mis-shaped tensors, NaN or
    infinite weights, settings that are not supported.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.suffix == ".npy" or (path / NETWORK_FILE).is_file():
            return Vectors.load(path)
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {list(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ModelError("float64 weights need jax_enable_x64; switch it on before anything else uses JAX.")
    steps = {
        "fold_layer_norm": fold_layer_norm,
        "center_writing_weights": center_writing_weights,
        "center_unembed": center_unembed,
        "fold_value_biases": fold_value_biases,
    }
    read = _from_folder(source) if isinstance(source, str | Path) else _from_object(source)
    if isinstance(read, TorchModel):
        asked = [name for name, on in steps.items() if on]
        if asked or dtype != "float32":
            raise ModelError(f"{asked or dtype} cannot be applied to {read.name}: a torch module runs as it is.")
        return read
    config, params, name, tokenizer = read
    config, params = _processed(config, params, steps)
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), params)
    return Model(config, params, name, fingerprint_of(config, params), tokenizer)


def load_processed(source: str | Path | object, process: Sequence[str]) -> Model | TorchModel | Vectors:
    """`load_model` with the switches named in `process`, each one of PROCESSING. **Raises:** as `load_model`."""
    steps: dict[str, Any] = dict.fromkeys(process, True)
    return load_model(source, **steps)
