"""What every source of a transformer's graph adds to the residual stream.

A head's output is its share of the attention's: `z_h W_O[h]`. Where a norm comes behind attention or MLP (Gemma-2), a
share of the normalised sum is the share of the sum, centred if the norm centres, over the scale of the whole sum, times
the norm's weights; biases are then constants of the stream, divided alike. A neuron's output is a number times its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from mdl.errors import ModelError
from mdl.models.circuits.graph import Graph
from mdl.models.config import TransformerConfig
from mdl.models.operators import Operator
from mdl.models.sites import Sites
from mdl.models.transformer import Params, normalize, run


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outputs:
    """Outputs of a graph whose neurons are sources; of other graphs they are the array `nodes` alone.

    **Arguments:** `nodes`: of `input` and all heads, in the order of the sources, [S, d], [S, T, d] or [B, S, T, d];
    `neurons`: activations, which multiply rows of `W_out`, [N], [N, T] or [B, N, T].
    """

    nodes: Any  # arrays; under `jax.tree.map` whatever the function makes of them
    neurons: Any


Values = Array | Outputs


def share_of_norm(config: TransformerConfig, params: Params, part: Array, scale: ArrayLike) -> Array:
    """A part's share of a norm's output, bias left out: centred if the norm centres, over `scale`, times weights."""
    if config.norm == "none":
        return part
    part = part - part.mean(-1, keepdims=True) if config.norm == "layer" else part
    part = part / scale
    return part * params["w"] if "w" in params else part


def _scale(config: TransformerConfig, whole: Float[Array, "b t d"]) -> Array:
    """What a norm divides by, [b, t, 1]; 1 where there is none."""
    sites = Sites(["post.hook_scale"], {})
    normalize(config.norm, config.norm_eps, {}, whole, sites, "post")
    return sites.found.get("post.hook_scale", jnp.ones((*whole.shape[:2], 1)))


def _behind(config: TransformerConfig, norm: Params, bias: Array, scale: Array) -> Array:
    """The bias of attention or MLP behind the norm that follows: a constant that everybody reads, [b, t, d]."""
    shared = share_of_norm(config, norm, bias, scale)
    return shared + norm["b"] if "b" in norm else shared


def _bias(params: Params, name: str, width: int) -> Array:
    return params[name] if name in params else jnp.zeros(width)


def head_outputs(
    config: TransformerConfig, block: Params, z: Float[Array, "b t h e"]
) -> tuple[Float[Array, "h b t d"], Array]:
    """Each head's output from its mixture of values, and the constant that no head owns: [d], or [b, t, d] behind a
    norm."""
    shares = jnp.einsum("bthe,hed->hbtd", z, block["attn"]["W_O"])
    bias = _bias(block["attn"], "b_O", config.d_model)
    if not config.post_norms:
        return shares, bias
    norm, scale = block.get("ln1_post", {}), _scale(config, shares.sum(0) + bias)
    return share_of_norm(config, norm, shares, scale), _behind(config, norm, bias, scale)


def neuron_rows(config: TransformerConfig, block: Params) -> Float[Array, "n d"]:
    """What each neuron of a layer writes at an activation of 1."""
    weight = block["mlp"]["W_out"]
    return share_of_norm(config, block.get("ln2_post", {}), weight, 1.0) if config.post_norms else weight


def neuron_outputs(
    config: TransformerConfig, block: Params, post: Float[Array, "b t n"]
) -> tuple[Float[Array, "n b t"], Array]:
    """Each neuron's activation, over the scale of a norm that follows, and the constant that no neuron owns."""
    bias = _bias(block["mlp"], "b_out", config.d_model)
    if not config.post_norms:
        return jnp.moveaxis(post, -1, 0), bias
    norm, scale = block.get("ln2_post", {}), _scale(config, post @ block["mlp"]["W_out"] + bias)
    return jnp.moveaxis(post / scale, -1, 0), _behind(config, norm, bias, scale)


def check_weights(params: Params, graph: Graph) -> None:
    """**Raises:** `ModelError` if a weight that has to be taken apart is an operator."""
    for layer, block in enumerate(params["blocks"]):
        names = [("attn", f"W_{n}") for n in "QKVO"] + ([("mlp", "W_out")] if graph.neurons else [])
        for part, name in names:
            if isinstance(block[part][name], Operator):
                raise ModelError(
                    f"blocks.{layer}.{part}.{name} is an operator, and edges need it head by head: expand it into "
                    "the array that it stands for"
                )


