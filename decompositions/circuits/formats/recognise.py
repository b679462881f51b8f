"""Which format a file has: by its name where that says it, otherwise by what it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from decompositions.circuits.formats import (
    acdc,
    auto_circuit,
    circuit_tracer,
    eap_ig,
    edge_pruning,
    feature_circuits,
    interpbench,
    mib,
)
from decompositions.circuits.formats.circuit_tracer import AttributionGraph
from decompositions.circuits.formats.feature_circuits import FeatureCircuit
from decompositions.circuits.formats.loaded import LoadedCircuit
from decompositions.circuits.formats.pickles import is_torch, read_pickle, read_torch
from mdl.errors import ExplanationError, did_you_mean
from mdl.models.circuits.graph import Graph

FORMATS: Mapping[str, Callable[[Any, Graph], LoadedCircuit]] = MappingProxyType(
    {
        acdc.FORMAT: lambda x, g: acdc.from_edges(x, g) if acdc.is_edge_list(x) else acdc.from_subgraph(x, g),
        interpbench.FORMAT: interpbench.from_pairs,
        eap_ig.FORMAT: lambda x, g: eap_ig.from_json(x, g) if eap_ig.is_json(x) else eap_ig.from_tensors(x, g),
        auto_circuit.SCORES: lambda x, g: auto_circuit.from_modules(x, g, auto_circuit.SCORES),
        auto_circuit.MASKS: lambda x, g: auto_circuit.from_modules(x, g, auto_circuit.MASKS),
        edge_pruning.FORMAT: edge_pruning.from_pairs,
    }
)
"""Formats of circuits of our graph, by name: what a file holds -> the circuit."""


def load_circuit(path: str | Path, graph: Graph, format: str | None = None) -> LoadedCircuit:
    """The circuit in a file, or in the folder of a MIB submission that is one file of scores.

    **Arguments:** `format`: one of `FORMATS`; None: recognised.

    **Raises:** `ExplanationError` for a file of no known format, a pickle that wants to import something, an empty
    circuit; `ModelError` for edges that the model does not have.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _of_folder(place, graph)
    if format is not None and format not in FORMATS:
        raise ExplanationError(f"no format {format!r}.{did_you_mean(format, FORMATS)} There are {', '.join(FORMATS)}")
    content = _content(place)
    reader = FORMATS[format] if format is not None else _recognised(content, place)
    try:
        return reader(content, graph)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ExplanationError(f"{place} has the parts of a circuit's file, but not their types: {error}") from error


def load_features(path: str | Path) -> FeatureCircuit | AttributionGraph:
    """A file of SAE or transcoder features: of feature-circuits, or of circuit-tracer.

    **Raises:** `ExplanationError` for any other file, or one that wants to import something.
    """
    place = Path(path).expanduser()
    content = read_torch(place)
    if circuit_tracer.is_graph(content):
        return circuit_tracer.from_graph(content)
    if feature_circuits.is_nodes(content):
        return feature_circuits.from_nodes(content)
    raise ExplanationError(f"{place} holds no features; circuits of heads and MLPs are read by load_circuit")


def _of_folder(folder: Path, graph: Graph) -> LoadedCircuit:
    submission = mib.load_submission(folder, graph)
    if not submission.scored:
        raise ExplanationError(
            f"{folder} is a submission of {len(submission.circuits)} circuits. Give one of its files, or take "
            "`load_submission(folder, graph).at(share)`."
        )
    return submission.circuits[0]


def _content(path: Path) -> Any:
    if not path.is_file():
        raise ExplanationError(f"there is no file or folder {path}")
    if is_torch(path):
        return read_torch(path)
    try:
        return json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        if path.suffix == ".json":
            raise ExplanationError(f"{path} is no json file: {error}") from error
    return read_torch(path) if path.suffix in (".pt", ".pth") else read_pickle(path)


def _recognised(content: Any, path: Path) -> Callable[[Any, Graph], LoadedCircuit]:
    if circuit_tracer.is_graph(content) or (feature_circuits.is_nodes(content) and not eap_ig.is_json(content)):
        raise ExplanationError(
            f"{path} holds features of SAEs or transcoders, which are no edges between heads and MLPs: load_features "
            "reads it"
        )
    tests: tuple[tuple[Callable[[Any], bool], Callable[[Any, Graph], LoadedCircuit]], ...] = (
        (eap_ig.is_json, eap_ig.from_json),
        (eap_ig.is_tensors, eap_ig.from_tensors),
        (acdc.is_subgraph, acdc.from_subgraph),
        (acdc.is_edge_list, acdc.from_edges),
        (auto_circuit.is_modules, auto_circuit.from_modules),
        (_is_hooks, interpbench.from_pairs),
        (interpbench.is_pairs, edge_pruning.from_pairs),
    )
    for matches, reader in tests:
        if matches(content):
            return reader
    empty = isinstance(content, (list, dict)) and not content
    raise ExplanationError(
        f"{path}: {'an empty circuit' if empty else 'no format of a circuit that is known here'}. Known are "
        f"{', '.join(FORMATS)} and the folder of a MIB submission; say which it is by format=..."
    )


def _is_hooks(content: Any) -> bool:
    """Whether the names of pairs are hooks, as InterpBench's are and Edge Pruning's are not."""
    return interpbench.is_pairs(content) and all("hook_" in name for pair in content for name in pair)
