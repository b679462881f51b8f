"""Train the autoencoders of the study, with sae-lens's own training classes.

    python -m experiments.sae_vs_pca.train --out SAES [--model NAME|DIR] [--tokens FILE.npy] [--site SITE] [--seed S]

One folder an autoencoder, OUT/SITE/RECIPE-sSEED; what is there already is left as it is, so that an interrupted run
goes on where it stopped. The recipes are those of the shipped autoencoders, at other widths, sparsities and
architectures.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAEConfig,
)
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata

from decompositions.sums import left_by
from experiments.embedded_model.train_saes import (
    BATCH,
    CONTEXT,
    SEQUENCES,
    collect,
    document_windows,
    save,
    train,
)
from experiments.sae_vs_pca.models import CONTROLS, MAIN_SAMPLES, MAIN_SITE, OTHER_SAMPLES, load, sites
from mdl.data import Sizes, from_tokens
from mdl.plugins import make_decomposition
from mdl.score import load_data
from mdl.task import Activations, build_task

HELD_OUT_TOKENS = 40_000
LENGTHS = {MAIN_SAMPLES: "", OTHER_SAMPLES: "-brief"}


@dataclass(frozen=True)
class Recipe:
    """One autoencoder: architecture, width as a multiple of the activations' width, sparsity (k, or the penalty)."""

    architecture: str
    factor: int
    sparsity: float
    samples: int
    seeds: tuple[int, ...] = (0,)
    leftover: str = ""  # trained on what this stateless explanation leaves

    @property
    def name(self) -> str:
        left = f"left-by-{self.leftover}-" if self.leftover else ""
        return f"{left}{self.architecture}-{self.factor}x-{self.sparsity:g}{LENGTHS[self.samples]}"

    def config(self, width: int, metadata: dict[str, Any]) -> TrainingSAEConfig:
        """sae-lens's configuration. Penalties assume activations scaled to a mean norm of sqrt(width)."""
        steps = self.samples // BATCH
        common: dict[str, Any] = {
            "d_in": width,
            "d_sae": self.factor * width,
            "normalize_activations": "expected_average_only_in",
            "metadata": SAEMetadata(**metadata),
        }
        return _MAKERS[self.architecture](common, self.sparsity, steps)


def _jumprelu(common: dict[str, Any], penalty: float, steps: int) -> TrainingSAEConfig:
    return JumpReLUTrainingSAEConfig(
        jumprelu_sparsity_loss_mode="tanh",
        jumprelu_ste_to_input=True,
        jumprelu_bandwidth=1.0,
        jumprelu_init_threshold=0.1,
        l0_coefficient=penalty,
        l0_warm_up_steps=steps // 2,
        pre_act_loss_coefficient=3e-3,
        **common,
    )


