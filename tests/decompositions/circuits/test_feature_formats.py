"""Files of SAE and transcoder features: nodes of feature circuits, attribution graphs."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from decompositions.circuits.formats import load_circuit, load_features
from decompositions.circuits.formats.circuit_tracer import AttributionGraph
from decompositions.circuits.formats.feature_circuits import FeatureCircuit
from mdl.errors import ExplanationError
from mdl.models.circuits.graph import Graph


class SparseAct:
    def __init__(self, act: torch.Tensor, res: torch.Tensor | None = None, resc: torch.Tensor | None = None) -> None:
        self.act, self.res, self.resc = act, res, resc


class LogitTarget(NamedTuple):
    token_str: str
    vocab_idx: int


class HookedTransformerConfig:
    def __init__(self) -> None:
        self.n_layers, self.dtype, self.device = 2, torch.float32, "cpu"


@pytest.fixture
def foreign() -> Iterator[None]:
    """Others' classes under their real names, while a test writes files."""
    parents = ("circuit_tracer", "circuit_tracer.attribution", "transformer_lens")
    places = {
        "activation_utils": SparseAct,
        "circuit_tracer.attribution.targets": LogitTarget,
        "transformer_lens.HookedTransformerConfig": HookedTransformerConfig,
    }
    before = {name: sys.modules.get(name) for name in (*places, *parents)}
    sys.modules |= {name: types.ModuleType(name) for name in parents}
    for name, cls in places.items():
        module = types.ModuleType(name)
        setattr(module, cls.__name__, cls)
        cls.__module__, sys.modules[name] = name, module
    yield
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


def test_feature_circuits(tmp_path: Path, foreign: None) -> None:
    nodes = {
        "y": torch.tensor([1.0]),
        "mlp_0": SparseAct(torch.tensor([[0.0, 0.3], [0.0, 0.0]]), resc=torch.tensor([[0.2], [0.0]])),
        "resid_1": SparseAct(torch.tensor([[-0.5, 0.0, 0.01]]), res=torch.tensor([[0.1, -0.4]])),
    }
    edges = {"mlp_0": {"resid_1": torch.eye(2).to_sparse()}}
    path = tmp_path / "circuit.pt"
    torch.save({"examples": [{"clean_prefix": "The"}], "nodes": nodes, "edges": edges}, path)
    found = load_features(path)
    assert isinstance(found, FeatureCircuit)
    assert set(found.effects) == {"mlp_0", "resid_1"}
    assert found.errors["resid_1"].tolist() == [[pytest.approx(-0.3)]]
    features, errors = found.above(0.25)["mlp_0"]
    assert features.tolist() == [[False, True], [False, False]]
    assert not errors.any()
    assert "1 pairs of submodules dropped" in found.notes[0]
    with pytest.raises(ExplanationError, match="an empty circuit"):
        found.above(9.0)
    with pytest.raises(ExplanationError, match="load_features reads it"):
        load_circuit(path, Graph(2, 2, 2))


def attribution(**changes: object) -> dict[str, object]:
    """Two layers, two tokens, three active features of which two are selected, one logit: 9 nodes."""
    content = {
        "input_string": "a b",
        "adjacency_matrix": torch.arange(81.0).reshape(9, 9),
        "cfg": HookedTransformerConfig(),
        "active_features": torch.tensor([[0, 0, 5], [0, 1, 7], [1, 1, 2]]),
        "logit_targets": [LogitTarget("c", 42)],
        "logit_probabilities": torch.tensor([0.9]),
        "vocab_size": 50,
        "input_tokens": torch.tensor([3, 4]),
        "selected_features": torch.tensor([0, 2]),
        "activation_values": torch.tensor([1.0, 2.0, 3.0]),
        "scan_name": None,
    }
    return {**content, **changes}


def test_attribution_graphs(tmp_path: Path, foreign: None) -> None:
    path = tmp_path / "graph.pt"
    torch.save(attribution(), path)
    found = load_features(path)
    assert isinstance(found, AttributionGraph)
    assert found.features.tolist() == [[0, 0, 5], [1, 1, 2]]
    assert found.activations.tolist() == [1.0, 3.0]
    assert found.logits.tolist() == [42]
    assert found.names() == ["f0.0#5", "f1.1#2", "e0.0", "e0.1", "e1.0", "e1.1", "t0", "t1", "l0"]
    assert found.adjacency[8, 0] == 72.0  # rows are targets
    old = attribution(logit_targets=torch.tensor([42]), cfg=None)
    torch.save(old, path)
    np.testing.assert_array_equal(load_features(path).adjacency, found.adjacency)
    torch.save(attribution(adjacency_matrix=torch.zeros(8, 8)), path)
    with pytest.raises(ExplanationError, match="9 nodes"):
        load_features(path)
    with pytest.raises(ExplanationError, match="load_features reads it"):
        load_circuit(path, Graph(2, 2, 2))


def test_other_files_are_no_features(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ExplanationError, match="holds no features"):
        load_features(tmp_path / "weights.pt")
