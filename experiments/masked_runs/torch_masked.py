"""The same masked forward of GPT-2 in torch, eagerly: sums of ablated outputs made once, differences kept in a buffer.

What a hooked model does at its best: no hooks are called, several masks run side by side in the batch, layers that no
edge leaves are skipped, logits are computed at the scored positions only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from mdl.models.circuits.graph import Graph


@dataclass
class TorchMasked:
    """GPT-2 on given tokens; weights under TransformerLens's names, as tensors; `ablated` [S, B, T, d]."""

    graph: Graph
    weights: Any
    embedded: torch.Tensor
    ablated: torch.Tensor
    scored: torch.Tensor

    def __post_init__(self) -> None:
        stops = [0, *(piece.stop for piece in self.graph.pieces)]
        self.bases = [self.ablated[:stop].sum(0) for stop in stops]
        constant, self.constants = torch.zeros(self.embedded.shape[-1]), []
        for block in self.weights["blocks"]:
            self.constants.append(constant)
            constant = constant + block["attn"]["b_O"]
        self.constants.append(constant)

    @torch.no_grad()
    def __call__(self, masks: torch.Tensor, skip: bool = False) -> torch.Tensor:
        """Logits [M, B, K, V] under masks [M, S, D]."""
        graph, count = self.graph, len(masks)
        buffer = torch.zeros((count, len(graph.sources), *self.embedded.shape))
        buffer[:, 0] = self.embedded - self.ablated[0]
        for layer, block in enumerate(self.weights["blocks"]):
            rows = graph.pieces[graph.written_before(layer)]
            if not skip or masks[:, rows].any():
                x = self.read(buffer, masks, rows.start, graph.inputs(layer), self.constants[layer])
                buffer[:, rows] = self.heads(block, x) - self.ablated[rows]
            rows = graph.pieces[graph.written_before(layer, mlp=True)]
            if not skip or masks[:, rows].any():
                inputs = graph.inputs(layer, mlp=True)
                x = self.read(buffer, masks, rows.start, inputs, self.constants[layer + 1])[:, 0]
                buffer[:, rows.start] = mlp(block, x) - self.ablated[rows.start]
        last = self.read_scored(buffer, masks[:, :, -1])
        return normed(self.weights["ln_final"], last) @ self.weights["embed"]["W_E"].T

    def read(
        self, buffer: torch.Tensor, masks: torch.Tensor, written: int, inputs: slice, constant: torch.Tensor
    ) -> torch.Tensor:
        """[M, n, B, T, d]: what some destinations read when the first sources are written."""
        count, shape = len(masks), self.embedded.shape
        piece = self.graph.pieces.index(next(p for p in self.graph.pieces if p.start == written))
        mixed = masks[:, :written, inputs].transpose(1, 2) @ buffer[:, :written].reshape(count, written, -1)
        return mixed.reshape(count, -1, *shape) + (self.bases[piece] + constant)

    def read_scored(self, buffer: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """[M, B, K, d]: what the logits read."""
        rows = torch.arange(len(self.scored))[:, None]
        base = (self.bases[-1] + self.constants[-1])[rows, self.scored]
        return base + torch.einsum("ms,msbkd->mbkd", column, buffer[:, :, rows, self.scored])

    def heads(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        """[M, H, B, T, d]: each head's output from the inputs [M, 3H, B, T, d] of all."""
        attn, heads = block["attn"], self.graph.n_heads
        x = normed(block["ln1"], x)
        q, k, v = (
            torch.einsum("mhbtd,hde->mbhte", x[:, i * heads : (i + 1) * heads], attn[f"W_{name}"])
            + attn[f"b_{name}"][:, None]
            for i, name in enumerate("QKV")
        )
        shape = q.shape
        z = functional.scaled_dot_product_attention(*(y.flatten(0, 1) for y in (q, k, v)), is_causal=True)
        return torch.einsum("mbhte,hed->mhbtd", z.reshape(shape), attn["W_O"])


def normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm."""
    return functional.layer_norm(x, x.shape[-1:], norm["w"], norm["b"], 1e-5)


def mlp(block: Any, x: torch.Tensor) -> torch.Tensor:
    """[M, B, T, d]: the MLP behind its norm."""
    weights = block["mlp"]
    pre = normed(block["ln2"], x) @ weights["W_in"] + weights["b_in"]
    return functional.gelu(pre, approximate="tanh") @ weights["W_out"] + weights["b_out"]
