"""Train the skip transcoder that ships with the embedded model.

    python -m experiments.embedded_model.train_transcoder --model MODEL --out TRANSCODERS

It reads what enters the MLP of layer 1 and predicts what leaves it. sae-lens has the classes that run and store
transcoders, but none that trains them, so the loop is here: BatchTopK (Bussmann et al. 2024, arXiv:2412.06410) with an
auxiliary loss for dead features (Gao et al. 2024, arXiv:2406.04093), and the skip path (Paulo et al. 2025,
arXiv:2501.18823) started at the least-squares map. What is saved is sae-lens's `jumprelu_skip_transcoder` in half
precision, the mean of the batches' thresholds for its threshold, with `metrics.json` beside it, measured on documents
that the model never saw. The run can be interrupted, and goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import torch
from rich.progress import track
from sae_lens import SAE, JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig, __version__
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from experiments.embedded_model.train_saes import BATCH, CONTEXT, HELD_OUT_TOKENS, SEQUENCES, document_windows
from mdl.models.transformer import run

READS, WRITES = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
NAME = "skip-8x"
FACTOR, K = 8, 32  # width over that of the activations; features of a token, on average
RATE, DECAY, WARM_UP = 2e-3, 0.4, 100  # of Adam: its peak, the share of steps over which it falls to 0, steps to rise
RIDGE = 1e-4
SEEN, FIRST_LENGTH = 8192, 0.1  # pairs on which atoms are started, and how long these are
DEAD_STEPS, DEAD_FEATURES, DEAD_WEIGHT = 150, 16, 1 / 32
MEMORY = 0.99  # of the running threshold
CHECKPOINT_STEPS = 500


@dataclass(frozen=True)
class Pairs:
    """What the MLP reads and what it writes, float32 [n, width] each."""

    inputs: np.ndarray
    outputs: np.ndarray

    @classmethod
    def collect(cls, model: Any, tokens: np.ndarray, wanted: int) -> Pairs:
        """Of the first `wanted` positions that are not the start token."""
        forward = jax.jit(partial(run, model.config, reads=(READS, WRITES)))
        batches = min(-(-wanted // ((CONTEXT - 1) * SEQUENCES)), len(tokens) // SEQUENCES)
        found: list[list[np.ndarray]] = [[], []]
        for index in track(range(batches), "activations"):
            values = forward(model.params, tokens[index * SEQUENCES : (index + 1) * SEQUENCES].astype(np.int32))
            for site, kept in zip((READS, WRITES), found, strict=True):
                kept.append(np.asarray(values[site][:, 1:], np.float32).reshape(-1, model.config.d_model))
        return cls(*(np.concatenate(kept)[:wanted] for kept in found))


def affine_map(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The least-squares map [d_in, d_out] of the inputs, and its bias [d_out]."""
    x, y = (a.astype(np.float64) for a in (pairs.inputs, pairs.outputs))
    centre, mean = x.mean(0), y.mean(0)
    gram = (x - centre).T @ (x - centre)
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    matrix = np.linalg.solve(gram, (x - centre).T @ (y - mean))
    return matrix, mean - centre @ matrix


