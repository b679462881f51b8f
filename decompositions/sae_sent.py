"""sae-lens transcoders whose encoder is sent: what of them a receiver can run, and their encoder as it is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import sae_lens
import scipy.sparse

from decompositions.dictionary import feature_statistics
from decompositions.sae_codes import TOLERANCE, encode
from decompositions.sae_origin import is_transcoder
from decompositions.sae_reading import Reading
from decompositions.sent_transcoder import AS_IT_IS, NORM, NORM_AND_MEAN, Encoder, SentTranscoderExplanation
from decompositions.transcoder import SkipPath
from mdl.errors import ExplanationError

NORMALISATIONS = (("none", AS_IT_IS), ("constant_norm_rescale", NORM), ("layer_norm", NORM_AND_MEAN))
COMPARED_TOKENS = 64
SAME = 1e-3  # thresholds whose spread is a smaller share of the largest were one, before they were stored


def check_sent(sae: sae_lens.SAE, name: str) -> None:
    """**Raises:** `ExplanationError` for an SAE that encodes what it predicts."""
    if not is_transcoder(sae):
        raise ExplanationError(
            f"{name}: encoder=sent for an SAE ({sae.cfg.architecture()}) whose encoder reads "
            f"{sae.cfg.metadata.hook_name or 'what it predicts'}: just what the receiver is to be told, so that it has "
            "nothing to run the encoder on. Only a transcoder's can be sent; take encoder=own, which sends the codes."
        )


def encoder_of(sae: sae_lens.SAE, reading: Reading, name: str) -> Encoder:
    """The encoder as a function of the region's inputs; what lies between these and what it reads is folded in.

    **Raises:** `ExplanationError` where the normalisation stands in the way.
    """
    rows, bias = (a.detach().numpy().astype(np.float64) for a in (sae.W_enc.T, sae.b_enc))
    normalisation = dict(NORMALISATIONS)[sae.cfg.normalize_activations]
    if normalisation != AS_IT_IS and (reading.scale is not None or reading.shift is not None):
        raise ExplanationError(
            f"{name}: encoder=sent, with normalize_activations={sae.cfg.normalize_activations!r} behind the scale and "
            f"bias of a norm at {reading.site}, which cannot be folded into it. Take encoder=own: the codes are sent."
        )
    if reading.shift is not None:
        bias = bias + rows @ reading.shift
    if reading.scale is not None:
        rows = rows * reading.scale
    threshold = getattr(sae, "threshold", None)
    thresholds = np.zeros(1) if threshold is None else threshold.detach().numpy().astype(np.float64)
    return Encoder(np.concatenate([rows, bias[:, None]], 1), thresholds, normalisation)


def sent_transcoder(
    sae: sae_lens.SAE,
    task: Any,
    name: str,
    reading: Reading | None,
    decoder: tuple[np.ndarray, np.ndarray],
    skip: SkipPath | None,
) -> SentTranscoderExplanation:
    """The sender's side of a checked transcoder, its features measured on fit data; `decoder`: rows and bias.

    **Raises:** `ExplanationError` if the receiver has no copy of what the encoder reads, or no feature is ever on.
    """
    if reading is None or not reading.inputs:
        site = "nothing that is known" if reading is None else reading.site
        raise ExplanationError(
            f"{name}: encoder=sent, but its encoder reads {site}, of which the receiver has no copy: what enters the "
            f"region {task.region.name!r} is {task.region.input}, from which it cannot be had. Take encoder=own, which "
            "sends the codes."
        )
    encoder, inputs, (atoms, bias) = encoder_of(sae, reading, name), task.fit.inputs.scored_values(), decoder
    expected = encode(sae, reading(task.fit)[:COMPARED_TOKENS])
    _check_encoder(encoder.activations(inputs[:COMPARED_TOKENS]), expected, name)
    encoder, atoms = in_own_units(encoder, atoms)
    found = encoder.activations(inputs)
    if found.nnz == 0:
        raise ExplanationError(
            f"{name}: none of {found.shape[1]} features is on for any of {len(inputs)} tokens. The transcoder was "
            "probably made for inputs of another site, model or scale."
        )
    notes = (f"{found.nnz / len(inputs):.4g} features on a token of fit data: the receiver finds out which",)
    statistics = feature_statistics(found, task.fit.outputs, 0)
    x = encoder.extended(inputs)
    return SentTranscoderExplanation(name, encoder, atoms, bias, statistics, x.T @ x / len(x), skip, notes)


def in_own_units(encoder: Encoder, atoms: np.ndarray) -> tuple[Encoder, np.ndarray]:
    """The same function with atoms of length 1: what is sent does not depend on the units that training left, and a
    threshold that training had in common (BatchTopK's) is in common again."""
    lengths = np.maximum(np.linalg.norm(atoms.astype(np.float64), axis=1), 1e-30)
    thresholds = np.broadcast_to(encoder.thresholds, lengths.shape) * lengths
    if np.ptp(thresholds) <= SAME * np.abs(thresholds).max(initial=0.0):
        thresholds = thresholds[:1]
    return Encoder(encoder.rows * lengths[:, None], thresholds, encoder.normalisation), atoms / lengths[:, None]


def _check_encoder(ours: scipy.sparse.csr_array, expected: scipy.sparse.csr_array, name: str) -> None:
    """Our encoder must be sae-lens's own. **Raises:** `ExplanationError` if it is not."""
    difference, largest = abs(ours - expected).max(), abs(expected).max()
    if not difference <= TOLERANCE * max(float(largest), 1e-6):
        raise ExplanationError(
            f"{name}: encoding differs from sae-lens {sae_lens.__version__}'s own by {difference:.3g} on "
            f"{ours.shape[0]} tokens: this version of sae-lens encodes in a way that is not supported here"
        )
