"""Train the embedded language model: a small GPT-2 on the running Python's standard library.

    python -m experiments.embedded_model.train --out RUN

The run can be interrupted and resumes from its last checkpoint. The result is a Hugging Face GPT-2 checkpoint in half
precision with its tokenizer, and the loss curve. Learning rate: warm-up, constant, then linear to zero over the last
`--decay` fraction (so that a longer run can start from the same plateau).
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from mdl.data import standard_library
from mdl.models.gpt2 import save_gpt2_checkpoint
from mdl.models.model import Model, fingerprint_of
from mdl.models.transformer import TransformerConfig, run

NAME = "embedded-python-gpt2"
END_OF_TEXT = "<|endoftext|>"
CONFIG = TransformerConfig(n_layers=4, d_model=192, n_heads=6, d_head=32, d_vocab=2048, n_ctx=256, d_mlp=768, tied=True)


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Byte-level byte-pair encoding; id 0 starts every sequence and separates documents."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False)
    return tokenizer._tokenizer


def training_stream(tokenizer: Tokenizer, rng: np.random.Generator) -> np.ndarray:
    """One epoch: training documents in random order, core modules and topics twice, tests once, EOT between them."""
    documents = [d for d in standard_library() if d.split == "train"]
    tests = ["test" in d.name.split("/")[0] for d in documents]
    encoded = [e.ids for e in tokenizer.encode_batch([d.text for d in documents])]
    chosen = [ids for ids, test in zip(encoded, tests, strict=True) for _ in range(1 if test else 2)]
    order = rng.permutation(len(chosen))
    return np.concatenate([np.array([0, *chosen[i]], np.uint16) for i in order])


def initial_parameters(config: TransformerConfig, seed: int) -> dict:
    """GPT-2's initialisation: normal(0.02), residual writers scaled by 1/sqrt(2 n_layers)."""
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    d, h, e, m = config.d_model, config.n_heads, config.d_head, config.d_mlp
    normal = lambda *shape, s=0.02: s * jax.random.normal(next(keys), shape)  # noqa: E731
    writer = 0.02 / np.sqrt(2 * config.n_layers)
    norm = lambda: {"w": jnp.ones(d), "b": jnp.zeros(d)}  # noqa: E731
    blocks = [
        {
            "ln1": norm(),
            "attn": {
                **{f"W_{n}": normal(h, d, e) for n in "QKV"},
                **{f"b_{n}": jnp.zeros((h, e)) for n in "QKV"},
                "W_O": normal(h, e, d, s=writer),
                "b_O": jnp.zeros(d),
            },
            "ln2": norm(),
            "mlp": {
                "W_in": normal(d, m),
                "b_in": jnp.zeros(m),
                "W_out": normal(m, d, s=writer),
                "b_out": jnp.zeros(d),
            },
        }
        for _ in range(config.n_layers)
    ]
    return {
        "embed": {"W_E": normal(config.d_vocab, d)},
        "pos_embed": {"W_pos": normal(config.n_ctx, d, s=0.01)},
        "blocks": blocks,
        "ln_final": norm(),
    }


def _dimension_numbers(params: dict) -> dict:
    """Which axes of each matrix are its input and output, for Muon; None leaves a tensor to Adam."""

    def numbers(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = path[-1].key
        if name in ("W_Q", "W_K", "W_V"):
            return optax.contrib.MuonDimensionNumbers(1, (0, 2))
        if name == "W_O":
            return optax.contrib.MuonDimensionNumbers((0, 1), 2)
        return optax.contrib.MuonDimensionNumbers(0, 1) if name in ("W_in", "W_out") else None

    return jax.tree_util.tree_map_with_path(numbers, params)


def make_optimizer(steps: int, decay: float, rate: float) -> optax.GradientTransformation:
    """Muon on the matrices inside the blocks, Adam on the rest (Jordan et al. 2024)."""

    def schedule(peak: float) -> optax.Schedule:
        start = int(steps * (1 - decay))
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, 100),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, steps - start),
            ],
            [100, start],
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(rate),
            adam_learning_rate=schedule(rate / 6),
            weight_decay=0.01,
            muon_weight_dimension_numbers=_dimension_numbers,
        ),
    )


