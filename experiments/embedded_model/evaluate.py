"""Is the embedded model a real one? Its held-out bits per byte, beside `xz -9` and an interpolated trigram model.

    python -m experiments.embedded_model.evaluate

All three see exactly the held-out files. `xz -9` compresses each file by itself; the trigram model (Witten-Bell
interpolation) is trained on the tokens that the model was trained on; the model reads each file in windows of its
context behind a start token, without overlap, which is the harshest way to count.
"""

from __future__ import annotations

import json
import lzma
from functools import partial
from pathlib import Path

import click
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.embedded_model.train import training_stream
from mdl.data import Document, standard_library
from mdl.models import Model, run
from mdl.score import embedded_model
from mdl.units import nats_to_bits

BATCH = 16


def model_bits(model: Model, documents: list[list[int]]) -> np.ndarray:
    """Bits of each document under the model, every token of it predicted once."""
    context = model.config.n_ctx - 1
    windows, owners = [], []
    for owner, ids in enumerate(documents):
        for start in range(0, len(ids), context):
            windows.append(ids[start : start + context])
            owners.append(owner)

    @partial(jax.jit)
    def losses(tokens: jax.Array) -> jax.Array:
        logits = run(model.config, model.params, tokens[:, :-1], ["logits"])["logits"]
        log_p = jax.nn.log_softmax(logits)
        return -jax.numpy.take_along_axis(log_p, tokens[:, 1:, None], 2)[..., 0]

    bits = np.zeros(len(documents))
    for start in range(0, len(windows), BATCH):
        chunk = windows[start : start + BATCH]
        tokens = np.zeros((BATCH, context + 1), np.int32)
        for row, ids in enumerate(chunk):
            tokens[row, 1 : 1 + len(ids)] = ids
        loss = nats_to_bits(np.asarray(losses(tokens), np.float64))
        for row, ids in enumerate(chunk):
            bits[owners[start + row]] += loss[row, : len(ids)].sum()
    return bits


class Trigram:
    """p(c | a b) interpolated with p(c | b), p(c) and 1/V, weights by Witten and Bell (1991, method C)."""

    def __init__(self, stream: np.ndarray, vocabulary: int):
        self.vocabulary = vocabulary
        x = stream.astype(np.int64)
        self.keys = [x, x[:-1] * vocabulary + x[1:], (x[:-2] * vocabulary + x[1:-1]) * vocabulary + x[2:]]
        self.counts = [np.unique(k, return_counts=True) for k in self.keys]
        # For each context length: how often each context occurs, and how many kinds of token follow it.
        self.totals = [np.unique(k[:-1], return_counts=True) for k in self.keys[:2]]
        self.kinds = [np.unique(unique // vocabulary, return_counts=True) for unique, _ in self.counts[1:]]

    @staticmethod
    def _look_up(table: tuple[np.ndarray, np.ndarray], keys: np.ndarray) -> np.ndarray:
        position = np.minimum(np.searchsorted(table[0], keys), len(table[0]) - 1)
        return np.where(table[0][position] == keys, table[1][position], 0)

    def bits(self, ids: list[int]) -> float:
        """Bits of a document that starts behind two start tokens (id 0)."""
        x = np.array([0, 0, *ids], np.int64)
        a, b, c = x[:-2], x[1:-1], x[2:]
        v, n, kinds = self.vocabulary, len(self.keys[0]), len(self.counts[0][0])
        p = (self._look_up(self.counts[0], c) + kinds / v) / (n + kinds)
        for order, context in ((1, b), (2, a * v + b)):
            total, follow = (
                self._look_up(self.totals[order - 1], context),
                self._look_up(self.kinds[order - 1], context),
            )
            count = self._look_up(self.counts[order], context * v + c)
            p = np.where(total > 0, (count + follow * p) / np.maximum(total + follow, 1), p)
        return float(-np.log2(p).sum())


def held_out_documents() -> list[Document]:
    return [d for d in standard_library() if d.split == "held-out"]


@click.command()
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write the figures into this file.")
def main(path: Path | None) -> None:
    """Print bits per byte of the embedded model, xz and a trigram model on the held-out files."""
    model = embedded_model()
    documents = held_out_documents()
    sizes = np.array([len(d.text.encode()) for d in documents])
    ids = [model.tokenizer.encode(d.text).ids for d in documents]
    trigram = Trigram(training_stream(model.tokenizer, np.random.default_rng(0)), model.config.d_vocab)
    rows = {
        "embedded model": model_bits(model, ids),
        "interpolated trigram, same tokens": np.array([trigram.bits(i) for i in ids]),
        "xz -9, each file by itself": np.array(
            [8.0 * len(lzma.compress(d.text.encode(), preset=9)) for d in documents]
        ),
    }
    table = Table(title=f"{len(documents)} held-out files, {sizes.sum():,} bytes, {sum(map(len, ids)):,} tokens")
    for header in ("", "bits per byte", "bits per token"):
        table.add_column(header)
    found = {}
    for name, bits in rows.items():
        found[name] = bits.sum() / sizes.sum()
        table.add_row(name, f"{found[name]:.3f}", f"{bits.sum() / sum(map(len, ids)):.3f}")
    Console().print(table)
    if path:
        path.write_text(json.dumps({"bits_per_byte": found, "bytes": int(sizes.sum())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
