"""Taking tensors out of a state dict by name, with every missing, unexpected or broken one reported at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdl.errors import ModelError, did_you_mean

# Buffers that old checkpoints store and that are no weights: causal masks and rotary frequencies.
_BUFFERS = re.compile(r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")


def as_float32(tensor: Any, name: str) -> np.ndarray:
    """A numpy float32 array from a numpy or torch tensor.

    **Raises:** `ModelError` naming the tensor and how many of its values are NaN or infinite.
    """
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().float().cpu().numpy()
    array = np.asarray(tensor, np.float32)
    broken = array.size - int(np.isfinite(array).sum())
    if broken:
        nan = int(np.isnan(array).sum())
        raise ModelError(
            f"tensor {name!r} of shape {array.shape} has {nan} NaN and {broken - nan} infinite values of {array.size}. "
            "The checkpoint is damaged, or was saved after training diverged; get a sound copy."
        )
    return array


class StateDict:
    """A state dict that is consumed tensor by tensor; `finish` reports all that did not fit.

    **Arguments:** `tensors`: numpy or torch tensors by name; `prefix`: what some checkpoints put before every name of
    the base model ("transformer.", "model.") and others leave out.
    """

    def __init__(self, tensors: Mapping[str, Any], prefix: str = ""):
        self.tensors = tensors
        self.prefix = prefix
        self.taken: set[str] = set()
        self.problems: list[str] = []

    def resolve(self, name: str) -> str | None:
        """The name under which a tensor is stored, or None."""
        return next((full for full in (self.prefix + name, name) if full in self.tensors), None)

    def has(self, name: str) -> bool:
        return self.resolve(name) is not None

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The tensor as float32; zeros, and a problem noted, when it is missing or has another shape."""
        full = self.resolve(name)
        if full is None:
            self.problems.append(f"missing {self.prefix + name!r}{did_you_mean(self.prefix + name, self.tensors)}")
            return np.zeros(shape, np.float32)
        self.taken.add(full)
        stored = tuple(self.tensors[full].shape)
        if stored != shape:
            self.problems.append(f"{full!r} has shape {stored}, the configuration asks for {shape}")
            return np.zeros(shape, np.float32)
        return as_float32(self.tensors[full], full)

    def skip(self, *names: str) -> None:
        """Tensors that may be there and are not needed (a stored copy of a tied embedding)."""
        self.taken |= {full for name in names if (full := self.resolve(name)) is not None}

    def finish(self, what: str) -> None:
        """**Raises:** `ModelError` with every tensor that was missing, had a wrong shape, or was not expected."""
        left = [n for n in self.tensors if n not in self.taken and not _BUFFERS.search(n)]
        problems = [*self.problems, *(f"unexpected {name!r}" for name in left)]
        if problems:
            shown = "\n  ".join(problems[:12])
            more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise ModelError(
                f"the tensors do not fit {what} ({len(problems)} of them):\n  {shown}{more}\n"
                "config.json and the weights are probably not of the same model, or a shard is missing."
            )
