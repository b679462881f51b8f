"""Every compiled program, every seed: one small JSON file each, so that it can be interrupted; then the table.

python -m experiments.compiled_programs.run --seeds 3
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import jax

from experiments.compiled_programs.cases import Case
from experiments.compiled_programs.contest import contest
from experiments.compiled_programs.report import report
from mdl.models.compiled import PROGRAMS

HERE = Path(__file__).parent
CELLS = Path("runs/compiled_programs")


@click.command()
@click.option("--seeds", default=3, show_default=True, help="How many of each program.")
@click.option("--first", default=0, show_default=True, help="The first seed.")
@click.option("--programs", multiple=True, type=click.Choice([*PROGRAMS]), help="Programs (default: all).")
@click.option(
    "--dense/--no-dense", default=False, help="Also what rounds dense weights, which takes minutes a program."
)
@click.option("--out", default=CELLS, show_default=True, type=click.Path(path_type=Path), help="Where cells are kept.")
def main(seeds: int, first: int, programs: tuple[str, ...], dense: bool, out: Path) -> None:
    """Score the weight-true circuit against its rivals, and print how often it wins."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = [(seed, name) for seed in range(first, first + seeds) for name in (programs or PROGRAMS)]
    # Every contestant compiles the same functions anew: once is enough.
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    for number, (seed, name) in enumerate(wanted):
        path = out / f"{name}-{seed}{'-dense' * dense}.json"
        if path.exists():
            continue
        started = time.time()
        cell = {"program": name, "seed": seed, "dense": dense, **contest(Case.of(name, seed), rounded=dense)}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({**cell, "seconds": time.time() - started}))
        partial.replace(path)
        click.echo(f"{number + 1} of {len(wanted)}: {name}, seed {seed}: {time.time() - started:.0f} s", err=True)
    report(out, HERE)


if __name__ == "__main__":
    main()
