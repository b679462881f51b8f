"""How wide and how sparse should an autoencoder of digits be, by bits? And what do its features look like then?

    python -m experiments.mdl_sae_digits.run                  # scikit-learn's digits; goes on where it was stopped
    python -m experiments.mdl_sae_digits.run --mnist FILE     # an idx file of MNIST images, gzip or plain
    python -m experiments.mdl_sae_digits.run --report         # the tables and pictures again, from what was found

Every cell (width, k) is a TopK autoencoder that sae-lens trains on the fit images. It is scored on held-out images like
any other explanation: all of them reproduce the images with the same mean squared error, and total(N) is what that
takes. Cells are appended to OUT/cells.jsonl; the tables are printed and written to results.json beside this file.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from decompositions.baselines import Nothing
from decompositions.clusters import Clusters
from decompositions.dictionary import DictionaryExplanation
from estimators.recovered import explained_variance
from experiments.mdl_sae_digits.explanations import Pixels, TopKSAE
from experiments.mdl_sae_digits.images import Images, digits, mnist
from experiments.mdl_sae_digits.report import report
from experiments.mdl_sae_digits.shapes import describe, digit_threshold
from mdl.models.vectors import VECTORS
from mdl.protocols import Decomposition, Explanation
from mdl.score import load_data, score
from mdl.task import Task, build_task

HORIZONS = (1437.0, 60_000.0, 1e6)
FIDELITY = 0.1
# Coarse first, so that a sweep that is stopped has holes rather than no end: 4 widths and 3 sparsities, then the rest.
WIDTHS = (64, 256, 1024, 16, 128, 512, 32)
SPARSITIES = (4, 1, 16, 2, 8)
COARSE = (4, 3)
SEEDS = (0, 1, 2)
CLUSTERS = (16, 64, 256)
DRAWN = 32  # features of each cell that are kept for the picture, the most used first
CELLS = "cells.jsonl"


@dataclass(frozen=True)
class Fitted:
    """A decomposition that was fitted already, under the name that cells go by."""

    explanation: Explanation

    def fit(self, task: Task) -> Explanation:
        return self.explanation


@dataclass(frozen=True)
class Sweep:
    """A task, where its cells are kept, and how near an image of the fit data has to be to count as memorised."""

    task: Task
    out: Path
    threshold: float

    @classmethod
    def of(cls, images: Images, out: Path) -> Sweep:
        data = load_data(images.vectors)
        task = build_task(images.vectors, VECTORS, data, lambda *_: None)
        threshold = digit_threshold(task.fit.outputs, task.tune_activations.sample().outputs)
        return cls(task, out, threshold)

    def cells(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What was found so far, by name and seed."""
        path = self.out / CELLS
        lines = path.read_text().splitlines() if path.exists() else []
        return {(c["name"], c["seed"]): c for c in map(json.loads, lines)}

    def run(self, name: str, decomposition: Decomposition, seed: int = 0, **size: int) -> None:
        """Fit, score and keep one cell, unless it is there."""
        if (name, seed) in self.cells():
            return
        started, used = time.time(), time.process_time()
        explanation = decomposition.fit(self.task.for_fitting())
        scored = decomposition if isinstance(decomposition, Nothing) else Fitted(explanation)
        others = HORIZONS[:-1]
        card, _ = score(self.task, [scored], fidelities=[FIDELITY], horizon=HORIZONS[-1], envelope=others)
        (found,) = card.scores
        cell: dict[str, Any] = {"name": name, "seed": seed, **size}
        cell["totals"] = {f"{n:.0f}": card.lowest(found, n) / n for n in HORIZONS}
        cell |= {c: found.column(c) for c in ("static", "state", "residual")}
        cell |= {"rate_stderr": found.rate_stderr, **found.beside}
        if isinstance(explanation, DictionaryExplanation):
            cell |= self._features(name, seed, explanation)
        cell |= {"cpu_seconds": time.process_time() - used, "seconds": time.time() - started}
        with (self.out / CELLS).open("a") as file:
            file.write(json.dumps(cell) + "\n")
        totals = ", ".join(f"{cell['totals'][f'{n:.0f}']:.1f} at N = {n:,.0f}" for n in HORIZONS)
        click.echo(f"{name}, seed {seed}: {totals} bits an image; {cell['cpu_seconds']:.1f} s of CPU")

    def _features(self, name: str, seed: int, explanation: DictionaryExplanation) -> dict[str, Any]:
        """Shapes of the features that fit data use, and the rows of those used most, kept for the picture.

        `unrounded_variance`: explained on held-out images by the autoencoder alone, nothing rounded.
        """
        use = explanation.statistics.frequency
        order = np.argsort(-use)[: np.count_nonzero(use)]
        shapes = describe(explanation.atoms[order], self.task.fit.outputs, self.threshold)
        np.save(self.out / f"{name}-{seed}.npy", explanation.atoms[order[:DRAWN]].astype(np.float16))
        medians = {f"median_{f}": float(np.median(getattr(shapes, f))) for f in ("cosine", "area", "elongation")}
        by_feature, by_use = shapes.shares(np.ones(len(order))), shapes.shares(use[order])
        assert self.task.held_out is not None
        images = self.task.held_out.sample().outputs
        alone = explained_variance(images, explanation.activations(images) @ explanation.atoms + explanation.bias)
        return {"live": len(order), "kinds": by_feature, "kinds_by_use": by_use, "unrounded_variance": alone, **medians}


