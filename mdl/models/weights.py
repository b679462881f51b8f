"""TransformerLens's weight processing: changes of weights that leave the model's function as it is, but not its sites.

A published sparse autoencoder was trained on the activations of processed weights (SAELens records
`center_writing_weights` with it), so the same processing has to be done before its sites mean the same. Nothing here
writes into its arguments. Formulas: TransformerLens, "Weight processing" (further comments), Elhage et al. 2021.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mdl.errors import ModelError
from mdl.models.config import TransformerConfig
from mdl.models.transformer import Params

Processed = tuple[TransformerConfig, Params]


def _mean_free(x: Any, axis: int) -> Any:
    return x - x.mean(axis, keepdims=True)


def _untie(config: TransformerConfig, params: Params) -> Processed:
    """The unembedding as a matrix of its own, so that it can change without the embedding."""
    if not config.tied:
        return config, params
    unembed = {**params.get("unembed", {}), "W_U": params["embed"]["W_E"].T}
    return replace(config, tied=False), {**params, "unembed": unembed}


def center_writing_weights(config: TransformerConfig, params: Params) -> Processed:
    """Take from everything that writes to the residual stream its mean over the stream's channels.

    LayerNorm takes that mean off anyway, so logits stay the same and the residual stream becomes mean-free: `W_E`,
    `W_pos`, `W_O`, `b_O`, `W_out`, `b_out`. Where any norm is no LayerNorm the weights are returned unchanged, as
    TransformerLens does, because there the mean matters.

    **Raises:** `ModelError` for norms after attention and MLP, which would bring the mean back.
    """
    if config.norm != "layer" or config.norm_before_unembedding != "layer":
        return config, params
    if config.post_norms:
        raise ModelError("center_writing_weights: LayerNorms after attention and MLP write to the stream themselves.")
    config, params = _untie(config, params)
    writers = ("W_O", "b_O", "W_out", "b_out", "W_E", "W_pos")
    center = lambda part: {n: _mean_free(w, -1) if n in writers else w for n, w in part.items()}  # noqa: E731
    blocks = [{n: center(part) for n, part in block.items()} for block in params["blocks"]]
    embeddings: Params = {n: center(params[n]) for n in ("embed", "pos_embed") if n in params}
    return config, {**params, **embeddings, "blocks": blocks}


def _fold(kind: str, norm: Params, part: Params, names: tuple[str, ...]) -> Params:
    """A norm's scale and bias moved into the matrices that read it; under LayerNorm these become mean-free too."""
    out = dict(part)
    for name in (n for n in names if f"W_{n}" in part):
        weight = part[f"W_{name}"]
        if "b" in norm:
            bias = np.einsum("d,...de->...e", norm["b"], weight)
            out[f"b_{name}"] = part[f"b_{name}"] + bias if f"b_{name}" in part else bias
        folded = weight * norm["w"][:, None] if "w" in norm else weight
        out[f"W_{name}"] = _mean_free(folded, -2) if kind == "layer" else folded
    return out


def fold_layer_norm(config: TransformerConfig, params: Params) -> Processed:
    """Move the norms' scales and biases into the weights that read them: `W' = diag(w) W`, `b' = b + W^T b_norm`.

    Norms after attention and MLP (Gemma-2) keep theirs. `hook_normalized` does not change; queries, keys, values and
    everything later stay the same too, for the function does.
    """
    if config.norm == "none" and config.norm_before_unembedding == "none":
        return config, params
    config, params = _untie(config, params)
    blocks = []
    for block in params["blocks"]:
        attn = _fold(config.norm, block.get("ln1", {}), block["attn"], ("Q", "K", "V"))
        folded = {**block, "attn": attn, "ln1": {}}
        if "mlp" in block:
            folded |= {"mlp": _fold(config.norm, block.get("ln2", {}), block["mlp"], ("gate", "in")), "ln2": {}}
        blocks.append(folded)
    unembed = _fold(config.norm_before_unembedding, params.get("ln_final", {}), params["unembed"], ("U",))
    return config, {**params, "blocks": blocks, "ln_final": {}, "unembed": unembed}


def center_unembed(config: TransformerConfig, params: Params) -> Processed:
    """Take from the unembedding its mean over the vocabulary: logits shift together, probabilities stay.

    **Raises:** `ModelError` where logits are soft-capped, for there a common shift changes probabilities.
    """
    if config.logit_softcap is not None:
        raise ModelError(
            f"center_unembed would change the model: its logits are soft-capped at {config.logit_softcap}. "
            "Leave it out."
        )
    config, params = _untie(config, params)
    return config, {**params, "unembed": {n: _mean_free(w, -1) for n, w in params["unembed"].items()}}


def fold_value_biases(config: TransformerConfig, params: Params) -> Processed:
    """Move value biases into the output bias, `b_O' = b_O + sum_h b_V[h] W_O[h]`: attention rows sum to one."""
    groups = config.n_heads // config.key_value_heads
    blocks = []
    for block in params["blocks"]:
        attn = dict(block["attn"])
        if "b_V" in attn:
            shift = np.einsum("he,hed->d", np.repeat(np.asarray(attn.pop("b_V")), groups, 0), np.asarray(attn["W_O"]))
            attn["b_O"] = attn["b_O"] + shift if "b_O" in attn else shift
        blocks.append({**block, "attn": attn})
    return config, {**params, "blocks": blocks}
