"""Models whose learning coefficient is known: a loss, weights at which it is least, data, and the coefficient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.integrate import quad

from estimators.learning_coefficient import Langevin, Loss

HEAT = 1000  # n beta of the cases whose loss is the exact divergence K(w), with no samples in it
NO_DATA = np.zeros((1, 1), np.float32)


@dataclass(frozen=True)
class Case:
    """**Arguments:** `exact`: lambda; `n`, `beta`: as of the posterior, beta None for 1 / ln n; `scale`: a curvature of
    L in its stiff directions, which says how large steps may be; `integral`: n beta E[L - L*] of what is sampled,
    step and localisation included, where it can be integrated."""

    name: str
    loss: Loss
    params: Any
    data: Any
    n: int
    exact: float
    beta: float | None = None
    scale: float = 1.0
    batch_size: int | None = None
    integral: Callable[[Langevin], float] | None = None

    @property
    def heat(self) -> float:
        """n beta."""
        return self.n * (1 / np.log(self.n) if self.beta is None else self.beta)


def regression(dimensions: int, samples: int, batch_size: int | None = None) -> Case:
    """Least squares with noise of variance 1, at its minimum: d / 2."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(samples, dimensions))
    outputs = inputs @ rng.normal(size=dimensions) + rng.normal(size=samples)
    weights = np.linalg.lstsq(inputs, outputs, rcond=None)[0]

    def loss(weights: Any, batch: Any) -> Any:
        return 0.5 * jnp.mean(jnp.square(batch[1] - batch[0] @ weights))

    data = (inputs.astype(np.float32), outputs.astype(np.float32))
    name = f"regression, d = {dimensions}" + (f", batches of {batch_size}" if batch_size else "")
    curvature = np.linalg.eigvalsh(inputs.T @ inputs) / np.log(samples)

    def integral(sampler: Langevin) -> float:
        stiff = curvature + sampler.localisation
        return float((0.5 * curvature / stiff / (1 - sampler.step_size * stiff / 4)).sum())

    # Mini-batches add noise of their own, which this leaves out.
    known = None if batch_size else integral
    start = jnp.asarray(weights, jnp.float32)
    return Case(name, loss, start, data, samples, dimensions / 2, batch_size=batch_size, integral=known)


def monomial(power: int) -> Case:
    """K(w) = w^(2k): 1 / (2k). Its scale is its curvature where w has the size that it has under the posterior."""

    def loss(weight: Any, _: Any) -> Any:
        return jnp.sum(weight ** (2 * power))

    typical = (1 / (2 * power * HEAT)) ** (1 / (2 * power))
    scale = 2 * power * (2 * power - 1) * typical ** (2 * power - 2)

    def integral(sampler: Langevin) -> float:
        def density(w: float) -> float:
            return float(np.exp(-HEAT * w ** (2 * power) - 0.5 * sampler.localisation * w * w))

        total = quad(density, 0, 3, limit=500)[0]
        return float(quad(lambda w: HEAT * w ** (2 * power) * density(w), 0, 3, limit=500)[0] / total)

    return Case(f"w^{2 * power}", loss, jnp.zeros(1), NO_DATA, HEAT, 1 / (2 * power), 1.0, scale, integral=integral)


def reduced_rank_coefficient(m: int, n: int, h: int, r: int) -> float:
    """lambda of y = B A x, x of M dimensions, y of N, B [N, H], the truth of rank r (Aoyagi and Watanabe 2005)."""
    if n + r <= m + h and m + r <= n + h and h + r <= m + n:
        odd = (m + n + h + r) % 2
        return (-((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * (m + n) + 2 * m * n + odd) / 8
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2
    return m * n / 2


def reduced_rank(m: int, n: int, h: int, r: int) -> Case:
    """K = |B A - B0 A0|^2 / 2, at the most singular weights of a truth of r ones."""
    a, b = np.eye(h, m, dtype=np.float32), np.eye(n, h, dtype=np.float32)
    a[r:], b[:, r:] = 0.0, 0.0

    def loss(weights: Any, truth: Any) -> Any:
        return 0.5 * jnp.sum(jnp.square(weights["b"] @ weights["a"] - truth[0]))

    exact = reduced_rank_coefficient(m, n, h, r)
    return Case(f"B A, ({m}, {n}, {h}, {r})", loss, {"a": a, "b": b}, (b @ a)[None], HEAT, exact, 1.0, 2.0)


def fitted_reduced_rank(m: int, n: int, h: int, r: int, samples: int) -> Case:
    """The same from samples with noise of variance 1, at the maximum of likelihood: no truth is used."""
    rng = np.random.default_rng(1)
    truth = np.eye(n, r) @ np.eye(r, m)
    inputs = rng.normal(size=(samples, m))
    outputs = inputs @ truth.T + rng.normal(size=(samples, n))
    full = np.linalg.lstsq(inputs, outputs, rcond=None)[0]  # [m, n]
    axes = np.linalg.svd(inputs @ full, full_matrices=False)[2][:h]
    # B A = (full P)^T with P the projection on the first h axes of the fitted outputs; both factors of like norms.
    left, values, right = np.linalg.svd(full @ axes.T @ axes, full_matrices=False)
    root = np.sqrt(values[:h])
    weights = {"a": (left[:, :h] * root).T, "b": right[:h].T * root}

    def loss(weights: Any, batch: Any) -> Any:
        predicted = batch[0] @ weights["a"].T @ weights["b"].T
        return 0.5 * jnp.mean(jnp.sum(jnp.square(batch[1] - predicted), 1))

    data = (inputs.astype(np.float32), outputs.astype(np.float32))
    params = {name: jnp.asarray(w, jnp.float32) for name, w in weights.items()}
    name = f"fitted B A, ({m}, {n}, {h}, {r}), n = {samples:,}"
    return Case(name, loss, params, data, samples, reduced_rank_coefficient(m, n, h, r), None, 2.0)


def all_cases() -> tuple[Case, ...]:
    """In the order of the table."""
    return (
        regression(6, 1000),
        regression(24, 1000),
        regression(24, 1000, batch_size=200),
        *(monomial(power) for power in (1, 2, 3, 4)),
        *(reduced_rank(*sizes) for sizes in ((3, 2, 1, 0), (5, 3, 2, 1), (6, 4, 3, 1), (4, 4, 4, 0), (8, 8, 4, 2))),
        fitted_reduced_rank(5, 3, 2, 1, 5000),
    )
