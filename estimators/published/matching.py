r"""How well parts of a matrix match true ones: MMCS and ML2R as printed, and a one-to-one match of whole matrices.

    MMCS = mean_j max_c cos(P_c[j], W[j])        ML2R = mean_j |P_c(j)[j]| / |W[j]|,    c(j) = the argmax

(Braun et al. 2025, arXiv 2501.14926; Bushnaq et al. 2025, arXiv 2506.20790), j running over input features,
P[j] being what a matrix [d_in, d_out] writes for feature j. Both look at one vector of a part at a time: the whole
matrix as one part has 1 and 1, and so have input columns whatever was learned. What is asked for is that each part be
the truth and nothing besides: hence the cosine of whole matrices, one part to one true part (the assignment with the
largest sum), with how much of it is there and how much is left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from mdl.errors import ExplanationError

SOURCE = "Braun et al. 2025, arXiv 2501.14926"


@dataclass(frozen=True)
class Factors:
    """Parts of rank one, u_c v_c^T, that are never multiplied out.

    **Arguments:** `inputs` [C, d_in]: u; `outputs` [C, d_out]: v.
    """

    inputs: np.ndarray
    outputs: np.ndarray

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2 or self.outputs.ndim != 2 or len(self.inputs) != len(self.outputs):
            raise ExplanationError(
                f"factors of shapes {self.inputs.shape} and {self.outputs.shape}: [C, d_in] and [C, d_out], as many "
                "of one as of the other."
            )

    def dense(self) -> Float[np.ndarray, "C d_in d_out"]:
        """Every part multiplied out."""
        return np.einsum("ci,co->cio", *(np.asarray(a, np.float64) for a in (self.inputs, self.outputs)))


Parts: TypeAlias = np.ndarray | Factors  # [C, d_in, d_out], or any [C, ...] where only whole parts are compared


@dataclass(frozen=True)
class Columns:
    """MMCS and ML2R, and what they are means of.

    **Arguments:** `cosines` [d_in]: of each feature's best part; `ratios` [d_in]: of its norm to the truth's;
    `best` [d_in]: which part that is.
    """

    cosines: Float[np.ndarray, " d_in"]
    ratios: Float[np.ndarray, " d_in"]
    best: Int[np.ndarray, " d_in"]

    @property
    def mmcs(self) -> float:
        """Mean max cosine similarity."""
        return float(self.cosines.mean())

    @property
    def ml2r(self) -> float:
        """Mean L2 ratio."""
        return float(self.ratios.mean())


def column_match(parts: Parts, target: Float[np.ndarray, "d_in d_out"]) -> Columns:
    """MMCS and ML2R of parts [C, d_in, d_out] against the target's matrix, as APD and SPD define them.

    **Raises:** ExplanationError for parts of other shapes, or a target with a feature that writes nothing.
    """
    dense = _dense(parts)
    if dense.shape[1:] != target.shape:
        raise ExplanationError(
            f"parts of shape {dense.shape[1:]} of a matrix of shape {target.shape}: they are the same."
        )
    truth = np.linalg.norm(target, axis=1)
    if not truth.all():
        raise ExplanationError(
            f"{(truth == 0).sum()} of {len(truth)} input features write nothing: no cosine with them is defined. Leave "
            "them out of both."
        )
    norms = np.linalg.norm(dense, axis=2)
    cosines = _over(np.einsum("cio,io->ci", dense, target), norms * truth)
    best = cosines.argmax(0)
    at = (best, np.arange(len(best)))
    return Columns(cosines[at], norms[at] / truth, best)


@dataclass(frozen=True)
class Match:
    """Parts against true parts, one to one.

    **Arguments:** `cosines` [T]: of each true part with the part that is its own, 0 where none is left for it or it
    points away; `part` [T]: which, -1 for none; `ratios` [T]: of their norms, 0 for none; `best` [T]: the largest
    cosine of any part, taken twice or not; `spare`: squared norms of parts that are nobody's, over those of the truth.
    """

    cosines: Float[np.ndarray, " T"]
    part: Int[np.ndarray, " T"]
    ratios: Float[np.ndarray, " T"]
    best: Float[np.ndarray, " T"]
    spare: float

    @property
    def mean_cosine(self) -> float:
        """The strict figure: 1 only if every true part is there, whole and alone."""
        return float(self.cosines.mean())

    @property
    def mean_max_cosine(self) -> float:
        """The same where a part may be taken twice: what MMCS would be of whole matrices."""
        return float(self.best.mean())

    @property
    def mean_ratio(self) -> float:
        """Mean ratio of norms: below 1 for parts that are shrunk, or missing."""
        return float(self.ratios.mean())


def matrix_match(parts: Parts, truth: Parts) -> Match:
    """The one-to-one assignment of parts to true parts with the largest sum of cosines between whole matrices.

    **Arguments:** `parts`, `truth`: [C, ...] and [T, ...] of the same shape behind the first axis, or factors; of parts
    that span several tensors, the tensors laid end to end (`joined`).

    **Raises:** ExplanationError for shapes that differ, for no parts, or for a true part that is zero.
    """
    products, squares, true_squares = _products(parts, truth)
    if not len(squares) or not np.all(true_squares > 0):
        raise ExplanationError(
            f"{len(squares)} parts against {len(true_squares)} true ones, {(true_squares == 0).sum()} of them zero: a "
            "cosine takes a part, and a truth that is not zero."
        )
    norms = np.sqrt(np.outer(squares, true_squares))
    cosines = np.maximum(_over(products, norms), 0.0)
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    kept = cosines[rows, columns] > 0
    rows, columns = rows[kept], columns[kept]
    part = np.full(len(true_squares), -1)
    part[columns] = rows
    found, ratios = np.zeros(len(part)), np.zeros(len(part))
    found[columns] = cosines[rows, columns]
    ratios[columns] = np.sqrt(squares[rows] / true_squares[columns])
    spare = (squares.sum() - squares[rows].sum()) / true_squares.sum()
    return Match(found, part, ratios, cosines.max(0), max(float(spare), 0.0))


def joined(tensors: Sequence[np.ndarray]) -> Float[np.ndarray, "C d"]:
    """Parts that span tensors, [C, ...] each, laid end to end: [C, d]."""
    return np.concatenate([np.reshape(np.asarray(t, np.float64), (len(t), -1)) for t in tensors], 1)


def column_parts(matrix: Float[np.ndarray, "d_in d_out"]) -> Factors:
    """Every input feature with what it writes: e_j W[j]^T. The truth of TMS; a baseline on rotated inputs."""
    return Factors(np.eye(len(matrix)), np.asarray(matrix, np.float64))


def neuron_parts(matrix: Float[np.ndarray, "d_in d_out"]) -> Factors:
    """Every output dimension with what it reads."""
    return Factors(np.asarray(matrix, np.float64).T, np.eye(matrix.shape[1]))


def singular_parts(matrix: Float[np.ndarray, "d_in d_out"]) -> Factors:
    """Singular directions, largest first: s_k u_k v_k^T."""
    left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return Factors((left * values).T, right)


def rotated(parts: Parts, rotation: Float[np.ndarray, "d_in d_in"]) -> Parts:
    """The same parts of a model that reads R x in place of x: feature directions u become R u."""
    if isinstance(parts, Factors):
        return Factors(parts.inputs @ rotation.T, parts.outputs)
    return np.einsum("ij,cjo->cio", rotation, parts)


def _dense(parts: Parts) -> np.ndarray:
    return parts.dense() if isinstance(parts, Factors) else np.asarray(parts, np.float64)


def _over(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """A quotient that is 0 where the denominator is: nothing points nowhere."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _products(parts: Parts, truth: Parts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner products [C, T] of whole parts, and the squared norms of both."""
    if isinstance(parts, Factors) and isinstance(truth, Factors):
        shapes = [(f.inputs.shape[1], f.outputs.shape[1]) for f in (parts, truth)]
        _same(shapes[0], shapes[1])
        products = (parts.inputs @ truth.inputs.T) * (parts.outputs @ truth.outputs.T)
        squares = [np.square(f.inputs).sum(1) * np.square(f.outputs).sum(1) for f in (parts, truth)]
        return products, squares[0], squares[1]
    dense = [_dense(p) for p in (parts, truth)]
    _same(dense[0].shape[1:], dense[1].shape[1:])
    flat = [np.reshape(d, (len(d), -1)) for d in dense]
    return flat[0] @ flat[1].T, np.square(flat[0]).sum(1), np.square(flat[1]).sum(1)


def _same(parts: tuple[int, ...], truth: tuple[int, ...]) -> None:
    if parts != truth:
        raise ExplanationError(
            f"parts of shape {parts} against true parts of shape {truth}: they are of the same tensors. A matrix of "
            "the other orientation has to be transposed first ([d_in, d_out])."
        )
