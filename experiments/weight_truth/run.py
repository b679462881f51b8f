"""Every toy, every seed: one small JSON file each, so that it can be interrupted; then the table (`report`).

python -m experiments.weight_truth.run --seeds 10
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from experiments.weight_truth.cases import CASES, CONTROLS
from experiments.weight_truth.contest import contest
from experiments.weight_truth.report import report

HERE = Path(__file__).parent
CELLS = Path("runs/weight_truth")


@click.command()
@click.option("--seeds", default=10, show_default=True, help="How many of each toy.")
@click.option("--first", default=0, show_default=True, help="The first seed.")
@click.option("--case", "cases", multiple=True, type=click.Choice([*CASES, *CONTROLS]), help="Toys (default: all).")
@click.option("--out", default=CELLS, show_default=True, type=click.Path(path_type=Path), help="Where cells are kept.")
def main(seeds: int, first: int, cases: tuple[str, ...], out: Path) -> None:
    """Score the truth against its rivals, and print how often it wins."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = [(seed, name) for seed in range(first, first + seeds) for name in (cases or (*CASES, *CONTROLS))]
    for number, (seed, name) in enumerate(wanted):
        path = out / f"{name.replace(' ', '-').replace(',', '')}-{seed}.json"
        if path.exists():
            continue
        started = time.time()
        cell = {"case": name, "seed": seed, **contest({**CASES, **CONTROLS}[name](seed))}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({**cell, "seconds": time.time() - started}))
        partial.replace(path)
        click.echo(f"{number + 1} of {len(wanted)}: {name}, seed {seed}: {time.time() - started:.0f} s", err=True)
    report(out, HERE)


if __name__ == "__main__":
    main()
