"""One decoder-only transformer as a pure JAX function with named sites.

It covers GPT-2, GPT-NeoX (Pythia), Llama, Mistral, Qwen2 and Gemma-2, and TransformerLens models with or without
norms and MLPs. Sites carry TransformerLens's hook names (`blocks.3.hook_resid_pre`), because every published sparse
autoencoder names its site so. Weights use TransformerLens's names and shapes too:
`W_Q [n_heads, d_model, d_head]`, `W_O [n_heads, d_head, d_model]`, `W_in [d_model, d_mlp]`, `W_U [d_model, d_vocab]`.
A matrix of a block may also be an operator (`mdl.models.operators`), heads and their channels in one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from mdl.errors import ModelError
from mdl.models.config import TransformerConfig
from mdl.models.operators import Operator, multiply
from mdl.models.sites import LOGITS, UNEMBED, Sites, Write, check_site, site_names

__all__ = ["ACTIVATIONS", "Params", "Sites", "TransformerConfig", "Write", "run"]

Params = dict[str, Any]

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def normalize(
    kind: str, eps: float, params: Params, x: Float[Array, "*b d"], sites: Sites, name: str
) -> Float[Array, "*b d"]:
    """LayerNorm, RMSNorm, or neither; `params` may lack scale and bias (folded norms)."""
    if kind == "none":
        return x
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    scale = sites(f"{name}.hook_scale", jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps))
    return rescale(params, sites(f"{name}.hook_normalized", x / scale))


def rescale(params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """A norm's scale and bias, where it has them, on what was normalised."""
    if "w" in params:
        x = x * params["w"]
    return x + params["b"] if "b" in params else x