def optima(cells: dict[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The autoencoder of seed 0 with the shortest total at each N."""
    grid = [c for c in cells.values() if "k" in c and c["seed"] == 0]
    return [min(grid, key=lambda c: c["totals"][f"{n:.0f}"]) for n in HORIZONS]


def run_all(sweep: Sweep, widths: tuple[int, ...], sparsities: tuple[int, ...]) -> None:
    """Baselines, the grid with one seed, then further seeds at the optimum of each N."""
    sweep.out.mkdir(parents=True, exist_ok=True)
    sweep.run("nothing", Nothing())
    sweep.run("pixels", Pixels())
    for count in CLUSTERS:
        sweep.run(f"clusters-{count}", Clusters(k=count), width=count)
    later = {**{("w", w): 2 for w in widths[COARSE[0] :]}, **{("k", k): 1 for k in sparsities[COARSE[1] :]}}
    grid = [TopKSAE(width, k) for width in widths for k in sparsities if k < width]
    grid.sort(key=lambda sae: later.get(("w", sae.width), 0) + later.get(("k", sae.k), 0))
    for index, sae in enumerate(grid):
        click.echo(f"[{index + 1}/{len(grid)}] ", nl=False)
        sweep.run(sae.name, sae, width=sae.width, k=sae.k)
    for best in optima(sweep.cells()):
        for seed in SEEDS[1:]:
            sae = TopKSAE(best["width"], best["k"], seed)
            sweep.run(sae.name, sae, seed, width=sae.width, k=sae.k)


@click.command()
@click.option("--mnist", "file", type=click.Path(exists=True, path_type=Path), help="An idx file of MNIST images.")
@click.option("--out", type=click.Path(path_type=Path), help="Where cells are kept. [default: runs/mdl_sae_DATA]")
@click.option("--widths", help="Widths to sweep, such as 64,256. [default: 16 to 1,024]")
@click.option("--sparsities", help="Features on an image, such as 1,4. [default: 1 to 16]")
@click.option("--report", "only_report", is_flag=True, help="Nothing is computed but tables and pictures.")
def main(file: Path | None, out: Path | None, widths: str | None, sparsities: str | None, only_report: bool) -> None:
    """Sweep widths and sparsities, print the tables, draw the pictures."""
    images = digits() if file is None else mnist(file)
    sweep = Sweep.of(images, out or Path("runs") / f"mdl_sae_{images.vectors.name}")
    if not only_report:
        wide, sparse = (
            tuple(map(int, text.split(","))) if text else default
            for text, default in ((widths, WIDTHS), (sparsities, SPARSITIES))
        )
        run_all(sweep, wide, sparse)
    held_out = sweep.task.held_out
    assert held_out is not None
    described = {
        "data": images.vectors.name,
        "images": {"fit": len(sweep.task.fit.outputs), "held_out": held_out.n_tokens},
        "fidelity": FIDELITY,
        "mse": FIDELITY * 2 * np.log(2) * null_kl(sweep.task) / sweep.task.width,
        "levels": images.levels,
        "threshold": sweep.threshold,
        "optima": [{"N": n, **c} for n, c in zip(HORIZONS, optima(sweep.cells()), strict=True)],
    }
    report(described, list(sweep.cells().values()), sweep.out, images.side)


def null_kl(task: Task) -> float:
    """KL of the mean image, bits: |x - mean|^2 / (2 ln 2), mean over held-out images."""
    assert task.held_out is not None
    mean = task.fit.outputs.mean(0, dtype=np.float64)
    return float(np.square(task.held_out.sample().outputs - mean).sum(1).mean() / 2 / np.log(2))


if __name__ == "__main__":
    main()
