"""Stochastic parameter decomposition: training of rank-one subcomponents with gates, for any network of matrices.

Source: Bushnaq et al. 2025 (SPD, arXiv:2506.20790); straight-through gates, leftover and adversary: VPD (2026).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from decompositions.weights.batches import Batches
from decompositions.weights.factors import Factors, TensorFactors
from decompositions.weights.gating import hard, initial_gates
from decompositions.weights.masking import Parameters, TensorParameters, clean_pass, gate_inputs
from decompositions.weights.spd_losses import LOSSES, SPDSettings, losses
from mdl.errors import ExplanationError
from mdl.models.networks import Network

CENSUS_BATCHES = 16  # over which mean gates are taken at the end
CENSUS_KEY, START_KEY = 2**30, 2**30 + 1  # beyond the numbers of steps, which are keys too

Progress = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class SPDResult:
    """A trained decomposition.

    `factors`: what is alive; `mean_gates`: of every subcomponent that was trained, name -> [C]; `active`: mean number
    of open gates a token, of each matrix; `history`: means of every loss over each chunk, and "step".
    """

    factors: Factors
    mean_gates: Mapping[str, np.ndarray]
    active: Mapping[str, float]
    history: Mapping[str, np.ndarray]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that training carries from step to step."""

    parameters: Any
    optimiser: Any
    step: Array


