"""AutoCircuit's PruneScores (Miller et al. 2024, arXiv:2407.08734): a tensor for each module that reads the stream.

{module name: tensor [(positions), (heads), sources so far]}. Two things come so, and mean opposite things: *prune
scores*, of which large ones are kept and 1 means in the circuit (`circuit_prune_scores`), and the model's *patch masks*
(`current_patch_masks_as_prune_scores`), of which 1 means ablated. Scores of more than two values and tables of booleans
can only be the first, names that end in `patch_mask` only the second; floats 0 and 1 can be either, so that whoever
loads them has to say which.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from decompositions.circuits.formats.hooks import destinations_of
from decompositions.circuits.formats.loaded import Gathering, LoadedCircuit, plain_graph
from decompositions.circuits.formats.pickles import read_torch
from mdl.errors import ExplanationError, ModelError
from mdl.models.circuits.graph import LOGITS, Graph

SCORES, MASKS = "auto-circuit", "auto-circuit-masks"
_SUFFIX = ".patch_mask"
_MODULES = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in", "hook_mlp_in", "hook_resid_post")


def load_auto_circuit(path: Path, graph: Graph, kind: str | None = None) -> LoadedCircuit:
    """PruneScores, or patch masks.

    **Arguments:** `kind`: `auto-circuit` (1 is kept), `auto-circuit-masks` (1 is ablated); None: by the content.

    **Raises:** `ExplanationError` for zeros and ones of which nobody says what they mean; `ModelError` for another
    model's.
    """
    return from_modules(read_torch(path), graph, kind)


def is_modules(content: Any) -> bool:
    """Whether an object maps names of reading modules to tensors."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and name.removesuffix(_SUFFIX).endswith(_MODULES) for name in content)
        and all(hasattr(value, "numpy") for value in content.values())
    )


def from_modules(content: Any, graph: Graph, kind: str | None = None) -> LoadedCircuit:
    """As `load_auto_circuit`, from what the file holds."""
    if not is_modules(content):
        raise ExplanationError("auto-circuit: PruneScores map names such as 'blocks.0.hook_q_input' to tensors")
    tables = {name.removesuffix(_SUFFIX): value.detach().numpy() for name, value in content.items()}
    masked = any(name.endswith(_SUFFIX) for name in content)
    kind = kind or (MASKS if masked else _meaning(tables))
    levels = _levels(tables)
    if kind == MASKS and levels - {0.0, 1.0}:
        raise ExplanationError(f"auto-circuit: patch masks are 0 or 1, and {len(levels - {0.0, 1.0})} values are not")
    decided = levels <= {0.0, 1.0}
    found = Gathering(graph, kind)
    positions = {len(t) for name, t in tables.items() if t.ndim == _axes(graph, name) + 1}
    for name, table in tables.items():
        for source, destinations, value in _edges(graph, name, table, kind == MASKS):
            kept = value == 0 if kind == MASKS else value != 0
            for destination in destinations:
                found.add(source, destination, bool(kept) and decided, None if decided else float(value))
    notes = (f"{max(positions)} positions joined: an edge is kept if it is at one of them",) if positions else ()
    return found.done(notes, decided)


def save_auto_circuit(path: Path, graph: Graph, edges: np.ndarray, masks: bool = False) -> None:
    """Write a circuit as `circuit_prune_scores(bool=True)` does, or as patch masks (floats, 1 for ablated).

    **Arguments:** `edges`: bool [sources, destinations]. **Raises:** `ModelError` for grouped keys and values, neurons.
    """
    import torch

    plain_graph(graph, "AutoCircuit")
    columns = {name: j for j, name in enumerate(graph.destinations)}
    content = {}
    for module in _modules(graph):
        names = [destinations_of(graph, module, head)[0] for head in _heads(graph, module)]
        places = [columns[name] for name in names]
        table = edges[: _before(graph, places[0]), places].T
        table = ~table if masks else table
        content[module] = torch.tensor(table if len(names) > 1 else table[0])
    if masks:
        content = {f"{name}{_SUFFIX}": value.float() for name, value in content.items()}
    torch.save(content, path)


def _meaning(tables: dict[str, np.ndarray]) -> str:
    if _levels(tables) - {0.0, 1.0} or all(t.dtype == bool for t in tables.values()):
        return SCORES
    raise ExplanationError(
        f"auto-circuit: zeros and ones, and nothing that says whether 1 is kept (prune scores) or ablated (masks). "
        f"Say which: format={SCORES!r} or format={MASKS!r}"
    )


def _levels(tables: dict[str, np.ndarray]) -> set[float]:
    return {float(v) for table in tables.values() for v in np.unique(table)[:3]}


def _edges(graph: Graph, module: str, table: np.ndarray, masked: bool) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Source, destinations and value of each edge into a module, positions joined: the largest |score|, no ablation."""
    axes = _axes(graph, module)
    if table.ndim not in (axes, axes + 1):
        raise ModelError(f"auto-circuit: {module} has a tensor {table.shape}: a circuit of another architecture")
    values = table.astype(np.float64)
    if table.ndim > axes:
        values = values.min(0) if masked else np.take_along_axis(values, np.abs(values).argmax(0)[None], 0)[0]
    rows = values[None] if axes == 1 else values
    heads = _heads(graph, module)
    if len(rows) != len(heads):
        raise ModelError(f"auto-circuit: {module} has {len(rows)} heads in place of {len(heads)}: another architecture")
    for head, row in zip(heads, rows, strict=True):
        destinations = destinations_of(graph, module, head)
        expected = _before(graph, _column(graph, destinations[0]))
        if len(row) != expected:
            raise ModelError(f"auto-circuit: {module} has {len(row)} sources before it in place of {expected}")
        for source, value in zip(graph.sources[:expected], row, strict=True):
            yield source, destinations, float(value)


def _column(graph: Graph, destination: str) -> int:
    shared = Gathering(graph, SCORES).grouped(destination)
    if shared not in graph.destinations:
        raise ModelError(
            f"auto-circuit: the model has no destination {destination!r}: a circuit of another architecture"
        )
    return graph.destinations.index(shared)


def _before(graph: Graph, destination: int) -> int:
    """How many sources come before a destination; they are the first ones."""
    return int(graph.possible[:, destination].sum())


def _axes(graph: Graph, module: str) -> int:
    """Axes of a module's tensor without positions: heads have one of their own where there are several."""
    return 2 if len(_heads(graph, module)) > 1 else 1


def _heads(graph: Graph, module: str) -> list[int]:
    return [0] if module.endswith(("hook_mlp_in", "hook_resid_post")) else list(range(graph.n_heads))


def _modules(graph: Graph) -> list[str]:
    found = []
    for name in graph.destinations:
        if name == LOGITS:
            found.append(f"blocks.{graph.n_layers - 1}.hook_resid_post")
        elif name.startswith("m"):
            found.append(f"blocks.{name[1:]}.hook_mlp_in")
        else:
            found.append(f"blocks.{name[1:].partition('.')[0]}.hook_{name[-2]}_input")
    return list(dict.fromkeys(found))