def _matryoshka(common: dict[str, Any], k: float, steps: int) -> TrainingSAEConfig:
    widths = [common["d_sae"] // 8, common["d_sae"] // 4, common["d_sae"] // 2, common["d_sae"]]
    return MatryoshkaBatchTopKTrainingSAEConfig(k=k, matryoshka_widths=widths, **common)


_MAKERS: dict[str, Callable[[dict[str, Any], float, int], TrainingSAEConfig]] = {
    "topk": lambda common, k, steps: TopKTrainingSAEConfig(k=int(k), **common),
    "abstopk": lambda common, k, steps: get_sae_training_class("abstopk")[1](k=int(k), **common),
    "batchtopk": lambda common, k, steps: BatchTopKTrainingSAEConfig(k=k, **common),
    "matryoshka": _matryoshka,
    "jumprelu": _jumprelu,
    "standard": lambda common, penalty, steps: StandardTrainingSAEConfig(
        l1_coefficient=penalty, l1_warm_up_steps=steps // 10, **common
    ),
    "gated": lambda common, penalty, steps: GatedTrainingSAEConfig(
        l1_coefficient=penalty, l1_warm_up_steps=steps // 10, **common
    ),
}

# The contest's seeds have the shipped autoencoders' own recipes and number of activations; what sweeps width, sparsity
# and architecture is comparable within itself.
HEADLINE = (
    Recipe("jumprelu", 8, 0.15, MAIN_SAMPLES, (1, 2)),  # seed 0 ships with the package
    Recipe("topk", 16, 16, MAIN_SAMPLES, (1, 2)),
)
SWEEP = (
    Recipe("jumprelu", 8, 0.15, OTHER_SAMPLES, (0, 1, 2)),
    *(Recipe("topk", factor, 16, OTHER_SAMPLES) for factor in (1, 2, 4, 8, 16, 32)),
    *(Recipe("topk", 8, k, OTHER_SAMPLES) for k in (4, 8, 32, 64)),
    *(Recipe(kind, 8, 16, OTHER_SAMPLES) for kind in ("batchtopk", "matryoshka", "abstopk")),
    *(Recipe(kind, 8, 1.2, OTHER_SAMPLES) for kind in ("standard", "gated")),
)
LEFTOVER = (Recipe("jumprelu", 8, 0.15, OTHER_SAMPLES, (0, 1, 2), "token-table"),)
ELSEWHERE = (
    Recipe("jumprelu", 8, 0.15, OTHER_SAMPLES),
    Recipe("topk", 8, 16, OTHER_SAMPLES),
)
STORIES = (Recipe("jumprelu", 8, 0.15, OTHER_SAMPLES, (0, 1, 2)), Recipe("topk", 8, 16, OTHER_SAMPLES))


def recipes(model: str, site: str) -> tuple[Recipe, ...]:
    """What is trained on a site of a model."""
    if (model, site) == ("embedded", MAIN_SITE):
        return (*SWEEP, *LEFTOVER, *HEADLINE)
    return ELSEWHERE if model in ("embedded", *CONTROLS) else STORIES


def activations(model: Any, site: str, samples: int, tokens: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Activations to train on and to measure on, of documents that no comparison holds out.

    A file of tokens is split as `mdl.data.from_tokens` splits it, so that what is trained on is what a comparison fits
    on; else the documents are the embedded model's training files.
    """
    if tokens is not None:
        data = from_tokens(tokens, Sizes(), 0)
        fit, tune = data.fit, data.tune
        return collect(model, fit, samples, site), collect(model, tune, HELD_OUT_TOKENS, site)
    rng = np.random.default_rng(0)
    held_out = collect(model, document_windows(model.tokenizer, "fit", rng), HELD_OUT_TOKENS, site)
    return collect(model, document_windows(model.tokenizer, "train", rng), samples, site), held_out


def leftover(model: Any, first: str, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """As `activations` at the main site, less what an explanation says that was fitted as the comparison fits it."""
    data = load_data(model)
    task = build_task(model, f"upstream of {MAIN_SITE}", data, lambda *_: None)
    explanation = make_decomposition(first).fit(task.for_fitting())
    rng, found = np.random.default_rng(0), []
    for split, wanted in (("fit", HELD_OUT_TOKENS), ("train", samples)):
        tokens = document_windows(model.tokenizer, split, rng)[: -(-wanted // (CONTEXT - 1) // SEQUENCES) * SEQUENCES]
        scored = np.ones(tokens.shape, bool)
        scored[:, 0] = False
        outputs = np.zeros((*tokens.shape, model.site_width(MAIN_SITE)), np.float32)
        outputs[scored] = collect(model, tokens, scored.sum(), MAIN_SITE)
        whole = Activations(tokens, scored, np.arange(len(tokens)), outputs, None, None)
        found.append(left_by(explanation, whole).outputs[scored][:wanted])
    held_out, given = found
    return given, held_out


def missing(model: str, site: str, out: Path) -> Iterator[tuple[Recipe, int, Path]]:
    """(recipe, seed, folder) of what has not been trained yet."""
    for recipe in recipes(model, site):
        for seed in recipe.seeds:
            folder = out / site / f"{recipe.name}-s{seed}"
            if not (folder / "metrics.json").exists():
                yield recipe, seed, folder


def train_site(model: Any, name: str, site: str, out: Path, tokens: Path | None) -> None:
    """Train, save and measure what a site lacks."""
    todo = list(missing(name, site, out))
    if not todo:
        click.echo(f"{site}: everything is in {out}")
        return
    whole = activations(model, site, max(r.samples for r, _, _ in todo), tokens)
    for recipe, seed, folder in todo:
        started = time.time()
        given, held_out = whole if not recipe.leftover else leftover(model, recipe.leftover, recipe.samples)
        metadata = {"hook_name": site, "model_name": model.name, "context_size": CONTEXT, "prepend_bos": True}
        config = recipe.config(given.shape[1], metadata)
        sae = train(config, given[: recipe.samples], recipe.samples, seed)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        found = save(sae, partial, held_out, {"training_tokens": recipe.samples, "seed": seed, **_told(recipe)})
        partial.replace(folder)
        click.echo(
            f"{site} {folder.name}: L0 {found['l0']:.1f}, explained variance {found['explained_variance']:.4f}, dead "
            f"{found['dead_fraction']:.1%}; {time.time() - started:.0f} s"
        )


def _told(recipe: Recipe) -> dict[str, Any]:
    told = dataclasses.asdict(recipe)
    return {key: told[key] for key in ("architecture", "factor", "sparsity", "leftover")}


@click.command()
@click.option("--model", default="embedded", show_default=True, help=f"embedded, {', '.join(CONTROLS)}, or a folder.")
@click.option("--tokens", type=click.Path(exists=True, path_type=Path), help="A .npy of token ids to train on.")
@click.option("--site", "wanted", multiple=True, help="Only this site. Repeatable. [default: all]")
@click.option("--out", type=click.Path(path_type=Path), default="runs/study/saes/embedded", show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(model: str, tokens: Path | None, wanted: tuple[str, ...], out: Path, threads: int) -> None:
    """Train what the study compares; safe to interrupt and to run again."""
    torch.set_num_threads(threads)
    loaded = load(model, out.parent.parent / "models")
    known = [site for _, site in sites(loaded.config.n_layers)]
    for site in wanted or sorted(known, key=lambda s: s != MAIN_SITE):
        train_site(loaded, model, site, out, tokens)


if __name__ == "__main__":
    main()
