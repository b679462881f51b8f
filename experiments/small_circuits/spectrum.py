"""At which frequencies a model of modular addition works: power, and what is left when its logits have no others."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from decompositions.weights.fourier import wave_power
from experiments.small_circuits.examples import additions
from mdl.models.model import Model
from mdl.models.transformer import run

KEY = 5  # frequencies
WRITERS = "W_out"


def spectrum(model: Model, modulus: int, key: int = KEY) -> dict[str, Any]:
    """Key frequencies (of the largest power in the embedding), their share of the power of the embedding and of the
    neuron-to-logit map W_out W_U; and the loss in nats, the accuracy and the fraction of the logits' variance explained
    when logits are restricted to clocks at these frequencies with the least-squares amplitudes.

    The restriction is Nanda et al. 2023's: logits projected on cos and sin (w_k (x + y)) times cos and sin (w_k c), the
    parts of these that are functions of x + y - c; all p^2 pairs.
    """
    examples = additions(modulus)
    logits = np.asarray(_logits(model, examples.tokens), np.float64).reshape(modulus, modulus, modulus)
    embedding = np.asarray(model.params["embed"]["W_E"], np.float64)[:modulus]
    out = np.asarray(model.params["blocks"][0]["mlp"][WRITERS], np.float64)
    to_logits = out @ np.asarray(model.params["unembed"]["W_U"], np.float64)
    power = wave_power(embedding)
    chosen = np.argsort(-power, kind="stable")[:key] + 1
    total = np.add.outer(np.arange(modulus), np.arange(modulus)) % modulus
    place = (total[..., None] - np.arange(modulus)) % modulus
    centred = logits - logits.mean(-1, keepdims=True)
    aligned = np.bincount(place.ravel(), centred.ravel(), modulus) / modulus**2
    clocks = np.cos(2.0 * np.pi / modulus * np.outer(chosen, np.arange(modulus)))
    amplitudes = 2.0 / modulus * clocks @ aligned
    restricted = (amplitudes @ clocks)[place]
    return {
        "key_frequencies": chosen.tolist(),
        "embedding_power": float(power[chosen - 1].sum()),
        "to_logits_power": float(wave_power(to_logits.T)[chosen - 1].sum()),
        "amplitudes": amplitudes.tolist(),
        "variance_explained": float(1.0 - np.square(centred - restricted).sum() / np.square(centred).sum()),
        "own": _figures(logits, total),
        "restricted": _figures(restricted, total),
    }


def _logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    found = jax.jit(partial(run, model.config, reads=["logits"]))
    parts = [np.asarray(found(model.params, part)["logits"])[:, -1] for part in np.split(tokens, len(tokens) // 113)]
    return np.concatenate(parts)


def _figures(logits: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    right = np.take_along_axis(logs, answers[..., None], -1)
    return {"loss_nats": float(-right.mean()), "accuracy": float((logits.argmax(-1) == answers).mean())}
