"""Running a network with components under masks in the place of its matrices, and how far its outputs then are.

    W'_T = sum_s m_s V_s U_s^T + m_Delta Delta_T,    m = g + (1 - g) r

g: the gate, r in [0, 1]: the source (a uniform draw, or an adversary's choice); the leftover Delta has g = 0, so that
its mask is its source. Sources: SPD (arXiv:2506.20790) and VPD (2026).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decompositions.weights.factors import Factors, TensorFactors
from decompositions.weights.gating import GateParameters, gate_values, hard
from mdl.errors import ExplanationError
from mdl.models.networks import Network
from mdl.models.operators import Masked, Recorder, Weight

LEFTOVER = "leftover of "  # before a matrix's name: the source of its leftover
DIVERGENCES = ("mse", "metric", "kl")

Masks = Mapping[str, Array]  # of each matrix [n, t, C] or [1, 1, C], and of leftovers [n, t, 1] or [1, 1, 1]


class TensorParameters(NamedTuple):
    """`TensorFactors` as arrays to be trained: `inputs` V [C, d_in], `outputs` U [C, d_out], `gates`."""

    inputs: Array
    outputs: Array
    gates: GateParameters | None

    @classmethod
    def of(cls, tensor: TensorFactors) -> TensorParameters:
        gates = None if tensor.gates is None else GateParameters.of(tensor.gates)
        return cls(jnp.asarray(tensor.inputs, jnp.float32), jnp.asarray(tensor.outputs, jnp.float32), gates)


Parameters = Mapping[str, TensorParameters]


def parameters_of(factors: Factors) -> dict[str, TensorParameters]:
    """A decomposition as arrays."""
    return {name: TensorParameters.of(tensor) for name, tensor in factors.tensors.items()}


@dataclass(frozen=True)
class SelfGated:
    """Subcomponents under gates that read what enters here, errors of earlier matrices included: a receiver's view.

    The gates of the first use hold for all uses; `masks` remembers them.
    """

    parameters: TensorParameters
    rounded: bool = False
    masks: list[Array] = field(default_factory=list)

    def __call__(self, x: Array) -> Array:
        scalars = x @ self.parameters.inputs.T
        if not self.masks:
            gates = hard(gate_values(_gates(self.parameters), scalars))
            self.masks.append(jnp.where(gates > 0.0, 1.0, 0.0) if self.rounded else gates)
        return (scalars * self.masks[0]) @ self.parameters.outputs

    def transposed(self, x: Array) -> Array:
        if not self.masks:
            raise ExplanationError("a matrix is used transposed first; gates read what enters an untransposed use")
        return ((x @ self.parameters.outputs.T) * self.masks[0]) @ self.parameters.inputs


def _gates(tensor: TensorParameters) -> GateParameters:
    if tensor.gates is None:
        raise ExplanationError("this decomposition has no gates, so that there are no masks that depend on inputs")
    return tensor.gates


def clean_pass(
    network: Network, weights: Mapping[str, Weight], names: tuple[str, ...], values: Array | None, tokens: Array
) -> tuple[Array, dict[str, Array]]:
    """The region's own outputs [n, t, d], and what enters each matrix at its first untransposed use [n, t, d_in].

    **Raises:** `ExplanationError` for a matrix that is only used transposed, or not at all.
    """
    watched = {name: Recorder(weights[name]) for name in names}
    outputs = network.run({**weights, **watched}, values, tokens)
    entering = {}
    for name, recorder in watched.items():
        straight = [x for x, transposed in recorder.seen if not transposed]
        if not straight:
            raise ExplanationError(f"the matrix {name!r} is never used untransposed: its gates have nothing to read")
        entering[name] = straight[0]
    return outputs, entering


def gate_inputs(parameters: Parameters, entering: Mapping[str, Array]) -> dict[str, Array]:
    """Each gate before its hard sigmoid, from what enters its matrix: name -> [n, t, C]."""
    return {name: gate_values(_gates(tensor), entering[name] @ tensor.inputs.T) for name, tensor in parameters.items()}


def masked_run(
    network: Network,
    weights: Mapping[str, Array],
    parameters: Parameters,
    masks: Masks,
    batch: tuple[Array | None, Array],
) -> Array:
    """Outputs [n, t, d] with those matrices replaced that `masks` names; leftovers are on where it names them too."""
    replaced: dict[str, Weight] = dict(weights)
    for name, tensor in parameters.items():
        if name not in masks:
            continue
        source = masks.get(LEFTOVER + name)
        left = None if source is None else leftover(jnp.asarray(weights[name]), tensor)
        replaced[name] = Masked(tensor.inputs, tensor.outputs, masks[name], left, 0.0 if source is None else source)
    return network.run(replaced, *batch)


def leftover(weight: Array, tensor: TensorParameters) -> Array:
    """W - sum of the components [d_in, d_out]."""
    return weight - tensor.inputs.T @ tensor.outputs


def mixed(gates: Masks, sources: Masks) -> dict[str, Array]:
    """m = g + (1 - g) r for each matrix; a leftover's mask is its source."""
    masks = {name: gate + (1.0 - gate) * sources[name] for name, gate in gates.items()}
    return masks | {name: source for name, source in sources.items() if name.startswith(LEFTOVER)}


