"""A decomposition of weights as arrays of a message, each row rounded for how often and how strongly it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from decompositions.weights.curvature import Curvature, Curvatures, square_root
from decompositions.weights.dense import rounded_rows
from decompositions.weights.factors import GATE_ARRAYS, Factors, TensorFactors
from decompositions.weights.gated import INDICES, KIND, PROGRAM, Layout
from decompositions.weights.rounding import round_matrix
from decompositions.weights.usage import MatrixUse, Usage
from mdl.message import QuantisedArray, Section
from mdl.models.networks import Network
from mdl.protocols import Settings
from mdl.static_rows import FEWEST_ROWS, metric_rows

NEVER = 1e-9  # a frequency: of what is not there


@dataclass(frozen=True)
class Slots:
    """The subcomponents of one matrix by component and place.

    `place` [C, terms]: the number of a subcomponent, -1 where a component has fewer; `own` [C]: whether a component's
    matrix is sent as it is, being fewer numbers than its terms.
    """

    place: np.ndarray
    own: np.ndarray

    @classmethod
    def of(cls, tensor: TensorFactors, components: int, whole: bool) -> Slots:
        """**Arguments:** `whole`: whether a component's matrix may be sent as it is."""
        (d_in, d_out), order = (
            (tensor.inputs.shape[1], tensor.outputs.shape[1]),
            np.argsort(tensor.component, kind="stable"),
        )
        counts = np.bincount(tensor.component, minlength=components)
        own = (counts * (d_in + d_out) >= d_in * d_out) & whole & (counts > 1)
        terms = int(counts[~own].max(initial=0))
        place = np.full((components, terms), -1)
        starts = np.cumsum([0, *counts[:-1]])
        for c in np.flatnonzero(~own & (counts > 0)):
            place[c, : counts[c]] = order[starts[c] : starts[c] + counts[c]]
        return cls(place, own)


