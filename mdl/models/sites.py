"""The named sites of a transformer: their order, shapes, where a suffix may start, and how they are read and written.

Names are TransformerLens's, and mean what they do in its version 3: `ln1.hook_normalized` and its like are the
normalised stream before the norm's scale and bias; what the unembedding reads is `unembed.hook_in`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from mdl.errors import ModelError, did_you_mean
from mdl.models.config import TransformerConfig

Write = ArrayLike | Callable[[Array], ArrayLike]

TOKENS = "tokens"
UNEMBED = "unembed.hook_in"
LOGITS = "logits"


def _norm_sites(kind: str, name: str) -> tuple[str, ...]:
    return () if kind == "none" else (f"{name}.hook_scale", f"{name}.hook_normalized")


def _layer_sites(config: TransformerConfig, layer: int) -> list[str]:
    rotary = ("attn.hook_rot_q", "attn.hook_rot_k") if config.positions == "rotary" else ()
    names = [
        "hook_resid_pre",
        *_norm_sites(config.norm, "ln1"),
        *("attn.hook_q", "attn.hook_k", "attn.hook_v", *rotary),
        *("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z"),
        *(_norm_sites(config.norm, "ln1_post") if config.post_norms else ()),
        "hook_attn_out",
    ]
    if config.d_mlp:
        names += [
            *(("hook_resid_mid",) if config.sequential else ()),
            *_norm_sites(config.norm, "ln2"),
            "mlp.hook_pre",
            *(("mlp.hook_pre_linear",) if config.gated_mlp else ()),
            "mlp.hook_post",
            *(_norm_sites(config.norm, "ln2_post") if config.post_norms else ()),
            "hook_mlp_out",
        ]
    return [f"blocks.{layer}.{name}" for name in (*names, "hook_resid_post")]


def site_names(config: TransformerConfig) -> tuple[str, ...]:
    """Every site, in the order in which `run` computes them; the last is `logits`."""
    embedding = ("hook_embed", "hook_pos_embed") if config.positions == "learned" else ("hook_embed",)
    layers = [name for layer in range(config.n_layers) for name in _layer_sites(config, layer)]
    return (*embedding, *layers, *_norm_sites(config.norm_before_unembedding, "ln_final"), UNEMBED, LOGITS)


def check_site(name: str, known: Collection[str]) -> None:
    """Refuse a site that the model does not have.

    **Raises:** `ModelError`, with the nearest names.
    """
    if name not in known:
        layers = {int(match[1]) for site in known if (match := re.match(r"blocks\.(\d+)\.", site))}
        extent = f" Layers run from 0 to {max(layers)}." if layers else ""
        raise ModelError(
            f"the model has no site {name!r} among its {len(known)}.{did_you_mean(name, known)}{extent} "
            "`sites()` lists them all."
        )


def site_shape(config: TransformerConfig, name: str, batch: int, positions: int) -> tuple[int, ...]:
    """Shape of the activation at a site, for `batch` sequences of `positions` tokens."""
    hook = name.rsplit(".", 1)[-1]
    if hook in ("hook_pattern", "hook_attn_scores"):
        return (batch, config.n_heads, positions, positions)
    if hook in ("hook_q", "hook_rot_q", "hook_z"):
        return (batch, positions, config.n_heads, config.d_head)
    if hook in ("hook_k", "hook_rot_k", "hook_v"):
        return (batch, positions, config.key_value_heads, config.d_head)
    if hook in ("hook_pre", "hook_pre_linear", "hook_post"):
        return (batch, positions, config.d_mlp)
    if hook == "hook_scale":
        return (batch, positions, 1)
    return (batch, positions, config.n_logits if name == LOGITS else config.d_model)


def site_width(config: TransformerConfig, name: str) -> int:
    """Numbers per token at a site; heads and their channels are counted together.

    **Raises:** `ModelError` for attention scores and patterns, whose width is the length of the sequence.
    """
    if name.endswith(("hook_pattern", "hook_attn_scores")):
        raise ModelError(f"{name!r} has one number per head and key position, so no fixed width; use site_shape.")
    return prod(site_shape(config, name, 1, 1)[2:])


def start_of(config: TransformerConfig, site: str) -> tuple[int, bool, str]:
    """The latest residual-stream starting point from which a run can replace `site`.

    **Returns:** `(layer, from_mid, boundary)` for `run`, where `boundary` names the activation to start from: the site
    itself when it is a residual stream, `"tokens"` when the embedding has to be run.
    """
    if site in ("hook_embed", "hook_pos_embed"):
        return -1, False, TOKENS
    if not site.startswith("blocks."):
        return config.n_layers, False, f"blocks.{config.n_layers - 1}.hook_resid_post"
    _, number, hook = site.split(".", 2)
    layer = int(number)
    if hook == "hook_resid_post":
        return layer + 1, False, site
    if config.sequential and hook.startswith(("hook_resid_mid", "ln2", "mlp.", "hook_mlp_out")):
        return layer, True, f"blocks.{layer}.hook_resid_mid"
    return layer, False, f"blocks.{layer}.hook_resid_pre"


class Sites:
    """Collects what is read at named sites and substitutes what is written there, during one forward pass."""

    def __init__(self, reads: Collection[str], writes: Mapping[str, Write]):
        self.reads = frozenset(reads)
        self.writes = writes
        self.found: dict[str, Array] = {}
        self.pending = set(self.reads) | set(writes)

    def __call__(self, name: str, value: Array) -> Array:
        if name not in self.pending:
            return value
        self.pending.discard(name)
        if name in self.writes:
            write = self.writes[name]
            value = _fit(name, write(value) if callable(write) else write, value.shape)
        if name in self.reads:
            self.found[name] = value
        return value

    @property
    def done(self) -> bool:
        """Nothing is left to read or write, so the rest of the model need not be run."""
        return not self.pending


def _fit(name: str, new: Any, shape: tuple[int, ...]) -> Array:
    """What is written, broadcast to the site's shape; heads may come flattened."""
    new = jnp.asarray(new)
    if new.shape == (*shape[:2], prod(shape[2:])):
        return new.reshape(shape)
    try:
        return jnp.broadcast_to(new, shape)
    except ValueError:
        raise ModelError(
            f"the value written at {name!r} has shape {new.shape}; the site has {shape}. "
            "Give that shape, one that broadcasts to it, or heads and channels flattened into one axis."
        ) from None