def draw_sources(key: Array, gates: Masks, with_leftover: bool, shared: bool = False) -> dict[str, Array]:
    """Sources r uniform in [0, 1], for each token and subcomponent, or `shared` by all tokens."""
    sources = {}
    for number, (name, gate) in enumerate(gates.items()):
        first, second = jax.random.split(jax.random.fold_in(key, number))
        lead = (1, 1) if shared else gate.shape[:2]
        sources[name] = jax.random.uniform(first, (*lead, gate.shape[-1]))
        if with_leftover:
            sources[LEFTOVER + name] = jax.random.uniform(second, (*lead, 1))
    return sources


def divergence(kind: str, outputs: Array, target: Array, root: Array | None) -> Float[Array, "n t"]:
    r"""How far outputs [n, t, d] are from the target's, for each position.

    "mse": $|e|^2 / d$ in squared units of the outputs; "metric": $|G^{1/2} e|^2 / 2$ nats, `root` being $G^{1/2}$,
    [d, d]: the KL that the rest of the model makes of the error e, to second order; "kl": $KL(target \| outputs)$ nats,
    both being logits. **Raises:** `ExplanationError` for another kind, or "metric" without a root.
    """
    if kind == "kl":
        own, other = jax.nn.log_softmax(target), jax.nn.log_softmax(outputs)
        return jnp.sum(jnp.exp(own) * (own - other), -1)
    error = outputs - target
    if kind == "mse":
        return jnp.mean(error**2, -1)
    if kind != "metric" or root is None:
        raise ExplanationError(
            f"divergence {kind!r}: take one of {', '.join(DIVERGENCES)}; "
            "'metric' needs the root of the metric of the rest of the model"
        )
    return 0.5 * jnp.sum((error @ root) ** 2, -1)


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on the sources: `steps` of `rate` times the gradient's sign, or of Adam (`rule`).

    `shared`: one set of sources for all tokens of the batch, as in VPD.
    """

    steps: int = 20
    rate: float = 0.1
    rule: str = "sign"
    shared: bool = True


def ascend(
    objective: Callable[[dict[str, Array]], Array], start: dict[str, Array], attack: Attack
) -> tuple[Array, dict[str, Array]]:
    """The largest value of the objective met on the way, the start included, and the sources there.

    **Raises:** `ExplanationError` for a rule other than "sign" and "adam".
    """
    if attack.rule not in ("sign", "adam"):
        raise ExplanationError(f"no rule {attack.rule!r} of ascent; there are 'sign' and 'adam'")
    slope = jax.value_and_grad(objective)

    def step(carry: tuple, number: Array) -> tuple[tuple, None]:
        sources, best, found, first, second = carry
        value, gradient = slope(sources)
        better = value > best
        found = jax.tree.map(lambda new, old: jnp.where(better, new, old), sources, found)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, gradient)

        def move(r: Array, g: Array, m: Array, v: Array) -> Array:
            if attack.rule == "sign":
                return jnp.clip(r + attack.rate * jnp.sign(g), 0.0, 1.0)
            unbiased = m / (1 - 0.9 ** (number + 1.0)), v / (1 - 0.999 ** (number + 1.0))
            return jnp.clip(r + attack.rate * unbiased[0] / (jnp.sqrt(unbiased[1]) + 1e-12), 0.0, 1.0)

        moved = jax.tree.map(move, sources, gradient, first, second)
        return (moved, jnp.maximum(value, best), found, first, second), None

    zeros = jax.tree.map(jnp.zeros_like, start)
    carry = (start, jnp.asarray(-jnp.inf), start, zeros, zeros)
    (last, best, found, _, _), _ = jax.lax.scan(step, carry, jnp.arange(attack.steps))
    value = objective(last)
    return jnp.maximum(value, best), jax.tree.map(lambda a, b: jnp.where(value > best, a, b), last, found)
