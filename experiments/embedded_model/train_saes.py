"""Train the sparse autoencoders that ship with the embedded model, with sae-lens's own training classes.

    python -m experiments.embedded_model.train_saes --model MODEL --out SAES

The site is the middle of the residual stream. All of them see the same activations in the same order: windows of the
documents that the model was trained on, tests left out, shuffled as a whole, without the start-of-text position. What
is saved is sae-lens's inference format with `metrics.json` beside it, measured on documents that the model never saw.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import torch
from rich.progress import track
from sae_lens import (
    SAE,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata

from mdl.data import standard_library, windows
from mdl.models.transformer import run

SITE = "blocks.2.hook_resid_pre"
CONTEXT = 256
BATCH = 512  # activations a training step
RATE = 3e-3  # of Adam; in a few thousand steps the usual 3e-4 stays far from converged
SEQUENCES = 16  # windows a forward pass
HELD_OUT_TOKENS = 40_000


def recipes(width: int, steps: int, metadata: dict[str, Any]) -> dict[str, TrainingSAEConfig]:
    """The shipped SAEs by name. Penalties assume activations scaled to a mean norm of sqrt(width)."""
    common: dict[str, Any] = {"d_in": width, "normalize_activations": "expected_average_only_in"}

    def shared(factor: int) -> dict[str, Any]:
        return {**common, "d_sae": factor * width, "metadata": SAEMetadata(**metadata)}

    return {
        "topk-4x": TopKTrainingSAEConfig(k=16, **shared(4)),
        "topk-16x": TopKTrainingSAEConfig(k=16, **shared(16)),
        "jumprelu-8x": JumpReLUTrainingSAEConfig(
            jumprelu_sparsity_loss_mode="tanh",
            jumprelu_ste_to_input=True,
            jumprelu_bandwidth=1.0,
            jumprelu_init_threshold=0.1,
            l0_coefficient=0.15,
            l0_warm_up_steps=steps // 2,
            pre_act_loss_coefficient=3e-3,
            **shared(8),
        ),
        "standard-4x": StandardTrainingSAEConfig(l1_coefficient=1.2, l1_warm_up_steps=steps // 10, **shared(4)),
    }


def document_windows(tokenizer: Any, split: str, rng: np.random.Generator) -> np.ndarray:
    """Windows [sequences, CONTEXT] of one split's documents behind the start token, in random order, tests left out."""
    documents = [d for d in standard_library() if d.split == split]
    texts = [d.text for d in documents if not any("test" in part for part in d.name.split("/")[:-1])]
    encoded = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    tokens, _ = windows(encoded, CONTEXT, 0)
    return tokens[rng.permutation(len(tokens))]


