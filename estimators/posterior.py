r"""A Gaussian posterior over static rows, and what it costs by bits-back: KL(q || p) in place of rounded numbers.

Rows w that are used with coefficients c cost a |w - w'|_G^2 nats when w' is used in their place. A receiver that gets a
sample w' of q, out of a prior p, can take the bits that chose the sample back once it has everything q was made from:
what is left of the cost is KL(q || p). So q is fitted to minimise

    sum over rows i of  KL(q_i || p_i) + a_i E_q |w_i - w'_i|_G^2                                      (nats)

q is a product of normals over the entries of each row, in coordinates in which metric and prior are both diagonal to
begin with. p is what the receiver has to know beforehand: normal innovations of variance (tau_i t_j)^2 behind the
linear prediction of columns that the quantised code may use too; t, tau and the prediction are charged.

Sources: Hinton and van Camp 1993 (COLT); Honkela and Valpola 2004 (IEEE Trans. Neural Networks 15(4)).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mdl.codes.lattice import PREDICTION_UNITS
from mdl.codes.steps import STEPS_PER_OCTAVE
from mdl.message import QuantisedArray, Section, encode_message
from mdl.units import nats_to_bits

ADAM_STEPS, RATE = 30, 0.1
COLUMN_GRID = ROW_GRID = STEPS_PER_OCTAVE  # scales are sent in quarter octaves
SMALLEST = 1e-12
Parameters = dict[str, Float[Array, "..."]]


@dataclass(frozen=True)
class Posterior:
    """Rows as a distribution.

    **Arguments:** `mean`, `spread` [r, d] in coordinates y, a row being y @ `basis` [d, d]; `kl_bits` [r]: of each row,
    0 for rows that are not `kept` [r] and stand at zero; `error` [r]: E |w - w'|_G^2; `prior`: what the receiver needs
    of the prior.
    """

    mean: np.ndarray
    spread: np.ndarray
    basis: np.ndarray
    kl_bits: np.ndarray
    error: np.ndarray
    kept: np.ndarray
    prior: Section

    def sample(self, seed: int) -> np.ndarray:
        """One draw of all rows, float64 [r, d]."""
        noise = np.random.Generator(np.random.Philox(seed)).standard_normal(self.mean.shape)
        return np.asarray(((self.mean + self.spread * noise) @ self.basis) * self.kept[:, None])

    def prior_bits(self) -> tuple[float, np.ndarray]:
        """Bits of the prior: what is sent at once, and [r] with each row."""
        message = encode_message([self.prior])
        return message.header_bits, message.part_bits[0]


@dataclass(frozen=True)
class Frame:
    """Coordinates y in which the first prior is `tau`^2 times the identity, and the metric diag(`gains`).

    `rotation` [d, d]: y = z @ rotation, z = innovations / `scales`; `basis` [d, d]: row = y @ basis.
    """

    y: np.ndarray
    tau: np.ndarray
    scales: np.ndarray
    rotation: np.ndarray
    gains: np.ndarray
    basis: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, root: np.ndarray, prediction: np.ndarray | None) -> Frame:
        width = rows.shape[1]
        rest = np.eye(width) if prediction is None else np.eye(width) - prediction / PREDICTION_UNITS
        innovations = rows @ rest.T
        scales, tau = np.ones(width), np.ones(len(rows))
        for _ in range(4):
            scales = np.sqrt(np.mean(np.square(innovations / tau[:, None]), 0)) + SMALLEST
            tau = np.sqrt(np.mean(np.square(innovations / scales), 1)) + SMALLEST
        back = scales[:, None] * np.linalg.inv(rest).T  # row = z @ back
        gains, rotation = np.linalg.eigh(back @ root @ root @ back.T)
        y = (innovations / scales) @ rotation
        return cls(y, tau, scales, rotation, np.maximum(gains, 0.0), rotation.T @ back)


def gaussian_kl(
    mean: Float[Array, "r d"],
    spread: Float[Array, "r d"],
    rotation: Float[Array, "d d"],
    deviation: Float[Array, "r d"],
) -> Float[Array, " r"]:
    r"""KL(q || p) of each row, nats: q a product in y, p a product of variance `deviation`^2 in z = y @ rotation^T.

    $$\sum_j \ln \sigma_j - \sum_k \ln s_k + \tfrac12 \sum_j \frac{z_j^2 + \sum_k R_{jk}^2 s_k^2}{\sigma_j^2} - d/2$$
    """
    second = jnp.square(mean @ rotation.T) + jnp.square(spread) @ jnp.square(rotation).T
    inside = jnp.log(deviation) - jnp.log(spread) + 0.5 * second / jnp.square(deviation) - 0.5
    return jnp.sum(inside, 1)


def _moved(parameters: Parameters, start: Parameters) -> tuple[Array, Array, Array]:
    """Mean less y, spread and the prior's deviations: parameters count from the start, in its standard deviations."""
    spread = start["spread"] * jnp.exp(parameters["spread"])
    deviation = jnp.exp(parameters["columns"])[None, :] * (start["tau"] * jnp.exp(parameters["rows"]))[:, None]
    return start["bias"] + start["spread"] * parameters["mean"], spread, deviation