def rotate(
    x: Float[Array, "b t h e"], frequencies: tuple[float, ...], adjacent: bool = False
) -> Float[Array, "b t h e"]:
    """Rotary position embedding on the first `2 * len(frequencies)` channels (Su et al. 2021).

    Channel i is paired with i + half (GPT-NeoX), or with `adjacent` its neighbour (GPT-J).
    """
    angles = jnp.arange(x.shape[1])[:, None] * jnp.asarray(frequencies, jnp.float32)[None]
    sin, cos = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.sin, jnp.cos))
    half = len(frequencies)
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if adjacent:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(rotated.shape)
        return jnp.concatenate([pairs, rest], -1)
    a, b = rotated[..., :half], rotated[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _project(config: TransformerConfig, params: Params, name: str, x: Float[Array, "b t d"]) -> Float[Array, "b t h e"]:
    weight = params[f"W_{name}"]
    if isinstance(weight, Operator):
        heads = config.n_heads if name == "Q" else config.key_value_heads
        out = weight(x).reshape(*x.shape[:2], heads, config.d_head)
    else:
        out = jnp.einsum("btd,hde->bthe", x, weight)
    return out + params[f"b_{name}"] if f"b_{name}" in params else out


def _allowed(config: TransformerConfig, layer: int, positions: int) -> Array:
    """Which key (column) each query (row) may look at."""
    distance = jnp.arange(positions)[:, None] - jnp.arange(positions)[None]
    allowed = distance >= 0 if config.causal else jnp.ones_like(distance, bool)
    window = None if config.windows is None else config.windows[layer]
    return allowed if window is None else allowed & (distance < window)


def attend(
    config: TransformerConfig,
    layer: int,
    q: Float[Array, "b t h e"],
    k: Float[Array, "b t g e"],
    v: Float[Array, "b t g e"],
    sites: Sites,
) -> Float[Array, "b t h e"]:
    """Each head's mixture of values (`hook_z`) from queries, keys and values; there may be fewer of the latter."""
    prefix = f"blocks.{layer}.attn"
    if config.positions == "rotary":
        q = sites(f"{prefix}.hook_rot_q", rotate(q, config.rotary_frequencies, config.rotary_adjacent))
        k = sites(f"{prefix}.hook_rot_k", rotate(k, config.rotary_frequencies, config.rotary_adjacent))
    groups = config.n_heads // config.key_value_heads
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scale = config.scale / (layer + 1) if config.scale_by_inverse_layer else config.scale
    scores = jnp.einsum("bthe,bshe->bhts", q, k) * scale
    if config.attention_softcap is not None:
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    scores = jnp.where(_allowed(config, layer, q.shape[1]), scores, -jnp.inf)
    pattern = jax.nn.softmax(sites(f"{prefix}.hook_attn_scores", scores), -1)
    pattern = sites(f"{prefix}.hook_pattern", pattern)
    return sites(f"{prefix}.hook_z", jnp.einsum("bhts,bshe->bthe", pattern, v))


def attention(
    config: TransformerConfig, params: Params, layer: int, x: Float[Array, "b t d"], sites: Sites
) -> Float[Array, "b t d"]:
    """Multi-head (or grouped-query) attention over the normalised input `x`."""
    prefix = f"blocks.{layer}.attn"
    q = sites(f"{prefix}.hook_q", _project(config, params, "Q", x))
    k = sites(f"{prefix}.hook_k", _project(config, params, "K", x))
    v = sites(f"{prefix}.hook_v", _project(config, params, "V", x))
    z = attend(config, layer, q, k, v, sites)
    if isinstance(params["W_O"], Operator):
        out = params["W_O"](z.reshape(*z.shape[:2], -1))
    else:
        out = jnp.einsum("bthe,hed->btd", z, params["W_O"])
    return out + params["b_O"] if "b_O" in params else out


def _linear(params: Params, name: str, x: Float[Array, "b t i"]) -> Float[Array, "b t o"]:
    out = multiply(x, params[f"W_{name}"])
    return out + params[f"b_{name}"] if f"b_{name}" in params else out


def neurons(
    config: TransformerConfig, params: Params, layer: int, x: Float[Array, "b t d"], sites: Sites
) -> Float[Array, "b t n"]:
    """What `W_out` reads: `act(x W_in + b_in)`; gated, `act(x W_gate + b_gate) (x W_in + b_in) + b_post`."""
    prefix = f"blocks.{layer}.mlp"
    act = ACTIVATIONS[config.activation]
    pre = sites(f"{prefix}.hook_pre", _linear(params, "gate" if config.gated_mlp else "in", x))
    post = act(pre)
    if config.gated_mlp:
        post = post * sites(f"{prefix}.hook_pre_linear", _linear(params, "in", x))
        post = post + params["b_post"] if "b_post" in params else post
    return sites(f"{prefix}.hook_post", post)


def mlp(config: TransformerConfig, params: Params, layer: int, x: Float[Array, "b t d"], sites: Sites) -> Array:
    """`neurons W_out + b_out`."""
    return _linear(params, "out", neurons(config, params, layer, x, sites))


def _half(config: TransformerConfig, params: Params, layer: int, x: Array, sites: Sites, which: str) -> Array:
    """What attention (`which` "attn") or the MLP ("mlp") adds to the residual stream."""
    name, norm = f"blocks.{layer}", "ln1" if which == "attn" else "ln2"
    normed = normalize(config.norm, config.norm_eps, params.get(norm, {}), x, sites, f"{name}.{norm}")
    return behind_norm(config, params, layer, normed, sites, which)


def behind_norm(
    config: TransformerConfig, params: Params, layer: int, normed: Float[Array, "b t d"], sites: Sites, which: str
) -> Float[Array, "b t d"]:
    """`_half` from the normalised stream, scale and bias included."""
    name, norm = f"blocks.{layer}", "ln1" if which == "attn" else "ln2"
    out = (attention if which == "attn" else mlp)(config, params[which], layer, normed, sites)
    if config.post_norms:
        after = f"{norm}_post"
        out = normalize(config.norm, config.norm_eps, params.get(after, {}), out, sites, f"{name}.{after}")
    return sites(f"{name}.hook_{which}_out", out)


def block(config: TransformerConfig, params: Params, layer: int, x: Array, sites: Sites, from_mid: bool) -> Array:
    """One layer, from its input or (`from_mid`) from the residual stream between attention and MLP."""
    name = f"blocks.{layer}"
    if not from_mid:
        x = sites(f"{name}.hook_resid_pre", x)
        if sites.done:  # what follows may not even be there, in a region that ends here
            return x
        attended = x + _half(config, params, layer, x, sites, "attn")
        if config.parallel and config.d_mlp:
            attended = attended + _half(config, params, layer, x, sites, "mlp")
        if not config.sequential:
            return sites(f"{name}.hook_resid_post", attended)
        x = attended
    x = sites(f"{name}.hook_resid_mid", x)
    if sites.done:
        return x
    return sites(f"{name}.hook_resid_post", x + _half(config, params, layer, x, sites, "mlp"))


def embed(config: TransformerConfig, params: Params, tokens: Int[Array, "b t"], sites: Sites) -> Float[Array, "b t d"]:
    """Token plus learned position embedding: the residual stream that enters layer 0.

    **Raises:** `ModelError` for more tokens than the model has position embeddings.
    """
    x = sites("hook_embed", params["embed"]["W_E"][tokens] * config.embedding_scale)
    if config.positions == "learned":
        if tokens.shape[1] > config.n_ctx:
            raise ModelError(
                f"{tokens.shape[1]} tokens a sequence, but the model has {config.n_ctx} position embeddings. "
                f"Cut the sequences to {config.n_ctx} tokens."
            )
        positions = jnp.broadcast_to(params["pos_embed"]["W_pos"][: tokens.shape[1]][None], x.shape)
        x = x + sites("hook_pos_embed", positions)
    return x


def unembed(config: TransformerConfig, params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Logits from the value at `unembed.hook_in`: the final norm's output, scale and bias included."""
    logits = multiply(x, params["embed"]["W_E"] if config.tied else params["unembed"]["W_U"], transposed=config.tied)
    if "b_U" in params.get("unembed", {}):
        logits = logits + params["unembed"]["b_U"]
    if config.logit_softcap is not None:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits


def _check_start(config: TransformerConfig, layer: int, from_mid: bool) -> None:
    if layer > config.n_layers:
        raise ModelError(f"a run cannot start at layer {layer}: the model has {config.n_layers} (0 to n starts it).")
    if from_mid and not (config.sequential and 0 <= layer < config.n_layers):
        raise ModelError(
            f"layer {layer} has no residual stream between attention and MLP to start from (parallel or "
            "attention-only model, or no such layer). Start at hook_resid_pre."
        )


def _check_all_seen(config: TransformerConfig, sites: Sites, layer: int) -> None:
    """A site that was asked for and never passed would be a silent mistake."""
    for name in sorted(sites.pending):
        check_site(name, site_names(config))
        raise ModelError(
            f"site {name!r} is upstream of where this run starts (layer {layer}), so it is neither read nor written. "
            "Start earlier, or leave it out."
        )


def _forward(config: TransformerConfig, params: Params, start: Array, sites: Sites, layer: int, from_mid: bool) -> None:
    x = embed(config, params, start, sites) if layer < 0 else start
    for index in range(max(layer, 0), config.n_layers):
        if sites.done:
            return
        x = block(config, params["blocks"][index], index, x, sites, from_mid and index == layer)
    if sites.done:
        return
    kind = config.norm_before_unembedding
    x = normalize(kind, config.norm_eps, params.get("ln_final", {}), x, sites, "ln_final")
    x = sites(UNEMBED, x)
    if LOGITS in sites.pending:
        sites(LOGITS, unembed(config, params, x))


def run(
    config: TransformerConfig,
    params: Params,
    start: ArrayLike,
    reads: Collection[str],
    writes: Mapping[str, Write] | None = None,
    layer: int = -1,
    from_mid: bool = False,
) -> dict[str, Array]:
    """Run the model from the tokens, or from the residual stream at a layer, and return what was read.

    **Arguments:** `start`: token ids `[batch, positions]` when `layer` is -1, else the residual stream
    `[batch, positions, d_model]` at `blocks.{layer}.hook_resid_pre` (`from_mid`: at `hook_resid_mid`;
    `layer == n_layers`: the residual stream that enters the final norm). `reads`: site names. `writes`: for a site
    name, an array that takes the place of the site's value, or a function of it.

    **Returns:** the value at each site of `reads`; what comes after the last of them is not computed, and under `jit`
    neither is anything else that no read needs. Matrix products are in full float32 on every device.

    **Raises:** `ModelError` for a site that does not exist or lies before the start, a written value that does not fit
    its site, a start that the model does not have, and too long a sequence.
    """
    _check_start(config, layer, from_mid)
    sites = Sites(reads, writes or {})
    with jax.default_matmul_precision("float32"):
        _forward(config, params, jnp.asarray(start), sites, layer, from_mid)
    _check_all_seen(config, sites, layer)
    return sites.found
