"""circuit-tracer's attribution graphs (Ameisen et al. 2025; Hanna et al. 2025): pt files, a graph type of its own.

Nodes, in this order: selected transcoder features, an error for each layer and position, the tokens, the logits.
`adjacency[t, s]` is the direct effect of node s on node t for one prompt. Nothing in it is an edge between heads and
MLPs, so that it is no circuit of `Graph`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decompositions.circuits.formats.pickles import LogitTarget, read_torch
from mdl.errors import ExplanationError

FORMAT = "circuit-tracer"
_KEYS = ("adjacency_matrix", "active_features", "selected_features", "input_tokens", "logit_probabilities")


@dataclass(frozen=True)
class AttributionGraph:
    """**Arguments:** `adjacency`: float64 [nodes, nodes], targets by sources; `features`: int [n, 3], layer, position
    and index of each feature node; `activations`: float64 [n], NaN where unknown; `n_layers`; `tokens`: int [n_pos];
    `logits`: int [k], vocabulary ids, -1 where unknown; `probabilities`: float64 [k]; `text`: the prompt.

    **Raises:** `ExplanationError` unless the numbers of nodes agree.
    """

    adjacency: np.ndarray
    features: np.ndarray
    activations: np.ndarray
    n_layers: int
    tokens: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    text: str

    def __post_init__(self) -> None:
        n = len(self.features) + self.n_errors + len(self.tokens) + len(self.logits)
        if self.adjacency.shape != (n, n):
            raise ExplanationError(
                f"{FORMAT}: an adjacency matrix {self.adjacency.shape} of {len(self.features)} features, "
                f"{self.n_layers} x {len(self.tokens)} errors, {len(self.tokens)} tokens, {len(self.logits)} logits: "
                f"{n} nodes"
            )
        if self.features.size and self.features[:, 0].max() >= self.n_layers:
            raise ExplanationError(f"{FORMAT}: a feature of layer {self.features[:, 0].max()} of {self.n_layers}")

    @property
    def n_errors(self) -> int:
        """Error nodes: one for each layer and position."""
        return self.n_layers * len(self.tokens)

    def names(self) -> list[str]:
        """Of every node: `f3.7#1204` (layer, position, feature), `e3.7`, `t7`, `l2`."""
        positions = range(len(self.tokens))
        return [
            *(f"f{layer}.{position}#{index}" for layer, position, index in self.features.tolist()),
            *(f"e{layer}.{position}" for layer in range(self.n_layers) for position in positions),
            *(f"t{position}" for position in positions),
            *(f"l{i}" for i in range(len(self.logits))),
        ]


def load_attribution_graph(path: Path) -> AttributionGraph:
    """A pt file. **Raises:** `ExplanationError` for what is none, or wants to import something."""
    return from_graph(read_torch(path))


def is_graph(content: Any) -> bool:
    """Whether an object is what circuit-tracer saves."""
    return isinstance(content, dict) and all(key in content for key in _KEYS)


def from_graph(content: Any) -> AttributionGraph:
    """As `load_attribution_graph`, from what the file holds."""
    if not is_graph(content):
        raise ExplanationError(f"{FORMAT}: a file has {', '.join(_KEYS)}")
    selected = _array(content["selected_features"]).astype(np.int64)
    active = _array(content["active_features"]).astype(np.int64).reshape(-1, 3)
    if selected.size and selected.max() >= len(active):
        raise ExplanationError(f"{FORMAT}: feature {selected.max()} is selected of {len(active)} active ones")
    values = content.get("activation_values")
    activations = np.full(len(selected), np.nan) if values is None else _array(values).astype(np.float64)
    if len(activations) == len(active) != len(selected):
        activations = activations[selected]
    probabilities = _array(content["logit_probabilities"]).astype(np.float64).reshape(-1)
    return AttributionGraph(
        _array(content["adjacency_matrix"]).astype(np.float64),
        active[selected],
        activations,
        _layers(content, active),
        _array(content["input_tokens"]).astype(np.int64).reshape(-1),
        _logits(content, len(probabilities)),
        probabilities,
        str(content.get("input_string", "")),
    )


def _layers(content: dict[str, Any], active: np.ndarray) -> int:
    """Of the configuration; without one, from the number of nodes."""
    stated = getattr(content.get("cfg"), "n_layers", None)
    if stated is not None:
        return int(stated)
    tokens = _array(content["input_tokens"]).size
    others = tokens + _array(content["logit_probabilities"]).size + _array(content["selected_features"]).size
    errors = len(content["adjacency_matrix"]) - others
    if tokens == 0 or errors % tokens:
        raise ExplanationError(f"{FORMAT}: {errors} error nodes are no multiple of {tokens} positions, and no cfg says")
    return errors // tokens


def _logits(content: dict[str, Any], count: int) -> np.ndarray:
    """Vocabulary ids of the logits: a list of targets, in old files a tensor."""
    targets = content.get("logit_targets", content.get("logit_tokens"))
    if targets is None:
        return np.full(count, -1)
    if isinstance(targets, (list, tuple)):
        return np.array([t.vocab_idx if isinstance(t, LogitTarget) else int(t) for t in targets], np.int64)
    return _array(targets).astype(np.int64).reshape(-1)


def _array(tensor: Any) -> np.ndarray:
    if hasattr(tensor, "detach"):
        import torch

        plain = tensor.detach()
        return np.asarray((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy())
    return np.asarray(tensor)
