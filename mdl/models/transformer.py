"""One decoder-only transformer as a pure JAX function with named sites.

It covers GPT-2, GPT-NeoX (Pythia), Llama, Mistral, Qwen2 and Gemma-2, and TransformerLens models with or without
norms and MLPs. Sites carry TransformerLens's hook names (`blocks.3.hook_resid_pre`), because every published sparse
autoencoder names its site so. Weights use TransformerLens's names and shapes too:
`W_Q [n_heads, d_model, d_head]`, `W_O [n_heads, d_head, d_model]`, `W_in [d_model, d_mlp]`, `W_U [d_model, d_vocab]`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Params = dict[str, Any]
Write = Array | Callable[[Array], Array]

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class TransformerConfig:
    """The architecture, which the receiver of a message knows (accounting standard, "Region").

    **Arguments:** sizes as in TransformerLens; `norm` is "layer", "rms" or "none"; `positions` is "learned", "rotary"
    or "none"; `rotary_frequencies` has one angular frequency (radians per position) for each rotated pair, so that any
    frequency scaling is resolved when a checkpoint is read; `windows` holds, per layer, the number of latest positions
    that attention may look at, or None for all; `logit_softcap` and `attention_softcap` are Gemma-2's
    `cap * tanh(x / cap)`.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_vocab: int
    n_ctx: int
    d_mlp: int = 0
    n_key_value_heads: int | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    positions: str = "learned"
    rotary_frequencies: tuple[float, ...] = ()
    activation: str = "gelu_new"
    gated_mlp: bool = False
    parallel: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] | None = None
    post_norms: bool = False
    embedding_scale: float = 1.0
    tied: bool = False

    @property
    def key_value_heads(self) -> int:
        return self.n_key_value_heads or self.n_heads

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by; 1/sqrt(d_head) unless the checkpoint says otherwise."""
        return self.d_head**-0.5 if self.attention_scale is None else self.attention_scale


class Sites:
    """Collects what is read at named sites and substitutes what is written there, during one forward pass."""

    def __init__(self, reads: Collection[str], writes: Mapping[str, Write]):
        self.reads = frozenset(reads)
        self.writes = writes
        self.found: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        if name in self.writes:
            write = self.writes[name]
            value = write(value) if callable(write) else write
        if name in self.reads:
            self.found[name] = value
        return value


def normalize(config: TransformerConfig, params: Params | None, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """LayerNorm, RMSNorm, or neither; `params` may lack scale and bias (folded norms)."""
    if config.norm == "none" or params is None:
        return x
    if config.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps)
    if "w" in params:
        x = x * params["w"]
    return x + params["b"] if "b" in params else x


def rotate(x: Float[Array, "b t h e"], frequencies: tuple[float, ...]) -> Float[Array, "b t h e"]:
    """Rotary position embedding on the first `2 * len(frequencies)` channels, halves paired (Su et al. 2021)."""
    angles = jnp.arange(x.shape[1])[:, None] * jnp.asarray(frequencies, jnp.float32)[None]
    sin, cos = jnp.sin(angles)[None, :, None], jnp.cos(angles)[None, :, None]
    half = len(frequencies)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _project(params: Params, name: str, x: Float[Array, "b t d"]) -> Float[Array, "b t h e"]:
    out = jnp.einsum("btd,hde->bthe", x, params[f"W_{name}"])
    return out + params[f"b_{name}"] if f"b_{name}" in params else out


def attention(
    config: TransformerConfig, params: Params, x: Float[Array, "b t d"], window: int | None, sites: Sites, prefix: str
) -> Float[Array, "b t d"]:
    """Causal multi-head (or grouped-query) attention over the normalised input `x`."""
    q = sites(f"{prefix}.hook_q", _project(params, "Q", x))
    k = sites(f"{prefix}.hook_k", _project(params, "K", x))
    v = sites(f"{prefix}.hook_v", _project(params, "V", x))
    if config.positions == "rotary":
        q, k = rotate(q, config.rotary_frequencies), rotate(k, config.rotary_frequencies)
    groups = config.n_heads // config.key_value_heads
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("bthe,bshe->bhts", q, k) * config.scale
    if config.attention_softcap is not None:
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    distance = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])[None]
    allowed = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    scores = sites(f"{prefix}.hook_attn_scores", jnp.where(allowed, scores, -jnp.inf))
    pattern = sites(f"{prefix}.hook_pattern", jax.nn.softmax(scores, -1))
    z = sites(f"{prefix}.hook_z", jnp.einsum("bhts,bshe->bthe", pattern, v))
    out = jnp.einsum("bthe,hed->btd", z, params["W_O"])
    return out + params["b_O"] if "b_O" in params else out


def mlp(config: TransformerConfig, params: Params, x: Float[Array, "b t d"], sites: Sites, prefix: str) -> Array:
    """`act(x W_in + b_in) W_out + b_out`, or gated: `act(x W_gate) * (x W_in)` in place of the activation."""
    act = ACTIVATIONS[config.activation]
    if config.gated_mlp:
        pre = sites(f"{prefix}.hook_pre", x @ params["W_gate"] + params.get("b_gate", 0.0))
        linear = sites(f"{prefix}.hook_pre_linear", x @ params["W_in"] + params.get("b_in", 0.0))
        post = act(pre) * linear
    else:
        post = act(sites(f"{prefix}.hook_pre", x @ params["W_in"] + params.get("b_in", 0.0)))
    return sites(f"{prefix}.hook_post", post) @ params["W_out"] + params.get("b_out", 0.0)


def _attention_half(config: TransformerConfig, params: Params, layer: int, x: Array, sites: Sites) -> Array:
    name = f"blocks.{layer}"
    normed = sites(f"{name}.ln1.hook_normalized", normalize(config, params.get("ln1"), x))
    window = None if config.windows is None else config.windows[layer]
    out = attention(config, params["attn"], normed, window, sites, f"{name}.attn")
    if config.post_norms:
        out = normalize(config, params["ln1_post"], out)
    return sites(f"{name}.hook_attn_out", out)


def _mlp_half(config: TransformerConfig, params: Params, layer: int, x: Array, sites: Sites) -> Array:
    name = f"blocks.{layer}"
    normed = sites(f"{name}.ln2.hook_normalized", normalize(config, params.get("ln2"), x))
    out = mlp(config, params["mlp"], normed, sites, f"{name}.mlp")
    if config.post_norms:
        out = normalize(config, params["ln2_post"], out)
    return sites(f"{name}.hook_mlp_out", out)


def block(config: TransformerConfig, params: Params, layer: int, x: Array, sites: Sites, from_mid: bool) -> Array:
    """One layer, from its input or (`from_mid`) from the residual stream between attention and MLP."""
    name = f"blocks.{layer}"
    if not from_mid:
        x = sites(f"{name}.hook_resid_pre", x)
        attended = x + _attention_half(config, params, layer, x, sites)
        if config.parallel:
            return sites(f"{name}.hook_resid_post", attended + _mlp_half(config, params, layer, x, sites))
        x = attended
    if config.d_mlp == 0:
        return sites(f"{name}.hook_resid_post", x)
    x = sites(f"{name}.hook_resid_mid", x)
    return sites(f"{name}.hook_resid_post", x + _mlp_half(config, params, layer, x, sites))


def embed(config: TransformerConfig, params: Params, tokens: Int[Array, "b t"], sites: Sites) -> Float[Array, "b t d"]:
    """Token plus learned position embedding: the residual stream that enters layer 0."""
    x = sites("hook_embed", params["embed"]["W_E"][tokens] * config.embedding_scale)
    if config.positions == "learned":
        positions = jnp.broadcast_to(params["pos_embed"]["W_pos"][: tokens.shape[1]][None], x.shape)
        x = x + sites("hook_pos_embed", positions)
    return x


def unembed(config: TransformerConfig, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Logits from the normalised final residual stream."""
    weights = params["embed"]["W_E"].T if config.tied else params["unembed"]["W_U"]
    logits = x @ weights
    if "b_U" in params.get("unembed", {}):
        logits = logits + params["unembed"]["b_U"]
    if config.logit_softcap is not None:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits


def run(
    config: TransformerConfig,
    params: Params,
    start: Array,
    reads: Collection[str],
    writes: Mapping[str, Write] | None = None,
    layer: int = -1,
    from_mid: bool = False,
) -> dict[str, Array]:
    """Run the model from the tokens, or from the residual stream at a layer, and return what was read.

    **Arguments:** `start`: token ids `[batch, positions]` when `layer` is -1, else the residual stream
    `[batch, positions, d_model]` at `blocks.{layer}.hook_resid_pre` (`from_mid`: at `hook_resid_mid`;
    `layer == n_layers`: the residual stream that enters the final norm). `reads`: site names. `writes`: for a site name,
    an array that takes the place of the site's value, or a function of it.

    **Returns:** the value at each site of `reads`; under `jit`, what no read needs is never computed.
    """
    sites = Sites(reads, writes or {})
    x = embed(config, params, start, sites) if layer < 0 else start
    for index in range(max(layer, 0), config.n_layers):
        x = block(config, params["blocks"][index], index, x, sites, from_mid and index == layer)
    x = sites("ln_final.hook_normalized", normalize(config, params.get("ln_final"), x))
    if "logits" in sites.reads:
        sites("logits", unembed(config, params, x))
    return sites.found
