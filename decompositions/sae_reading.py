"""What an encoder reads: a site of the model, which need not be the one that it predicts.

The encoder is the sender's tool. What it reads is computed from the tokens by the sender, who holds the whole model; of
it only the codes travel.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from decompositions.dictionary import REMEMBERED
from decompositions.sae_origin import INNER
from mdl.errors import ExplanationError
from mdl.models import Model
from mdl.models.transformer import run
from mdl.protocols import Sample

TOKENS = 4096  # tokens a run of the model


@dataclass(frozen=True)
class Reading:
    """Values [n, d_in] of `site` at a sample's scored positions, times `scale` plus `shift` where there are such.

    `inputs`: the site is the region's own input, which a receiver has too.
    """

    model: Model
    site: str
    inputs: bool = False
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    known: dict[bytes, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, sample: Sample) -> np.ndarray:
        """Float32, heads flattened."""
        values = sample.inputs.scored_values() if self.inputs else self._run(sample)
        values = values if self.scale is None else values * self.scale
        return np.asarray(values if self.shift is None else values + self.shift, np.float32)

    def _run(self, sample: Sample) -> np.ndarray:
        """The latest few are kept: a scorer encodes the same samples at many settings."""
        tokens, scored = sample.inputs.tokens, sample.inputs.scored
        key = hashlib.blake2b(tokens.tobytes() + scored.tobytes(), digest_size=16).digest()
        if key not in self.known:
            while len(self.known) >= REMEMBERED:
                del self.known[next(iter(self.known))]
            self.known[key] = self._values(tokens, scored)
        return self.known[key]

    def _values(self, tokens: np.ndarray, scored: np.ndarray) -> np.ndarray:
        size = max(1, TOKENS // tokens.shape[1])
        found = []
        for start in range(0, len(tokens), size):
            batch = tokens[start : start + size]
            padded = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), 0)])  # one shape, one compilation
            values = np.asarray(self._read(self.model.params, padded)[self.site])[: len(batch)]
            found.append(values.reshape(*batch.shape, -1)[scored[start : start + size]])
        return np.concatenate(found)

    @cached_property
    def _read(self) -> Callable[..., Any]:
        return jax.jit(partial(run, self.model.config, reads=(self.site,)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Reading:
        """With the same model: its weights are never written to, and too large to have twice."""
        return replace(self, known={})

    @property
    def described(self) -> str:
        return self.site if self.scale is None and self.shift is None else f"{self.site} behind its scale and bias"


def candidates(task: Any, site: str, name: str) -> tuple[Reading, ...]:
    """What a site's name may mean, the likeliest first.

    `ln2.hook_normalized` is the norm's output before its scale and bias in TransformerLens 3 (and there for every
    RMSNorm), after them for a LayerNorm in its versions 1 and 2; `mlp.hook_in` is what the MLP reads. `hook_mlp_in` is
    the residual stream before the norm, but sae-lens gives this name to what transcoders of Gemma 3 read behind it.

    **Raises:** `ExplanationError` for a site that the model does not have, or a model without named sites.
    """
    if not isinstance(task.model, Model):
        raise ExplanationError(
            f"{name} reads {site} and predicts another site; {task.model.name} runs as a torch module, whose inner "
            "sites have other names. Use a model with an adapter."
        )
    match = re.fullmatch(r"(blocks\.(\d+)\.)(ln2\.hook_normalized|mlp\.hook_in|hook_mlp_in)", site)
    if match is None:
        return (_reading(task, site, name),)
    block = task.model.params["blocks"][int(match[2])] if int(match[2]) < task.model.config.n_layers else {}
    normalized = _reading(task, f"{match[1]}ln2.hook_normalized", name)
    norm = {key: np.asarray(value, np.float32) for key, value in block.get("ln2", {}).items()}
    plain = (normalized,)
    scaled = (Reading(task.model, normalized.site, normalized.inputs, norm.get("w"), norm.get("b")),) if norm else ()
    if match[3] == "ln2.hook_normalized":
        return (*plain, *scaled)
    if match[3] == "mlp.hook_in":
        return (*scaled, *plain)
    stream = "hook_resid_mid" if task.model.config.sequential else "hook_resid_pre"
    return (_reading(task, match[1] + stream, name), *scaled, *plain)


def _reading(task: Any, site: str, name: str) -> Reading:
    known = task.model.sites()
    if site not in known:
        raise ExplanationError(
            f"{name} reads {site}, which {task.model.name} does not have ({task.model.config.n_layers} layers, "
            f"{len(known)} sites). It was probably trained on another model."
        )
    return Reading(task.model, site, site == task.region.input)


def through(task: Any, inner: str, side: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The known matrix [d_inner, d] and bias [d] from an inner site (heads' outputs, neurons) to the region's output.

    **Raises:** `ExplanationError` where what lies between is not linear, or token scales would not pass through it.
    """
    if not isinstance(task.model, Model):
        raise ExplanationError(f"{name}: {inner} of {task.model.name}, a torch module without an adapter, is not known")
    if not task.region.output.endswith(INNER[inner]):
        raise ExplanationError(f"{name}: trained at {inner}, from which no one matrix leads to {task.region.output}")
    if task.model.config.post_norms:
        raise ExplanationError(
            f"{name}: between {inner} and {task.region.output} {task.model.name} has a norm, so that no linear map "
            "leads from the SAE's rows to the region's output"
        )
    if side:
        raise ExplanationError(
            f"{name}: trained at {inner} with a norm or mean of each token, which its output's bias is not scaled by; "
            "only SAEs without such a normalisation are carried on to the region's output"
        )
    layer, part = int(task.region.output.split(".")[1]), inner.split(".")[0]
    weights = task.model.params["blocks"][layer][part]
    key = "O" if part == "attn" else "out"
    matrix = np.asarray(weights[f"W_{key}"], np.float32)
    matrix = matrix.reshape(-1, matrix.shape[-1])
    return matrix, np.asarray(weights.get(f"b_{key}", np.zeros(matrix.shape[1])), np.float32)