def untrained(pairs: Pairs, scale: float, model_name: str, seed: int) -> JumpReLUSkipTranscoder:
    """A feature for each of some inputs, its atom what the least-squares map lacks where it is among a token's K
    largest, beside that map; outputs are `scale` times what the model writes."""
    width = pairs.inputs.shape[1]
    metadata = SAEMetadata(
        hook_name=READS,
        hook_name_out=WRITES,
        model_name=model_name,
        context_size=CONTEXT,
        prepend_bos=True,
        training_architecture="batchtopk_skip_transcoder",
        k=K,
        sae_lens_version=__version__,
    )
    config = JumpReLUSkipTranscoderConfig(
        d_in=width, d_out=width, d_sae=FACTOR * width, apply_b_dec_to_input=False, metadata=metadata
    )
    sae, (matrix, bias) = JumpReLUSkipTranscoder(config), affine_map(pairs)
    rng = np.random.default_rng(seed)
    seeds, some = (np.sort(rng.permutation(len(pairs.inputs))[:n]) for n in (config.d_sae, SEEN))
    with torch.no_grad():
        centred = torch.from_numpy(pairs.inputs[seeds] - pairs.inputs.mean(0))
        sae.W_enc.copy_((centred / centred.norm(dim=1, keepdim=True)).T)
        sae.W_skip.copy_(torch.from_numpy(scale * matrix.T))
        sae.b_dec.copy_(torch.from_numpy(scale * bias))
        x, y = torch.from_numpy(pairs.inputs[some]), torch.from_numpy(scale * pairs.outputs[some])
        best = torch.relu(x @ sae.W_enc).topk(K, dim=1)
        codes = torch.zeros(len(x), config.d_sae).scatter(1, best.indices, best.values)
        rows = codes.T @ (y - x @ sae.W_skip.T - sae.b_dec)
        sae.W_dec.copy_(FIRST_LENGTH * rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
    return sae


@dataclass
class Run:
    """A training run: the transcoder, its optimiser, a running threshold, and for how many steps features were off."""

    sae: JumpReLUSkipTranscoder
    optimiser: torch.optim.Adam
    off: Tensor
    threshold: float = 0.0
    step: int = 0

    @classmethod
    def of(cls, sae: JumpReLUSkipTranscoder) -> Run:
        trained = [p for name, p in sae.named_parameters() if name != "threshold"]
        return cls(sae, torch.optim.Adam(trained, lr=RATE, betas=(0.9, 0.99)), torch.zeros(sae.cfg.d_sae))

    def advance(self, x: Tensor, y: Tensor, rate: float) -> float:
        """One step of Adam. Returns the share of the squared outputs that the transcoder leaves."""
        sae = self.sae
        acts = torch.relu(x @ sae.W_enc + sae.b_enc)
        with torch.no_grad():
            scores = acts * sae.W_dec.norm(dim=1)
            least = float(scores.flatten().topk(K * len(x), sorted=False).values.min())
            on = scores >= max(least, 1e-12)
            self.threshold = MEMORY * self.threshold + (1 - MEMORY) * least if self.step else least
            self.off = torch.where(on.any(0), 0, self.off + 1)
        left = y - ((acts * on) @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T)
        size = y.pow(2).mean()
        loss = left.pow(2).mean() / size + DEAD_WEIGHT * self._revived(x, left.detach())
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return float(left.detach().pow(2).mean() / size)

    def _revived(self, x: Tensor, left: Tensor) -> Tensor:
        """What the dead features leave of what the others left."""
        dead = torch.nonzero(self.off > DEAD_STEPS)[:, 0]
        if not len(dead):
            return torch.zeros(())
        acts = torch.relu(x @ self.sae.W_enc[:, dead] + self.sae.b_enc[dead])
        best = acts.topk(min(DEAD_FEATURES, len(dead)), dim=1)
        acts = torch.zeros_like(acts).scatter(1, best.indices, best.values)
        return (left - acts @ self.sae.W_dec[dead]).pow(2).mean() / left.pow(2).mean()

    def save(self, path: Path) -> None:
        """Written whole or not at all."""
        state = {"sae": self.sae.state_dict(), "optimiser": self.optimiser.state_dict(), "off": self.off}
        partial_path = path.with_suffix(".partial")
        torch.save({**state, "threshold": self.threshold, "step": self.step}, partial_path)
        partial_path.replace(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.sae.load_state_dict(state["sae"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.off, self.threshold, self.step = state["off"], state["threshold"], state["step"]


def rate_at(step: int, steps: int) -> float:
    """Rises, stays, falls to zero."""
    return RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / max(DECAY * steps, 1.0))


def batch_at(step: int, size: int, seed: int) -> np.ndarray:
    """The pairs of a step, numbered: epochs, each in a random order of its own."""
    batches = size // BATCH
    order = np.random.default_rng([seed, step // batches]).permutation(size)
    return order[step % batches * BATCH : (step % batches + 1) * BATCH]


def train(
    pairs: Pairs, steps: int, checkpoint: Path, model_name: str, seed: int, say: Callable[[str], Any]
) -> JumpReLUSkipTranscoder:
    """Train on `pairs`, in the outputs' own units again at the end; rows of length 1, one threshold for all."""
    scale = 1.0 / float(np.sqrt(np.mean(np.square(pairs.outputs - pairs.outputs.mean(0)))))
    run = Run.of(untrained(pairs, scale, model_name, seed))
    if checkpoint.exists():
        run.restore(checkpoint)
        say(f"goes on from step {run.step}")
    recent: list[float] = []
    for step in track(range(run.step, steps), "training"):
        chosen = batch_at(step, len(pairs.inputs), seed)
        x, y = torch.from_numpy(pairs.inputs[chosen]), torch.from_numpy(scale * pairs.outputs[chosen])
        recent.append(run.advance(x, y, rate_at(step, steps)))
        if (step + 1) % CHECKPOINT_STEPS == 0:
            run.save(checkpoint)
            dead = float((run.off > DEAD_STEPS).float().mean())
            say(f"step {step + 1}: {np.mean(recent):.4f} of the squares left, {dead:.1%} of features dead")
            recent = []
    return finished(run, scale)


@torch.no_grad()
def finished(run: Run, scale: float) -> JumpReLUSkipTranscoder:
    """The rows' lengths folded into the encoder, the outputs' scale taken out."""
    sae = run.sae
    lengths = sae.W_dec.norm(dim=1)
    sae.W_enc.mul_(lengths / scale)
    sae.b_enc.mul_(lengths / scale)
    sae.W_dec.div_(lengths[:, None])
    sae.b_dec.div_(scale)
    sae.W_skip.div_(scale)
    sae.threshold.fill_(run.threshold / scale)
    return sae


@torch.no_grad()
def evaluate(sae: SAE, pairs: Pairs) -> dict[str, float]:
    """L0, explained variance 1 - sum |y - y'|^2 / sum |y - mean|^2, and the share of features that never fire."""
    error, fired, active = 0.0, torch.zeros(sae.cfg.d_sae), 0.0
    for start in range(0, len(pairs.inputs), BATCH):
        x, y = (torch.from_numpy(a[start : start + BATCH]) for a in (pairs.inputs, pairs.outputs))
        on = sae.encode(x) != 0
        error += float((y - sae(x)).pow(2).sum())
        active += float(on.sum())
        fired += on.sum(0)
    variance = float(np.square(pairs.outputs - pairs.outputs.mean(0)).sum())
    return {
        "l0": active / len(pairs.inputs),
        "explained_variance": 1.0 - error / variance,
        "mse": error / len(pairs.inputs),
        "dead_fraction": float((fired == 0).float().mean()),
        "held_out_tokens": len(pairs.inputs),
    }


def save(sae: JumpReLUSkipTranscoder, folder: Path, held_out: Pairs, training: dict[str, Any]) -> dict[str, Any]:
    """Write it in half precision, read it back, and measure what was read. Returns what is written to metrics.json."""
    sae.cfg.dtype = "float16"
    weights, _ = sae.half().save_model(folder)
    weights.chmod(0o644)
    read = SAE.load_from_disk(folder, dtype="float32")
    matrix, bias = training.pop("affine")
    left = held_out.outputs - (held_out.inputs @ matrix + bias)
    variance = np.square(held_out.outputs - held_out.outputs.mean(0)).sum()
    affine = {"affine_explained_variance": 1.0 - float(np.square(left).sum() / variance)}
    metrics = {**evaluate(read, held_out), **affine, **training}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


@click.command()
@click.option(
    "--model", "folder", type=click.Path(exists=True, path_type=Path), required=True, help="Checkpoint folder."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The transcoder's folder is written here.")
@click.option("--tokens", default=1_000_000, show_default=True, help="Different activations that it is trained on.")
@click.option("--steps", default=4500, show_default=True, help=f"Batches of {BATCH} activations.")
@click.option("--name", default="", help="The model's name in the metadata; by default the checkpoint's.")
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, out: Path, tokens: int, steps: int, name: str, seed: int) -> None:
    """Train the shipped transcoder on the model in a folder."""
    from mdl.models import load_model

    if (out / NAME / "metrics.json").exists():
        click.echo(f"{NAME}: already in {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    model, rng = load_model(str(folder)), np.random.default_rng(seed)
    held_out = Pairs.collect(model, document_windows(model.tokenizer, "fit", rng), HELD_OUT_TOKENS)
    pairs = Pairs.collect(model, document_windows(model.tokenizer, "train", rng), tokens)
    started, checkpoint = time.time(), out / f"{NAME}.checkpoint"
    sae = train(pairs, steps, checkpoint, name or model.name, seed, click.echo)
    training = {"training_tokens": len(pairs.inputs), "steps": steps, "seed": seed, "affine": affine_map(pairs)}
    metrics = save(sae, out / NAME, held_out, training)
    checkpoint.unlink(missing_ok=True)
    click.echo(
        f"{NAME}: L0 {metrics['l0']:.1f}, explained variance {metrics['explained_variance']:.4f} (an affine map: "
        f"{metrics['affine_explained_variance']:.4f}), dead {metrics['dead_fraction']:.1%}; "
        f"{time.time() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
