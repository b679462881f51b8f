"""Any sae-lens SAE or transcoder that decodes linearly, by object, by folder or by its name on the hub.

sae-lens encodes (the sender's tool), or matching pursuit does in its place; what is sent is the decoder: rows, bias,
a transcoder's skip path, and per token the support, the values and the side information that some normalisations need.
Or a transcoder's encoder is sent too, and the receiver runs it: then nothing is sent for a token.
Every loaded SAE is checked against sae-lens's own forward pass. Special tokens are none of its business: their outputs
are constants, which a message carries and pays for, whatever the SAE would have made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sae_lens
import scipy.sparse

from decompositions.dictionary import DictionaryExplanation, fit_dictionary
from decompositions.sae_codes import (
    check_forward,
    decoder_of,
    encode,
    encode_by_pursuit,
    fold_scale,
    mean_active,
    skip_of,
)
from decompositions.sae_loading import load_folder, load_hub, own_copy
from decompositions.sae_origin import TEMPORAL, check, check_weights, data_notes, inner_site, is_transcoder, side_of
from decompositions.sae_reading import Reading, candidates, through
from decompositions.sae_sent import check_sent, sent_transcoder
from decompositions.sent_transcoder import SentTranscoderExplanation
from decompositions.transcoder import Remainder, SkipPath, TranscoderExplanation
from mdl.errors import ExplanationError
from mdl.protocols import Sample

Fitted = DictionaryExplanation | TranscoderExplanation | SentTranscoderExplanation
CHECKED_TOKENS = 64
COMPARED_TOKENS = 2048  # on which what a site's name means is decided, or the pursuit's k


@dataclass(frozen=True)
class SAE:
    """A sae-lens SAE or transcoder: give `path` (a folder), `release` and `id` (the hub), or `object`.

    **Arguments:** `any_site`: accept an SAE that was trained at another site than the region's output, or under other
    weight processing; `name`: what tables show, by default the folder's name or the id; `encoder`: its own, or matching
    pursuit with its rows, `k` steps a token (by default as many features as its own encoder has on a token), or its
    own, sent to the receiver (a transcoder's).
    """

    path: str = ""
    release: str = ""
    id: str = ""
    object: Any = field(default=None, repr=False)
    any_site: bool = False
    name: str = ""
    encoder: Literal["own", "pursuit", "sent"] = "own"
    k: int = 0

    def check(self, site: str, width: int, model_name: str) -> None:
        """Refuse what `fit` would refuse, before anything else is computed. **Raises:** as `fit`."""
        sae, name = self._load(), self._shown_name()
        check(sae, site, width, model_name, name, self.any_site, self.encoder == "pursuit")
        if self.encoder == "sent":
            check_sent(sae, name)

    def fit(self, task: Any) -> Fitted:
        """Load, check against the task, and measure its features on fit data.

        **Raises:** `ExplanationError` if it cannot be loaded, does not decode linearly, or does not fit the task.
        """
        name, pursuit = self._shown_name(), self.encoder == "pursuit"
        sae = self._load()
        if self.encoder == "sent":
            check_sent(sae, name)
        notes = check(sae, task.region.output, task.width, task.model.name, name, self.any_site, pursuit)
        notes += check_weights(sae, task, name, self.any_site) + data_notes(sae, task)
        reading, told = reading_of(sae, task, name)
        values = task.fit.outputs if reading is None else reading(task.fit)
        if values.shape[1] != sae.cfg.d_in:
            raise ExplanationError(
                f"{name}: the SAE reads {sae.cfg.d_in} numbers a token, {reading.site if reading else 'the site'} has "
                f"{values.shape[1]}. It was probably trained on another model ({sae.cfg.metadata.model_name})."
            )
        if sae.cfg.normalize_activations == "expected_average_only_in":
            notes.append(fold_scale(sae, values))
        if sae.cfg.architecture() != TEMPORAL:
            check_forward(sae, name, values[:CHECKED_TOKENS])
        steps = self._steps(sae, values, name) if pursuit else 0
        found = explanation_of(sae, task, name, reading, steps, self.encoder == "sent")
        return _with_notes(found, (*notes, *told))

    def _steps(self, sae: sae_lens.SAE, values: np.ndarray, name: str) -> int:
        if self.k:
            return self.k
        if sae.cfg.architecture() == TEMPORAL:
            raise ExplanationError(f"{name}: say how many features a token has: encoder=pursuit,k=K")
        return mean_active(sae, values[:: max(1, len(values) // COMPARED_TOKENS)])

    def _shown_name(self) -> str:
        if self.name:
            return self.name
        name = Path(self.path).name or self.id.strip("/").split("/")[-1] or "sae"
        added = {"own": "", "pursuit": "+pursuit", "sent": "+encoder"}[self.encoder]
        return name + added + (f" (k={self.k})" if self.k else "")

    def _load(self) -> sae_lens.SAE:
        given = [bool(self.path), bool(self.release or self.id), self.object is not None]
        if sum(given) != 1 or bool(self.release) != bool(self.id):
            raise ExplanationError(
                f"an SAE is given by path, or by release and id, or as an object; got path={self.path!r}, "
                f"release={self.release!r}, id={self.id!r}, object={type(self.object).__name__}"
            )
        if self.k < 0 or (self.k and self.encoder != "pursuit"):
            raise ExplanationError(f"k={self.k} with encoder={self.encoder}: k, at least 1, belongs to encoder=pursuit")
        if self.path:
            sae = load_folder(Path(self.path))
        elif self.release:
            sae = load_hub(self.release, self.id)
        else:
            sae = own_copy(self.object)
        if sae.cfg.reshape_activations == "hook_z":
            sae.turn_off_forward_pass_hook_z_reshaping()  # heads are flattened already where it reads
        return sae.eval()


def reading_of(sae: sae_lens.SAE, task: Any, name: str) -> tuple[Reading | None, list[str]]:
    """What the SAE's encoder reads, None for the region's output; of the meanings that a site's name has had, that
    under which it predicts best. Returns notes too."""
    metadata, inner = sae.cfg.metadata, inner_site(sae)
    if not is_transcoder(sae):
        if inner is None:
            return None, []
        return candidates(task, task.region.output.rsplit(".", 1)[0] + f".{inner}", name)[0], []
    site, notes = metadata.hook_name, []
    if site is None:
        site = task.region.input
        notes.append(f"does not say what it reads; the region's input, {site}, is taken on trust")
    found = candidates(task, site, name)
    if len(found) == 1:
        return found[0], notes
    errors = [_error(sae, task, reading) for reading in found]
    best = found[int(np.argmin(errors))]
    if max(errors) > 1.01 * min(errors):
        notes.append(f"reads {site}: taken as {best.described}, under which it predicts best")
    return best, notes


def _error(sae: sae_lens.SAE, task: Any, reading: Reading) -> float:
    """Sum of squares of what a transcoder leaves, with its own encoder, on the first sequences of fit data."""
    inputs = task.fit.inputs
    sequences = max(1, COMPARED_TOKENS // inputs.tokens.shape[1])
    values = None if inputs.values is None else inputs.values[:sequences]
    some = replace(inputs, tokens=inputs.tokens[:sequences], scored=inputs.scored[:sequences], values=values)
    x = reading(replace(task.fit, inputs=some))
    if x.shape[1] != sae.cfg.d_in:
        return 0.0  # refused by its width, which the caller names
    (atoms, bias), skip = decoder_of(sae), skip_of(sae)
    prediction = encode(sae, x) @ atoms + bias + (0.0 if skip is None else x @ skip)
    return float(np.square(task.fit.outputs[: len(x)] - prediction, dtype=np.float64).sum())


def explanation_of(
    sae: sae_lens.SAE, task: Any, name: str, reading: Reading | None, steps: int, sent: bool = False
) -> Fitted:
    """The sender's side of a checked SAE; `steps` of matching pursuit, or 0 for its own encoder, which may be sent."""
    (atoms, bias), side, inner = decoder_of(sae), side_of(sae), inner_site(sae)
    signed = sae.cfg.architecture() == "abstopk"  # all others, matching pursuit among them, are rectified
    if inner is not None:
        matrix, shift = through(task, inner, side, name)
        atoms, bias = atoms @ matrix, bias @ matrix + shift
    skip = None if reading is None else _skip_path(sae, task, name, reading)
    if skip is not None and reading is not None and reading.shift is not None:
        bias = bias + reading.shift @ skip_of(sae)
    if sent:
        return sent_transcoder(sae, task, name, reading, (atoms, bias), skip)
    encoder: Callable[[np.ndarray], scipy.sparse.csr_array] = partial(encode, sae)
    reads: Callable[[Sample], np.ndarray] | None = reading
    if steps:
        encoder = partial(encode_by_pursuit, atoms, bias, side, steps, signed)
        reads = None if skip is None else Remainder(skip.matrix)
    values = task.fit.outputs if reads is None else reads(task.fit)
    dictionary = fit_dictionary(name, atoms, bias, encoder, values, signed, side)
    return dictionary if reads is None else TranscoderExplanation(dictionary, reads, skip)


def _skip_path(sae: sae_lens.SAE, task: Any, name: str, reading: Reading) -> SkipPath | None:
    """The skip path as a map of the region's inputs. **Raises:** `ExplanationError` where it reads something else."""
    matrix = skip_of(sae)
    if matrix is None:
        return None
    if not reading.inputs:
        raise ExplanationError(
            f"{name}: its skip path multiplies {reading.site}, of which the receiver has no copy: what enters the "
            f"region {task.region.name!r} is {task.region.input}, from which it cannot be had. Only a transcoder "
            "without a skip path can be scored when it reads there."
        )
    scaled = matrix if reading.scale is None else reading.scale[:, None] * matrix
    return SkipPath.of(scaled, task.fit.inputs.scored_values())


def _with_notes(found: Fitted, notes: tuple[str, ...]) -> Fitted:
    if isinstance(found, TranscoderExplanation):
        return replace(found, dictionary=replace(found.dictionary, notes=notes))
    return replace(found, notes=(*found.notes, *notes))