def loss_of(params: dict, batch: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy in nats."""
    logits = run(CONFIG, params, batch[:, :-1], ["logits"])["logits"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@partial(jax.jit, static_argnames="optimizer", donate_argnums=(0, 1))
def train_step(params: dict, state: optax.OptState, batch: jax.Array, optimizer: optax.GradientTransformation):
    loss, gradient = jax.value_and_grad(loss_of)(params, batch)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def batches(stream: np.ndarray, size: int, rng: np.random.Generator):
    """Windows of `n_ctx` tokens behind an end-of-text token, in random order, from a random offset."""
    width = CONFIG.n_ctx - 1
    offset = int(rng.integers(width))
    windows = stream[offset : offset + (len(stream) - offset) // width * width].reshape(-1, width)
    windows = windows[rng.permutation(len(windows))]
    for start in range(0, len(windows) - size + 1, size):
        chosen = windows[start : start + size].astype(np.int32)
        yield np.concatenate([np.zeros((size, 1), np.int32), chosen], 1)


def save(path: Path, tree: object, **scalars: float) -> None:
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **leaves, **scalars)
    os.replace(temporary, path)


def restore(path: Path, tree: object) -> tuple[object, int]:
    stored = np.load(path)
    leaves = [jnp.asarray(stored[f"leaf{i}"]) for i in range(len(jax.tree.leaves(tree)))]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves), int(stored["step"])


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for checkpoints and the result.")
@click.option("--steps", default=2800, show_default=True)
@click.option("--batch", default=16, show_default=True, help="Sequences a step.")
@click.option("--rate", default=0.02, show_default=True, help="Muon's peak learning rate; Adam's is a sixth of it.")
@click.option("--decay", default=0.36, show_default=True, help="Last fraction of the steps, in which the rate falls.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, steps: int, batch: int, rate: float, decay: float, seed: int) -> None:
    """Train, checkpointing every 200 steps into OUT."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_file = out / "tokenizer.json"
    if not tokenizer_file.exists():
        texts = [d.text for d in standard_library() if d.split == "train" and "test" not in d.name.split("/")[0]]
        train_tokenizer(texts, CONFIG.d_vocab).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    params = initial_parameters(CONFIG, seed)
    optimizer = make_optimizer(steps, decay, rate)
    state, begin = optimizer.init(params), 0
    checkpoint, curve = out / "checkpoint.npz", out / "curve.jsonl"
    if checkpoint.exists():
        (params, state), begin = restore(checkpoint, (params, state))
    rng = np.random.default_rng(seed + begin)
    source = iter(())
    started, recent = time.time(), []
    with Progress() as progress, curve.open("a") as log:
        bar = progress.add_task("training", total=steps, completed=begin)
        for step in range(begin, steps):
            tokens = next(source, None)
            if tokens is None:
                source = batches(training_stream(tokenizer, rng), batch, rng)
                tokens = next(source)
            params, state, loss = train_step(params, state, jnp.asarray(tokens), optimizer)
            recent.append(float(loss))
            progress.advance(bar)
            if (step + 1) % 50 == 0:
                tokens_seen = (step + 1) * batch * (CONFIG.n_ctx - 1)
                record = {"step": step + 1, "tokens": tokens_seen, "loss_nats": float(np.mean(recent))}
                log.write(json.dumps({**record, "seconds": round(time.time() - started, 1)}) + "\n")
                log.flush()
                recent.clear()
            if (step + 1) % 200 == 0 or step + 1 == steps:
                save(checkpoint, (params, state), step=step + 1)
    trained = Model(CONFIG, params, NAME, fingerprint_of(CONFIG, params), tokenizer)
    save_gpt2_checkpoint(trained, out / NAME, "float16", tokenizer)


if __name__ == "__main__":
    main()
