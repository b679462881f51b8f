"""TransformerLens's hook names as nodes of our graph, for the files that are written in them."""

from __future__ import annotations

import re

from mdl.errors import ExplanationError
from mdl.models.circuits.graph import INPUT, LETTERS, LOGITS, Graph

EMBEDDINGS = ("blocks.0.hook_resid_pre", "hook_embed", "hook_pos_embed")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_INPUTS = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in", "hook_mlp_in", "hook_resid_mid")
_INSIDE = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "mlp.hook_pre")


def source_of(graph: Graph, hook: str, head: int | None) -> str | None:
    """The source that a hook is the output of; None for a hook inside a node, whose edges are no edges of ours.

    **Raises:** `ExplanationError` for a hook that is no node's.
    """
    if hook in EMBEDDINGS:
        return INPUT
    layer, rest = _parts(hook)
    if rest in _INPUTS or rest in _INSIDE:
        return None
    if rest in ("attn.hook_result", "attn.hook_z"):
        return f"a{layer}.h{_head(graph, hook, head)}"
    if rest in ("hook_mlp_out", "mlp.hook_post"):
        return f"m{layer}"
    raise ExplanationError(f"the hook {hook!r} writes nothing into the residual stream that is an edge's source")


def destinations_of(graph: Graph, hook: str, head: int | None) -> tuple[str, ...]:
    """The destinations that a hook is an input of: one, or all three of a head that is named as a whole.

    **Raises:** `ExplanationError` for a hook that is no node's, or the stream behind another layer than the last.
    """
    layer, rest = _parts(hook)
    if rest == "hook_resid_post":
        if layer != graph.n_layers - 1:
            raise ExplanationError(
                f"edges end at {hook!r}, but the model's last layer is {graph.n_layers - 1}: a circuit of another "
                "architecture"
            )
        return (LOGITS,)
    if rest in ("hook_mlp_in", "hook_resid_mid", "hook_mlp_out", "mlp.hook_post", "mlp.hook_pre"):
        return (f"m{layer}",)
    for letter in LETTERS:
        if rest in (f"hook_{letter}_input", f"attn.hook_{letter}"):
            return (f"a{layer}.h{_head(graph, hook, head)}<{letter}>",)
    if rest in ("hook_attn_in", "attn.hook_result", "attn.hook_z"):
        return tuple(f"a{layer}.h{_head(graph, hook, head)}<{letter}>" for letter in LETTERS)
    raise ExplanationError(f"the hook {hook!r} reads nothing from the residual stream that is an edge's destination")


def _parts(hook: str) -> tuple[int, str]:
    match = _BLOCK.fullmatch(hook)
    if match is None:
        raise ExplanationError(
            f"{hook!r} is no hook of a transformer's graph; expected names such as 'blocks.0.hook_q_input'"
        )
    return int(match[1]), match[2]


def _head(graph: Graph, hook: str, head: int | None) -> int:
    if head is None and graph.n_heads == 1:
        return 0
    if head is None:
        raise ExplanationError(f"{hook!r} names no head, but the model has {graph.n_heads} in a layer")
    return head
