r"""The local learning coefficient of a model's weights, by Langevin dynamics: an `estimate` of their code length.

    lambda(w*) = n beta (E_w [L_n(w)] - L_n(w*)),    w ~ exp(-n beta L_n(w) - gamma/2 |w - w*|^2),    beta = 1 / ln n

(Lau et al. 2023, arXiv 2308.12108, definition 1; Watanabe 2009.) The free energy of n samples near w* is

    F_n = n L_n(w*) + lambda ln n - (m - 1) ln ln n + O_p(1)        nats

so that lambda log2 n bits is the leading term of what the weights cost beyond the data's own surprise. Left out: the
multiplicity m; the O_p(1) term, which holds the prior and the unit in which each weight is measured, and does not
vanish; n L_n(w*) itself. A code of about this length exists (Urdshals et al. 2025, arXiv 2510.12077), but this is none:
a line to draw beside real bits, never part of a total.

Three biases a standard error over chains does not show, hence `sensitivity`: a step of finite size inflates lambda (a
direction of curvature h by 1 / (1 - step h / 4)); localisation takes from it (h / (h + gamma)); chains that have not
settled take from it too. `virial` watches the first and the last, at no cost: E (w - w*) . grad U = d at equilibrium.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree_utils as otu
from jaxtyping import Float

from mdl.errors import MDLError

SOURCE = "Lau et al. 2023, arXiv 2308.12108"
RUNAWAY_RATIO = 3.0  # of the excess loss in the last quarter of the draws to that in the second, in every chain
VIRIAL_TOLERANCE = 0.1

Loss = Callable[[Any, Any], Any]


class DivergenceError(MDLError):
    """Chains that left the neighbourhood of the weights: their mean loss estimates nothing."""


@dataclass(frozen=True)
class Langevin:
    """Settings of the sampler, w <- w - step/2 (n beta grad L_B(w) + gamma (w - w*)) + sqrt(step) noise.

    **Arguments:** `step_size`: step, in units of w^2; `localisation`: gamma, per unit of w^2; `draws`, `burn_in`: steps
    of each chain that count, and before them that do not; `chains`: at least 2, for the error comes from them;
    `batch_size`: samples of a mini-batch, drawn anew with replacement at each step, None for all of them.
    """

    step_size: float
    localisation: float
    draws: int = 2000
    burn_in: int = 1000
    chains: int = 4
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not (0 < self.step_size < np.inf and 0 <= self.localisation < np.inf):
            raise MDLError(
                f"a step of {self.step_size:g} and a localisation of {self.localisation:g}: the first is positive, the "
                "second is not negative, both are finite."
            )
        batch = 1 if self.batch_size is None else self.batch_size
        if self.chains < 2 or self.draws < 4 or self.burn_in < 0 or batch < 1:
            raise MDLError(
                f"{self.chains} chains of {self.burn_in} + {self.draws} steps on batches of {self.batch_size}: it "
                "takes 2 chains for a standard error, 4 draws to see whether they run away, a sample in a batch."
            )


@dataclass(frozen=True)
class LearningCoefficient:
    """What the chains say.

    **Arguments:** `value`, `stderr`: lambda and its standard error over chains (no unit); `per_chain` [chains];
    `trace` [chains, burn_in + draws]: L_B(w) - L_B(w*) at every step, nats a sample; `virial`: E (w - w*) . grad U / d,
    1 at equilibrium; `drift`: of lambda from the first half of the draws to the second, `drift_stderr` its standard
    error; `parameters`: d; `n`, `beta`, `sampler`: what they were obtained with.
    """

    value: float
    stderr: float
    per_chain: Float[np.ndarray, " chains"]
    trace: Float[np.ndarray, "chains steps"]
    virial: float
    drift: float
    drift_stderr: float
    parameters: int
    n: int
    beta: float
    sampler: Langevin

    def bits(self, n: float | int) -> float:
        """lambda log2 n, bits: the leading term alone; negative where lambda is."""
        return self.value * float(np.log2(n))

    def bits_stderr(self, n: float | int) -> float:
        """Standard error of `bits`, of the sampling alone."""
        return self.stderr * float(np.log2(n))

    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the estimate, as far as the chains show it; empty if nothing."""
        found = []
        if self.value < 0:
            found.append(
                f"lambda = {self.value:.4g} is negative: the chains found lower losses than at w*, which is no local "
                "minimum at this temperature. Train w* to the end on these data, or raise the localisation."
            )
        if self.virial > 1 + VIRIAL_TOLERANCE:
            found.append(f"the virial is {self.virial:.3g} of d, above 1: the step inflates lambda. Lower it.")
        if self.virial < 1 - VIRIAL_TOLERANCE:
            found.append(
                f"the virial is {self.virial:.3g} of d, below 1: flat directions are not explored. More steps, or a "
                "larger localisation."
            )
        if abs(self.drift) > 3 * self.drift_stderr:
            found.append(
                f"lambda drifts by {self.drift:.3g} +- {self.drift_stderr:.2g} between the halves of the draws. "
                "Longer burn-in."
            )
        return tuple(found)


