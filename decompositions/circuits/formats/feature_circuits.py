"""Sparse feature circuits (Marks et al. 2024, arXiv:2403.19647): pt files of SAE features and error terms.

{"examples", "nodes", "edges"}: `nodes` maps a submodule (`embed`, `attn_0`, `mlp_3`, `resid_5`, `y`) to the indirect
effects of its features and of its SAE's error. Their evaluation ablates nodes and never looks at edges (their issue
14), so that the circuit is the set of nodes; edges are counted and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from decompositions.circuits.formats.pickles import SparseAct, read_torch
from mdl.errors import ExplanationError

FORMAT = "feature-circuits"
_KEYS = ("nodes", "edges")
TARGET = "y"


@dataclass(frozen=True)
class FeatureCircuit:
    """Indirect effects of SAE features and error terms, by submodule.

    **Arguments:** `effects`: float64 [..., features], leading axes being positions where effects were not summed over
    them; `errors`: float64 [..., 1], summed over the error's dimensions; `notes`: what was dropped.
    """

    effects: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]
    notes: tuple[str, ...]

    def above(self, threshold: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each submodule, the nodes of |effect| above a threshold: bool, of the shapes of `effects`, `errors`.

        **Raises:** `ExplanationError` if none is.
        """
        found = {
            name: (np.abs(self.effects[name]) > threshold, np.abs(self.errors[name]) > threshold)
            for name in self.effects
        }
        if not any(features.any() or errors.any() for features, errors in found.values()):
            raise ExplanationError(f"{FORMAT}: an empty circuit, no node has an effect above {threshold}")
        return found


def load_feature_circuit(path: Path) -> FeatureCircuit:
    """A pt file. **Raises:** `ExplanationError` for what is none, or wants to import something."""
    return from_nodes(read_torch(path))


def is_nodes(content: Any) -> bool:
    """Whether an object is what feature-circuits saves."""
    return isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in _KEYS)


def from_nodes(content: Any) -> FeatureCircuit:
    """As `load_feature_circuit`, from what the file holds."""
    if not is_nodes(content):
        raise ExplanationError(f"{FORMAT}: a file has examples, nodes and edges")
    effects, errors = {}, {}
    for name, node in content["nodes"].items():
        if name == TARGET:
            continue
        if not isinstance(node, SparseAct) or node.act is None:
            raise ExplanationError(f"{FORMAT}: node {name!r} is {type(node).__name__}, not effects of features")
        effects[str(name)] = _array(node.act)
        errors[str(name)] = _error(node, effects[str(name)])
    if not effects:
        raise ExplanationError(f"{FORMAT}: an empty circuit, without a single submodule")
    pairs = sum(len(down) for down in content["edges"].values() if isinstance(down, dict))
    notes = (f"edges between {pairs} pairs of submodules dropped: the circuit is its nodes",) if pairs else ()
    return FeatureCircuit(MappingProxyType(effects), MappingProxyType(errors), notes)


def _error(node: SparseAct, effects: np.ndarray) -> np.ndarray:
    """The error's effect, contracted: [..., 1]; zeros where there is none."""
    if node.resc is not None:
        found = _array(node.resc)
        return found if found.ndim == effects.ndim else found[..., None]
    if node.res is not None:
        return np.asarray(_array(node.res).sum(-1, keepdims=True))
    return np.zeros((*effects.shape[:-1], 1))


def _array(tensor: Any) -> np.ndarray:
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    return np.asarray(dense.detach().double().numpy())
