"""The learning coefficient where it is known: regular models, potentials, reduced-rank regression.

Tolerance: 4 standard errors over the chains, against the exact value at the same n beta, localisation and step where
there is one. Chains are 16, so that 4 of their standard errors are missed by chance in one run of a thousand.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from estimators.learning_coefficient import (
    DivergenceError,
    Langevin,
    LearningCoefficient,
    largest_curvature,
    local_learning_coefficient,
    sensitivity,
)
from mdl.errors import MDLError

ERRORS = 4.0
CHAINS = 16
NO_DATA = np.zeros((1, 1), np.float32)  # of a loss that is a function of the weights alone


def agrees(found: LearningCoefficient, exact: float) -> bool:
    return abs(found.value - exact) < ERRORS * found.stderr


# Reduced-rank regression y = B A x + noise, x standard normal of M dimensions, y of N, B [N, H], A [H, M], the true map
# of rank r: K(B, A) = |B A - B0 A0|^2 / 2.


def aoyagi_watanabe(m: int, n: int, h: int, r: int) -> tuple[float, int]:
    """lambda and its multiplicity (Aoyagi and Watanabe 2005, Neural Networks 18(7), 924-933, main theorem)."""
    if n + r <= m + h and m + r <= n + h and h + r <= m + n:
        odd = (m + n + h + r) % 2
        return (-((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * (m + n) + 2 * m * n + odd) / 8, 1 + odd
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2, 1
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2, 1
    return m * n / 2, 1


SIZES = [(m, n, h, r) for m in range(1, 8) for n in range(1, 8) for h in range(1, 9) for r in range(min(m, n, h) + 1)]


def test_the_oracle_is_regular_where_nothing_is_singular() -> None:
    """At full rank r = H the model is a manifold of rank-H maps; with H >= M + N - r it is every map."""
    for m, n, h, r in SIZES:
        found, multiplicity = aoyagi_watanabe(m, n, h, r)
        if r == h:
            assert (found, multiplicity) == (h * (m + n - h) / 2, 1)
        if h >= m + n - r:
            assert found == m * n / 2
        assert found <= min(h * (m + n), m * n) / 2


def test_the_oracle_is_symmetric_and_splits_off_its_regular_part() -> None:
    """B A near rank r is r (M + N - r) regular directions, and the same problem of sizes less r at rank 0."""
    for m, n, h, r in SIZES:
        assert aoyagi_watanabe(m, n, h, r) == aoyagi_watanabe(n, m, h, r)
        if 0 < r < min(m, n, h):
            rest, multiplicity = aoyagi_watanabe(m - r, n - r, h - r, 0)
            assert aoyagi_watanabe(m, n, h, r) == (r * (m + n - r) / 2 + rest, multiplicity)


def rank_one_expectation(m: int, n: int, heat: float, pull: float) -> float:
    """heat E[K] for H = 1, r = 0, exactly: K = |a|^2 |b|^2 / 2 has two radii; a sum over their logs."""
    log_radius = np.linspace(-40.0, 5.0, 3001)
    a, b = np.exp(log_radius)[:, None], np.exp(log_radius)[None, :]
    loss = 0.5 * (a * b) ** 2
    weight = np.exp(m * log_radius[:, None] + n * log_radius[None, :] - heat * loss - 0.5 * pull * (a**2 + b**2))
    return float(heat * (weight * loss).sum() / weight.sum())


@pytest.mark.parametrize(("m", "n"), [(3, 2), (2, 4), (1, 3)])
def test_the_exact_expectation_tends_to_the_oracle(m: int, n: int) -> None:
    exact, multiplicity = aoyagi_watanabe(m, n, 1, 0)
    assert multiplicity == 1
    assert rank_one_expectation(m, n, 1e10, 1.0) == pytest.approx(exact, rel=1e-3)


def test_the_multiplicity_is_what_is_missing() -> None:
    """n beta E[K] = -d ln Z / d ln t of Z = c t^-lambda (ln t)^(m - 1): lambda - (m - 1) / (ln t + constant)."""
    exact, multiplicity = aoyagi_watanabe(2, 2, 1, 0)
    missing = [exact - rank_one_expectation(2, 2, heat, 1.0) for heat in (1e8, 1e12)]
    assert multiplicity == 2
    assert 1 / missing[1] - 1 / missing[0] == pytest.approx(np.log(1e4), rel=0.01)


def reduced_rank(m: int, n: int, h: int, r: int, **settings: Any) -> LearningCoefficient:
    """At the most singular weights of the true map, ones on its first r diagonal entries."""
    a, b = np.eye(h, m, dtype=np.float32), np.eye(n, h, dtype=np.float32)
    a[r:], b[:, r:] = 0.0, 0.0

    def loss(weights: Any, truth: Any) -> Any:
        return 0.5 * jnp.sum(jnp.square(weights["b"] @ weights["a"] - truth[0]))

    sampler = Langevin(**{"burn_in": 4000, "draws": 12000, "chains": CHAINS} | settings)
    key = jax.random.key(1)
    return local_learning_coefficient(loss, {"a": a, "b": b}, (b @ a)[None], n=1000, beta=1.0, key=key, sampler=sampler)


@pytest.mark.parametrize(("m", "n"), [(3, 2), (2, 2)])
def test_rank_one_regression_of_nothing(m: int, n: int) -> None:
    found = reduced_rank(m, n, 1, 0, step_size=2e-4, localisation=2.0)
    assert agrees(found, rank_one_expectation(m, n, 1000.0, 2.0))
    assert found.parameters == m + n


def test_reduced_rank_regression() -> None:
    """M = 5, N = 3, H = 2, r = 1: lambda 4.5 of 16 weights, which a regular model of as many would have at 8.

    The localisation takes 2.5 (3.5 h / (h + gamma) of its regular directions, h = 1000) per thousand and gamma.
    """
    found = reduced_rank(5, 3, 2, 1, step_size=5e-5, localisation=5.0)
    assert aoyagi_watanabe(5, 3, 2, 1) == (4.5, 1)
    assert agrees(found, 4.5)
    assert found.stderr < 0.1
    assert found.warnings() == ()


def regression(samples: int, dimensions: int) -> tuple[Any, Any, Any]:
    """Loss, weights and data of linear regression with noise of variance 1, at the least squares."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(samples, dimensions)) * np.sqrt(np.linspace(0.5, 1.5, dimensions))
    outputs = inputs @ rng.normal(size=dimensions) + rng.normal(size=samples)
    weights = np.linalg.lstsq(inputs, outputs, rcond=None)[0]

    def loss(weights: Any, batch: Any) -> Any:
        return 0.5 * jnp.mean(jnp.square(batch[1] - batch[0] @ weights)) + 0.5 * jnp.log(2 * jnp.pi)

    return loss, jnp.asarray(weights, jnp.float32), (inputs.astype(np.float32), outputs.astype(np.float32))