def pieces_of(graph: Graph, values: Values, positions: int) -> tuple[Array, ...]:
    """Values of all sources, piece by piece: nodes [n, B or 1, T or 1, d], neurons [n, B or 1, T or 1].

    **Raises:** `ModelError` for values that do not fit the graph, or are of fewer positions.
    """
    if isinstance(values, Outputs) != bool(graph.neurons):
        raise ModelError(
            f"values of sources as {type(values).__name__}, the graph has {graph.neurons} neurons a layer: with "
            "neurons they come as Outputs(nodes, neurons), without as one array"
        )
    if not isinstance(values, Outputs):
        whole = _sources_first(values, 1, positions)
        _check_count(whole, len(graph.sources), "sources")
        return tuple(whole[piece] for piece in graph.pieces)
    nodes, neurons = _sources_first(values.nodes, 1, positions), _sources_first(values.neurons, 0, positions)
    _check_count(nodes, 1 + graph.n_layers * graph.n_heads, "nodes")
    _check_count(neurons, graph.n_layers * graph.neurons, "neurons")
    pieces = [nodes[:1]]
    for layer in range(graph.n_layers):
        heads, own = layer * graph.n_heads + 1, layer * graph.neurons
        pieces += [nodes[heads : heads + graph.n_heads], neurons[own : own + graph.neurons]]
    return tuple(pieces)


def _sources_first(values: Array, channels: int, positions: int) -> Array:
    """[S, ...], [S, T, ...] or [B, S, T, ...] -> [S, B or 1, T or 1, ...]; `channels`: how many axes come last."""
    extra = values.ndim - channels
    if extra == 1:
        return values[:, None, None]
    if extra not in (2, 3):
        raise ModelError(f"values of sources have shape {values.shape}: give [S, d], [S, T, d] or [B, S, T, d]")
    at = extra - 1
    if values.shape[at] < positions:
        raise ModelError(
            f"values of sources are of {values.shape[at]} positions, the sequences of {positions}: positional means of "
            "shorter sequences do not reach. Take them of sequences as long."
        )
    cut = jax.lax.slice_in_dim(values, 0, positions, axis=at)
    return cut[:, None] if extra == 2 else jnp.moveaxis(cut, 1, 0)


def _check_count(values: Array, count: int, what: str) -> None:
    if values.shape[0] != count:
        raise ModelError(
            f"values of {values.shape[0]} {what}, the graph has {count}: were they made for another model, or with "
            "other neurons?"
        )


def joined(graph: Graph, pieces: Sequence[Array]) -> Values:
    """Pieces of a batch, [n, B, T, ...], as [B, S, T, d]; with neurons as `Outputs`."""
    if not graph.neurons:
        return jnp.moveaxis(jnp.concatenate(list(pieces)), 0, 1)
    nodes, neurons = jnp.concatenate([pieces[0], *pieces[1::2]]), jnp.concatenate(pieces[2::2])
    return Outputs(jnp.moveaxis(nodes, 0, 1), jnp.moveaxis(neurons, 0, 1))


def source_outputs(
    config: TransformerConfig, params: Params, tokens: Int[ArrayLike, "b t"], graph: Graph | None = None
) -> Values:
    """What every source adds to the stream in the plain forward, [B, S, T, d]; `Outputs` if neurons are sources.

    With the constants (biases) of attention they add up to what the final norm reads.
    """
    graph = Graph.of(config) if graph is None else graph
    check_weights(params, graph)
    hook = "mlp.hook_post" if graph.neurons else "hook_mlp_out"
    layers = range(graph.n_layers)
    names = [f"blocks.{i}.{n}" for i in layers for n in ("attn.hook_z", *([hook] if graph.mlps else []))]
    found = run(config, params, tokens, ["blocks.0.hook_resid_pre", *names])
    pieces = [found["blocks.0.hook_resid_pre"][None]]
    with jax.default_matmul_precision("float32"):
        for i in layers:
            block = params["blocks"][i]
            pieces.append(head_outputs(config, block, found[f"blocks.{i}.attn.hook_z"])[0])
            if graph.neurons:
                pieces.append(neuron_outputs(config, block, found[f"blocks.{i}.{hook}"])[0])
            elif graph.mlps:
                pieces.append(found[f"blocks.{i}.{hook}"][None])
    return joined(graph, pieces)
