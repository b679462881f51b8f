"""Rows that are sent once, rounded on a lattice under the metric: the sender's side of `mdl/codes/lattice.py`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from mdl.codes.lattice import LARGEST_COEFFICIENT, MOST_PREDICTED, PREDICTION_UNITS, Rounding, fit_prediction
from mdl.codes.steps import grid_steps
from mdl.errors import CodeError, MessageError
from mdl.message import QuantisedArray, step_exponent
from mdl.protocols import Settings

FEWEST_ROWS = 17  # fewer hardly pay for the columns' steps: 16 rows of 16 break even
MOST_COUPLED = 4096  # rows: the factor of more would take over a gigabyte and minutes
COUPLED_BLOCKS = 24  # rows of a block are rounded at once, as if they were not coupled to each other
COUPLING_RIDGE = 0.02  # of every row's own energy: what fit data say of rare pairs of features is not taken whole
COEFFICIENT_BITS = 3.0  # what a coefficient of the prediction takes, about


@dataclass(frozen=True)
class Coupling:
    """How rows that are used together share their errors: the sender rounds each with those of the others in view.

    With coefficients c of second moments H = E[c c^T], errors E cost trace(E G E^T H), which is
    sum_i d_i |sum_j u_ij e_j|_G^2 for H = U^T diag(d) U, U unit upper triangular: row i is rounded after all j > i.

    `order` [n]: the row at each place; `factor` [n, n]: U; `energy` [n]: d, of the rows in their own order.
    """

    order: np.ndarray
    factor: np.ndarray
    energy: np.ndarray

    @classmethod
    def of(cls, moments: scipy.sparse.csr_array | np.ndarray) -> Coupling | None:
        """From second moments [n, n]; None for more than 4,096 rows, which are rounded each by itself.

        Rare rows are rounded first, those whose errors matter most last.
        """
        if moments.shape[0] > MOST_COUPLED:
            return None
        dense = moments.toarray() if isinstance(moments, scipy.sparse.sparray) else np.array(moments)
        dense = dense.astype(np.float64)
        own = np.maximum(np.diag(dense), 1e-12)
        dense[np.diag_indices(len(dense))] = own * (1.0 + COUPLING_RIDGE)
        order = np.argsort(-own, kind="stable")
        upper = np.linalg.cholesky(dense[np.ix_(order, order)]).T
        energy = np.empty(len(own))
        energy[order] = np.square(np.diag(upper)) / (1.0 + COUPLING_RIDGE)
        return cls(order, (upper / np.diag(upper)[:, None]).astype(np.float32), energy)

    def symbols(self, rounding: Rounding, rows: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Integers [n, d]: what `rounding` makes of the rows, each moved by what is left of the errors before it."""
        steps = grid_steps(exponents)
        errors, symbols = np.zeros(rows.shape, np.float32), np.zeros(rows.shape, np.int64)
        for block in np.array_split(np.arange(len(rows)), COUPLED_BLOCKS)[::-1]:
            if not len(block):
                continue
            here, later = self.order[block], block[-1] + 1
            pull = self.factor[block[0] : later, later:] @ errors[later:]
            symbols[here] = rounding.symbols(rows[here] + pull, exponents[here])
            errors[block] = rows[here] - rounding.lattice.points(symbols[here]) * steps[here, None]
        return symbols


def predict_columns(rows: np.ndarray) -> np.ndarray | None:
    """The prediction [d, d], in sixteenths, that rows [n, d] ask for; each counts by its direction alone.

    None for more columns than a message predicts, or coefficients too large for it.
    """
    if rows.shape[1] > MOST_PREDICTED:
        return None
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    prediction = fit_prediction(np.asarray(rows / np.maximum(norms, 1e-30), np.float64))
    return prediction if np.abs(prediction).max(initial=0) <= LARGEST_COEFFICIENT else None


def metric_rows(
    rows: np.ndarray,
    energy: np.ndarray,
    settings: Settings,
    prediction: np.ndarray | None = None,
    coupling: Coupling | None = None,
    frequency: np.ndarray | float = 1.0,
) -> QuantisedArray:
    """Rows [n, d] that are used with coefficients c, `energy` [n] = E[c^2] a token, rounded under the metric in force.

    The step of a row is `settings.metric_step`; `prediction` [d, d], in sixteenths, is used if it saves more bits than
    it takes; `coupling` says which rows are used together; `frequency` [n]: how often each is used. Few rows are
    rounded number by number, with `settings.static_step`.

    **Raises:** `MessageError` for values that are NaN or infinite, or steps far too fine.
    """
    rows = np.asarray(rows, np.float64)
    if len(rows) < FEWEST_ROWS or not np.isfinite(rows).all():
        return QuantisedArray.from_values(rows, settings.static_step(energy, frequency))
    steps = settings.metric_step(energy if coupling is None else coupling.energy, frequency)
    steps = np.broadcast_to(steps, (len(rows),))
    if prediction is not None and not prediction_pays(rows, steps, settings.root, prediction):
        prediction = None
    exponents = step_exponent(steps)
    rounding = Rounding.of(rows, settings.root, prediction)
    try:
        symbols = rounding.symbols(rows, exponents) if coupling is None else coupling.symbols(rounding, rows, exponents)
    except CodeError as error:
        raise MessageError(f"static rows: {error} Ask for a lower fidelity, or a shorter horizon.") from error
    return QuantisedArray(symbols, exponents, rounding.lattice)


def prediction_pays(rows: np.ndarray, steps: np.ndarray, root: np.ndarray, prediction: np.ndarray) -> bool:
    r"""Whether the bits that a prediction saves are more than its own.

    $$\sum_{r,j} \tfrac12 \log_2 \frac{v_j + s_{rj}^2 / 12}{i_j + s_{rj}^2 / 12}$$ are saved; v and i are the mean
    squares of columns and of innovations, s the steps.
    """
    heights = np.diag(np.linalg.cholesky(root @ root.T))
    noise = np.square(steps[:, None] / heights) / 12.0
    innovations = rows - rows @ (prediction / PREDICTION_UNITS).T
    before, after = (np.mean(np.square(a), 0) for a in (rows, innovations))
    saved = 0.5 * np.log2((before + noise) / (after + noise)).sum()
    return bool(saved > COEFFICIENT_BITS * rows.shape[1] * (rows.shape[1] - 1) / 2)