def local_learning_coefficient(
    loss: Loss, params: Any, data: Any, *, n: int, key: Any, sampler: Langevin, beta: float | None = None
) -> LearningCoefficient:
    """lambda at `params`, by stochastic-gradient Langevin dynamics, all chains at once from `params`.

    Each draw is L_B(w) - L_B(w*) on one mini-batch, which is unbiased and spares the noise that both have in common.

    **Arguments:** `loss`: (params, batch) -> mean nats a sample, differentiable; `params`: w*, a pytree of floats, a
    local minimum; `data`: a pytree whose leading axis is what batches are drawn from; `n`: samples of the posterior
    (tokens, where the leading axis is sequences), at least 2; `key`: a JAX random key; `beta`: 1 / ln n by default.

    **Raises:** DivergenceError where the loss is not finite or runs away; MDLError for settings that make no sense.

    **Source:** Lau et al. 2023, arXiv 2308.12108, algorithm 1; the paired baseline and the virial are ours.
    """
    if n < 2:
        raise MDLError(f"n = {n}: ln n has to be positive, so that it takes two samples at least.")
    beta = 1.0 / float(np.log(n)) if beta is None else beta
    if not 0 < beta < np.inf:
        raise MDLError(f"an inverse temperature of {beta}: it is positive and finite, 1 / ln n = {1 / np.log(n):.4g}.")
    _check_pytrees(loss, params, data)
    chains = jax.random.split(key, sampler.chains)
    length = sampler.burn_in + sampler.draws
    numbers = (n * beta, sampler.step_size, sampler.localisation)
    trace, virial = _run_chains(loss, length, sampler.batch_size, params, data, chains, *map(jnp.float32, numbers))
    return _summary(np.asarray(trace, np.float64), np.asarray(virial, np.float64), params, n, beta, sampler)


def _check_pytrees(loss: Loss, params: Any, data: Any) -> None:
    leaves = jax.tree.leaves(params)
    if not leaves or any(not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) for leaf in leaves):
        kinds = sorted({str(jnp.asarray(leaf).dtype) for leaf in leaves})
        raise MDLError(f"weights of types {kinds}: all have to be floats; leave what is not a weight out of `params`.")
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise MDLError(f"data with leading axes {sorted(sizes)}: one axis of samples that all arrays share, not empty.")
    shape = jax.eval_shape(loss, params, data)
    if getattr(shape, "shape", None) != ():
        raise MDLError(f"the loss returns {shape}: it has to be one number, the mean over the batch in nats a sample.")


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run_chains(
    loss: Loss, length: int, batch_size: int | None, start: Any, data: Any, keys: Any, heat: Any, step: Any, pull: Any
) -> tuple[Any, Any]:
    """Excess loss and virial at every step of every chain, both [chains, length]; `heat` is n beta, `pull` gamma."""
    samples = jax.tree.leaves(data)[0].shape[0]
    whole = loss(start, data)

    def batch_at(key: Any) -> tuple[Any, Any]:
        if batch_size is None:
            return data, whole
        chosen = jax.random.randint(key, (batch_size,), 0, samples)
        batch = jax.tree.map(lambda leaf: leaf[chosen], data)
        return batch, loss(start, batch)

    def advance(weights: Any, key: Any) -> tuple[Any, tuple[Any, Any]]:
        of_batch, of_noise = jax.random.split(key)
        batch, baseline = batch_at(of_batch)
        value, gradient = jax.value_and_grad(loss)(weights, batch)
        away = otu.tree_sub(weights, start)
        force = otu.tree_add_scale(otu.tree_scale(heat, gradient), pull, away)
        noise = otu.tree_random_like(of_noise, weights)
        moved = otu.tree_add_scale(otu.tree_add_scale(weights, -step / 2, force), jnp.sqrt(step), noise)
        return moved, (value - baseline, otu.tree_vdot(away, force))

    def chain(key: Any) -> tuple[Any, Any]:
        measured: tuple[Any, Any] = jax.lax.scan(advance, start, jax.random.split(key, length))[1]
        return measured

    return jax.vmap(chain)(keys)