def start_parameters(
    network: Network, weights: Mapping[str, Array], batches: Batches, settings: SPDSettings, seed: int
) -> dict[str, TensorParameters]:
    """Unit V, random or what enters the matrix for random inputs; the U of least squares, so that the sum is W where
    the V span all inputs."""
    key = jax.random.fold_in(jax.random.key(seed), START_KEY)
    entering: dict[str, Array] = {}
    if settings.start == "inputs":
        largest = max(count for _, count in settings.components)
        drawn = [batches.draw(jax.random.fold_in(key, n)) for n in range(-(-4 * largest // _positions(batches, key)))]
        seen = [clean_pass(network, weights, settings.names, *batch)[1] for batch in drawn]
        entering = {n: jnp.concatenate([s[n].reshape(-1, s[n].shape[-1]) for s in seen]) for n in settings.names}
    found = {}
    for number, (name, count) in enumerate(settings.components):
        first, second = jax.random.split(jax.random.fold_in(key, number))
        v = jax.random.normal(first, (count, weights[name].shape[0]))
        if entering:
            # Gumbel's trick: rows without replacement, in proportion to their squared norms; zeros come last.
            chance = jnp.log(jnp.sum(entering[name] ** 2, -1)) + jax.random.gumbel(first, (len(entering[name]),))
            v = entering[name][jax.lax.top_k(chance, count)[1]] + 1e-3 * v
        v = v / jnp.linalg.norm(v, axis=1, keepdims=True)
        outputs = jnp.linalg.pinv(v.T) @ weights[name]
        gates = initial_gates(second, count, settings.gate_hidden, settings.one_sided)
        found[name] = TensorParameters(v, outputs, gates)
    return found


def _positions(batches: Batches, key: Array) -> int:
    return int(jax.eval_shape(batches.draw, key)[1].size)


def _optimiser(settings: SPDSettings) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(settings.rate, settings.steps))


@partial(jax.jit, static_argnames=("network", "settings", "length"))
def _advance(
    state: State,
    weights: Mapping[str, Array],
    batches: Any,
    metric_root: Array | None,
    key: Array,
    network: Network,
    settings: SPDSettings,
    length: int,
) -> tuple[State, dict[str, Array]]:
    """`length` steps, and the means of their losses."""
    optimiser = _optimiser(settings)

    def step(state: State, _: None) -> tuple[State, dict[str, Array]]:
        draw, noise = jax.random.split(jax.random.fold_in(key, state.step))
        slope = jax.grad(losses, has_aux=True)
        gradient, terms = slope(
            state.parameters,
            weights,
            batches.draw(draw),
            noise,
            state.step,
            metric_root,
            network,
            settings,
        )
        updates, inner = optimiser.update(gradient, state.optimiser, state.parameters)
        return State(optax.apply_updates(state.parameters, updates), inner, state.step + 1), terms

    state, terms = jax.lax.scan(step, state, length=length)
    return state, {name: jnp.mean(term) for name, term in terms.items()}


def train_spd(
    network: Network,
    weights: Mapping[str, Any],
    batches: Batches,
    settings: SPDSettings,
    *,
    seed: int,
    metric_root: Any = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> SPDResult:
    """Decompose a network's matrices.

    **Arguments:** `weights`: all weights of the network; `batches`: its inputs; `metric_root` [d, d]: of the divergence
    "metric"; `progress`: called with the steps done and the last chunk's losses; `checkpoint`: a file that is written
    after every chunk (a temporary one, then renamed) and continued from if it is there, to the same result.

    **Raises:** `ExplanationError` for settings that do not fit the network (before any work), for a checkpoint of
    another training, and for a loss that is not finite.
    """
    root = None if metric_root is None else jnp.asarray(metric_root, jnp.float32)
    settings.check(network, root)
    own = {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
    _check_weights(network, own)
    key = jax.random.key(seed)
    parameters = start_parameters(network, own, batches, settings, seed)
    state = State(parameters, _optimiser(settings).init(parameters), jnp.zeros((), jnp.int32))
    mark = _fingerprint(network, own, settings, seed)
    history: list[np.ndarray] = []
    if checkpoint is not None and checkpoint.exists():
        state, history = _read(checkpoint, state, mark)
    while (done := int(state.step)) < settings.steps:
        length = min(settings.chunk, settings.steps - done)
        state, terms = _advance(state, own, batches, root, key, network, settings, length)
        row = {name: float(terms[name]) for name in LOSSES}
        _check_finite(row, done + length, settings)
        history.append(np.array([done + length, *row.values()]))
        if checkpoint is not None:
            _write(checkpoint, state, history, mark)
        if progress is not None:
            progress(done + length, row)
    return _result(state.parameters, own, batches, network, settings, seed, np.array(history))


def training_steps(
    network: Network,
    weights: Mapping[str, Any],
    batches: Batches,
    settings: SPDSettings,
    *,
    seed: int,
    length: int,
) -> Callable[[], float]:
    """A function that trains `length` more steps at each call and returns their mean loss: for timing.

    **Raises:** `ExplanationError` for settings that do not fit the network; the divergence "metric" is not for it.
    """
    settings.check(network, None)
    own = {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
    parameters = start_parameters(network, own, batches, settings, seed)
    state = State(parameters, _optimiser(settings).init(parameters), jnp.zeros((), jnp.int32))

    def advance() -> float:
        nonlocal state
        state, terms = _advance(state, own, batches, None, jax.random.key(seed), network, settings, length)
        return float(jax.block_until_ready(terms["total"]))

    return advance


def _check_weights(network: Network, weights: Mapping[str, Array]) -> None:
    for name, shape in network.matrices.items():
        if name not in weights or weights[name].shape != tuple(shape):
            found = weights[name].shape if name in weights else "missing"
            raise ExplanationError(f"weight {name!r} is {found}; the network needs a matrix of {tuple(shape)}")


def _check_finite(row: Mapping[str, float], step: int, settings: SPDSettings) -> None:
    if bad := [name for name, value in row.items() if not np.isfinite(value)]:
        raise ExplanationError(
            f"training stopped: {', '.join(bad)} not finite by step {step} of {settings.steps}. "
            f"The likely cause is the learning rate, {settings.rate}: take a smaller one."
        )


def _fingerprint(network: Network, weights: Mapping[str, Array], settings: SPDSettings, seed: int) -> str:
    """Which training a checkpoint belongs to."""
    digest = hashlib.sha256(f"{seed} {settings} {dict(network.matrices)}".encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + np.asarray(weight).tobytes())
    return digest.hexdigest()


def _named_leaves(state: State) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _write(path: Path, state: State, history: list[np.ndarray], mark: str) -> None:
    partial_path = path.with_name(path.name + ".partial")
    save_file({**_named_leaves(state), "history": np.array(history)}, partial_path, {"training": mark})
    partial_path.replace(path)


def _read(path: Path, like: State, mark: str) -> tuple[State, list[np.ndarray]]:
    """**Raises:** `ExplanationError` for a file that is no checkpoint, or one of another training."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ExplanationError(f"{path} is not a readable checkpoint ({error}): remove it to start again") from error
    if metadata.get("training") != mark:
        raise ExplanationError(
            f"{path} is a checkpoint of other weights, settings, or seed: remove it, or name another file"
        )
    structure = jax.tree_util.tree_structure(like)
    leaves = [jnp.asarray(arrays[name]) for name in _named_leaves(like)]
    return jax.tree_util.tree_unflatten(structure, leaves), list(arrays["history"])


@partial(jax.jit, static_argnames=("network",))
def _census(
    parameters: Parameters, weights: Mapping[str, Array], batches: Any, key: Array, network: Network
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Mean gates of each subcomponent, and how many are open a token, of each matrix, over one batch."""
    _, entering = clean_pass(network, weights, tuple(parameters), *batches.draw(key))
    gates = {name: hard(x) for name, x in gate_inputs(parameters, entering).items()}
    means = {name: jnp.mean(g, (0, 1)) for name, g in gates.items()}
    return means, {name: jnp.mean(jnp.sum(g > 0, -1)) for name, g in gates.items()}


def _result(
    parameters: Parameters,
    weights: Mapping[str, Array],
    batches: Batches,
    network: Network,
    settings: SPDSettings,
    seed: int,
    history: np.ndarray,
) -> SPDResult:
    keys = [jax.random.fold_in(jax.random.key(seed), CENSUS_KEY - n) for n in range(1, 1 + CENSUS_BATCHES)]
    counted = [_census(parameters, weights, batches, key, network) for key in keys]
    means = {n: np.mean([np.asarray(c[0][n]) for c in counted], 0) for n in parameters}
    active = {n: float(np.mean([c[1][n] for c in counted])) for n in parameters}
    kept = {n: np.arange(len(m)) if settings.alive is None else np.flatnonzero(m > settings.alive)
            for n, m in means.items()}  # fmt: skip
    notes = (
        f"SPD of {settings.steps} steps, seed {seed}: {sum(len(k) for k in kept.values())} of "
        f"{sum(c for _, c in settings.components)} subcomponents kept, mean gate above {settings.alive}",
    )
    columns = {"step": history[:, 0]} | {name: history[:, 1 + i] for i, name in enumerate(LOSSES)}
    return SPDResult(Factors(_numbered(parameters, kept), "spd", notes), means, active, columns)


def _numbered(parameters: Parameters, kept: Mapping[str, np.ndarray]) -> dict[str, TensorFactors]:
    """Those kept, numbered through all matrices. A matrix with none alive keeps an empty list."""
    found, first = {}, 0
    for name, tensor in parameters.items():
        chosen = kept[name]
        gates = None if tensor.gates is None else tensor.gates.numpy().rows(chosen)
        ids = np.arange(first, first + len(chosen))
        found[name] = TensorFactors(
            np.asarray(tensor.inputs, np.float32)[chosen], np.asarray(tensor.outputs, np.float32)[chosen], ids, gates
        )
        first += len(chosen)
    return found
