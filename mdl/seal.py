"""Whether a task is still what it was: plug-ins are handed its arrays, and could write into them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mdl.errors import ExplanationError
from mdl.models import Model, TorchModel
from mdl.task import Task

WEIGHTS = "the model's weights"


def seal(task: Task, further: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Hashes of the task's arrays and of `further` ones; the weights themselves, which cannot be written into."""
    arrays: dict[str, Any] = dict(further or {})
    for split in ("fit_activations", "tune_activations", "held_out"):
        for name in ("tokens", "scored", "groups", "outputs", "inputs", "boundary", "measured"):
            arrays[f"{name} of {split}"] = getattr(getattr(task, split), name, None)
    found: dict[str, Any] = {name: _hash(array) for name, array in arrays.items() if array is not None}
    found[WEIGHTS] = ()
    if isinstance(task.model, Model):
        found[WEIGHTS] = tuple(jax.tree.leaves(task.model.params))
    elif isinstance(task.model, TorchModel):
        found[WEIGHTS] = tuple(p._version for p in task.model.module.parameters())
    return found


def check_seal(before: Mapping[str, Any], after: Mapping[str, Any], culprit: str) -> None:
    """**Raises:** `ExplanationError` naming what is not what it was."""
    for what, was in before.items():
        now = after[what]
        same = len(was) == len(now) and all(
            a is b or (isinstance(a, int) and a == b) for a, b in zip(was, now, strict=True)
        )
        if not (same if what == WEIGHTS else was == now):
            raise ExplanationError(
                f"{culprit} changed the task under way: {what} is not what it was, and every score would be measured "
                "against the changed one. Copy an array before writing into it."
            )


def _hash(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).view(np.uint8).data, digest_size=16).digest()
