"""Any sae-lens SAE that is a linear dictionary, by object, by folder or by its name on the hub.

sae-lens encodes (the sender's tool); what is sent is the decoder: rows, bias, and per token the support, the values and
the side information that some normalisations need. Every loaded SAE is checked against sae-lens's own forward pass.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import scipy.sparse
import torch
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from decompositions.dictionary import NO_SIDE, SCALE, SCALE_AND_MEAN, DictionaryExplanation, fit_dictionary, token_side
from mdl.errors import ExplanationError, did_you_mean

FILES = ("cfg.json", "sae_weights.safetensors")
LINEAR = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit")
SIDE = {
    "none": NO_SIDE,
    "expected_average_only_in": NO_SIDE,
    "constant_norm_rescale": SCALE,
    "layer_norm": SCALE_AND_MEAN,
}
CHUNK_ELEMENTS = 1 << 24  # activations held densely at a time
CHECKED_TOKENS = 64
TOLERANCE = 1e-4  # of the largest output, in float32


@dataclass(frozen=True)
class SAE:
    """A sae-lens SAE: give `path` (a folder), `release` and `id` (the hub), or `object`.

    **Arguments:** `any_site`: accept an SAE that was trained at another site than the region's output; `name`: what
    tables show, by default the folder's name or the id.
    """

    path: str = ""
    release: str = ""
    id: str = ""
    object: Any = field(default=None, repr=False)
    any_site: bool = False
    name: str = ""

    def check(self, site: str, width: int, model_name: str) -> None:
        """Refuse what `fit` would refuse, before anything else is computed. **Raises:** as `fit`."""
        check(self._load(), site, width, model_name, self._shown_name(), self.any_site)

    def _shown_name(self) -> str:
        return self.name or Path(self.path).name or self.id.strip("/").split("/")[-1] or "sae"

    def fit(self, task: Any) -> DictionaryExplanation:
        """Load, check against the task, and measure its features on fit data.

        **Raises:** `ExplanationError` if it cannot be loaded, is no linear dictionary, or does not fit the task.
        """
        name = self._shown_name()
        sae = self._load()
        notes = check(sae, task.region.output, task.width, task.model.name, name, self.any_site)
        outputs = task.fit.outputs
        if sae.cfg.normalize_activations == "expected_average_only_in":
            notes.append(fold_scale(sae, outputs))
        atoms, bias = decoder_of(sae)
        side = SIDE[sae.cfg.normalize_activations]
        check_forward(sae, name, atoms, bias, outputs[:CHECKED_TOKENS])
        signed = sae.cfg.architecture() == "abstopk"  # matching pursuit here is rectified
        return fit_dictionary(name, atoms, bias, partial(encode, sae), outputs, signed, side, tuple(notes))

    def _load(self) -> sae_lens.SAE:
        given = [bool(self.path), bool(self.release or self.id), self.object is not None]
        if sum(given) != 1 or bool(self.release) != bool(self.id):
            raise ExplanationError(
                f"an SAE is given by path, or by release and id, or as an object; got path={self.path!r}, "
                f"release={self.release!r}, id={self.id!r}, object={type(self.object).__name__}"
            )
        if self.path:
            sae = load_folder(Path(self.path))
        elif self.release:
            sae = load_hub(self.release, self.id)
        else:
            sae = own_copy(self.object)
        if sae.cfg.reshape_activations == "hook_z":
            sae.turn_off_forward_pass_hook_z_reshaping()  # the task's outputs have their heads flattened already
        return sae.eval()


def load_folder(path: Path) -> sae_lens.SAE:
    """Read an inference SAE from disk, float32 on the CPU. **Raises:** `ExplanationError` if it is not one."""
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else "no such folder"
        raise ExplanationError(
            f"{path} is not a sae-lens SAE: {' and '.join(missing)} missing (found: {found}). Expected the folder that "
            f"`save_model` or `save_inference_model` writes, with {FILES[0]} and {FILES[1]}."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # how to load the model; ours is loaded
            return sae_lens.SAE.load_from_disk(path, device="cpu", dtype="float32")
    except Exception as error:  # sae-lens and safetensors raise many types, all about these two files
        raise ExplanationError(
            f"sae-lens {sae_lens.__version__} cannot read {path}: {type(error).__name__}: {error}. The files are "
            "damaged, or were written by a training class or another version; save again with `save_inference_model`."
        ) from error


def load_hub(release: str, identifier: str) -> sae_lens.SAE:
    """Download an SAE with sae-lens. **Raises:** `ExplanationError` with near names, or what to put where."""
    directory = get_pretrained_saes_directory()
    if release not in directory and "/" not in release:
        near = did_you_mean(release, directory)
        raise ExplanationError(f"sae-lens {sae_lens.__version__} lists no release {release!r}.{near}")
    if release in directory and identifier not in directory[release].saes_map:
        near = did_you_mean(identifier, directory[release].saes_map)
        raise ExplanationError(f"release {release!r} has no SAE {identifier!r}.{near}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return sae_lens.SAE.from_pretrained(release, identifier, device="cpu", dtype="float32")
    except Exception as error:  # the hub's client raises many types
        raise ExplanationError(
            f"{release}/{identifier} could not be fetched from the Hugging Face hub ({type(error).__name__}: {error}). "
            "Without a connection: download it elsewhere, `SAE.from_pretrained(...).save_model(folder)`, copy the "
            f"folder ({FILES[0]}, {FILES[1]}) here and give it as path."
        ) from error


def own_copy(given: Any) -> sae_lens.SAE:
    """An independent inference copy of an SAE or a training SAE, by way of its own files."""
    if not isinstance(given, sae_lens.SAE):
        raise ExplanationError(f"object is a {type(given).__name__}; expected a sae_lens.SAE or sae_lens.TrainingSAE")
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(given, sae_lens.TrainingSAE):
            given.save_inference_model(folder)
        else:
            given.save_model(folder)
        return load_folder(Path(folder))


def canonical_site(name: str) -> str:
    """One name for sites that carry the same activation: after block l is before block l + 1, in either naming."""
    if match := re.fullmatch(
        r"(?:model\.layers|gpt_neox\.layers|transformer\.h|model\.language_model\.layers)\.(\d+)", name
    ):
        return f"blocks.{int(match[1]) + 1}.hook_resid_pre"
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", name):
        return f"blocks.{int(match[1]) + 1}.hook_resid_pre"
    return name


def check(sae: sae_lens.SAE, site: str, width: int, model_name: str, name: str, any_site: bool) -> list[str]:
    """Refuse an SAE that does not fit the region's output, before any long work. Returns notes for the score."""
    config, metadata = sae.cfg, sae.cfg.metadata
    architecture = config.architecture()
    if architecture not in LINEAR:
        raise ExplanationError(
            f"{name}: architecture {architecture!r} is no linear dictionary of what it reads. Supported: "
            f"{', '.join(LINEAR)}; batchtopk and matryoshka as saved, which is jumprelu. Transcoders read elsewhere "
            "than they write: use the decomposition 'transcoder'."
        )
    if config.normalize_activations not in SIDE:
        raise ExplanationError(
            f"{name}: normalize_activations={config.normalize_activations!r} is applied outside the SAE; fold it into "
            f"the weights first (sae-lens does so at the end of training). Supported: {', '.join(SIDE)}."
        )
    for tensor, value in sae.state_dict().items():
        if bad := int((~torch.isfinite(value)).sum()):
            raise ExplanationError(f"{name}: {bad} of {value.numel()} entries of {tensor} are NaN or infinite")
    if config.d_in != width:
        heads = " Its heads have to be flattened for this one." if config.reshape_activations == "hook_z" else ""
        raise ExplanationError(
            f"{name}: the SAE reads {config.d_in} numbers a token, the region's output {site} has "
            f"{width}. It was probably trained on another model or site ({metadata.model_name}, "
            f"{metadata.hook_name}).{heads}"
        )
    return _check_origin(metadata, site, model_name, name, any_site)


