"""Models that Tracr assembled, as ours: from its dictionary of parameters, which Haiku names, without its packages.

| theirs | ours |
| --- | --- |
| `token_embed`, `pos_embed`: `embeddings` | `W_E`, `W_pos` |
| `transformer/layer_L/attn/query`, `key`, `value`: `w` [d, heads e] | `W_Q`, `W_K`, `W_V` [heads, d, e] |
| `transformer/layer_L/attn/linear`: `w` [heads e, d] | `W_O` [heads, e, d] |
| `transformer/layer_L/mlp/linear_1`, `linear_2`: `w` | `W_in`, `W_out` |

Their biases are zeros. They have no unembedding, but names of the coordinates of the stream (`residual_labels`,
`reverse_1:3`): a logit is BETA times the coordinate of a value of the output (`compile_program`).

**Source:** Lindner et al. 2023, arXiv:2301.05062, and its code, github.com/google-deepmind/tracr.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from mdl.errors import ModelError
from mdl.models.compiled.assembly import BETA
from mdl.models.config import TransformerConfig
from mdl.models.model import Model, fingerprint_of
from mdl.models.transformer import Params

Parameters = Mapping[str, Mapping[str, np.ndarray]]


def tracr_model(params: Parameters, labels: Sequence[str], n_heads: int, output: str, causal: bool = False) -> Model:
    """A model that Tracr assembled (`assembled.params`, `.residual_labels`, `.model_config.num_heads` and `.causal`).

    **Arguments:** `output`: the label of the output's coordinates, without values: `reverse_1` of `reverse_1:3`; its
    logits are in the order of the labels.

    **Raises:** `ModelError` for parameters that are missing or biased, and for a label that there is not.
    """
    places = [i for i, label in enumerate(labels) if label.rpartition(":")[0] == output or label == output]
    if not places:
        raise ModelError(f"no coordinate is labelled {output!r} among {len(labels)}: {', '.join(labels[:8])}, ...")
    biased = [name for name, own in params.items() if "b" in own and np.asarray(own["b"]).any()]
    if biased:
        raise ModelError(f"{', '.join(biased)} have biases, which Tracr gives to nothing: this is another model")
    layers = sum(name.endswith("attn/query") for name in params)
    blocks = [_block(params, f"transformer/layer_{layer}", n_heads) for layer in range(layers)]
    if not blocks:
        raise ModelError(f"no layers among the parameters {', '.join(params)}: these are no Tracr model's")
    tokens, positions = (_weight(params, name, "embeddings") for name in ("token_embed", "pos_embed"))
    unembed = jnp.asarray(BETA * np.eye(len(labels))[:, places], jnp.float32)
    config = TransformerConfig(
        n_layers=layers,
        d_model=len(labels),
        n_heads=n_heads,
        d_head=blocks[0]["attn"]["W_Q"].shape[2],
        d_vocab=len(tokens),
        n_ctx=len(positions),
        d_mlp=blocks[0]["mlp"]["W_in"].shape[1],
        norm="none",
        activation="relu",
        causal=causal,
        d_vocab_out=len(places),
    )
    own: Params = {"embed": {"W_E": tokens}, "pos_embed": {"W_pos": positions}}
    own |= {"blocks": blocks, "unembed": {"W_U": unembed}}
    return Model(config, own, f"tracr {output}", fingerprint_of(config, own))


def _block(params: Parameters, prefix: str, heads: int) -> Params:
    attention = {}
    for letter, name in (("Q", "query"), ("K", "key"), ("V", "value")):
        matrix = _weight(params, f"{prefix}/attn/{name}", "w")
        attention[f"W_{letter}"] = matrix.reshape(len(matrix), heads, -1).transpose(1, 0, 2)
    out = _weight(params, f"{prefix}/attn/linear", "w")
    attention["W_O"] = out.reshape(heads, -1, out.shape[1])
    sides = {"W_in": "linear_1", "W_out": "linear_2"}
    return {"attn": attention, "mlp": {n: _weight(params, f"{prefix}/mlp/{s}", "w") for n, s in sides.items()}}


def _weight(params: Parameters, name: str, key: str) -> jnp.ndarray:
    if name not in params or key not in params[name]:
        raise ModelError(f"no parameter {name!r} with {key!r}: these are no Tracr model's ({', '.join(params)})")
    return jnp.asarray(np.asarray(params[name][key]), jnp.float32)
