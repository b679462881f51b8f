"""Does an SAE belong to this task? Where it was trained, on which weights, on what data: refusals and notes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import sae_lens
import torch

from decompositions.dictionary import NO_SIDE, SCALE, SCALE_AND_MEAN
from mdl.errors import ExplanationError

LINEAR = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
TEMPORAL = "temporal"
SIDE = {
    "none": NO_SIDE,
    "expected_average_only_in": NO_SIDE,
    "constant_scalar_rescale": NO_SIDE,  # temporal SAEs only; folded in
    "constant_norm_rescale": SCALE,
    "layer_norm": SCALE_AND_MEAN,
}
# Sites inside a block whose activation one known matrix turns into the block's output.
INNER = {"attn.hook_z": "hook_attn_out", "mlp.hook_post": "hook_mlp_out"}
BLOCK = r"(?:model\.layers|gpt_neox\.layers|transformer\.h|model\.language_model\.layers)\.(\d+)"
CENTRED = 1e-3  # of a token's norm: float32 weights whose mean was taken off leave 1e-6


def is_transcoder(sae: sae_lens.SAE) -> bool:
    return sae.cfg.architecture() in TRANSCODERS


def side_of(sae: sae_lens.SAE) -> int:
    """What side information decoding needs. A transcoder normalises what it reads, and does not undo it."""
    return NO_SIDE if is_transcoder(sae) else SIDE[sae.cfg.normalize_activations]


def canonical_site(name: str) -> str:
    """One name for sites that carry the same activation: after block l is before block l + 1, in either naming."""
    if match := re.fullmatch(BLOCK, name):
        return f"blocks.{int(match[1]) + 1}.hook_resid_pre"
    if match := re.fullmatch(rf"{BLOCK}\.(mlp|attn|attention|self_attn)", name):
        return f"blocks.{int(match[1])}.hook_{'mlp' if match[2] == 'mlp' else 'attn'}_out"
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", name):
        return f"blocks.{int(match[1]) + 1}.hook_resid_pre"
    return name


def inner_site(sae: sae_lens.SAE) -> str | None:
    """The inner site that an SAE reconstructs, if its region ends one matrix later."""
    site = sae.cfg.metadata.hook_name
    if site is None or is_transcoder(sae):
        return None
    return next((inner for inner in INNER if site.endswith(inner)), None)


def written_site(sae: sae_lens.SAE) -> str | None:
    """The site that an SAE's prediction is of, None where it does not say."""
    metadata = sae.cfg.metadata
    if is_transcoder(sae):
        return metadata.hook_name_out
    inner = inner_site(sae)
    return metadata.hook_name if inner is None else metadata.hook_name.removesuffix(inner) + INNER[inner]


def region_of(site: str) -> str | None:
    """The region that ends at a site, as `parse_region` reads it; None if there is none, as far as names say."""
    if match := re.fullmatch(r"(blocks\.\d+)\.hook_(mlp|attn)_out", site):
        return f"{match[1]}.{match[2]}"
    beside = re.fullmatch(r"blocks\.\d+\.(?!hook_resid_(pre|mid|post)$).*", site)
    return None if beside else f"upstream of {site}"


def check(
    sae: sae_lens.SAE, site: str, width: int, model_name: str, name: str, any_site: bool, pursuit: bool
) -> list[str]:
    """Refuse an SAE that does not fit the region's output, before any long work. Returns notes for the score.

    **Raises:** `ExplanationError`.
    """
    _check_decodes(sae, name, pursuit)
    for tensor, value in sae.state_dict().items():
        if bad := int((~torch.isfinite(value)).sum()):
            raise ExplanationError(f"{name}: {bad} of {value.numel()} entries of {tensor} are NaN or infinite")
    notes = _check_site(sae, site, model_name, name, any_site)
    written = sae.cfg.d_out if is_transcoder(sae) else sae.cfg.d_in
    if written != width and inner_site(sae) is None:
        metadata = sae.cfg.metadata
        raise ExplanationError(
            f"{name}: the SAE {'writes' if is_transcoder(sae) else 'reads'} {written} numbers a token, the region's "
            f"output {site} has {width}. It was probably trained on another model or site ({metadata.model_name}, "
            f"{written_site(sae)})."
        )
    return notes