def _summary(
    trace: Float[np.ndarray, "chains steps"],
    virial: Float[np.ndarray, "chains steps"],
    params: Any,
    n: int,
    beta: float,
    sampler: Langevin,
) -> LearningCoefficient:
    _check_divergence(trace, n * beta, sampler)
    draws = n * beta * trace[:, sampler.burn_in :]
    parameters = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))
    per_chain = draws.mean(1)
    half = sampler.draws // 2
    drift = draws[:, half:].mean(1) - draws[:, :half].mean(1)
    return LearningCoefficient(
        value=float(per_chain.mean()),
        stderr=standard_error(per_chain),
        per_chain=per_chain,
        trace=trace,
        virial=float(virial[:, sampler.burn_in :].mean()) / parameters,
        drift=float(drift.mean()),
        drift_stderr=standard_error(drift),
        parameters=parameters,
        n=n,
        beta=beta,
        sampler=sampler,
    )


def standard_error(values: Float[np.ndarray, " k"]) -> float:
    """Of the mean of independent values, at least two."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _check_divergence(trace: Float[np.ndarray, "chains steps"], heat: float, sampler: Langevin) -> None:
    how = f"Lower the step ({sampler.step_size:g}) or raise the localisation ({sampler.localisation:g})."
    broken = ~np.isfinite(trace)
    if broken.any():
        raise DivergenceError(
            f"{broken.any(1).sum()} of {len(trace)} chains reach a loss that is not finite, the first of them after "
            f"{broken.any(0).argmax()} of {trace.shape[1]} steps: the step is too large for the curvature. {how}"
        )
    quarter = sampler.draws // 4
    draws = heat * trace[:, sampler.burn_in :]
    early, late = draws[:, quarter : 2 * quarter].mean(1), draws[:, -quarter:].mean(1)
    if np.all(late > RUNAWAY_RATIO * np.abs(early)):
        raise DivergenceError(
            f"the excess loss runs away: n beta (L - L*) is {early.mean():.4g} in the second quarter of the draws and "
            f"{late.mean():.4g} in the last. {how} If the chains are only slow to settle, lengthen the burn-in "
            f"({sampler.burn_in})."
        )


def largest_curvature(loss: Loss, params: Any, data: Any, *, key: Any, iterations: int = 50) -> float:
    """The largest eigenvalue of the Hessian of L at `params`, by power iteration: nats a sample, per unit of w^2.

    A step of 4 share / (n beta h + gamma) inflates the stiffest direction by 1 / (1 - share), the others by less. Where
    the Hessian is zero (w^4 at 0) it says nothing of the step. **Raises:** MDLError where it is not finite.
    """
    largest = float(_power_iteration(loss, iterations, params, data, key))
    if not np.isfinite(largest):
        raise MDLError(f"a largest curvature of {largest} at w*: the loss or its derivatives are not finite there.")
    return largest


@partial(jax.jit, static_argnums=(0, 1))
def _power_iteration(loss: Loss, iterations: int, params: Any, data: Any, key: Any) -> Any:
    def gradient(weights: Any) -> Any:
        return jax.grad(loss)(weights, data)

    def turn(direction: Any, _: Any) -> tuple[Any, Any]:
        image = jax.jvp(gradient, (params,), (direction,))[1]
        size = otu.tree_norm(image)
        # A zero Hessian leaves the direction as it is.
        unit = otu.tree_scale(1 / jnp.where(size > 0, size, 1.0), image)
        kept = jax.tree.map(lambda new, old: jnp.where(size > 0, new, old), unit, direction)
        return kept, otu.tree_vdot(direction, image)

    start = otu.tree_random_like(key, params)
    start = otu.tree_scale(1 / otu.tree_norm(start), start)
    return jax.lax.scan(turn, start, None, length=iterations)[1][-1]


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep: the sampler, and its estimate or why there is none."""

    sampler: Langevin
    estimate: LearningCoefficient | None
    failure: str = ""


def sensitivity(
    loss: Loss,
    params: Any,
    data: Any,
    *,
    n: int,
    key: Any,
    sampler: Langevin,
    step_sizes: Sequence[float],
    localisations: Sequence[float],
    beta: float | None = None,
) -> tuple[Cell, ...]:
    """`local_learning_coefficient` at every step size and localisation, rows by step; all else as in `sampler`.

    Every cell has the same random key, so that neighbours differ by their settings more than by their noise. A cell
    whose chains diverge has no estimate and says why; other errors are raised. Compiled once.
    """
    cells = []
    for step in step_sizes:
        for localisation in localisations:
            here = replace(sampler, step_size=step, localisation=localisation)
            try:
                found = local_learning_coefficient(loss, params, data, n=n, key=key, sampler=here, beta=beta)
                cells.append(Cell(here, found))
            except DivergenceError as error:
                cells.append(Cell(here, None, str(error)))
    return tuple(cells)