def test_a_regular_model_has_half_its_dimension_and_no_more() -> None:
    """Exactly: sum 1/2 h / (h + gamma) / (1 - step (h + gamma) / 4) over the curvatures h of n beta L."""
    loss, weights, data = regression(1000, 6)
    step, pull, n = 1e-3, 20.0, 1000
    sampler = Langevin(step, pull, draws=6000, burn_in=500, chains=CHAINS)
    found = local_learning_coefficient(loss, weights, data, n=n, key=jax.random.key(0), sampler=sampler)
    curvature = np.linalg.eigvalsh(data[0].astype(np.float64).T @ data[0]) / np.log(n)
    inflation = 1 / (1 - step * (curvature + pull) / 4)
    assert agrees(found, float((0.5 * curvature / (curvature + pull) * inflation).sum()))
    assert abs(found.virial - inflation.mean()) < 0.02
    assert found.stderr < 0.1
    assert found.beta == pytest.approx(1 / np.log(1000))


def test_a_regular_model_from_mini_batches() -> None:
    loss, weights, data = regression(1000, 6)
    sampler = Langevin(1e-4, 0.5, draws=10000, burn_in=1000, chains=CHAINS, batch_size=200)
    found = local_learning_coefficient(loss, weights, data, n=1000, key=jax.random.key(2), sampler=sampler)
    assert agrees(found, 3.0)
    assert found.warnings() == ()