def _check_origin(metadata: Any, output: str, model_name: str, name: str, any_site: bool) -> list[str]:
    site, notes = metadata.hook_name, []
    if metadata.hook_head_index is not None:
        raise ExplanationError(
            f"{name}: trained on head {metadata.hook_head_index} alone of {site}; a region has all heads"
        )
    if site is None:
        notes.append(f"{name} does not say at which site it was trained; {output} is taken on trust")
    elif canonical_site(site) != canonical_site(output):
        message = f"{name}: trained at {site}, the region's output is {output}"
        if not any_site:
            layer = "upstream of " if "resid" in site else "that ends at "
            raise ExplanationError(f"{message}. Take the region {layer}{site}, or any_site=True to score it here.")
        notes.append(message)
    if metadata.model_name and metadata.model_name != model_name:
        notes.append(f"{name}: its metadata name the model {metadata.model_name!r}, the task's is {model_name!r}")
    return notes


def fold_scale(sae: sae_lens.SAE, outputs: np.ndarray) -> str:
    """Fold in the scale sqrt(d) / mean norm that training used and did not store, measured on fit data as sae-lens
    measures it. Returns the note that says so."""
    factor = float(np.sqrt(sae.cfg.d_in) / np.linalg.norm(outputs, axis=1).mean())
    sae.fold_activation_norm_scaling_factor(factor)
    return f"expected_average_only_in without a stored factor: {factor:.6g} measured on fit data and folded in"