@dataclass(frozen=True)
class Scaled:
    r"""Factors V, U of one matrix, scaled against each other so that an error counts alike in both.

    An error in V_s costs E[m |x|^2] |U_s|_B^2, one in U_s E[m (V_s . x)^2]; V_s a and U_s / a are the same component.
    `energy` [S]: what an error costs then; `scale` [S]: a; `roots`: of the metrics for V and for U, mean 1 on their
    diagonals.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    energy: np.ndarray
    scale: np.ndarray
    roots: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, tensor: TensorFactors, use: MatrixUse, curvature: Curvature) -> Scaled:
        level = float(np.trace(curvature.outputs)) / len(curvature.outputs)
        reads = use.size * np.einsum("so,op,sp->s", tensor.outputs, curvature.outputs, tensor.outputs)
        writes = use.energy * level
        ratio = np.sqrt(np.maximum(reads, 1e-30) / np.maximum(writes, 1e-30))
        scale = np.sqrt(np.clip(ratio, 1e-12, 1e12))
        roots = square_root(use.spread), square_root(curvature.outputs / level)
        columns = scale[:, None]
        return cls(tensor.inputs * columns, tensor.outputs / columns, np.sqrt(reads * writes), scale, roots)

    def sides(self, settings: Settings) -> tuple[Settings, Settings]:
        """The settings for V, and for U."""
        return replace(settings, root=self.roots[0]), replace(settings, root=self.roots[1])

    def joined(self, settings: Settings) -> Settings:
        """The settings for both in one row."""
        return replace(settings, root=scipy.linalg.block_diag(*self.roots))


@dataclass(frozen=True)
class Packing:
    """`mode`: who decides what is on (`decompositions.weights.gated`); `rest`: whether the leftover is sent."""

    network: Network
    weights: Mapping[str, np.ndarray]
    factors: Factors
    curvature: Curvatures
    usage: Usage
    mode: int
    rest: bool

    @cached_property
    def slots(self) -> dict[str, Slots]:
        count = self.factors.n_components
        return {name: Slots.of(t, count, self.mode != PROGRAM) for name, t in self.factors.tensors.items()}

    @cached_property
    def left(self) -> dict[str, np.ndarray]:
        """Matrices that every token needs: those not decomposed and, if it is sent, what components lack; zeros where
        no component has a part."""
        found = {name: self.weights[name] for name in self.network.matrices if name not in self.factors.tensors}
        empty = {n: np.zeros(self.network.matrices[n]) for n, t in self.factors.tensors.items() if not len(t.component)}
        return {**found, **empty, **(self.factors.leftover(self.weights) if self.rest else {})}

    def section(self, settings: Settings) -> Section:
        """The layout, header arrays and parts that `GatedDecoder` reads."""
        header: list[QuantisedArray] = []
        parts: list[QuantisedArray] = []
        fields = []
        for name in self.network.matrices:
            if name in self.left:
                header.append(_rest(self.left[name], self.curvature.matrices[name], settings))
            terms, own = 0, False
            if name in self.factors.tensors and len(self.factors.tensors[name].component):
                terms, own = self._components(name, settings, header, parts)
            fields.append([int(name in self.left), terms, int(own)])
        for name in (*self.network.tables, *self.network.vectors):
            header.append(rounded_rows(self.weights[name], self.curvature.others[name], settings))
        layout = Layout(self.mode, self.factors.n_components, np.array(fields))
        return Section(KIND, (layout.integers(), *header), tuple(parts))

    def _components(
        self, name: str, settings: Settings, header: list[QuantisedArray], parts: list[QuantisedArray]
    ) -> tuple[int, bool]:
        """Append one matrix's components. Returns how many terms a component has, and whether there are whole ones."""
        tensor, slots, use = self.factors.tensors[name], self.slots[name], self.usage.matrices[name]
        curvature, terms = self.curvature.matrices[name], slots.place.shape[1]
        scaled = Scaled.of(tensor, use, curvature)
        if self.mode == PROGRAM:
            always, place = np.ones_like(self.usage.frequency), slots.place[:, 0]
            reads, writes = scaled.sides(settings)
            # Gates read V . x in the units in which they were trained: V and U are not scaled against each other.
            header.append(_rows(tensor.inputs, place, scaled.energy * scaled.scale**2, always, reads))
            header.extend(_gates(tensor, place, settings))
            parts.append(_rows(tensor.outputs, place, scaled.energy / scaled.scale**2, self.usage.frequency, writes))
        else:
            both, joined = scaled.joined(settings), np.concatenate([scaled.inputs, scaled.outputs], 1)
            for r in range(terms):
                parts.append(_rows(joined, slots.place[:, r], scaled.energy, self.usage.frequency, both))
        if slots.own.any():
            parts.append(self._own(tensor, slots, use, curvature, settings))
        return terms, bool(slots.own.any())

    def _own(
        self, tensor: TensorFactors, slots: Slots, use: MatrixUse, curvature: Curvature, settings: Settings
    ) -> QuantisedArray:
        """Components' matrices as they are, [C, d_in * d_out]; zeros where a component has terms instead."""
        count = self.factors.n_components
        matrices = np.where(slots.own[:, None, None], tensor.matrices(count), 0.0).reshape(count, -1)
        size = np.zeros(count)
        size[tensor.component] = use.size
        harm = float(np.trace(curvature.outputs)) / len(curvature.outputs)
        energy = np.where(slots.own, size * harm, 0.0)
        frequency = np.where(slots.own, self.usage.frequency, NEVER)
        return QuantisedArray.from_values(matrices, replace(settings, root=np.eye(1)).static_step(energy, frequency))

    def prices(self, settings: Settings, section: Section) -> np.ndarray:
        """Bits of having a component on, [C]: its index, and its share of the part that is paid on first use."""
        f = np.clip(self.usage.frequency, 0.5 / 4096, 1 - 1e-6)
        content = _content(section.parts)
        uses = settings.horizon * f / -np.expm1(settings.horizon * np.log1p(-f))
        index = np.log2(np.maximum((1 - f) / f, 1.0)) + 0.1
        return np.asarray(index + content / uses if self.mode == INDICES else index)

    @staticmethod
    def unrounded(
        network: Network, weights: Mapping[str, np.ndarray], factors: Factors, rest: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Operators' arrays and other weights as the decoder would have them at infinite precision."""
        left = factors.leftover(weights)
        matrices: dict[str, dict[str, Any]] = {}
        for name in network.matrices:
            if name not in factors.tensors:
                matrices[name] = {"rest": jnp.asarray(weights[name], jnp.float32)}
                continue
            tensor = factors.tensors[name]
            place = Slots.of(tensor, factors.n_components, False).place
            there = (place >= 0)[..., None]
            matrices[name] = {
                "inputs": jnp.asarray(np.where(there, tensor.inputs[place], 0.0), jnp.float32),
                "outputs": jnp.asarray(np.where(there, tensor.outputs[place], 0.0), jnp.float32),
            }
            if rest:
                matrices[name]["rest"] = jnp.asarray(left[name], jnp.float32)
        return matrices, {n: jnp.asarray(weights[n]) for n in (*network.tables, *network.vectors)}


def _rest(matrix: np.ndarray, curvature: Curvature, settings: Settings) -> QuantisedArray:
    """A matrix that every token needs; zeros are sent as such."""
    return round_matrix(matrix, curvature, settings) if matrix.any() else QuantisedArray.from_values(matrix, 1.0)


def _rows(
    rows: np.ndarray, place: np.ndarray, energy: np.ndarray, frequency: np.ndarray, settings: Settings
) -> QuantisedArray:
    """One row a component: the subcomponent in its place, zeros where it has none."""
    there = place >= 0
    values = np.where(there[:, None], rows[place], 0.0)
    used, often = np.where(there, energy[place], 0.0), np.where(there, frequency, NEVER)
    paid = -np.expm1(settings.horizon * np.log1p(-np.minimum(often, 1.0 - 1e-9)))
    if paid.sum() < FEWEST_ROWS:  # too few to pay for the columns' steps
        return QuantisedArray.from_values(values, settings.static_step(used, often))
    return metric_rows(values, used, settings, None, often)


def _gates(tensor: TensorFactors, place: np.ndarray, settings: Settings) -> list[QuantisedArray]:
    """The gates' four arrays, in steps of a share of their spread."""
    assert tensor.gates is not None
    found = []
    for key in GATE_ARRAYS:
        values = np.atleast_2d(getattr(tensor.gates, key).T).T[place]
        values = np.where((place >= 0)[:, None], values, 0.0)
        step = settings.knobs["gates"] * max(float(np.sqrt(np.mean(np.square(values)))), 1e-12)
        found.append(QuantisedArray.from_values(values, step))
    return found


def _content(parts: tuple[QuantisedArray, ...]) -> np.ndarray:
    """About the bits of each part's numbers."""
    return np.asarray(sum(np.log2(1.0 + 2.0 * np.abs(a.symbols)).sum(1) + (a.symbols != 0).sum(1) for a in parts))