def _objective(parameters: Parameters, start: Parameters) -> Array:
    """The sum to be minimised, nats."""
    bias, spread, deviation = _moved(parameters, start)
    error = (jnp.square(bias) + jnp.square(spread)) @ start["gains"]
    return jnp.sum(gaussian_kl(start["y"] + bias, spread, start["rotation"], deviation) + start["weights"] * error)


@partial(jax.jit, static_argnames=("steps",))
def _descend(start: Parameters, steps: int) -> tuple[Parameters, Array]:
    rows, width = start["y"].shape
    parameters: Parameters = {
        "mean": jnp.zeros((rows, width)),
        "spread": jnp.zeros((rows, width)),
        "columns": jnp.zeros(width),
        "rows": jnp.zeros(rows),
    }
    rule = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def step(carry: tuple[Parameters, optax.OptState], _: None) -> tuple[tuple[Parameters, optax.OptState], Array]:
        value, slope = jax.value_and_grad(_objective)(carry[0], start)
        update, state = rule.update(slope, carry[1])
        return (optax.apply_updates(carry[0], update), state), value

    (parameters, _), values = jax.lax.scan(step, (parameters, rule.init(parameters)), None, length=steps)
    return parameters, values


def fit_posterior(
    rows: np.ndarray,
    weights: np.ndarray,
    root: np.ndarray,
    prediction: np.ndarray | None = None,
    steps: int = ADAM_STEPS,
) -> Posterior:
    """The posterior of rows [r, d], errors of which cost `weights` [r] nats a unit of |.|_G^2, G = root @ root.

    **Arguments:** `prediction` [d, d] in sixteenths, of columns from those before them, or None; `steps`: of Adam, from
    the exact optimum for a prior with the rows' own scales. Rows that are cheaper at zero are put there.
    """
    frame = Frame.of(np.asarray(rows, np.float64), root, prediction)
    precision = 1.0 / np.square(frame.tau)[:, None] + 2.0 * weights[:, None] * frame.gains
    start = {
        "y": frame.y,
        "tau": frame.tau,
        "spread": 1.0 / np.sqrt(precision),
        "bias": -frame.y / np.square(frame.tau)[:, None] / precision,
        "rotation": frame.rotation,
        "gains": frame.gains,
        "weights": weights,
    }
    found, _ = _descend({k: jnp.asarray(v, jnp.float32) for k, v in start.items()}, steps)
    moved = {k: np.asarray(v, np.float64) for k, v in found.items()}
    spread = start["spread"] * np.exp(moved["spread"])
    bias = start["bias"] + start["spread"] * moved["mean"]
    columns = np.rint(COLUMN_GRID * np.log2(frame.scales * np.exp(moved["columns"]))).astype(np.int64)
    levels = np.rint(ROW_GRID * np.log2(frame.tau * np.exp(moved["rows"]))).astype(np.int64)
    deviation = np.exp2(columns / COLUMN_GRID) / frame.scales * np.exp2(levels / ROW_GRID)[:, None]
    kl = _exact_kl(frame.y + bias, spread, frame.rotation, deviation)
    error = (np.square(bias) + np.square(spread)) @ frame.gains
    absent = np.square(frame.y) @ frame.gains
    kept = kl + weights * error < weights * absent
    return Posterior(
        mean=frame.y + bias,
        spread=spread,
        basis=frame.basis,
        kl_bits=np.where(kept, nats_to_bits(kl), 0.0),
        error=np.where(kept, error, absent),
        kept=kept,
        prior=_prior(columns, np.where(kept, levels, 0), kept, prediction),
    )


def _exact_kl(mean: np.ndarray, spread: np.ndarray, rotation: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """`gaussian_kl` in float64: its terms nearly cancel where the data say little."""
    second = np.square(mean @ rotation.T) + np.square(spread) @ np.square(rotation).T
    return np.sum(np.log(deviation) - np.log(spread) + 0.5 * second / np.square(deviation) - 0.5, 1)


def _prior(columns: np.ndarray, levels: np.ndarray, kept: np.ndarray, prediction: np.ndarray | None) -> Section:
    """Scales of columns, and the prediction if there is one, at once; with each row whether it is there, and its
    scale."""
    header = [QuantisedArray.from_integers(columns)]
    if prediction is not None:
        header.append(QuantisedArray.from_integers(prediction[np.tril_indices(len(columns), -1)]))
    parts = (QuantisedArray.from_integers(kept.astype(np.int64)), QuantisedArray.from_integers(levels))
    return Section("prior", tuple(header), parts)
