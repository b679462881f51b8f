"""The models of the study: the embedded one, two controls made from it, and their sites.

The *shuffled* control has every weight tensor's entries permuted at random: the same marginal distribution of weights,
no structure. The *untrained* control is drawn as GPT-2 is initialised. Both keep biases, layer norms' gains and the
tokenizer, and are read on the same text: what an explanation saves on them it does not owe to what was learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mdl.models import load_model
from mdl.score import EMBEDDED, EMBEDDED_NAME, embedded_model

INITIAL_SPREAD = 0.02  # of GPT-2's weights
CONTROLS = ("shuffled", "untrained")
MAIN_SITE = "blocks.2.hook_resid_pre"
MAIN_HELD_OUT, OTHER_HELD_OUT = 48, 24  # sequences
MAIN_SAMPLES, OTHER_SAMPLES = 1_500_000, 500_000  # activations that an autoencoder is trained on


def sites(layers: int) -> Iterator[tuple[str, str]]:
    """(region, site) for every residual site between blocks, the last output, and every MLP output."""
    for layer in range(layers):
        yield f"upstream of blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_resid_pre"
    yield f"upstream of blocks.{layers - 1}.hook_resid_post", f"blocks.{layers - 1}.hook_resid_post"
    for layer in range(layers):
        yield f"blocks.{layer}.mlp", f"blocks.{layer}.hook_mlp_out"


def write_control(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a control as a checkpoint folder, unless it is there. Returns the folder."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng, source = np.random.default_rng(seed), EMBEDDED / EMBEDDED_NAME
    tensors = {
        name: _changed(kind, value, rng) for name, value in sorted(load_file(source / "model.safetensors").items())
    }
    for path in source.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folder / "partial", metadata={"format": "pt"})
    (folder / "partial").replace(folder / "model.safetensors")
    return folder


def _changed(kind: str, value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if value.ndim < 2:
        return value
    if kind == "shuffled":
        return np.ascontiguousarray(rng.permutation(value.ravel()).reshape(value.shape))
    return rng.normal(0.0, INITIAL_SPREAD, value.shape).astype(value.dtype)


def load(name: str, scratch: Path) -> Any:
    """The embedded model, a control (made in `scratch` if it is not there yet), or a checkpoint folder."""
    if name == "embedded":
        return embedded_model()
    return load_model(str(write_control(name, scratch / name) if name in CONTROLS else name))
