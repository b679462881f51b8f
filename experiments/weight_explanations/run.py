"""Weights, transcoder, parameter decomposition, tables and the standard coder, of one region, in one table.

python -m experiments.weight_explanations.run --region blocks.1.mlp --out runs/mlp
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from experiments.weight_explanations.lines import quantiser_lines
from experiments.weight_explanations.picture import draw_lines
from mdl.ledger import Scorecard
from mdl.report.envelope import overtakings
from mdl.report.picture import draw
from mdl.report.progress import progress_bar
from mdl.report.table import print_scorecard
from mdl.score import compare, embedded_saes, embedded_transcoders

HERE = Path(__file__).parent
MLP, UPSTREAM = "blocks.1.mlp", "upstream of blocks.2.hook_resid_pre"
SPD = HERE.parent / "parameter_decomposition" / "blocks.1.mlp.safetensors"
FAMILIES = ("token-table", "affine", "weights", "weights:quantiser=nearest", "low-rank", "neurons")


def explanations(region: str, lists: bool) -> list[str]:
    """Every family that can explain the region. `lists`: SPD by index lists too, of 353 components on at every token:
    they take minutes to code, and are far behind."""
    if region != MLP:
        return [
            *FAMILIES,
            "circuit:level=subspace",
            *(f'sae:path="{path}"' for path in embedded_saes() if "topk-16x" in str(path)),
        ]
    transcoders = [f'sae:path="{path}"{sent}' for path in embedded_transcoders() for sent in ("", ",encoder=sent")]
    spd = [f'components:path="{SPD}",gates=program,name=SPD with gates']
    spd += [f'components:path="{SPD}",name=SPD'] if lists else []
    return [*FAMILIES, *transcoders, *spd]


@click.command()
@click.option("--region", default=MLP, show_default=True)
@click.option("--sequences", default=24, show_default=True, help="Held-out sequences.")
@click.option("--fidelity", "fidelities", multiple=True, type=float, default=(0.1, 0.01), show_default=True)
@click.option("--lists", is_flag=True, help="SPD by index lists too.")
@click.option("--lines", is_flag=True, help="The bound and the learning coefficient too: minutes more.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/weights"), show_default=True)
def main(region: str, sequences: int, fidelities: tuple[float, ...], lists: bool, lines: bool, out: Path) -> None:
    """Score, print the table, and leave figures and pictures beside this file."""
    console = Console(width=160, highlight=False)
    with progress_bar(Console(stderr=True)) as progress:
        card = compare(
            region=region,
            explanations=explanations(region, lists),
            fidelities=fidelities,
            sequences=sequences,
            out=out,
            progress=progress,
        )
    print_scorecard(card, console)
    name = region.replace(" ", "-")
    draw(card, HERE / f"{name}.png")
    results: dict[str, Any] = {
        "task": card.task,
        "seconds": card.seconds,
        "scores": rows(card),
        "overtakings": changes(card),
    }
    (HERE / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    if lines:
        found = quantiser_lines(region)
        draw_lines(found, HERE / f"{name}-bound.png")
        (HERE / f"{name}-bound.json").write_text(json.dumps(found, indent=1) + "\n")


def rows(card: Scorecard) -> list[dict[str, Any]]:
    """What the README quotes."""
    return [
        {
            "explanation": s.explanation,
            "phenomenon": s.phenomenon,
            "fidelity": s.fidelity,
            "static_kbit": round(s.static.whole_bits / 1e3, 2),
            "rate": round(s.rate, 3),
            "kl_bits": s.kl_bits,
            "total_1e4": round(float(s.total(1e4)) / 1e4, 3),
            "total_1e6": round(float(s.total(1e6)) / 1e6, 3),
            "l0": round(s.beside["l0"], 2),
            "settings": dict(s.settings),
        }
        for s in card.scores
    ]


def changes(card: Scorecard) -> list[dict[str, Any]]:
    """Who overtakes whom, at which N, in each setting."""
    settings = dict.fromkeys((s.phenomenon, s.fidelity) for s in card.scores)
    return [{"setting": list(s), "overtakings": [str(c) for c in overtakings(card, s)]} for s in settings]


if __name__ == "__main__":
    main()