def decoder_of(sae: sae_lens.SAE) -> tuple[np.ndarray, np.ndarray]:
    """Effective rows [F, d] and bias [d] of `decode`, before any per-token normalisation is undone; float32."""
    atoms = sae.W_dec.detach()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        atoms = atoms / atoms.norm(dim=-1, keepdim=True)
    bias = sae.b_dec.detach()
    if sae.cfg.architecture() == "matching_pursuit" and not sae.cfg.apply_b_dec_to_input:
        bias = torch.zeros_like(bias)
    return atoms.numpy().astype(np.float32), bias.numpy().astype(np.float32)


@torch.no_grad()
def encode(sae: sae_lens.SAE, outputs: np.ndarray) -> scipy.sparse.csr_array:
    """sae-lens's own encoding, sparse float32 [n, F], a bounded number of dense activations at a time."""
    size = max(1, CHUNK_ELEMENTS // sae.cfg.d_sae)
    found = []
    for start in range(0, len(outputs), size):
        codes = sae.encode(torch.from_numpy(np.ascontiguousarray(outputs[start : start + size], np.float32)))
        found.append(scipy.sparse.csr_array((codes.to_dense() if codes.is_sparse else codes).numpy()))
    return scipy.sparse.vstack(found, format="csr") if found else scipy.sparse.csr_array((0, sae.cfg.d_sae))


@torch.no_grad()
def check_forward(sae: sae_lens.SAE, name: str, atoms: np.ndarray, bias: np.ndarray, outputs: np.ndarray) -> None:
    """Our decoding of the exact activations must be sae-lens's own. **Raises:** `ExplanationError` if it is not."""
    expected = sae(torch.from_numpy(np.ascontiguousarray(outputs, np.float32))).numpy()
    ours = encode(sae, outputs) @ atoms + bias
    side = SIDE[sae.cfg.normalize_activations]
    if side != NO_SIDE:
        scale, mean = token_side(outputs, side)
        ours = ours * scale[:, None] + mean[:, None]
    difference = float(np.abs(ours - expected).max(initial=0.0))
    if not difference <= TOLERANCE * max(float(np.abs(expected).max(initial=0.0)), 1e-6):
        raise ExplanationError(
            f"{name}: decoding differs from sae-lens {sae_lens.__version__}'s own by {difference:.3g} on "
            f"{len(outputs)} tokens: this version of sae-lens decodes in a way that is not supported here"
        )
