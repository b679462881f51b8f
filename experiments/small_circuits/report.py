"""Tables of the small models' results, as the README has them.

python -m experiments.small_circuits.report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

HORIZONS = ("1000", "10000", "1e+06")


def table(result: dict[str, Any]) -> list[str]:
    """Markdown lines: totals in kbit at each N, the shortest bold; at the largest N what was sent, and what is left."""
    lines = ["| explanation | 1e3 | 1e4 | 1e6 | KL left | sent |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    least = {n: min(row[n]["total_bits"] for row in result["rows"]) for n in HORIZONS}
    for row in result["rows"]:
        totals = [_total(row[n]["total_bits"], least[n]) for n in HORIZONS]
        last = row[HORIZONS[-1]]
        lines.append(
            f"| {row['explanation']} | {' | '.join(totals)} | {last['kl_bits_a_measured_token']:.4f} | {_sent(row)} |"
        )
    return lines


def _total(bits: float, least: float) -> str:
    text = f"{bits / 1e3:.4g}" if bits < 1e6 else f"{bits / 1e3:.0f}"
    return f"**{text}**" if bits <= least else text


def _sent(row: dict[str, Any]) -> str:
    """At each N: edges or frequencies."""
    last = row[HORIZONS[-1]]
    if "edges" in last:
        return ", ".join(str(row[n]["edges"]) for n in HORIZONS) + " edges"
    if "frequencies" in last:
        return "frequencies " + "; ".join(" ".join(map(str, row[n]["frequencies"])) for n in HORIZONS)
    return ""


def heading(result: dict[str, Any]) -> str:
    """What was trained, and how well it does."""
    return (
        f"{result['model']}: {result['parameters']} weights, {result['steps']} steps, test loss "
        f"{result['test_loss_nats']:.4g} nats, accuracy {result['test_accuracy']:.4f}"
    )


def textbook_lines(found: dict[str, Any]) -> list[str]:
    """Heads, what the textbook's circuits leave, and the first edges that are added."""
    share = lambda values: ", ".join(f"{v:.2f}" for v in values)  # noqa: E731
    lines = [f"previous-token attention {share(found['previous'])}; induction attention {share(found['induction'])}"]
    for name, circuit in found["circuits"].items():
        null = found[f"null ({'zero' if name.endswith('zero)') else 'mean'})"]
        grown = ", ".join(f"{edge} {bits:.3f}" for edge, bits in circuit["added"][:8])
        lines.append(
            f"{name}: {len(circuit['edges'])} edges leave {circuit['kl_bits']:.3f} of {null:.3f}; then {grown}"
        )
    return lines


def print_model(result: dict[str, Any], console: Console) -> None:
    """All of one model."""
    console.print(heading(result))
    for line in textbook_lines(result["textbook"]) if "textbook" in result else []:
        console.print(line)
    if "spectrum" in result:
        console.print(json.dumps(result["spectrum"]))
    for line in table(result):
        console.print(line)


@click.command()
@click.option("--file", type=click.Path(path_type=Path), default=Path(__file__).parent / "results.json")
def main(file: Path) -> None:
    """Print what was found, from results.json."""
    console = Console(width=200, highlight=False)
    for result in json.loads(file.read_text()).values():
        print_model(result, console)


if __name__ == "__main__":
    main()
