"""sae-lens SAEs and transcoders, read in float32: from a folder, from the hub, from an object."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import sae_lens
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from mdl.errors import ExplanationError, did_you_mean

FILES = ("cfg.json", "sae_weights.safetensors")
ACTIVATION_KEYS = ("activation_fn", "activation_fn_str")  # of configs older than sae-lens 6
ACTIVATIONS = ("relu", "topk")


def load_folder(path: Path) -> sae_lens.SAE:
    """Read an inference SAE from disk, float32 on the CPU, whatever it was stored in.

    **Raises:** `ExplanationError` if it is not one, or if sae-lens would read it as something that it is not.
    """
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else "no such folder"
        raise ExplanationError(
            f"{path} is not a sae-lens SAE: {' and '.join(missing)} missing (found: {found}). Expected the folder that "
            f"`save_model` or `save_inference_model` writes, with {FILES[0]} and {FILES[1]}."
        )
    try:
        _check_activation(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # how to load the model; that is checked against the task's
            return sae_lens.SAE.load_from_disk(path, device="cpu", dtype="float32", converter=read_folder)
    except ExplanationError:
        raise
    except Exception as error:  # sae-lens and safetensors raise many types, all about these two files
        raise ExplanationError(
            f"sae-lens {sae_lens.__version__} cannot read {path}: {type(error).__name__}: {error}. The files are "
            "damaged, or were written by a training class or another version; save again with `save_inference_model`."
        ) from error


def _check_activation(path: Path) -> None:
    """sae-lens 6 reads every activation of an older config but top-k as a ReLU."""
    config = json.loads((path / FILES[0]).read_text())
    for key in ACTIVATION_KEYS:
        if config.get(key, "relu") not in ACTIVATIONS:
            raise ExplanationError(
                f"{path / FILES[0]}: {key} is {config[key]!r}, which sae-lens {sae_lens.__version__} would take for a "
                f"ReLU. Supported: {', '.join(ACTIVATIONS)}. With its dictionary alone it can be scored: "
                f"set {key} to 'relu' and give encoder=pursuit."
            )


def read_folder(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """sae-lens's own reader, with a fine-tuning factor of each feature (sae-lens before 6) folded into its row."""
    config, state = sae_lens_disk_loader(path, device, cfg_overrides)
    factor = state.pop("finetuning_scaling_factor", None)
    if factor is not None:
        state["W_dec"] = factor[:, None] * state["W_dec"]
    return config, state


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
            f"Without a connection: on a machine that has one, SAE.from_pretrained({release!r}, {identifier!r})"
            f'.save_model("FOLDER"); copy FOLDER, with {FILES[0]} and {FILES[1]}, to this machine and give it as '
            "sae:path=FOLDER."
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