def test_the_largest_curvature_gives_a_step_of_known_inflation() -> None:
    loss, weights, data = regression(1000, 6)
    exact = np.linalg.eigvalsh(data[0].astype(np.float64).T @ data[0])[-1] / 1000
    found = largest_curvature(loss, weights, data, key=jax.random.key(0), iterations=300)
    assert found == pytest.approx(exact, rel=1e-3)
    assert largest_curvature(monomial(2), {"w": jnp.zeros(())}, NO_DATA, key=jax.random.key(0)) == 0.0
    with pytest.raises(MDLError, match="not finite"):
        largest_curvature(lambda w, _: jnp.sum(jnp.sqrt(w)), jnp.zeros(2), NO_DATA, key=jax.random.key(0))


def monomial(power: int) -> Any:
    def loss(weight: Any, _: Any) -> Any:
        return jnp.sum(weight["w"] ** (2 * power))

    return loss


def potential_expectation(power: int, heat: float, pull: float) -> float:
    """heat E[w^(2 power)], by numerical integration."""

    def density(w: float) -> float:
        return float(np.exp(-heat * w ** (2 * power) - 0.5 * pull * w * w))

    mean = quad(lambda w: heat * w ** (2 * power) * density(w), 0, 3, limit=500, epsabs=1e-13)[0]
    return float(mean / quad(density, 0, 3, limit=500, epsabs=1e-13)[0])


@pytest.mark.parametrize(("power", "step"), [(1, 1e-5), (2, 3e-4), (3, 3e-4)])
def test_a_potential_has_one_over_its_power(power: int, step: float) -> None:
    """w^(2k): 1 / (2k), which is also n beta E[w^(2k)] at every n beta where nothing localises."""
    assert potential_expectation(power, 1e3, 0.0) == pytest.approx(1 / (2 * power), rel=1e-6)
    sampler = Langevin(step, 1.0, draws=20000, burn_in=4000, chains=CHAINS)
    start, key = {"w": jnp.zeros(())}, jax.random.key(power)
    found = local_learning_coefficient(monomial(power), start, NO_DATA, n=1000, beta=1.0, key=key, sampler=sampler)
    assert agrees(found, potential_expectation(power, 1e3, 1.0))
    assert found.stderr < 0.05 / power


def bowl(weights: Any, _: Any) -> Any:
    return 0.5 * jnp.sum(jnp.square(weights - 1.0))


def test_a_negative_estimate_stays_negative() -> None:
    """L = |w - 1|^2 / 2 at w* = 0, away from the minimum: d / 2 - n beta d / 2."""
    sampler = Langevin(1e-2, 0.0, draws=4000, burn_in=1000)
    found = local_learning_coefficient(
        bowl, jnp.zeros(2), NO_DATA, n=20, beta=1.0, key=jax.random.key(0), sampler=sampler
    )
    assert agrees(found, 1.0 / (1 - 0.05) - 20.0)
    assert found.bits(1024) == pytest.approx(10 * found.value)
    assert found.bits_stderr(1024) == pytest.approx(10 * found.stderr)
    assert any("negative" in line and "no local minimum" in line for line in found.warnings())


def test_steps_that_are_far_too_large_are_reported() -> None:
    sampler = Langevin(1.0, 0.0, draws=200, burn_in=100)
    with pytest.raises(DivergenceError, match=r"4 of 4 chains reach a loss that is not finite.*Lower the step \(1\)"):
        local_learning_coefficient(bowl, jnp.ones(3), NO_DATA, n=100, beta=1.0, key=jax.random.key(0), sampler=sampler)


