"""What a decomposition does under masks that its author did not choose: the toolkit draws them all.

Every figure is the mean divergence of the network's outputs from its own, in the unit of the divergence (squared units
of the outputs, or nats), over all positions of a batch. Sources: the evaluations of SPD (arXiv:2506.20790), VPD (2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from decompositions.weights.factors import Factors
from decompositions.weights.gating import hard
from decompositions.weights.masking import (
    LEFTOVER,
    Attack,
    Masks,
    Parameters,
    SelfGated,
    ascend,
    clean_pass,
    divergence,
    draw_sources,
    gate_inputs,
    masked_run,
    mixed,
    parameters_of,
)
from mdl.errors import ExplanationError
from mdl.models.networks import Network

ADVERSARY_STEPS = (20, 80, 320)


@dataclass(frozen=True)
class Bench:
    """What masks are tried on: a decomposition, its network with all weights, and inputs.

    **Arguments:** `values` [n, t, d] or None, `tokens` [n, t]: what enters; `kind`, `metric_root`: of the divergence
    (`masking.divergence`). **Raises:** `ExplanationError` for factors that do not fit the network.
    """

    factors: Factors
    network: Network
    weights: Mapping[str, np.ndarray]
    values: np.ndarray | None
    tokens: np.ndarray
    kind: str = "mse"
    metric_root: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.factors.check(self.network)

    @property
    def arrays(self) -> tuple[Parameters, dict[str, Array], tuple[Array | None, Array], Array | None]:
        """Parameters, weights, batch and metric root on the device."""
        weights = {name: jnp.asarray(w, jnp.float32) for name, w in self.weights.items()}
        values = None if self.values is None else jnp.asarray(self.values, jnp.float32)
        root = None if self.metric_root is None else jnp.asarray(self.metric_root, jnp.float32)
        return parameters_of(self.factors), weights, (values, jnp.asarray(self.tokens)), root

    def gates(self) -> dict[str, Array]:
        """Every gate [n, t, C] on the network's own activations. **Raises:** `ExplanationError` without gates."""
        parameters, weights, batch, _ = self.arrays
        return _clean_gates(parameters, weights, batch, self.network)

    def distance(self, masks: Masks) -> float:
        """Under given masks; matrices that are not named are left as they are."""
        return float(_distance(*self.arrays, dict(masks), self.network, self.kind))


@partial(jax.jit, static_argnames=("network",))
def _clean_gates(parameters: Parameters, weights: Mapping[str, Array], batch: tuple, network: Network) -> dict:
    _, entering = clean_pass(network, weights, tuple(parameters), *batch)
    return {name: hard(x) for name, x in gate_inputs(parameters, entering).items()}


@partial(jax.jit, static_argnames=("network", "kind"))
def _distance(
    parameters: Parameters,
    weights: Mapping[str, Array],
    batch: tuple,
    root: Array | None,
    masks: Masks,
    network: Network,
    kind: str,
) -> Array:
    target = network.run(weights, *batch)
    return jnp.mean(divergence(kind, masked_run(network, weights, parameters, masks, batch), target, root))


@partial(jax.jit, static_argnames=("network", "kind", "rounded"))
def _own_gates_distance(
    parameters: Parameters,
    weights: Mapping[str, Array],
    batch: tuple,
    root: Array | None,
    network: Network,
    kind: str,
    rounded: bool,
) -> Array:
    replaced = {name: SelfGated(tensor, rounded) for name, tensor in parameters.items()}
    outputs = network.run({**weights, **replaced}, *batch)
    return jnp.mean(divergence(kind, outputs, network.run(weights, *batch), root))


@partial(jax.jit, static_argnames=("network", "kind", "attack"))
def _attacked(
    parameters: Parameters,
    weights: Mapping[str, Array],
    batch: tuple,
    root: Array | None,
    gates: Masks,
    start: Masks,
    network: Network,
    kind: str,
    attack: Attack,
) -> tuple[Array, dict[str, Array]]:
    target = network.run(weights, *batch)

    def far(sources: Masks) -> Array:
        outputs = masked_run(network, weights, parameters, mixed(gates, sources), batch)
        return jnp.mean(divergence(kind, outputs, target, root))

    return ascend(far, dict(start), attack)


