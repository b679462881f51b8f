"""The textbook's circuit of induction, found from attention patterns, and what it leaves unexplained.

A head of the first layer looks at the token before; a head of the second looks, through its keys, for what stood behind
the current token, and copies it (Elhage et al. 2021, "A mathematical framework for transformer circuits"; Olsson et al.
2022, arXiv:2209.11895).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.small_circuits.examples import Examples
from mdl.models.circuits.ablations import mean, zero
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import MaskedModel, masked_model, masked_run, masked_runs
from mdl.models.model import Model
from mdl.models.transformer import run
from mdl.units import nats_to_bits

STRONG = 0.3  # of attention where it should be, from which a head counts as doing its job


@dataclass(frozen=True)
class Heads:
    """Shares of attention: `previous` of each head of layer 0 on the token before, wherever it stands (in a sequence
    that repeats, it stood elsewhere too); `induction` of each head of layer 1 on tokens that stood behind the current
    one before. Measured positions only, means."""

    previous: tuple[float, ...]
    induction: tuple[float, ...]


def head_scores(model: Model, examples: Examples) -> Heads:
    """How much attention goes where the textbook says."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1)]
    found = jax.jit(partial(run, model.config, reads=names))(model.params, examples.tokens)
    first, second = (np.asarray(found[name], np.float64) for name in names)  # [n, h, query, key]
    tokens, measured = examples.tokens, examples.measured
    before = tokens[:, None, :] == np.roll(tokens, 1, 1)[:, :, None]  # the first query's is never measured
    # key s > 0 stands behind an earlier copy of the query's token where token s - 1 is that token
    behind = np.zeros((*tokens.shape, tokens.shape[1]), bool)
    behind[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]
    behind &= np.tri(tokens.shape[1], dtype=bool)[None]
    share = lambda pattern, where: (pattern * where[:, None]).sum(-1)  # noqa: E731
    mean_of = lambda values: values.transpose(1, 0, 2)[:, measured].mean(1)  # noqa: E731
    previous, induction = mean_of(share(first, before)), mean_of(share(second, behind))
    return Heads(tuple(float(s) for s in previous), tuple(float(s) for s in induction))


def textbook_edges(first: list[int], second: list[int]) -> list[str]:
    """Embedding to the first heads; embedding to queries and values, first heads to keys of the second; logits."""
    edges = [f"input->a0.h{head}<{letter}>" for head in first for letter in "qkv"]
    for head in second:
        edges += [f"input->a1.h{head}<q>", f"input->a1.h{head}<v>", f"a1.h{head}->logits"]
        edges += [f"a0.h{source}->a1.h{head}<k>" for source in first]
    return edges


def textbooks(heads: Heads) -> dict[str, list[str]]:
    """The circuit of the strongest head of each kind, and that of all strong ones, where they differ."""
    ranks = [sorted(range(len(s)), key=lambda i, s=s: -s[i]) for s in (heads.previous, heads.induction)]
    strong = [[i for i, share in enumerate(s) if share >= STRONG] for s in (heads.previous, heads.induction)]
    found = {"textbook": textbook_edges(ranks[0][:1], ranks[1][:1])}
    if all(strong) and [len(s) for s in strong] != [1, 1]:
        found["textbook, all strong heads"] = textbook_edges(strong[0], strong[1])
    return found


def measured_kl(logits: Array, reference: Array, measured: Array) -> Array:
    """Mean KL(reference || logits) at measured positions, nats."""
    p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    return ((jnp.exp(p) * (p - q)).sum(-1) * measured).sum() / measured.sum()


@dataclass(frozen=True, eq=False)
class Masks:
    """A model on some examples, ready for masks of its edges under one ablation."""

    graph: Graph
    model: MaskedModel
    measured: Array
    plain: Array

    @classmethod
    def of(cls, model: Model, examples: Examples, ablation: str) -> Masks:
        """`ablation`: "zero", or "mean" over these examples."""
        graph = Graph.of(model.config)
        means = partial(mean, model.config, model.params, examples.tokens, graph)
        constants = zero(model.config, graph) if ablation == "zero" else means()
        masked = masked_model(model.config, model.params, examples.tokens, constants.fixed, graph)
        plain = masked_run(masked, jnp.asarray(graph.possible, jnp.float32))
        return cls(graph, masked, jnp.asarray(examples.measured), plain)

    def bits(self, masks: np.ndarray) -> np.ndarray:
        """KL of each of some circuits [m, S, D], bits a measured token."""
        stacked = jnp.asarray(masks, jnp.float32)
        found = masked_runs(self.model, stacked, measured_kl, (self.plain, self.measured), 1, True)
        return np.asarray(nats_to_bits(np.asarray(found, np.float64)))

    def grown(
        self, edges: np.ndarray, least: float = 1e-4, progress: Callable[[str, float], Any] | None = None
    ) -> list[tuple[str, float]]:
        """Edges in the order in which they are added to a circuit, always the one that lowers the KL most, with what it
        leaves in bits a measured token; until that is under `least`, or nothing is left to add."""
        now, found = np.array(edges, bool), []
        while (left := np.argwhere(self.graph.possible & ~now)).size:
            tried = np.repeat(now[None], len(left), 0)
            tried[np.arange(len(left)), left[:, 0], left[:, 1]] = True
            bits = self.bits(tried)
            best = int(np.argmin(bits))
            now = tried[best]
            found.append((self.graph.edge_name(*map(int, left[best])), float(bits[best])))
            if progress is not None:
                progress(*found[-1])
            if bits[best] < least:
                break
        return found
