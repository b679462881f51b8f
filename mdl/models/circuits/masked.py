r"""The forward pass of a transformer of which edges are ablated.

Every destination d reads, in place of the residual stream,

$$x_d = c + \sum_s m_{sd}\, o_s + (1 - m_{sd})\, a_s = c + \sum_s a_s + \sum_s m_{sd}\,(o_s - a_s)$$

over the sources s that are written before it: o_s is the source's output in the masked run itself, a_s what stands in
for it, c the constants of the stream (biases of attention outputs so far). The sums of a_s do not depend on the mask:
they are made once, and passed along as arguments. Then there is one product of matrices for the inputs of each layer.

Exact where norms come before attention and MLPs. Behind a norm that follows them (Gemma-2) a head's output is its share
of the normalised sum at the scale of the masked run's own sum; under a mask of ones that is the plain forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from mdl.errors import ModelError
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.outputs import (
    Values,
    check_weights,
    head_outputs,
    neuron_outputs,
    neuron_rows,
    pieces_of,
)
from mdl.models.config import TransformerConfig
from mdl.models.sites import Sites
from mdl.models.transformer import Params, attend, embed, mlp, neurons, normalize, unembed

TOGETHER = 32  # outputs of nodes that one product reads, at least


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class MaskedModel:
    """A model on given tokens, with what stands in for its sources: everything but the mask. Made by `masked_model`.

    **Arguments:** `embedded` [b, t, d]: the output of `input`; `ablated`: of every piece of the graph, [n, b or 1,
    t or 1, d], neurons without d; `bases`: sums of the first 0, 1, ... pieces of them, [b or 1, t or 1, d]; `scored`
    [b, k]: positions of which there are to be logits, None for all.
    """

    config: TransformerConfig = field(metadata={"static": True})
    graph: Graph = field(metadata={"static": True})
    params: Params
    embedded: Array
    ablated: tuple[Array, ...]
    bases: tuple[Array, ...]
    scored: Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Written:
    """What a masked run wrote: `deltas`: of each piece o - a, [n, b, t, d] (neurons [n, b, t]); `constants`: the sum of
    the stream's constants when 0, 1, ... pieces were written, [d] or [b, t, d]."""

    deltas: tuple[Array, ...]
    constants: tuple[Array, ...]


def masked_model(
    config: TransformerConfig,
    params: Params,
    tokens: Int[ArrayLike, "b t"],
    ablated: Values,
    graph: Graph | None = None,
    scored: Int[ArrayLike, "b k"] | None = None,
) -> MaskedModel:
    """A model ready for masks of its edges.

    **Arguments:** `ablated`: what stands in for each source, [S, d], [S, T, d] or [B, S, T, d] (`Outputs` if neurons
    are sources); `graph`: by default heads and MLPs; `scored`: positions whose logits are wanted, [B, K], None for all.

    **Raises:** `ModelError` for ablated values that do not fit, and for operators in place of attention's matrices.
    """
    graph = Graph.of(config) if graph is None else graph
    check_weights(params, graph)
    tokens = jnp.asarray(tokens)
    pieces = pieces_of(graph, ablated, tokens.shape[1])
    with jax.default_matmul_precision("float32"):
        parts = [_whole(config, params, graph, i, piece) for i, piece in enumerate(pieces)]
        bases = tuple(accumulate(parts, jnp.add, initial=jnp.zeros((1, 1, config.d_model))))
    embedded = embed(config, params, tokens, Sites((), {}))
    return MaskedModel(config, graph, params, embedded, pieces, bases, None if scored is None else jnp.asarray(scored))


@partial(jax.jit, static_argnames=("skip", "layer"))
def masked_run(
    model: MaskedModel,
    mask: ArrayLike,
    *,
    skip: bool = False,
    nudges: Float[Array, "d #b #t c"] | None = None,  # noqa: UP037 (# broadcasts)
    layer: int = 0,
    written: Written | None = None,
) -> Float[Array, "b k v"]:
    """Logits of the model under a mask of edges, [B, K, V] at the scored positions.

    **Arguments:** `mask`: 1 (or True) where an edge is kept, [S, D], or of each position [T, S, D]; between 0 and 1
    mixtures; entries of edges that there are not are never looked at. `skip`: heads of a layer, or an MLP, of which no
    edge leaves are not computed (of no use under `vmap`, and wrong for derivatives with respect to the mask); `nudges`
    [D, B, T, d]: added to what each destination reads; `layer`, `written`: start at the heads of a layer, with what an
    earlier run wrote before it, whose mask may differ in edges to that layer and later ones only.

    **Raises:** `ModelError` for a mask of other sources or destinations, and for `layer` without `written`.
    """
    return _forward(model, mask, skip, nudges, layer, written)[0]


@jax.jit
def write(model: MaskedModel, mask: ArrayLike) -> Written:
    """What a masked run writes, to start other runs from. Arguments as of `masked_run`."""
    return _forward(model, mask, False, None, 0, None)[1]


