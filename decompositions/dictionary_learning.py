"""Online dictionary learning, by scikit-learn: atoms fitted with an L1 penalty, tokens then encoded with k of them.

    learning: min over atoms |v_i| <= 1 and codes of  sum_t |x_t - mean - sum_i c_ti v_i|^2 / 2 + alpha |c_t|_1
    encoding: orthogonal matching pursuit of k steps (`decompositions/matching_pursuit.py`)

Source: Mairal, Bach, Ponce and Sapiro 2009, "Online dictionary learning for sparse coding", ICML.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.decomposition import MiniBatchDictionaryLearning, sparse_encode
from sklearn.exceptions import ConvergenceWarning

from decompositions.dictionary import DictionaryExplanation, fit_dictionary
from decompositions.random_dictionary import encode
from mdl.errors import ExplanationError
from mdl.task import Task

BATCH = 256
PROBED = 256  # tokens on which the penalty is chosen
HALVINGS = 8  # of the interval, in its logarithm, in which the penalty lies
INNER_ITERATIONS = 100  # of coordinate descent, for each batch


def penalty_for(points: np.ndarray, atoms: np.ndarray, k: int) -> float:
    """The penalty at which Lasso with these unit atoms uses about k of them a point, by bisection.

    **Arguments:** `points` [n, d], centred; `atoms` [F, d]; the result is in the units of points.
    """
    low, high = 1e-3, 1.0
    largest = float(np.median(np.abs(points @ atoms.T).max(1)))  # beyond it, half of the points use none
    for _ in range(HALVINGS):
        middle = float(np.sqrt(low * high))
        codes = _lasso(points, atoms, middle * largest)
        low, high = (middle, high) if np.count_nonzero(codes) > k * len(points) else (low, middle)
    return float(np.sqrt(low * high)) * largest


def _lasso(points: np.ndarray, atoms: np.ndarray, alpha: float) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a count of non-zeros is all that is asked
        codes = sparse_encode(points, atoms, algorithm="lasso_cd", alpha=alpha, max_iter=INNER_ITERATIONS)
    return np.asarray(codes)


def learn(points: np.ndarray, features: int, k: int, epochs: int, seed: int) -> np.ndarray:
    """Unit atoms [features, d], float32, from centred points [n, d]; the first ones are points themselves."""
    rng = np.random.default_rng(seed)
    norms = np.linalg.norm(points, axis=1)
    usable = np.flatnonzero(norms > 1e-6 * norms.max(initial=0.0))
    start = points[rng.choice(usable, features, replace=len(usable) < features)].astype(np.float64)
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    some = points[rng.choice(len(points), min(PROBED, len(points)), replace=False)].astype(np.float64)
    learner = MiniBatchDictionaryLearning(
        n_components=features,
        alpha=penalty_for(some, start, k),
        max_iter=epochs,
        fit_algorithm="cd",
        batch_size=BATCH,
        dict_init=start,
        random_state=seed,
        transform_max_iter=INNER_ITERATIONS,
        tol=0.0,
        max_no_improvement=None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        atoms = learner.fit(points.astype(np.float64)).components_
    sizes = np.linalg.norm(atoms, axis=1, keepdims=True)
    return np.asarray(np.where(sizes > 1e-8, atoms / np.maximum(sizes, 1e-8), start), np.float32)


@dataclass(frozen=True)
class DictionaryLearning:
    """scikit-learn's mini-batch dictionary learning; tokens are encoded by `k` steps of orthogonal matching pursuit.

    **Arguments:** `features`: atoms; `tokens`: as many of the fit data, drawn at random, are learnt from, `epochs`
    times over; `seed`: of that draw, of the first atoms and of the order.
    """

    features: int = 768
    k: int = 8
    tokens: int = 16384
    epochs: int = 2
    seed: int = 0

    def fit(self, task: Task) -> DictionaryExplanation:
        """**Raises:** `ExplanationError` for options out of range."""
        if min(self.tokens, self.epochs) < 1 or not 1 <= self.k <= self.features or not 0 <= self.seed < 1 << 32:
            raise ExplanationError(
                f"dictionary-learning: features={self.features}, k={self.k}, tokens={self.tokens}, epochs="
                f"{self.epochs}, seed={self.seed}; needed are 1 <= k <= features, a token and an epoch at least, and a "
                "seed from 0 to 2**32 - 1"
            )
        outputs = np.asarray(task.fit.outputs)
        mean = outputs.mean(0, dtype=np.float64).astype(np.float32)
        chosen = np.random.default_rng(self.seed).permutation(len(outputs))[: self.tokens]
        atoms = learn(outputs[chosen] - mean, self.features, self.k, self.epochs, self.seed)
        name = f"dictionary learning ({self.features}, k={self.k})"
        return fit_dictionary(name, atoms, mean, partial(encode, atoms, mean, self.k), outputs, signed=True)
