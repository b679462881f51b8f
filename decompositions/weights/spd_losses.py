"""The losses of stochastic parameter decomposition, as pure functions of parameters, weights, a batch and a key.

    L = a0 |W - sum V U^T|^2 / size  +  a1 E_r D(all masked)  +  a2 mean_l E_r D(only l masked)  +  a3 sum_l,c |g|^p
        [ + a4 max_r D(all masked) ]

Sources: Bushnaq et al. 2025 (SPD, arXiv:2506.20790), section 3; the adversarial term: VPD (2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from decompositions.weights.gating import lower_leaky, straight_through, upper_leaky
from decompositions.weights.masking import (
    DIVERGENCES,
    Attack,
    Parameters,
    ascend,
    clean_pass,
    divergence,
    draw_sources,
    gate_inputs,
    leftover,
    masked_run,
    mixed,
)
from mdl.errors import ExplanationError
from mdl.models.networks import Network

GATE_FLOOR = 1e-12  # under |g|^p: its derivative at 0 is finite
LOSSES = ("total", "faithfulness", "stochastic", "layerwise", "importance", "adversarial", "active")
TRAINING_ATTACK = Attack(steps=3)


@dataclass(frozen=True)
class SPDSettings:
    """What is decomposed and how it is trained; hashable.

    **Arguments:** `components`: matrices and their numbers of subcomponents; `steps`, `rate`: of Adam, cosine down to
    0; `gate_hidden`: hidden units of a gate; `faithfulness`, `stochastic`, `layerwise`, `importance`, `adversarial`:
    the losses' weights, the importance's coming down linearly to `final_importance` if that is given (components first
    have to part, then to be exact); `power`: p of the importance, coming down linearly to `final_power` if that is
    given; `divergence`: of outputs, "mse", "metric" or "kl"; `straight_through`: of gates below 0 (VPD), else leaky
    masks (SPD); `one_sided`: gates begin open on one side of 0 only (for inputs of one sign), else on both; `start`: V
    begin as "random" directions, or as what enters the matrix for random "inputs"; `leftover`: W - sum is a component
    too, whose gate is 0; `attack`: of the adversarial loss; `alive`: components whose gate is on average above it are
    kept, None keeps all; `chunk`: steps between two reports.
    """

    components: tuple[tuple[str, int], ...]
    steps: int
    rate: float = 1e-3
    gate_hidden: int = 16
    faithfulness: float = 1.0
    stochastic: float = 1.0
    layerwise: float = 1.0
    importance: float = 1e-3
    final_importance: float | None = None
    adversarial: float = 0.0
    power: float = 1.0
    final_power: float | None = None
    divergence: str = "mse"
    straight_through: bool = True
    one_sided: bool = False
    start: str = "random"
    leftover: bool = False
    attack: Attack = TRAINING_ATTACK
    alive: float | None = 1e-6
    chunk: int = 100

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.components)

    def check(self, network: Network, metric_root: Array | None) -> None:
        """**Raises:** `ExplanationError` for a matrix that the network lacks, fewer than one component, or settings
        that make no sense, before any work."""
        for name, count in self.components:
            if name not in network.matrices:
                known = ", ".join(network.matrices) or "none"
                raise ExplanationError(f"no matrix {name!r} to decompose; the network's matrices are {known}")
            if count < 1:
                raise ExplanationError(f"{count} components of {name!r}: take at least 1")
        if not self.components or len(set(self.names)) < len(self.components):
            raise ExplanationError(f"components of the matrices {self.names}: name at least one, and each once")
        if self.divergence not in DIVERGENCES or (self.divergence == "metric") != (metric_root is not None):
            given = "no" if metric_root is None else "a"
            raise ExplanationError(
                f"divergence {self.divergence!r} with {given} metric root: take 'mse' or 'kl' without one, or "
                "'metric' with it"
            )
        if self.start not in ("random", "inputs"):
            raise ExplanationError(f"start {self.start!r}: components begin as 'random' directions or as 'inputs'")
        numbers = {"steps": self.steps, "gate_hidden": self.gate_hidden, "chunk": self.chunk}
        for what, number in numbers.items():
            if number < 1:
                raise ExplanationError(f"{what} is {number}: it has to be at least 1")
        if not self.rate > 0 or not self.power > 0 or not (self.final_power is None or self.final_power > 0):
            raise ExplanationError(
                f"rate {self.rate}, power {self.power}, final power {self.final_power}: they have to be above 0"
            )


def _line(first: float, last: float | None, settings: SPDSettings, step: Array) -> Array:
    last = first if last is None else last
    return first + (last - first) * step / max(settings.steps - 1, 1)


def importance_at(settings: SPDSettings, step: Array) -> tuple[Array, Array]:
    """The importance's weight and its p at a step."""
    weight = _line(settings.importance, settings.final_importance, settings, step)
    return weight, _line(settings.power, settings.final_power, settings, step)