@partial(jax.jit, static_argnames=("outcome", "chunk", "skip"))
def masked_runs(
    model: MaskedModel,
    masks: Array,
    outcome: Callable[..., Any] | None = None,
    arguments: tuple[Any, ...] = (),
    chunk: int = 1,
    skip: bool = False,
) -> Any:
    """`outcome(logits, *arguments)` under each of many masks, stacked; without `outcome` the logits [M, B, K, V].

    **Arguments:** `masks` [M, S, D] or [M, T, S, D]; `chunk`: how many run side by side (more memory); `skip`: as of
    `masked_run`, for `chunk` 1. Compiled once for each `outcome`, which must therefore be the same function each time.

    **Raises:** `ModelError` as `masked_run`.
    """

    def one(mask: Array) -> Any:
        logits = masked_run(model, mask, skip=skip)
        return logits if outcome is None else outcome(logits, *arguments)

    return jax.lax.map(one, masks, batch_size=None if chunk == 1 else chunk)


def _whole(config: TransformerConfig, params: Params, graph: Graph, piece: int, values: Array) -> Array:
    """The sum of a piece's sources, [b or 1, t or 1, d]."""
    if not (graph.neurons and piece and piece % 2 == 0):
        return values.sum(0)
    return jnp.einsum("nbt,nd->btd", values, neuron_rows(config, params["blocks"][piece // 2 - 1]))


@dataclass(frozen=True)
class _Pass:
    """One masked run on its way: what it has written so far, and how it is to read."""

    model: MaskedModel
    mask: Array
    skip: bool
    nudges: Array | None
    deltas: list[Array]
    constants: list[Array]
    groups: list[tuple[int, int, Array]] = field(default_factory=list)

    def group(self) -> None:
        """Put the outputs of nodes together, once there are enough: first piece, last but one, deltas.

        One product reads a group. To put all together for every product would cost more than the products, and one
        product a piece nearly as much.
        """
        together = self._ungrouped(len(self.deltas))
        if together and together[0][2].shape[0] >= TOGETHER:
            self.groups.extend(together)

    def _ungrouped(self, count: int) -> list[tuple[int, int, Array]]:
        first = self.groups[-1][1] if self.groups else 0
        nodes = [delta for delta in self.deltas[first:count] if delta.ndim == 4]
        return [(first, count, jnp.concatenate(nodes))] if nodes else []

    def _rows(self, first: int, stop: int, inputs: slice) -> Array:
        """The mask of nodes among some pieces."""
        places = [i for i in range(first, stop) if self.deltas[i].ndim == 4]
        return jnp.concatenate([self.mask[..., self.model.graph.pieces[i], inputs] for i in places], -2)

    def read(self, count: int, inputs: slice) -> Float[Array, "n b t d"]:
        """What some destinations read when `count` pieces are written."""
        stream = self.model.bases[count] + self.constants[count]
        for first, stop, deltas in [*self.groups, *self._ungrouped(count)]:
            stream = stream + _mix(self._rows(first, stop, inputs), deltas)
        for i in range(2, count, 2) if self.model.graph.neurons else ():
            rows = self.mask[..., self.model.graph.pieces[i], inputs]
            directions = neuron_rows(self.model.config, self._block(i // 2 - 1))
            stream = stream + _mix_neurons(rows, self.deltas[i], directions)
        return stream if self.nudges is None else stream + self.nudges[inputs]

    def read_scored(self) -> Float[Array, "b k d"]:
        """What the logits read, at the scored positions."""
        graph, scored = self.model.graph, self.model.scored
        if scored is None or graph.neurons or self.nudges is not None:
            stream = self.read(len(self.deltas), graph.inputs(graph.n_layers))[0]
            return stream if scored is None else jnp.take_along_axis(stream, scored[..., None], 1)
        batch, positions, width = self.model.embedded.shape
        column = self.mask[..., graph.inputs(graph.n_layers)]
        column = column[scored] if column.ndim == 3 else column[None, None]
        deltas = jnp.concatenate([jnp.take_along_axis(d, scored[None, ..., None], 2) for d in self.deltas])
        base = jnp.broadcast_to(self.model.bases[-1] + self.constants[-1], (batch, positions, width))
        return jnp.take_along_axis(base, scored[..., None], 1) + jnp.einsum("bks,sbkd->bkd", column[..., 0], deltas)

    def heads(self, layer: int) -> None:
        """The heads of a layer read and write."""
        config, graph, block = self.model.config, self.model.graph, self._block(layer)
        moving = config.post_norms and ("b_O" in block["attn"] or "b" in block.get("ln1_post", {}))

        def compute() -> tuple[Array, Array]:
            x = _normed(config, block, "ln1", self.read(graph.written_before(layer), graph.inputs(layer)))
            ends = (graph.n_heads, graph.n_heads + graph.key_value_heads)
            q, k, v = (_project(block["attn"], n, y) for n, y in zip("QKV", jnp.split(x, ends), strict=True))
            return head_outputs(config, block, attend(config, layer, q, k, v, Sites((), {})))

        self._write(compute, moving, block["attn"].get("b_O"))

    def mlp(self, layer: int) -> None:
        """The MLP of a layer reads and writes, or its neurons do."""
        config, graph, block = self.model.config, self.model.graph, self._block(layer)
        params, sites = block["mlp"], Sites((), {})

        def compute() -> tuple[Array, Array]:
            read = self.read(graph.written_before(layer, mlp=True), graph.inputs(layer, mlp=True))[0]
            x = _normed(config, block, "ln2", read)
            if graph.neurons:
                return neuron_outputs(config, block, neurons(config, params, layer, x, sites))
            out = mlp(config, params, layer, x, sites)
            out = _normed(config, block, "ln2_post", out) if config.post_norms else out
            return out[None], jnp.zeros(config.d_model)

        bias = params.get("b_out") if graph.neurons else None
        self._write(compute, bool(graph.neurons) and config.post_norms, bias)

    def _write(self, compute: Callable[[], tuple[Array, Array]], moving: bool, bias: Array | None) -> None:
        """Append a piece. It is not computed if no edge leaves it, unless its constant depends on the run (`moving`);
        otherwise the constant is `bias`."""
        index = len(self.deltas)
        ablated = self.model.ablated[index]
        if self.skip and not moving:
            left = self.mask[..., self.model.graph.pieces[index], :]
            shape = jax.eval_shape(compute)[0].shape
            delta = jax.lax.cond((left != 0).any(), lambda: compute()[0] - ablated, lambda: jnp.zeros(shape))
            constant = jnp.zeros(self.model.config.d_model) if bias is None else bias
        else:
            out, constant = compute()
            delta = out - ablated
        self.deltas.append(delta)
        self.constants.append(self.constants[-1] + constant)

    def _block(self, layer: int) -> Params:
        block: Params = self.model.params["blocks"][layer]
        return block


def _mix(rows: Float[Array, "*t s n"], deltas: Float[Array, "s b t d"]) -> Float[Array, "n b t d"]:
    """sum_s m_sn (o_s - a_s)."""
    return jnp.einsum("tsn,sbtd->nbtd" if rows.ndim == 3 else "sn,sbtd->nbtd", rows, deltas)


def _mix_neurons(rows: Array, activations: Array, directions: Array) -> Float[Array, "n b t d"]:
    """The same for the neurons of a layer, which write numbers times fixed directions."""
    weights = jnp.moveaxis(rows, 0, -1)[:, :, None] if rows.ndim == 3 else rows[..., None, None]
    return jnp.einsum("snbt,sd->nbtd", weights * activations[:, None], directions)


def _normed(config: TransformerConfig, block: Params, name: str, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    return normalize(config.norm, config.norm_eps, block.get(name, {}), x, Sites((), {}), name)


def _project(params: Params, name: str, x: Float[Array, "h b t d"]) -> Float[Array, "b t h e"]:
    """Queries, keys or values, each head from its own input."""
    # The barrier keeps XLA from making the product transposed, which takes three times as long on a CPU.
    product = jax.lax.optimization_barrier(jnp.einsum("hbtd,hde->hbte", x, params[f"W_{name}"]))
    out = jnp.moveaxis(product, 0, 2)
    return out + params[f"b_{name}"] if f"b_{name}" in params else out


def _forward(
    model: MaskedModel, mask: ArrayLike, skip: bool, nudges: Array | None, layer: int, written: Written | None
) -> tuple[Array, Written]:
    config, graph = model.config, model.graph
    checked = _checked(graph, jnp.asarray(mask, jnp.float32), model.embedded.shape[1])
    with jax.default_matmul_precision("float32"):
        if written is None:
            if layer:
                raise ModelError(f"a masked run from layer {layer} needs what was written before it: pass `written`")
            begun = [model.embedded[None] - model.ablated[0]], [jnp.zeros(config.d_model)] * 2
        else:
            count = graph.written_before(layer)
            begun = list(written.deltas[:count]), list(written.constants[: count + 1])
        now = _Pass(model, checked, skip, nudges, *begun)
        for index in range(layer, graph.n_layers):
            now.group()
            now.heads(index)
            if graph.mlps:
                now.mlp(index)
        kind = config.norm_before_unembedding
        final = model.params.get("ln_final", {})
        x = normalize(kind, config.norm_eps, final, now.read_scored(), Sites((), {}), "ln_final")
        return unembed(config, model.params, x), Written(tuple(now.deltas), tuple(now.constants))


def _checked(graph: Graph, mask: Array, positions: int) -> Array:
    expected = graph.possible.shape
    if mask.shape[-2:] != expected or mask.shape[:-2] not in ((), (positions,)):
        raise ModelError(
            f"a mask of shape {mask.shape}, the graph has {expected[0]} sources and {expected[1]} destinations: give "
            f"[{expected[0]}, {expected[1]}], or [{positions}, {expected[0]}, {expected[1]}] for one a position. Is "
            "it of another model, or with neurons?"
        )
    return mask
