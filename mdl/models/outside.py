"""What a receiver holds of a model: all weights except a region's.

A tensor that is also used outside the region (a tied embedding) is known. The region's own are not in what is written
for the receiver; read back they are NaN, so that whatever would depend on them comes out as NaN and is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from mdl.models.config import TransformerConfig
from mdl.models.model import Model, named_weights

WEIGHTS, DESCRIPTION = "outside.safetensors", "outside.json"


def region_weights(model: Model, region_input: str, region_output: str) -> frozenset[str]:
    """Names of the weights that the receiver does not hold.

    Upstream of a site: the embeddings (a tied one is known) and every block before the site. Of an MLP or an attention
    block: its matrices, and the scales and biases of its norms, for what enters is the normalised stream before these.
    """
    names = [name for name, _ in named_weights(model.params)]
    if region_output == "logits":
        return frozenset(names)
    if region_input == "tokens":
        layer, from_mid, _ = model.start_of(region_output)
        prefixes = [f"blocks.{i}." for i in range(max(layer, 0))] + ["pos_embed."]
        prefixes += [f"blocks.{layer}.{part}" for part in ("ln1.", "ln1_post.", "attn.")] if from_mid else []
        prefixes += [] if model.config.tied else ["embed."]
    else:
        layer = int(region_output.split(".")[1])
        part, norm = ("mlp", "ln2") if region_output.endswith("mlp_out") else ("attn", "ln1")
        prefixes = [f"blocks.{layer}.{name}." for name in (part, norm, f"{norm}_post")]
    return frozenset(name for name in names if name.startswith(tuple(prefixes)))


def save_outside(model: Model, region_input: str, region_output: str, folder: Path) -> None:
    """Write configuration, every weight's shape, and the weights outside the region."""
    hidden = region_weights(model, region_input, region_output)
    weights = {name: np.ascontiguousarray(weight) for name, weight in named_weights(model.params)}
    shapes = {name: [list(w.shape), str(w.dtype)] for name, w in weights.items()}
    save_file({n: w for n, w in weights.items() if n not in hidden}, folder / WEIGHTS)
    described = {"config": asdict(model.config), "name": model.name, "fingerprint": model.fingerprint, "shapes": shapes}
    (folder / DESCRIPTION).write_text(json.dumps(described))


def load_outside(folder: Path) -> Model:
    """The model as the receiver has it; the region's weights are NaN."""
    described = json.loads((folder / DESCRIPTION).read_text())
    known = load_file(folder / WEIGHTS)
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described["config"].items()}
    params: dict[str, Any] = {}
    for name, (shape, dtype) in described["shapes"].items():
        _place(params, name.split("."), known.get(name, np.full(shape, np.nan, dtype)))
    params["blocks"] = [params.get("blocks", {})[str(i)] for i in range(fields["n_layers"])]
    on_device = jax.tree.map(jax.numpy.asarray, params)
    return Model(TransformerConfig(**fields), on_device, described["name"], described["fingerprint"])


def _place(tree: dict[str, Any], path: list[str], value: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
