"""The whole study from scratch: train, score, draw; says how long it took.

    python -m experiments.sae_vs_pca [--out runs/study] [--jobs 2] [--stories FOLDER ...]

Every step goes on where an interrupted one stopped. A story folder is a checkpoint with `tokens_tinystories.npy` in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from experiments.sae_vs_pca import bare, report, run, train
from experiments.sae_vs_pca.models import CONTROLS, MAIN_SITE

STORY_SITE = "blocks.3.hook_resid_pre"
STORY_TOKENS = "tokens_tinystories.npy"


def timed(what: str, step: Callable[..., Any], **options: Any) -> None:
    """One step, and how long it took."""
    started = time.time()
    step(**options)
    click.echo(f"{what}: {(time.time() - started) / 60:.1f} minutes")


def one_model(name: str, wanted: tuple[str, ...], tokens: Path | None, out: Path, jobs: int) -> None:
    """Train and score what one model lacks; `wanted`: its sites, all of them if empty."""
    short, regions = Path(name).name, tuple(f"upstream of {site}" for site in wanted)
    saes, cells = out / "saes", out / "cells"
    options: dict[str, Any] = {"model": name, "tokens": tokens, "wanted": wanted, "out": saes / short, "threads": jobs}
    timed(f"training on {short}", train.main.callback, **options)  # type: ignore[arg-type]
    options = {"model": name, "tokens": tokens, "wanted": regions, "only": (), "saes": saes, "out": cells, "jobs": jobs}
    timed(f"scoring on {short}", run.main.callback, **options)  # type: ignore[arg-type]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="runs/study", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Sites that are scored at a time.")
@click.option("--stories", type=click.Path(exists=True, path_type=Path), multiple=True, help="A model of others.")
@click.option("--save/--no-save", default=True, show_default=True, help="Write results and pictures beside the README.")
def main(out: Path, jobs: int, stories: tuple[Path, ...], save: bool) -> None:
    """Regenerate every table and picture of the study."""
    started = time.time()
    one_model("embedded", (), None, out, jobs)
    for control in CONTROLS:
        one_model(control, (MAIN_SITE,), None, out, jobs)
    for folder in stories:
        one_model(str(folder), (STORY_SITE,), folder / STORY_TOKENS, out, jobs)
    timed("without a residual coder", bare.main.callback, saes=out / "saes", out=out / "cells")  # type: ignore[arg-type]
    report.main.callback(cells=out / "cells", save=save, width=200)  # type: ignore[misc]
    click.echo(f"all of it: {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
