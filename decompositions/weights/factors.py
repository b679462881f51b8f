"""Anybody's decomposition of weight matrices into components: factors with component ids that span tensors, and gates.

    W_T = sum over subcomponents s of T of  V_s U_s^T   + leftover_T

Every subcomponent belongs to one component c(s); a component is on or off for a token, in all tensors at once. This is
the shape of SPD (rank one, one id a subcomponent), APD (any rank, ids that span layers), SVD, neurons, input columns,
and the whole matrix as one part. The file format is safetensors: for each matrix T of the network the arrays `T.inputs`
[S, d_in], `T.outputs` [S, d_out], `T.component` [S] (integers), and, if there are gates, `T.gate.*` (`ScalarGates`).

Sources: Braun et al. 2025 (APD, arXiv:2501.14926), Bushnaq et al. 2025 (SPD, arXiv:2506.20790).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mdl.errors import ExplanationError
from mdl.models.networks import Network

GATE_ARRAYS = ("weight_in", "bias_in", "weight_out", "bias_out")


@dataclass(frozen=True)
class ScalarGates:
    r"""SPD's gates: a small MLP for each subcomponent on the scalar v = V_s . x.

    $$g_s = \mathrm{clip}(w^{out}_s \cdot \mathrm{gelu}(w^{in}_s v + b^{in}_s) + b^{out}_s, 0, 1)$$

    **Arguments:** `weight_in`, `bias_in`, `weight_out` [S, h]; `bias_out` [S]. A function of one token's activations,
    so it cannot see later tokens. Source: Bushnaq et al. 2025, section 3.2; the GELU is exact.
    """

    weight_in: np.ndarray
    bias_in: np.ndarray
    weight_out: np.ndarray
    bias_out: np.ndarray

    def rows(self, chosen: np.ndarray) -> ScalarGates:
        """Of some subcomponents."""
        return ScalarGates(*(getattr(self, name)[chosen] for name in GATE_ARRAYS))


@dataclass(frozen=True)
class TensorFactors:
    """Subcomponents of one matrix: `inputs` [S, d_in] (V), `outputs` [S, d_out] (U), `component` [S]."""

    inputs: np.ndarray
    outputs: np.ndarray
    component: np.ndarray
    gates: ScalarGates | None = None

    def total(self) -> np.ndarray:
        """Their sum, [d_in, d_out]."""
        return self.inputs.T @ self.outputs

    def matrices(self, components: int) -> np.ndarray:
        """Each component's part of the matrix, [C, d_in, d_out]."""
        found = np.zeros((components, self.inputs.shape[1], self.outputs.shape[1]), np.float64)
        for s, c in enumerate(self.component):
            found[c] += np.outer(self.inputs[s], self.outputs[s])
        return found


