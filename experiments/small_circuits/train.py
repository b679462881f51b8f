"""Train the small models: minutes each on one core.

    python -m experiments.small_circuits.train --out runs/small_circuits [--model induction-2]

A run that was interrupted goes on from its last checkpoint, to the same weights. Of each model OUT/NAME gets model/
(which `mdl compare --model` takes), data.npz (`--tokens`) and figures.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from rich.progress import Progress

from experiments.small_circuits.examples import Examples
from experiments.small_circuits.models import Small, model_named, models
from experiments.small_circuits.training import as_model, figures, train
from mdl.models.native import save_model

SCORED = 4096  # examples that explanations are fitted and scored on, at most
MODEL, DATA, FIGURES = "model", "data.npz", "figures.json"


def scored_examples(small: Small, seed: int) -> Examples:
    """Other examples than the test's, but of the additions, of which there are only so many: some of all."""
    if small.last:
        every = small.test(seed), small.examples(0, seed)
        joined = Examples(*(np.concatenate([getattr(e, n) for e in every]) for n in ("tokens", "measured", "answers")))
        return joined[np.random.default_rng([seed, 1]).permutation(len(joined))[:SCORED]]
    return small.test(seed + 1)


def finish(small: Small, seed: int, folder: Path, progress: Progress) -> None:
    """Train, save the model and its data, and write down what it can do."""
    bar = progress.add_task(small.name, total=small.steps)

    def report(step: int, loss: float, seconds: float) -> None:
        progress.update(bar, completed=step, description=f"{small.name}: {loss:.4g} nats")

    params = train(small, seed, folder, report)
    progress.update(bar, completed=small.steps)
    model = as_model(small, params)
    save_model(model, folder / MODEL)
    scored_examples(small, seed).save(folder / DATA)
    loss, accuracy = figures(small, params, small.test(seed))
    found = {"model": small.name, "seed": seed, "steps": small.steps, "parameters": model.n_parameters}
    found |= {"test_loss_nats": loss, "test_accuracy": accuracy, "fingerprint": model.fingerprint}
    (folder / FIGURES).write_text(json.dumps(found, indent=1) + "\n")
    progress.console.print(f"{small.name}: test loss {loss:.4g} nats, accuracy {accuracy:.4f}")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/small_circuits"), show_default=True)
@click.option("--model", "names", multiple=True, help="Which; all by default.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, names: tuple[str, ...], seed: int) -> None:
    """Train some or all of the small models."""
    with Progress() as progress:
        for name in names or models():
            finish(model_named(name), seed, out / name, progress)


if __name__ == "__main__":
    main()