def faithfulness(parameters: Parameters, weights: Mapping[str, Array]) -> Array:
    """Mean squared entry of W - sum over all decomposed matrices."""
    left = [leftover(weights[name], tensor) for name, tensor in parameters.items()]
    return sum((jnp.sum(d**2) for d in left), jnp.zeros(())) / sum(d.size for d in left)


def importance(gates: Mapping[str, Array], power: Array) -> Array:
    """Mean over tokens of sum over matrices and subcomponents of |g|^p."""
    terms = [jnp.mean(jnp.sum((jnp.abs(g) + GATE_FLOOR) ** power, -1)) for g in gates.values()]
    return sum(terms, jnp.zeros(()))


def losses(
    parameters: Parameters,
    weights: Mapping[str, Array],
    batch: tuple[Array | None, Array],
    key: Array,
    step: Array,
    metric_root: Array | None,
    network: Network,
    settings: SPDSettings,
) -> tuple[Array, dict[str, Array]]:
    """The total, and every term by the names in `LOSSES`; "active" is the mean number of open gates a token."""
    target, entering = clean_pass(network, weights, settings.names, *batch)
    before = gate_inputs(parameters, entering)
    squash = straight_through if settings.straight_through else lower_leaky
    gates = {name: squash(x) for name, x in before.items()}

    def far(sources: Mapping[str, Array], of: Mapping[str, Array]) -> Array:
        outputs = masked_run(network, weights, parameters, mixed(of, sources), batch)
        return jnp.mean(divergence(settings.divergence, outputs, target, metric_root))

    keys = jax.random.split(key, 3)
    terms = dict.fromkeys(LOSSES, jnp.zeros(()))
    terms["faithfulness"] = faithfulness(parameters, weights)
    terms["stochastic"] = far(draw_sources(keys[0], gates, settings.leftover), gates)
    terms["layerwise"] = terms["stochastic"]  # of a single matrix they are the same expectation
    if len(gates) > 1 and settings.layerwise:
        sources = draw_sources(keys[1], gates, False)
        each = [far({name: sources[name]}, {name: gate}) for name, gate in gates.items()]
        terms["layerwise"] = sum(each, jnp.zeros(())) / len(each)
    weight, power = importance_at(settings, step)
    terms["importance"] = importance({name: upper_leaky(x) for name, x in before.items()}, power)
    terms["active"] = sum((jnp.mean(jnp.sum(x > 0, -1)) for x in before.values()), jnp.zeros(()))
    if settings.adversarial:
        start = draw_sources(keys[2], gates, settings.leftover, settings.attack.shared)
        fixed = jax.lax.stop_gradient(gates)
        _, worst = ascend(lambda r: far(r, fixed), start, settings.attack)
        terms["adversarial"] = far(jax.lax.stop_gradient(worst), gates)
    names = ("faithfulness", "stochastic", "layerwise", "adversarial")
    total = weight * terms["importance"] + sum(getattr(settings, name) * terms[name] for name in names)
    terms["total"] = total
    return total, terms
