"""A circuit as arrays of a message, each block rounded for how much the region's outputs notice: the sender's side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from decompositions.circuits.decoder import BYTE, CONSTANTS, KIND, NEURONS, SUBSPACE, place
from decompositions.circuits.kept import Block, Kept
from decompositions.circuits.layout import edge_layout
from decompositions.weights.curvature import Curvature, Curvatures
from decompositions.weights.dense import rounded_rows
from decompositions.weights.rounding import round_matrix
from mdl.codes.edges import encode_edges
from mdl.message import QuantisedArray, Section
from mdl.models.circuits.graph import LOGITS
from mdl.protocols import Settings


@dataclass(frozen=True)
class Packing:
    """**Arguments:** `weights`: the region's own, flat, by name; `constants` [D, d]: what each destination reads in the
    place of dropped sources; `stream` [layers + 1]: mean squares of the residual stream before each layer's heads and
    before the logits."""

    kept: Kept
    weights: Mapping[str, np.ndarray]
    constants: np.ndarray
    curvature: Curvatures
    stream: np.ndarray
    known: dict[Any, Curvature] = field(default_factory=dict, compare=False, repr=False)

    def section(self, settings: Settings) -> Section:
        """What `CircuitDecoder` reads."""
        kept = self.kept
        mode = SUBSPACE * kept.subspace + CONSTANTS * kept.constants + NEURONS * (kept.graph.neurons > 0)
        data = np.frombuffer(encode_edges(kept.edges, edge_layout(kept.graph)), np.uint8).astype(np.int64)
        header = [np.array([[mode]]), BYTE + data[None]]
        arrays, constants = self._constants(settings) if kept.constants else ([], np.zeros_like(self.constants))
        decoded = {name: np.full(s, float(name.endswith(".w")), np.float32) for name, s in kept.shapes.items()}
        for block in kept.blocks():
            array = self._block(block, decoded, constants, settings)
            place(kept, decoded, constants, block, array.values())
            arrays.append(array)
        return Section(KIND, (*(QuantisedArray.from_integers(a) for a in header), *arrays))

    def _block(
        self, block: Block, decoded: dict[str, np.ndarray], constants: np.ndarray, settings: Settings
    ) -> QuantisedArray:
        matrix = self.weights[block.name].reshape(self.kept.shapes[block.name])
        if block.name not in self.kept.network.matrices:
            sensitivity = self.curvature.others[block.name].reshape(matrix.shape)
            here = np.ix_(block.rows, block.columns)
            return rounded_rows(matrix[here], sensitivity[here], settings)
        curvature = self.curvature.matrices[block.name]
        columns = curvature.outputs[np.ix_(block.columns, block.columns)]
        if block.destination is None:
            if (own := self.known.get(block.name)) is None:  # kept, with its factorisations
                own = self.known[block.name] = Curvature(curvature.inputs[np.ix_(block.rows, block.rows)], columns)
            return round_matrix(matrix[np.ix_(block.rows, block.columns)], own, settings)
        span = self.kept.span(block.destination, decoded, constants)
        back = np.linalg.pinv(span)
        inputs = back.T @ curvature.inputs @ back
        return round_matrix(span @ matrix[:, block.columns], Curvature(inputs, columns), settings)

    def _constants(self, settings: Settings) -> tuple[list[QuantisedArray], np.ndarray]:
        """Distinct constants, which of them each destination reads (0: none), and what the receiver makes of that."""
        wanted = np.where(self.kept.needed[:, None], self.constants, 0.0)
        rows, which = np.unique(wanted, axis=0, return_inverse=True)
        which = which.reshape(-1)
        energy = np.bincount(which, [self._harm(d) for d in range(len(wanted))], len(rows))
        some = rows.any(1)
        number = np.where(some, np.cumsum(some), 0)[which]
        flat = replace(settings, root=np.eye(1))
        array = QuantisedArray.from_values(rows[some].reshape(-1, wanted.shape[1]), flat.static_step(energy[some]))
        received = np.concatenate([np.zeros_like(wanted[:1]), array.values()])[number].astype(np.float32)
        return [array, QuantisedArray.from_integers(number[None])], received

    def _harm(self, destination: int) -> float:
        """What a unit error in a reader's input costs: tr(W B W^T) / d, over E[x^2] where a norm scales by that."""
        kept, name = self.kept, self.kept.graph.destinations[destination]
        if not kept.needed[destination]:
            return 0.0
        if name == LOGITS:
            matrix, mean_square = "unembed.W_U", float(self.stream[-1])
        else:
            layer = int(name[1:].partition(".")[0])
            head = name.endswith(">")
            matrix = f"blocks.{layer}." + (f"attn.W_{name[-2].upper()}" if head else "mlp.W_in")
            mean_square = float(self.stream[layer])
        if matrix not in self.curvature.matrices:  # a residual stream, or a tied unembedding
            return 1.0 / max(float(self.stream[-1]), 1e-30)
        normed = kept.config.norm_before_unembedding if name == LOGITS else kept.config.norm
        return self._through(matrix, name) / kept.config.d_model / (mean_square if normed != "none" else 1.0)

    def _through(self, matrix: str, destination: str) -> float:
        """tr(W B W^T) of the columns of one destination."""
        outputs, w = self.curvature.matrices[matrix].outputs, self.weights[matrix]
        if destination.endswith(">"):
            size = self.kept.config.d_head
            head = int(destination[:-3].split(".h")[1])
            columns = slice(head * size, (head + 1) * size)
            outputs, w = outputs[columns, columns], w[:, columns]
        return float(np.einsum("io,op,ip->", w, outputs, w))
