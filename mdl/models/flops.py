"""Floating-point operations of a forward pass: 2 for each multiply-add, matrix products and attention only."""

from __future__ import annotations

from mdl.models.config import TransformerConfig

_ATTENTION = ("q", "k", "v", "scores", "z")
_ATTENTION_NEEDS = {
    "hook_q": ("q",),
    "hook_rot_q": ("q",),
    "hook_k": ("k",),
    "hook_rot_k": ("k",),
    "hook_v": ("v",),
    "hook_attn_scores": ("q", "k", "scores"),
    "hook_pattern": ("q", "k", "scores"),
    "hook_z": _ATTENTION,
}


def _layer_costs(config: TransformerConfig, n_context: int) -> dict[str, int]:
    heads, keys = config.n_heads * config.d_head, config.key_value_heads * config.d_head
    projection = 2 * config.d_model * config.d_mlp
    return {
        "q": 2 * config.d_model * heads,
        "k": 2 * config.d_model * keys,
        "v": 2 * config.d_model * keys,
        "scores": 2 * heads * n_context,
        "z": 2 * heads * n_context,
        "out": 2 * heads * config.d_model,
        "pre": projection,
        "linear": projection if config.gated_mlp else 0,
        "down": projection,
    }


def _needs(config: TransformerConfig, hook: str) -> tuple[str, ...]:
    """The products within its own layer that a site depends on."""
    whole_attention = (*_ATTENTION, "out")
    if hook == "hook_resid_pre" or hook.startswith("ln1."):
        return ()
    if hook.startswith("attn."):
        return _ATTENTION_NEEDS[hook.removeprefix("attn.")]
    if hook.startswith(("ln1_post", "hook_attn_out")):
        return whole_attention
    before = () if config.parallel else whole_attention
    if hook.startswith(("hook_resid_mid", "ln2.")):
        return before
    if hook == "mlp.hook_pre":
        return (*before, "pre")
    if hook == "mlp.hook_pre_linear":
        return (*before, "linear")
    if hook == "mlp.hook_post":
        return (*before, "pre", "linear")
    if hook.startswith(("ln2_post", "hook_mlp_out")):
        return (*before, "pre", "linear", "down")
    return (*whole_attention, "pre", "linear", "down")


def flops_upstream(config: TransformerConfig, site: str, n_context: int) -> int:
    """FLOPs per token that the activation at `site` depends on, from the tokens on.

    Every token attends to all `n_context` positions, masked ones included, as `run` computes it.
    """
    costs = _layer_costs(config, n_context)
    if site in ("hook_embed", "hook_pos_embed"):
        return 0
    if not site.startswith("blocks."):
        unembedding = 2 * config.d_model * config.n_logits if site == "logits" else 0
        return config.n_layers * sum(costs.values()) + unembedding
    _, layer, hook = site.split(".", 2)
    return int(layer) * sum(costs.values()) + sum(costs[name] for name in _needs(config, hook))


def flops_per_token(config: TransformerConfig, n_context: int) -> int:
    """FLOPs per token of a whole forward pass over sequences of `n_context` tokens, logits included."""
    return flops_upstream(config, "logits", n_context)