@dataclass(frozen=True)
class Factors:
    """A decomposition of some of a network's matrices; those that are not named are not decomposed."""

    tensors: Mapping[str, TensorFactors]
    name: str = "components"
    notes: tuple[str, ...] = field(default=())

    @property
    def n_components(self) -> int:
        """C: one more than the largest id."""
        return 1 + max((int(t.component.max(initial=-1)) for t in self.tensors.values()), default=-1)

    @property
    def gated(self) -> bool:
        """Whether every matrix comes with gates."""
        return all(t.gates is not None for t in self.tensors.values())

    def leftover(self, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the components lack of each decomposed matrix: W - sum."""
        return {name: weights[name] - tensor.total() for name, tensor in self.tensors.items()}

    def check(self, network: Network) -> None:
        """**Raises:** `ExplanationError` for matrices that the network lacks, factors of other shapes, ids that are no
        component's, gates of other sizes, numbers that are not finite."""
        for name, tensor in self.tensors.items():
            if name not in network.matrices:
                known = ", ".join(network.matrices)
                raise ExplanationError(f"{self.name}: no matrix {name!r} in this region, whose matrices are {known}")
            _check_tensor(f"{self.name}: {name}", tensor, network.matrices[name])
        if not self.tensors:
            raise ExplanationError(f"{self.name} decomposes no matrix")
        if not self.n_components:
            raise ExplanationError(f"{self.name} has no component in any matrix")
        used = np.concatenate([t.component for t in self.tensors.values()])
        if missing := int(self.n_components - len(np.unique(used))):
            raise ExplanationError(
                f"{self.name}: component ids run to {self.n_components - 1}, but {missing} of them have no part of any "
                "matrix. Number the components without gaps."
            )

    def save(self, path: Path) -> None:
        """Write a safetensors file, to a temporary one that is then renamed."""
        arrays: dict[str, np.ndarray] = {}
        for name, t in self.tensors.items():
            arrays[f"{name}.inputs"], arrays[f"{name}.outputs"] = t.inputs, t.outputs
            arrays[f"{name}.component"] = np.asarray(t.component, np.int64)
            if t.gates is not None:
                arrays |= {f"{name}.gate.{key}": getattr(t.gates, key) for key in GATE_ARRAYS}
        partial = path.with_name(path.name + ".partial")
        save_file({key: np.ascontiguousarray(a) for key, a in arrays.items()}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, name: str = "") -> Factors:
        """Read what `save` wrote, or anybody's file of that shape. **Raises:** `ExplanationError` if it is not one."""
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ExplanationError(f"{path} is not a readable safetensors file ({error})") from error
        names = [key.removesuffix(".inputs") for key in arrays if key.endswith(".inputs")]
        wanted = {f"{n}.{part}" for n in names for part in ("inputs", "outputs", "component")}
        gates = {f"{n}.gate.{key}" for n in names for key in GATE_ARRAYS}
        strange = [key for key in arrays if key not in wanted | gates]
        if others := [key for key in strange if key.split(".gate.")[0] in names and ".gate." in key]:
            raise ExplanationError(
                f"{path} holds gates of another kind ({', '.join(others[:3])}). A gate that a receiver runs reads one "
                "scalar of one token, so that it cannot see later ones (a bidirectional gate leaks the future). Leave "
                "the gates out and let the sender list what is on (gates=indices), or fit gates of this kind."
            )
        if not names or wanted - set(arrays) or strange:
            lacking = ", ".join(sorted(wanted - set(arrays))[:3]) or "no array 'MATRIX.inputs'"
            raise ExplanationError(
                f"{path} holds no decomposition of weights: missing or unknown are {lacking} {strange[:3]}. For each "
                "matrix it takes MATRIX.inputs [S, d_in], MATRIX.outputs [S, d_out], MATRIX.component [S]."
            )
        tensors = {n: _read_tensor(path, arrays, n) for n in names}
        return cls(tensors, name or path.stem)


def _read_tensor(path: Path, arrays: Mapping[str, np.ndarray], name: str) -> TensorFactors:
    given = [key for key in GATE_ARRAYS if f"{name}.gate.{key}" in arrays]
    if given and len(given) < len(GATE_ARRAYS):
        raise ExplanationError(f"{path}: gates of {name} have {', '.join(given)}; all of {GATE_ARRAYS} are needed")
    gates = ScalarGates(*(arrays[f"{name}.gate.{key}"] for key in GATE_ARRAYS)) if given else None
    component = arrays[f"{name}.component"]
    if not np.issubdtype(component.dtype, np.integer):
        raise ExplanationError(f"{path}: {name}.component is of type {component.dtype}; component ids are integers")
    return TensorFactors(arrays[f"{name}.inputs"], arrays[f"{name}.outputs"], component.astype(np.int64), gates)


def _check_tensor(what: str, tensor: TensorFactors, shape: tuple[int, int]) -> None:
    count = len(tensor.component)
    found, wanted = (tensor.inputs.shape, tensor.outputs.shape), ((count, shape[0]), (count, shape[1]))
    if found != wanted or tensor.component.shape != (count,):
        raise ExplanationError(
            f"{what}: factors {found[0]} and {found[1]} for {count} component ids do not fit the matrix {shape}: "
            f"expected inputs {wanted[0]} and outputs {wanted[1]}. Are they transposed?"
        )
    if count and tensor.component.min() < 0:
        raise ExplanationError(f"{what}: a component id of {tensor.component.min()}; they are numbered from 0")
    for array in (tensor.inputs, tensor.outputs):
        if bad := int((~np.isfinite(array)).sum()):
            raise ExplanationError(f"{what}: {bad} of {array.size} numbers are NaN or infinite")
    if (g := tensor.gates) is not None:
        hidden = g.weight_in.shape[-1]
        sizes = [(count, hidden)] * 3 + [(count,)]
        if [getattr(g, key).shape for key in GATE_ARRAYS] != sizes:
            raise ExplanationError(
                f"{what}: gates of shapes {[getattr(g, key).shape for key in GATE_ARRAYS]} where {sizes} are expected "
                "for gates that read one scalar of one token"
            )
