"""Matrices rounded so that what is wrong in one number is made good in the others, on both sides: the sender's tool.

The error of a matrix E counts as tr(A E B E^T) (`decompositions.weights.curvature`). Rows are rounded from the last to
the first, each on the lattice of its columns (`mdl.codes.lattice`) with what the later rows left over fed back through
the Cholesky factor of A: the nearest-plane algorithm (Babai 1986) on the Kronecker lattice, of which GPTQ (Frantar et
al. 2023) is the case B = 1, and steps of each row in proportion to 1 / (conditional spread of its input) are those of
WaterSIC (arXiv:2603.04956). The receiver sees rows on a lattice and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decompositions.weights.curvature import Curvature
from mdl.codes.lattice import DEAD_ZONE, WIDEST_ZERO, Rounding
from mdl.codes.steps import grid_steps
from mdl.errors import MessageError
from mdl.message import LARGEST_SYMBOL, QuantisedArray, step_exponent
from mdl.protocols import Settings
from mdl.static_rows import FEWEST_ROWS, predict_columns, prediction_pays

PREDICTED_SHARE = 2  # rows to columns: with fewer rows a prediction of columns takes more bits than it saves


def round_to_nearest(matrix: np.ndarray, curvature: Curvature, settings: Settings) -> QuantisedArray:
    """Number by number, with the best step of each row: the plainest of quantisers."""
    energy = np.diag(curvature.inputs)
    own = replace(settings, root=_diagonal_root(curvature))
    return QuantisedArray.from_values(matrix, own.static_step(energy))


def _diagonal_root(curvature: Curvature) -> np.ndarray:
    return np.diag(np.sqrt(np.diag(curvature.outputs)))


def round_matrix(matrix: np.ndarray, curvature: Curvature, settings: Settings) -> QuantisedArray:
    """On the Kronecker lattice, with feedback along rows and columns.

    **Arguments:** `matrix` [d_in, d_out].

    **Raises:** `MessageError` for values that are not finite, or steps far too fine.
    """
    matrix = np.asarray(matrix, np.float64)
    if not np.isfinite(matrix).all():
        raise MessageError(f"{(~np.isfinite(matrix)).sum()} of {matrix.size} weights are NaN or infinite")
    if len(matrix) < FEWEST_ROWS:
        return round_to_nearest(matrix, curvature, settings)
    own = replace(settings, root=curvature.right)
    steps = own.metric_step(np.square(np.diag(curvature.cholesky)))
    return _prepared(matrix, curvature).rounded(steps)


@dataclass(frozen=True)
class Prepared:
    """A matrix and its curvature: what rounding takes at any step, worked out once."""

    matrix: np.ndarray
    curvature: Curvature

    def rounded(self, steps: np.ndarray) -> QuantisedArray:
        """In steps of each row, [d_in]."""
        prediction = self._prediction
        pays = prediction is not None and prediction_pays(self.matrix, steps, self.curvature.right, prediction)
        rounding, exponents = self._predicted if pays else self._plain, step_exponent(steps)
        lower = self.curvature.cholesky
        symbols = _symbols(self.matrix, rounding, exponents, lower / np.diag(lower))
        return QuantisedArray(symbols, exponents, rounding.lattice)

    @cached_property
    def _prediction(self) -> np.ndarray | None:
        rows, columns = self.matrix.shape
        return predict_columns(self.matrix) if rows >= PREDICTED_SHARE * columns else None

    @cached_property
    def _plain(self) -> Rounding:
        return Rounding.of(self.matrix, self.curvature.right)

    @cached_property
    def _predicted(self) -> Rounding:
        return Rounding.of(self.matrix, self.curvature.right, self._prediction)


def _prepared(matrix: np.ndarray, curvature: Curvature) -> Prepared:
    """The latest matrix of a curvature is kept: searches round one matrix at many steps."""
    known = curvature.known.get("prepared")
    if known is None or not np.array_equal(known.matrix, matrix):
        curvature.known["prepared"] = known = Prepared(matrix, curvature)
    return known


def _symbols(matrix: np.ndarray, rounding: Rounding, exponents: np.ndarray, feedback: np.ndarray) -> np.ndarray:
    """Integers [d_in, d_out]; `feedback` [d_in, d_in]: unit lower triangular."""
    steps = grid_steps(exponents)
    variance = np.square(np.maximum(rounding.spread / steps[:, None], 1e-3))
    zero = np.minimum(0.5 + DEAD_ZONE / variance, WIDEST_ZERO)
    basis = np.asarray(rounding.lattice.points(np.eye(matrix.shape[1], dtype=np.int64)))
    found = np.asarray(
        _feedback_rounding(
            *(jnp.asarray(a, jnp.float32) for a in (matrix, steps, zero, rounding.analysis)),
            *(jnp.asarray(a, jnp.float32) for a in (rounding.generator, basis, feedback)),
        ),
        np.float64,
    )
    if not np.abs(found).max(initial=0.0) <= LARGEST_SYMBOL:
        raise MessageError(
            f"weights of up to {np.abs(matrix).max():.3g} in steps of down to {steps.min():.3g}: far more steps than "
            "float32 resolves. Ask for a lower fidelity, or a shorter horizon."
        )
    return found.astype(np.int64)


@partial(jax.jit)
def _feedback_rounding(
    matrix: Any, steps: Any, zero: Any, analysis: Any, generator: Any, basis: Any, feedback: Any
) -> Any:
    """Rows from the last to the first; within a row, columns from the last to the first."""
    rows, columns = matrix.shape
    diagonal = jnp.diag(generator)
    lower = generator / diagonal[:, None]

    def nearest(target: Any, threshold: Any) -> Any:
        def column(k: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            rest, symbols = state
            j = columns - 1 - k
            wanted = rest[j] / diagonal[j]
            size = jnp.abs(wanted)
            near = jnp.where(size < 1.0, jnp.sign(wanted), jnp.round(wanted))
            symbol = jnp.where(size < threshold[j], 0.0, near)
            return rest - (symbol * diagonal[j]) * lower[j], symbols.at[j].set(symbol)

        return jax.lax.fori_loop(0, columns, column, (target, jnp.zeros(columns)))[1]

    def row(k: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        errors, symbols = state
        i = rows - 1 - k
        target = matrix[i] - feedback[:, i] @ errors  # rows up to i have no error yet
        found = nearest((target @ analysis) / steps[i], zero[i])
        error = steps[i] * (found @ basis) - matrix[i]
        return errors.at[i].set(error), symbols.at[i].set(found)

    with jax.default_matmul_precision("float32"):
        return jax.lax.fori_loop(0, rows, row, (jnp.zeros_like(matrix), jnp.zeros_like(matrix)))[1]