def test_a_slow_runaway_is_reported() -> None:
    """step h / 2 = 2.01: every step stretches the weights by 1.01, and nothing overflows yet."""
    sampler = Langevin(0.0402, 0.0, draws=400, burn_in=0)
    with pytest.raises(DivergenceError, match="runs away"):
        local_learning_coefficient(bowl, jnp.ones(3), NO_DATA, n=100, beta=1.0, key=jax.random.key(0), sampler=sampler)


def test_chains_that_have_not_settled_say_so() -> None:
    sampler = Langevin(1e-6, 0.0, draws=2000, burn_in=0)
    found = local_learning_coefficient(
        bowl, jnp.ones(50), NO_DATA, n=100, beta=1.0, key=jax.random.key(0), sampler=sampler
    )
    assert found.value < 10
    assert len(found.warnings()) == 2
    assert "flat directions are not explored" in found.warnings()[0]
    assert "Longer burn-in" in found.warnings()[1]


def test_the_sweep_shows_both_biases_and_what_diverges() -> None:
    sampler = Langevin(1.0, 0.0, draws=3000, burn_in=500, chains=8)
    steps, pulls = (1e-3, 1.2e-2, 1.0), (0.0, 100.0)
    cells = sensitivity(
        bowl, jnp.ones(8), NO_DATA, n=100, beta=1.0, key=jax.random.key(3),
        sampler=sampler, step_sizes=steps, localisations=pulls,
    )  # fmt: skip
    assert [(c.sampler.step_size, c.sampler.localisation) for c in cells] == [(s, p) for s in steps for p in pulls]
    for cell in cells[:4]:
        step, pull = cell.sampler.step_size, cell.sampler.localisation
        assert cell.estimate is not None
        assert agrees(cell.estimate, 4.0 * 100 / (100 + pull) / (1 - step * (100 + pull) / 4))
    assert all(cell.estimate is None and "not finite" in cell.failure for cell in cells[4:])
    assert any("the step inflates" in line for line in cells[2].estimate.warnings())  # type: ignore[union-attr]


def test_the_same_key_gives_the_same_chains_and_the_trace_is_whole() -> None:
    sampler = Langevin(1e-3, 1.0, draws=60, burn_in=20, chains=3)
    runs = [
        local_learning_coefficient(bowl, jnp.ones(4), NO_DATA, n=50, key=jax.random.key(seed), sampler=sampler)
        for seed in (5, 5, 6)
    ]
    np.testing.assert_array_equal(runs[0].trace, runs[1].trace)
    assert not np.array_equal(runs[0].trace, runs[2].trace)
    assert runs[0].trace.shape == (3, 80)
    np.testing.assert_allclose(runs[0].trace[:, 0], 0.0)
    draws = 50 / np.log(50) * runs[0].trace[:, 20:]
    np.testing.assert_allclose(runs[0].per_chain, draws.mean(1))
    assert runs[0].stderr == pytest.approx(np.std(draws.mean(1), ddof=1) / np.sqrt(3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 1}, "two samples"),
        ({"beta": -1.0}, "inverse temperature of -1"),
        ({"params": jnp.arange(3)}, "all have to be floats"),
        ({"params": {}}, "all have to be floats"),
        ({"data": (np.zeros((3, 1)), np.zeros((4, 1)))}, "one axis of samples"),
        ({"data": np.zeros((0, 1))}, "not empty"),
        ({"loss": lambda weights, _: weights}, "one number"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"loss": bowl, "params": jnp.ones(3), "data": NO_DATA, "n": 50} | changed
    positional = [given.pop(name) for name in ("loss", "params", "data")]
    with pytest.raises(MDLError, match=message):
        local_learning_coefficient(*positional, key=jax.random.key(0), sampler=Langevin(1e-3, 1.0, 40, 0), **given)


@pytest.mark.parametrize("changed", [{"step_size": 0.0}, {"localisation": -1.0}, {"chains": 1}, {"batch_size": 0}])
def test_settings_that_make_no_sense_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(MDLError, match=r"a step of|chains of"):
        Langevin(**{"step_size": 1e-3, "localisation": 1.0} | changed)
