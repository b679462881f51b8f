"""Circuits of two behaviours beside every other family: one small JSON file for each row, then the tables.

python -m experiments.embedded_circuits.run
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from experiments.embedded_circuits.behaviours import BEHAVIOURS, write
from mdl.score import EMBEDDED, compare, embedded_model, load_data
from mdl.task import BEHAVIOUR

HERE = Path(__file__).parent
CELLS = Path("runs/embedded_circuits")
HORIZON = 1e7  # precisions are chosen for it: a behaviour of one token in ten pays for weights ten times as late
HORIZONS = (1e5, 1e6, 1e7, 1e8)
SEQUENCES, FIT_SEQUENCES = 16, 64
WHOLE, UPSTREAM = "model", "upstream of blocks.2.hook_resid_pre"
FIDELITY = 0.1
SAE = "sae:topk-4x"  # of those that are shipped with the model
CIRCUITS = (
    "circuit:level=node,search=eap-ig",
    "circuit:level=node,search=eap-ig,ablation=zero",
    "circuit:level=subspace,search=eap-ig",
)
ROWS = {
    WHOLE: (
        "nothing",
        "token-table",
        "weights",
        *CIRCUITS,
        "token-pairs",
        "low-rank",
        "circuit:level=neuron,search=eap-ig",
        "circuit:level=node,search=greedy",
        "circuit:level=node,search=eap-ig,ablation=optimal",
    ),
    UPSTREAM: ("nothing", "token-table", SAE, "weights", *CIRCUITS, "pca:rank=16"),
}


@click.command()
@click.option("--behaviour", "behaviours", multiple=True, type=click.Choice([*BEHAVIOURS]), help="Default: all.")
@click.option("--region", "regions", multiple=True, type=click.Choice([*ROWS]), help="Default: all.")
@click.option("--out", default=CELLS, show_default=True, type=click.Path(path_type=Path), help="Where cells are kept.")
def main(behaviours: tuple[str, ...], regions: tuple[str, ...], out: Path) -> None:
    """Score every explanation of every behaviour; rows that are there are not made again."""
    for behaviour in behaviours or BEHAVIOURS:
        data = out / f"{behaviour}.npz"
        if not data.exists():
            write(embedded_model(), load_data(embedded_model(), sequences=200), behaviour, data)
        for region in regions or ROWS:
            for row in ROWS[region]:
                path = out / f"{behaviour}@{region}@{row}.json".replace(" ", "-")
                if path.exists():
                    continue
                started = time.time()
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(cell(data, behaviour, region, row)))
                partial.replace(path)
                click.echo(f"{path.stem}: {time.time() - started:.0f} s", err=True)
    report(out)


def cell(data: Path, behaviour: str, region: str, row: str) -> dict[str, Any]:
    """One explanation's scores under behaviour, and (upstream) of activations."""
    wanted = ["behaviour"] if region == WHOLE else ["behaviour", "activations"]
    card = compare(
        region=region,
        tokens=data,
        explanations=[f'sae:path="{EMBEDDED / "saes" / row[4:]}"' if row == SAE else row],
        phenomena=wanted,
        fidelities=[FIDELITY],
        horizon=HORIZON,
        sequences=SEQUENCES,
        fit_sequences=FIT_SEQUENCES,
    )
    scores = [s for s in card.scores if (s.explanation == "nothing") == (row == "nothing")]
    asked = card.task["measured_tokens"] / card.task["held_out_tokens"]
    return {
        "behaviour": behaviour,
        "region": region,
        "row": row,
        "task": {key: card.task[key] for key in ("data_sha256", "null_kl_bits", "measured_tokens", "held_out_tokens")},
        "asked": asked,
        "scores": [
            {
                "phenomenon": s.phenomenon,
                "explanation": s.explanation,
                "static_bits": s.static.whole_bits,
                "rate": s.rate,
                "kl_bits_asked": s.kl_bits / asked,
                "totals": {f"{n:g}": float(s.total(n)) / n for n in HORIZONS},
            }
            for s in scores
        ],
    }


def report(out: Path) -> None:
    """Tables of what is there, and results.json beside this file."""
    cells = [json.loads(path.read_text()) for path in sorted(out.glob("*@*.json"))]
    (HERE / "results.json").write_text(json.dumps(cells, indent=1) + "\n")
    for behaviour, region, phenomenon in sorted(
        {(c["behaviour"], c["region"], s["phenomenon"]) for c in cells for s in c["scores"]}
    ):
        some = [c for c in cells if (c["behaviour"], c["region"]) == (behaviour, region)]
        title = (
            f"{behaviour}, {region}, {phenomenon}: null {some[0]['task']['null_kl_bits'] / some[0]['asked']:.2f} bits"
        )
        table = Table(title=f"{title} at each of the positions asked for ({100 * some[0]['asked']:.1f} % of all)")
        left = "KL left there" if phenomenon == BEHAVIOUR else "told"
        for column in ("explanation", "message, kbit", left, *(f"N = {n:g}" for n in HORIZONS)):
            table.add_column(column)
        rows = [s for c in some for s in c["scores"] if s["phenomenon"] == phenomenon]
        for s in sorted(rows, key=lambda s: s["totals"][f"{HORIZON:g}"]):
            told = s["kl_bits_asked"] if phenomenon == BEHAVIOUR else s["rate"]
            totals = (f"{s['totals'][f'{n:g}']:.3f}" for n in HORIZONS)
            table.add_row(s["explanation"], f"{s['static_bits'] / 1e3:.0f}", f"{told:.3f}", *totals)
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
