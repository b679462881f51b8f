"""Hugging Face checkpoint folders: finding them, and reading their configuration, tensors and tokenizer."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from mdl.errors import ModelError

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_checkpoint(source: str | Path) -> Path:
    """The folder of a checkpoint: `source` itself, or the local snapshot of a hub name (cached, else downloaded).

    **Raises:** `ModelError` when there is neither, saying what to put where.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{folder} is a file. Give the folder that holds config.json and the weights.")
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
        if not any((snapshot / name).exists() for name in _FILES[:2]):
            snapshot = Path(snapshot_download(str(source), allow_patterns=["*.json", "pytorch_model*.bin"]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{str(source)!r} is no folder here, and the Hugging Face hub could not give it ({reason}). "
            "Copy config.json, model.safetensors and tokenizer.json of the model into a folder and give its path, or "
            "fill the hub's cache where there is a network (`hf download NAME`) and copy that."
        ) from error
    return snapshot


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    **Raises:** `ModelError` when the file is missing or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = sorted(p.name for p in path.parent.iterdir())[:12] if path.parent.is_dir() else []
        raise ModelError(f"no {path.name} in {path.parent}; it holds {there}. Give a checkpoint's folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}). It was probably cut short; copy it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def _shards(folder: Path) -> list[Path]:
    present = next((name for name in _FILES if (folder / name).exists()), None)
    if present is None:
        there = sorted(p.name for p in folder.iterdir())[:12]
        raise ModelError(f"no weights in {folder}: none of {list(_FILES)}; it holds {there}.")
    if not present.endswith(".index.json"):
        return [folder / present]
    names = sorted(set(read_json(folder / present).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing or not names:
        raise ModelError(f"{present} in {folder} lists {len(names)} shards, of which {missing or 'all'} are missing.")
    return [folder / name for name in names]


def _read_shard(path: Path) -> dict[str, Any]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError) as error:
        raise ModelError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: {error}. "
            "It is damaged, cut short, or a Git LFS pointer in place of the file; copy it again."
        ) from error


def read_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, by name: safetensors if there, else pytorch_model.bin; sharded or not.

    **Raises:** `ModelError` for weights that are missing or cannot be read.
    """
    tensors: dict[str, Any] = {}
    for path in _shards(folder):
        tensors |= _read_shard(path)
    return tensors


def read_tokenizer(folder: Path) -> Any | None:
    """The `tokenizers.Tokenizer` of tokenizer.json, or None where the checkpoint has none.

    **Raises:** `ModelError` when the file cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise ModelError(f"{path} is not a tokenizer that `tokenizers` reads: {error}.") from error