def _check_decodes(sae: sae_lens.SAE, name: str, pursuit: bool) -> None:
    """Whether what it decodes to is a function of symbols that can be sent."""
    architecture, normalisation = sae.cfg.architecture(), sae.cfg.normalize_activations
    if architecture == TEMPORAL and not pursuit:
        raise ExplanationError(
            f"{name}: a temporal SAE's output is no function of its sparse codes. forward() adds codes that attention "
            "predicts with the true activation of the token itself: as its query, and in the projection that scales "
            "them. They are dense and cannot be had from what was sent before; decode() leaves them out and says so. "
            "Its dictionary alone can be scored: encoder=pursuit,k=K."
        )
    if architecture not in (*LINEAR, *TRANSCODERS, TEMPORAL):
        raise ExplanationError(
            f"{name}: architecture {architecture!r} is no linear dictionary that is known here. Supported: "
            f"{', '.join((*LINEAR, *TRANSCODERS))}; batchtopk and matryoshka as saved, which is jumprelu."
        )
    if normalisation not in SIDE:
        raise ExplanationError(
            f"{name}: normalize_activations={normalisation!r} is applied outside the SAE; fold it into "
            f"the weights first (sae-lens does so at the end of training). Supported: {', '.join(SIDE)}."
        )
    if is_transcoder(sae) and normalisation == "expected_average_only_in":
        raise ExplanationError(
            f"{name}: a transcoder with normalize_activations={normalisation!r} was trained on scaled inputs and "
            "scaled outputs, and stores neither factor. Fold both into its weights and set it to 'none'."
        )


def _check_site(sae: sae_lens.SAE, output: str, model_name: str, name: str, any_site: bool) -> list[str]:
    metadata, site, notes = sae.cfg.metadata, written_site(sae), []
    heads = {"hook_head_index": metadata.hook_name, "hook_head_index_out": metadata.hook_name_out}
    for key, place in heads.items():
        if metadata[key] is not None:
            raise ExplanationError(f"{name}: trained on head {metadata[key]} alone of {place}; a region has all heads")
    if site is None:
        verb = "writes" if is_transcoder(sae) else "was trained"
        notes.append(f"does not say at which site it {verb}; {output} is taken on trust")
    elif canonical_site(site) != canonical_site(output):
        message = f"{'writes to' if is_transcoder(sae) else 'trained at'} {site}, the region's output is {output}"
        if not any_site:
            region = region_of(site)
            ends = "No region ends there" if region is None else f"Take the region '{region}'"
            raise ExplanationError(f"{name}: {message}. {ends}; any_site=True scores it here.")
        notes.append(message)
    if metadata.model_name and metadata.model_name != model_name:
        notes.append(f"its metadata name the model {metadata.model_name!r}, the task's is {model_name!r}")
    return notes


def check_weights(sae: sae_lens.SAE, task: Any, name: str, any_site: bool) -> list[str]:
    """Refuse an SAE whose `model_from_pretrained_kwargs` ask for other weights than the task's model has.

    Centred writing weights leave a residual stream whose tokens have mean 0, which is what is looked at; models with
    other norms than LayerNorm are never centred. Folding norms, or centring the unembedding, changes nothing at a
    residual site.

    **Raises:** `ExplanationError` with the switch to set; with `any_site` it becomes a note.
    """
    asked = sae.cfg.metadata.model_from_pretrained_kwargs or {}
    found = _processing_of(sae, task)
    notes = []
    for key, has in found.items():
        if key not in asked or bool(asked[key]) == has:
            continue
        message = (
            f"trained on the activations of a model loaded with {key}={bool(asked[key])}; "
            f"{task.model.name} was loaded {'with' if has else 'without'} it"
        )
        if not any_site:
            remedy = f"Leave {key} out" if has else f"Load it so: --process {key}, in Python process=[{key!r}]"
            raise ExplanationError(f"{name}: {message}. {remedy}; or any_site=True to score the SAE on these weights.")
        notes.append(message)
    return notes


def _processing_of(sae: sae_lens.SAE, task: Any) -> dict[str, bool]:
    """Which weight processing the model shows, of that which matters where the SAE was trained."""
    config, inner = getattr(task.model, "config", None), inner_site(sae)
    if inner == "attn.hook_z":
        blocks = task.model.params["blocks"] if config is not None else []
        # Without value biases there is nothing to fold, and no difference.
        return {"fold_value_biases": False} if any(np.any(b["attn"].get("b_V", 0)) for b in blocks) else {}
    if inner is not None or getattr(config, "norm", "layer") != "layer":
        return {}
    outputs = task.fit.outputs
    off = np.abs(outputs.mean(1, dtype=np.float64)) * np.sqrt(outputs.shape[1])
    return {"center_writing_weights": bool(off.mean() < CENTRED * np.linalg.norm(outputs, axis=1).mean())}


def data_notes(sae: sae_lens.SAE, task: Any) -> list[str]:
    """How the data differ from what the SAE was trained on: length of context, start token."""
    metadata, tokens, scored = sae.cfg.metadata, task.fit.inputs.tokens, task.fit.inputs.scored
    notes = []
    if metadata.context_size and metadata.context_size < tokens.shape[1]:
        notes.append(f"trained on contexts of {metadata.context_size} tokens, these have {tokens.shape[1]}")
    if metadata.prepend_bos and scored[:, 0].any():
        share = scored[:, 0].mean()
        notes.append(f"trained on sequences that begin with a start token; {100 * share:.0f} % of these begin without")
    if metadata.seqpos_slice not in (None, [None], (None,)):
        notes.append(f"trained at positions {metadata.seqpos_slice} alone, scored at all")
    return notes
