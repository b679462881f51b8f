"""Masked runs a second, here and in torch: `python -m experiments.masked_runs.benchmark`.

The same random GPT-2, tokens, masks and arithmetic on both sides (their logits are compared first). The two alternate
in one process on one processor, so that both meet the same load; `ratio` is torch / ours, median and quartiles over the
rounds. `chunk`: masks side by side. "half": every edge kept with a chance of a half; "few": the edges among ten random
nodes, where both skip the layers that no edge leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from experiments.masked_runs.torch_masked import TorchMasked
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import MaskedModel, masked_model, masked_runs
from mdl.models.circuits.outputs import source_outputs
from mdl.models.config import TransformerConfig

NODES = 10


@dataclass(frozen=True)
class Case:
    """A shape, and how much of it is run."""

    config: TransformerConfig
    batch: int
    positions: int
    masks: int
    chunks: tuple[int, ...]


def cases() -> dict[str, Case]:
    """Two layers as in the induction literature, and GPT-2 small."""
    two = TransformerConfig(n_layers=2, d_model=128, n_heads=4, d_head=32, d_vocab=64, n_ctx=48, d_mlp=512, tied=True)
    small = TransformerConfig(
        n_layers=12, d_model=768, n_heads=12, d_head=64, d_vocab=50257, n_ctx=1024, d_mlp=3072, tied=True
    )
    return {"two-layers": Case(two, 4, 48, 32, (1, 8)), "gpt2-small": Case(small, 1, 16, 8, (1, 4))}


def random_weights(config: TransformerConfig, seed: int = 0) -> Any:
    """GPT-2's weights at its usual scale, float32 numpy."""
    rng = np.random.default_rng(seed)
    d, h, e, n = config.d_model, config.n_heads, config.d_head, config.d_mlp

    def draw(*shape: int) -> np.ndarray:
        return 0.05 * rng.standard_normal(shape, np.float32)

    def norm() -> dict[str, np.ndarray]:
        return {"w": 1 + draw(d), "b": draw(d)}

    def block() -> Any:
        attn = {f"W_{x}": draw(h, d, e) for x in "QKV"} | {f"b_{x}": draw(h, e) for x in "QKV"}
        return {
            "attn": {**attn, "W_O": draw(h, e, d), "b_O": draw(d)},
            "mlp": {"W_in": draw(d, n), "b_in": draw(n), "W_out": draw(n, d), "b_out": draw(d)},
            "ln1": norm(),
            "ln2": norm(),
        }

    blocks = [block() for _ in range(config.n_layers)]
    tables = {"embed": {"W_E": draw(config.d_vocab, d)}, "pos_embed": {"W_pos": draw(config.n_ctx, d)}}
    return {**tables, "blocks": blocks, "ln_final": norm()}


def both(case: Case) -> tuple[MaskedModel, TorchMasked]:
    """The two, on the same tokens, ablated with the outputs on others, scored at the last position."""
    config, rng, graph = case.config, np.random.default_rng(1), Graph.of(case.config)
    weights = random_weights(config)
    params = jax.tree.map(jnp.asarray, weights)
    tokens, others = rng.integers(0, config.d_vocab, (2, case.batch, case.positions))
    scored = np.full((case.batch, 1), case.positions - 1)
    ablated = jax.jit(partial(source_outputs, config))(params, others)
    ours = masked_model(config, params, tokens, ablated, graph, scored)
    tensors = jax.tree.map(torch.from_numpy, weights)
    values = torch.from_numpy(np.array(jnp.moveaxis(ablated, 1, 0)))
    embedded = torch.from_numpy(np.array(ours.embedded))
    return ours, TorchMasked(graph, tensors, embedded, values, torch.from_numpy(scored))


def drawn_masks(graph: Graph, kind: str, count: int) -> np.ndarray:
    """float32 [M, S, D]."""
    rng = np.random.default_rng(2)
    if kind == "half":
        found = [graph.possible & (rng.random(graph.possible.shape) < 0.5) for _ in range(count)]
    else:
        chosen = [rng.choice(len(graph.sources), NODES, replace=False) for _ in range(count)]
        found = [graph.induced(np.isin(np.arange(len(graph.sources)), c)) for c in chosen]
    return np.stack(found).astype(np.float32)


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def compare(case: Case, kind: str, chunk: int, rounds: int) -> dict[str, object]:
    """Masks a second of both, and the ratio of their times over alternating rounds."""
    ours, theirs = both(case)
    masks = drawn_masks(ours.graph, kind, case.masks)
    on_device, tensor, skip = jnp.asarray(masks), torch.from_numpy(masks), kind == "few" and chunk == 1

    def own() -> Any:
        return jax.block_until_ready(masked_runs(ours, on_device, chunk=chunk, skip=skip))

    def other() -> torch.Tensor:
        return torch.cat([theirs(part, skip=skip) for part in tensor.split(chunk)])

    difference = float(np.abs(np.asarray(own()) - other().numpy()).max())
    assert difference < 1e-3, f"logits differ by {difference:.2g}: the two do not compute the same"
    pairs = np.array([(seconds(own), seconds(other)) for _ in range(rounds)])
    ratios = pairs[:, 1] / pairs[:, 0]
    rates = case.masks / np.median(pairs, 0)
    return {
        "masks": kind,
        "chunk": chunk,
        "ours_masks_a_second": round(float(rates[0]), 2),
        "torch_masks_a_second": round(float(rates[1]), 2),
        "ratio": round(float(np.median(ratios)), 2),
        "ratio_quartiles": [round(float(q), 2) for q in np.quantile(ratios, [0.25, 0.75])],
        "largest_difference_of_logits": float(f"{difference:.1g}"),
    }


def main() -> None:
    """Print one JSON object a case, kind of masks and chunk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX counts the processors
    torch.set_num_threads(1)
    print(json.dumps({"jax": jax.__version__, "torch": torch.__version__, "rounds": arguments.rounds}))
    for name in arguments.cases:
        case = cases()[name]
        for kind, chunk in [("half", c) for c in case.chunks] + [("few", 1)]:
            print(json.dumps({"case": name, **compare(case, kind, chunk, arguments.rounds)}), flush=True)


if __name__ == "__main__":
    main()
