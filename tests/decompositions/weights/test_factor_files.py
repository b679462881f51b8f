"""Files of decompositions by anybody: what is missing, unknown or of another type is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from decompositions.weights.factors import Factors
from mdl.errors import ExplanationError


def arrays() -> dict[str, np.ndarray]:
    """Of one matrix, with gates."""
    gates = {f"W.gate.{key}": np.ones((2, 3)) for key in ("weight_in", "bias_in", "weight_out")}
    factors = {"W.inputs": np.ones((2, 4)), "W.outputs": np.ones((2, 3)), "W.component": np.arange(2)}
    return {**factors, **gates, "W.gate.bias_out": np.ones(2)}


def test_a_whole_file(tmp_path: Path) -> None:
    save_file(arrays(), tmp_path / "a.safetensors")
    found = Factors.load(tmp_path / "a.safetensors")
    assert found.gated
    assert found.n_components == 2
    small = {**arrays(), "W.component": np.arange(2, dtype=np.int32)}
    save_file(small, tmp_path / "b.safetensors")
    assert Factors.load(tmp_path / "b.safetensors").tensors["W"].component.dtype == np.int64


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("W.inputs", "no array 'MATRIX.inputs'"),
        ("W.outputs", r"missing or unknown are W\.outputs"),
        ("W.component", r"missing or unknown are W\.component"),
        ("W.gate.bias_in", r"gates of W have weight_in, weight_out, bias_out; all of"),
    ],
)
def test_what_is_missing(left_out: str, message: str, tmp_path: Path) -> None:
    save_file({key: a for key, a in arrays().items() if key != left_out}, tmp_path / "a.safetensors")
    with pytest.raises(ExplanationError, match=message):
        Factors.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"W.U": np.ones(3)}, r"\['W\.U'\]"),
        ({"W.gate.bias": np.ones(3)}, r"W\.gate\.bias"),
        ({"V.gate.bias_in": np.ones(3)}, r"V\.gate\.bias_in"),
        ({"W.component": np.ones(2)}, r"W\.component is of type float64; component ids are integers"),
    ],
)
def test_what_is_unknown(added: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    save_file({**arrays(), **added}, tmp_path / "a.safetensors")
    with pytest.raises(ExplanationError, match=message):
        Factors.load(tmp_path / "a.safetensors")


def test_what_is_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    for path in (tmp_path / "text.safetensors", tmp_path, tmp_path / "nowhere.safetensors"):
        with pytest.raises(ExplanationError, match="is not a readable safetensors file"):
            Factors.load(path)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ExplanationError, match="holds no decomposition of weights"):
        Factors.load(tmp_path / "empty.safetensors")