def constant_masks(bench: Bench, value: float) -> dict[str, Array]:
    """The same mask for every subcomponent and token."""
    return {name: jnp.full((1, 1, len(t.component)), value) for name, t in bench.factors.tensors.items()}


def stochastic(bench: Bench, seed: int, draws: int = 4, leftover: bool = True) -> float:
    """Mean over draws of the sources, uniform and independent for every token, subcomponent and leftover."""
    gates = bench.gates()
    keys = jax.random.split(jax.random.key(seed), draws)
    return float(np.mean([bench.distance(mixed(gates, draw_sources(key, gates, leftover))) for key in keys]))


def random_masks(bench: Bench, seed: int, draws: int = 4) -> float:
    """Masks uniform in [0, 1], whatever the gates say: what the gates are worth."""
    shut = {n: jnp.zeros((*bench.tokens.shape, len(t.component))) for n, t in bench.factors.tensors.items()}
    keys = jax.random.split(jax.random.key(seed), draws)
    return float(np.mean([bench.distance(draw_sources(key, shut, False)) for key in keys]))


def adversarial(bench: Bench, seed: int, attack: Attack) -> tuple[float, dict[str, Array]]:
    """The largest divergence that the attack finds from one uniform start, and the sources; leftovers take part."""
    gates = bench.gates()
    start = draw_sources(jax.random.key(seed), gates, True, attack.shared)
    worst, sources = _attacked(*bench.arrays, gates, start, bench.network, bench.kind, attack)
    return float(worst), sources


def self_gated(bench: Bench, rounded: bool = False) -> float:
    """Gates as masks, each reading what the masked network makes of earlier layers, as a receiver has to."""
    return float(_own_gates_distance(*bench.arrays, bench.network, bench.kind, rounded))


def single_ablations(bench: Bench) -> np.ndarray:
    """Divergence with one component off in all its matrices and every other on, [C]; the leftover stays on."""
    found = np.zeros(bench.factors.n_components)
    for component in range(len(found)):
        masks: dict[str, Array] = {}
        for name, tensor in bench.factors.tensors.items():
            masks[name] = jnp.asarray((tensor.component != component).astype(np.float32))[None, None]
            masks[LEFTOVER + name] = jnp.ones((1, 1, 1))
        found[component] = bench.distance(masks)
    return found


def under_masks(
    bench: Bench, seed: int, adversary_steps: tuple[int, ...] = ADVERSARY_STEPS, attack: Attack | None = None
) -> dict[str, float]:
    """The mean divergence under each kind of mask, and the "seed" that drew them.

    "all on" (without the leftover), "gates", "rounded" (gates above 0 count as 1), "self-gated" (gates read the masked
    network), "stochastic" (the leftover too), "random", "off", "adversarial K" for each number of steps, "active": mean
    number of gates above 0 a token. Only those that need no gate, where there is none.

    **Raises:** `ExplanationError` if the divergence is not finite under some masks.
    """
    found = {"all on": bench.distance(constant_masks(bench, 1.0)), "off": bench.distance(constant_masks(bench, 0.0))}
    found["random"] = random_masks(bench, seed)
    if bench.factors.gated:
        gates = bench.gates()
        found["gates"] = bench.distance(gates)
        found["rounded"] = bench.distance({name: (g > 0).astype(jnp.float32) for name, g in gates.items()})
        found["self-gated"] = self_gated(bench)
        found["stochastic"] = stochastic(bench, seed)
        found["active"] = float(sum(jnp.mean(jnp.sum(g > 0, -1)) for g in gates.values()))
        for steps in adversary_steps:
            worst, _ = adversarial(bench, seed, replace(attack or Attack(), steps=steps))
            found[f"adversarial {steps}"] = worst
    if bad := [name for name, value in found.items() if not np.isfinite(value)]:
        raise ExplanationError(f"under {', '.join(bad)} masks the outputs are not finite: factors as large as that?")
    return found | {"seed": float(seed)}