def collect(model: Any, tokens: np.ndarray, wanted: int, site: str = SITE) -> np.ndarray:
    """Activations at a site of the first `wanted` positions that are not the start token, float32 [n, width]."""
    forward = jax.jit(partial(run, model.config, reads=(site,)))
    batches = min(-(-wanted // ((CONTEXT - 1) * SEQUENCES)), len(tokens) // SEQUENCES)
    found = []
    for index in track(range(batches), f"activations at {site}"):
        batch = tokens[index * SEQUENCES : (index + 1) * SEQUENCES].astype(np.int32)
        found.append(
            np.asarray(forward(model.params, batch)[site][:, 1:], np.float32).reshape(-1, model.config.d_model)
        )
    return np.concatenate(found)[:wanted]


def shuffled_batches(activations: np.ndarray, seed: int) -> Iterator[torch.Tensor]:
    """Batches of BATCH activations without end: epochs, each in a random order of its own."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(activations))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield torch.from_numpy(activations[order[start : start + BATCH]])


def train(config: TrainingSAEConfig, activations: np.ndarray, samples: int, seed: int) -> TrainingSAE:
    """Train one SAE on `samples` activations; the scale of the activations is folded into its weights at the end.

    b_dec starts at the mean, so that no feature is spent on it.
    """
    torch.manual_seed(seed)
    steps = samples // BATCH
    sae = get_sae_training_class(config.architecture())[0](config)
    mean = activations.mean(0)
    scale = np.sqrt(config.d_in) / np.linalg.norm(activations[: 100 * BATCH], axis=1).mean()
    sae.b_dec.data.copy_(torch.from_numpy(mean * scale))
    settings = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=RATE,
        lr_end=RATE / 10,
        lr_warm_up_steps=steps // 50,
        lr_decay_steps=steps // 4,
        dead_feature_window=max(50, steps // 20),
        feature_sampling_window=max(50, steps // 4),
        n_batches_for_norm_estimate=100,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(settings, sae, shuffled_batches(activations, seed)).fit()


@torch.no_grad()
def evaluate(sae: SAE, activations: np.ndarray) -> dict[str, float]:
    """L0, explained variance, mse and cosine as sae-lens defines them, and the share of features that never fire.

    Explained variance is 1 - sum |x - x'|^2 / sum |x - mean|^2; mse is the mean over tokens of |x - x'|^2, in the
    activations' own units.
    """
    error, fired, active, cosine = 0.0, torch.zeros(sae.cfg.d_sae), 0.0, 0.0
    for chunk in torch.from_numpy(activations).split(BATCH):
        codes = sae.encode(chunk)
        output = sae.decode(codes)
        error += float((chunk - output).pow(2).sum())
        cosine += float(torch.cosine_similarity(chunk, output).sum())
        active += float((codes != 0).sum())
        fired += (codes != 0).sum(0)
    variance = float(((activations - activations.mean(0)) ** 2).sum())
    tokens = len(activations)
    return {
        "l0": active / tokens,
        "explained_variance": 1.0 - error / variance,
        "mse": error / tokens,
        "cossim": cosine / tokens,
        "dead_fraction": float((fired == 0).float().mean()),
        "held_out_tokens": tokens,
    }


def save(sae: TrainingSAE, folder: Path, held_out: np.ndarray, training: Mapping[str, Any]) -> dict[str, Any]:
    """Write the inference form, read it back, and measure what was read. Returns what is written to metrics.json."""
    weights, _ = sae.save_inference_model(folder)
    weights.chmod(0o644)
    metrics = {**evaluate(SAE.load_from_disk(folder), held_out), **training}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def train_all(
    activations: np.ndarray, held_out: np.ndarray, out: Path, model_name: str, seed: int, say: Callable[[str], Any]
) -> None:
    """Train, save and measure every recipe on the same activations; what OUT already has is left as it is."""
    metadata = {"hook_name": SITE, "model_name": model_name, "context_size": CONTEXT, "prepend_bos": True}
    samples = len(activations)
    for name, config in recipes(activations.shape[1], samples // BATCH, metadata).items():
        if (out / name / "metrics.json").exists():
            say(f"{name}: already in {out}")
            continue
        started = time.time()
        sae = train(config, activations, samples, seed)
        seconds = time.time() - started
        metrics = save(sae, out / name, held_out, {"training_tokens": samples, "seed": seed})
        say(
            f"{name}: L0 {metrics['l0']:.1f}, explained variance {metrics['explained_variance']:.4f}, "
            f"dead {metrics['dead_fraction']:.1%}; {seconds:.0f} s, {samples / seconds:.0f} activations a second"
        )


@click.command()
@click.option(
    "--model", "folder", type=click.Path(exists=True, path_type=Path), required=True, help="Checkpoint folder."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="One folder an SAE is written here.")
@click.option("--tokens", default=2_000_000, show_default=True, help="Activations that each SAE is trained on.")
@click.option("--name", default="", help="The model's name in the metadata; by default the checkpoint's.")
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, out: Path, tokens: int, name: str, seed: int) -> None:
    """Train the shipped SAEs on the model in a folder."""
    from mdl.models import load_model

    model = load_model(str(folder))
    rng = np.random.default_rng(seed)
    held_out = collect(model, document_windows(model.tokenizer, "fit", rng), HELD_OUT_TOKENS)
    started = time.time()
    activations = collect(model, document_windows(model.tokenizer, "train", rng), tokens)
    seconds = time.time() - started
    click.echo(f"{len(activations)} activations of the {tokens} asked for, {len(activations) / seconds:.0f} a second")
    train_all(activations, held_out, out, name or model.name, seed, click.echo)


if __name__ == "__main__":
    main()
