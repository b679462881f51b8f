"""Rows that are sent once, rounded on a lattice under the metric: the sender's side of `mdl/codes/lattice.py`."""

from __future__ import annotations

import numpy as np

from mdl.codes.lattice import LARGEST_COEFFICIENT, MOST_PREDICTED, PREDICTION_UNITS, Rounding, fit_prediction
from mdl.errors import CodeError, MessageError
from mdl.message import QuantisedArray, step_exponent
from mdl.protocols import Settings

FEWEST_ROWS = 17  # fewer hardly pay for the columns' steps: 16 rows of 16 break even
COEFFICIENT_BITS = 3.0  # what a coefficient of the prediction takes, about


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
    frequency: np.ndarray | float = 1.0,
) -> QuantisedArray:
    """Rows [n, d] that are used with coefficients c, `energy` [n] = E[c^2] a token, rounded under the metric in force.

    The step of a row is `settings.metric_step`; `prediction` [d, d], in sixteenths, is used if it saves more bits than
    it takes; `frequency` [n]: how often each is used. Few rows are rounded number by number, with
    `settings.static_step`.

    **Raises:** `MessageError` for values that are NaN or infinite, or steps far too fine.
    """
    rows = np.asarray(rows, np.float64)
    if len(rows) < FEWEST_ROWS or not np.isfinite(rows).all():
        return QuantisedArray.from_values(rows, settings.static_step(energy, frequency))
    steps = np.broadcast_to(settings.metric_step(energy, frequency), (len(rows),))
    if prediction is not None and not prediction_pays(rows, steps, settings.root, prediction):
        prediction = None
    exponents = step_exponent(steps)
    rounding = Rounding.of(rows, settings.root, prediction)
    try:
        symbols = rounding.symbols(rows, exponents)
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
