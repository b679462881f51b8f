"""Training of the small models: AdamW, checkpoints, and the same weights whether or not it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from experiments.small_circuits.examples import Examples
from experiments.small_circuits.models import Small, initial_weights, last_logits
from mdl.models.model import Model, fingerprint_of
from mdl.models.transformer import Params, run

CHECKPOINT, EVERY, REPORT = "checkpoint.npz", 100, 100  # steps
BATCH = 1024  # sequences at once, where nothing is trained
B1, B2 = 0.9, 0.98  # of AdamW

Report = Callable[[int, float, float], None]


def optimiser(small: Small) -> optax.GradientTransformation:
    """AdamW with a linear warm-up."""
    rise = optax.linear_schedule(0.0, small.rate, small.warm_up)
    rest = max(1, small.steps - small.warm_up)
    after = optax.cosine_decay_schedule(small.rate, rest) if small.falling else optax.constant_schedule(small.rate)
    schedule = optax.join_schedules([rise, after], [small.warm_up])
    return optax.adamw(schedule, b1=B1, b2=B2, weight_decay=small.weight_decay)


def logits_of(small: Small, params: Params, tokens: ArrayLike) -> Array:
    """Logits [n, t, v], or of the last position alone [n, 1, v] where no other is measured."""
    if small.last:
        return last_logits(small.config, params, tokens)[:, None]
    return run(small.config, params, tokens, ["logits"])["logits"]


def loss_of(small: Small, params: Params, tokens: ArrayLike, answers: ArrayLike) -> tuple[Array, Array]:
    """Mean cross-entropy in nats where there is an answer, with smoothed labels, and the share that is right."""
    logits = logits_of(small, params, tokens)
    answers = jnp.asarray(answers)[:, -logits.shape[1] :]
    there = answers >= 0
    logs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logs, jnp.maximum(answers, 0)[..., None], -1)[..., 0]
    losses = -(1.0 - small.smoothing) * own - small.smoothing * logs.mean(-1)
    right = (logits.argmax(-1) == answers) & there
    return (losses * there).sum() / there.sum(), right.sum() / there.sum()


def train(small: Small, seed: int, folder: Path, report: Report | None = None, stop: int | None = None) -> Params:
    """Train to the end (or to step `stop`), from the checkpoint in `folder` if there is one.

    What a step is trained on depends on the seed and the step alone, so that an interrupted run ends at the same
    weights. `report` is told the step, the training loss in nats and the time in seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    method = optimiser(small)
    params = initial_weights(small.config, seed, small.scale)
    state, begin = method.init(params), 0
    if (folder / CHECKPOINT).exists():
        (params, state), begin = restore(folder / CHECKPOINT, (params, state))
    advance = _step(small, method)
    started, last = time.time(), small.steps if stop is None else stop
    for step in range(begin, last):
        batch = small.examples(step, seed)
        params, state, loss = advance(params, state, batch.tokens, batch.answers)
        if report is not None and ((step + 1) % REPORT == 0 or step + 1 == last):
            report(step + 1, float(loss), time.time() - started)
        if (step + 1) % EVERY == 0 or step + 1 == last:
            save(folder / CHECKPOINT, (params, state), step + 1)
    return params


def _step(small: Small, method: optax.GradientTransformation) -> Callable[..., tuple[Params, Any, Array]]:
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, tokens: Array, answers: Array) -> tuple[Params, Any, Array]:
        (loss, _), gradient = jax.value_and_grad(lambda p: loss_of(small, p, tokens, answers), has_aux=True)(params)
        updates, state = method.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def save(path: Path, tree: object, step: int) -> None:
    """Write all leaves to an .npz, through a temporary file that is renamed."""
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        np.savez(file, **leaves, step=step)
    temporary.replace(path)


def restore(path: Path, tree: object) -> tuple[Any, int]:
    """What `save` wrote, in the structure of `tree`, and the step."""
    with np.load(path) as stored:
        leaves = [jnp.asarray(stored[f"leaf{i}"]) for i in range(len(jax.tree.leaves(tree)))]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves), int(stored["step"])


def figures(small: Small, params: Params, examples: Examples) -> tuple[float, float]:
    """Mean cross-entropy in nats an answer, and accuracy, over all answers."""
    measure = jax.jit(partial(loss_of, replace(small, smoothing=0.0)))
    total, right, count = 0.0, 0.0, 0
    for start in range(0, len(examples), BATCH):
        part = examples[np.arange(start, min(start + BATCH, len(examples)))]
        loss, accuracy = measure(params, part.tokens, part.answers)
        answers = int(part.measured.sum())
        total, right, count = total + float(loss) * answers, right + float(accuracy) * answers, count + answers
    return total / count, right / count


def as_model(small: Small, params: Params) -> Model:
    """A `Model` of these weights, float32."""
    held = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    return Model(small.config, held, small.name, fingerprint_of(small.config, held))
