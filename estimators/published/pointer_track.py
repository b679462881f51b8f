r"""The pointer track: circuits as papers count them, naming edges of a model whose weights are known. Never a score.

A point of a curve is a circuit of k of E edges with

    k log2 E - log2 k!  bits to name it       and       KL bits at each position that is asked for

The list code and not log2 C(E, k), under which the whole model is named in no bits at all, leaves no surprise, and wins
every contest; but no code can mend that the receiver of a pointer has the weights, can run the model, and is surprised
by nothing. So there is no total of this track that means anything, and none is given: two circuits can be compared at
the same size, or two searches by their whole curves, under one and the same ablation. For a score, a circuit is charged
for what it keeps (`decompositions.circuits`).

Resampled activations are two numbers. The *mean* E_x' KL(M || C_x') is the price of sending with one donor at a time,
the *mixture* KL(M || E_x' C_x') that of a code which averages the predictions of all donors: shorter by Jensen's
inequality, at the price of as many runs. The donors' seed is public and fixed; the best of S seeds costs log2 S bits.
Both numbers are conditional on the donors: whoever has them knows what they have in common with the data, so that
neither is comparable with zero or mean ablation, and a table of both is refused. Either can exceed the uniform
prediction (17 bits against 6 were seen at k = 0 on a model of 64 tokens): a share `floor` of the unigram distribution
can be mixed in, for all circuits of a curve alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdl.codes.edges import list_bits
from mdl.errors import ExplanationError
from mdl.models.circuits.ablations import Ablation, Resample
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import MaskedModel, masked_model, masked_run
from mdl.models.config import TransformerConfig
from mdl.units import nats_to_bits

DRAWS = 8  # donors of every sequence, under resampling


@dataclass(frozen=True)
class PointerCurve:
    """**Arguments:** `ablation`: what stood in for dropped edges; `possible`: E; `edges` [n]: k; `name_bits` [n]: to
    name them; `kl_bits` [n]: mean over positions and donors; `mixture_bits` [n]: of the donors' average, the same where
    there is but one."""

    name: str
    ablation: str
    possible: int
    edges: np.ndarray
    name_bits: np.ndarray
    kl_bits: np.ndarray
    mixture_bits: np.ndarray

    def at(self, k: int) -> tuple[float, float]:
        """Mean and mixture KL of the largest circuit of at most k edges, bits a position.

        **Raises:** `ExplanationError` where every circuit is larger.
        """
        fitting = np.flatnonzero(self.edges <= k)
        if not len(fitting):
            raise ExplanationError(f"{self.name}: its smallest circuit has {self.edges.min()} edges, more than {k}")
        best = fitting[np.argmax(self.edges[fitting])]
        return float(self.kl_bits[best]), float(self.mixture_bits[best])


def pointer_curve(
    name: str,
    config: TransformerConfig,
    params: Any,
    tokens: np.ndarray,
    graph: Graph,
    circuits: Sequence[np.ndarray],
    ablation: Ablation,
    scored: np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    chosen_from: int = 1,
    floor: float = 0.0,
) -> PointerCurve:
    """Evaluate circuits, bool [sources, destinations] each, on sequences [B, T] at positions `scored` [B, K].

    **Arguments:** `draws`: of donors, with seeds from that of a `Resample` on; `chosen_from`: how many seeds were
    tried; `floor`: the share of the unigram distribution of `tokens` in every prediction, from 0 to below 1.

    **Raises:** `ExplanationError` for no circuits, for fewer than one draw or seed, for a floor outside [0, 1);
    `ModelError` as `masked_model`.
    """
    if not circuits or draws < 1 or chosen_from < 1 or not 0.0 <= floor < 1.0:
        raise ExplanationError(
            f"{len(circuits)} circuits, {draws} draws, best of {chosen_from} seeds, a floor of {floor}: it takes one "
            "or more of the first three, and a floor from 0 to below 1"
        )
    sources = [ablation]
    if isinstance(ablation, Resample):
        sources = [Resample(ablation.seed + draw) for draw in range(draws)]
    models = [
        masked_model(config, params, tokens, a.values(config, params, tokens, graph), graph, scored) for a in sources
    ]
    plain = jax.nn.log_softmax(masked_run(models[0], jnp.asarray(graph.possible, jnp.float32)))
    base = np.bincount(np.ravel(tokens), minlength=config.n_logits)[: config.n_logits] + 0.5
    unigram = jnp.log(jnp.asarray(base / base.sum(), jnp.float32))
    found = np.array([_point(models, edges, plain, unigram, floor) for edges in circuits])
    counts = np.array([int(edges.sum()) for edges in circuits])
    named = np.array([float(list_bits(graph.n_edges, k)) for k in counts]) + math.log2(chosen_from)
    return PointerCurve(name, ablation.kind, graph.n_edges, counts, named, *nats_to_bits(found.T))


def _point(
    models: Sequence[MaskedModel], edges: np.ndarray, plain: Any, unigram: Any, floor: float
) -> tuple[float, float]:
    """Mean and mixture KL, nats a position."""
    mask, share = jnp.asarray(edges, jnp.float32), jnp.asarray(floor, jnp.float32)
    logs = [_predicted(model, mask, unigram, share) for model in models]
    mean = float(np.mean([float(_divergence(plain, log)) for log in logs]))
    mixture = jax.nn.logsumexp(jnp.stack(logs), 0) - math.log(len(logs)) if len(logs) > 1 else logs[0]
    return mean, float(_divergence(plain, mixture))


@jax.jit
def _predicted(model: MaskedModel, mask: Any, unigram: Any, floor: Any) -> Any:
    own = jax.nn.log_softmax(masked_run(model, mask, skip=True))
    return jnp.logaddexp(jnp.log1p(-floor) + own, jnp.log(floor) + unigram)


@jax.jit
def _divergence(plain: Any, log: Any) -> Any:
    return (jnp.exp(plain) * (plain - log)).sum(-1).mean()


def pointer_table(curves: Sequence[PointerCurve], sizes: Sequence[int]) -> dict[str, list[tuple[float, float]]]:
    """Mean and mixture KL of every curve at the same numbers of edges.

    **Raises:** `ExplanationError` for curves of different ablations or graphs: they answer different questions.
    """
    kinds, graphs = ({getattr(c, key) for c in curves} for key in ("ablation", "possible"))
    if len(kinds) > 1:
        raise ExplanationError(
            f"curves under {' and '.join(sorted(kinds))} ablation in one table: what stands in for dropped edges tells "
            "the receiver more under one than under another, and on this track nobody pays for it. Make a table of "
            "each, or score circuits with everything charged (circuit:... of mdl compare)."
        )
    if len(graphs) > 1:
        raise ExplanationError(f"curves of graphs with {sorted(graphs)} edges in one table: they are of other models")
    return {curve.name: [curve.at(k) for k in sizes] for curve in curves}
