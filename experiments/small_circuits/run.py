"""Explanations of the small models in one table each: tables, weights, textbook and searched circuits, clocks.

    python -m experiments.small_circuits.run --runs runs/small_circuits [--model induction-2]

takes what `experiments.small_circuits.train` left, and writes results.json beside this file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from decompositions.circuits.circuit import Circuit, CircuitExplanation
from decompositions.circuits.decoder import CircuitDecoder
from decompositions.circuits.search import Path as Nested
from experiments.small_circuits.examples import Examples
from experiments.small_circuits.models import MODULUS, model_named, models
from experiments.small_circuits.spectrum import spectrum
from experiments.small_circuits.textbook import Masks, head_scores, textbooks
from experiments.small_circuits.train import DATA, FIGURES, MODEL
from mdl.ledger import Score, Scorecard
from mdl.message import decode_message
from mdl.models import Model, load_model
from mdl.models.circuits.graph import Graph
from mdl.models.networks import TransformerRegion
from mdl.protocols import Decomposition
from mdl.report.progress import progress_bar
from mdl.score import compare
from mdl.task import Task

HERE = Path(__file__).parent
HORIZONS = (1e3, 1e4, 1e6)
SEARCHED = 64  # sequences on which the textbook's circuit and its growth are measured
YARDSTICKS = ("token-table", "token-pairs", "weights", "low-rank")
FEW = (
    ("greedy", "edge", "zero"),
    ("greedy", "edge", "mean"),
    ("greedy", "subspace", "mean"),
    ("greedy", "node", "mean"),
)
CLOCKS = ("fourier", "fourier:select=kl", "fourier:frequencies=1", "fourier:frequencies=5")
WAVES = ("fourier-weights:frequencies=5", "fourier-weights:frequencies=10")


@dataclass(frozen=True)
class Grown:
    """A circuit with edges added one by one, of which each N takes as many as give the shortest total.

    **Arguments:** `path` [circuits, sources, destinations]: from the first circuit on, nested.
    """

    name: str
    path: np.ndarray
    level: str
    ablation: str = "mean"

    def fit(self, task: Task) -> CircuitExplanation:
        first = Circuit(edges=self.path[0], level=self.level, ablation=self.ablation, name=self.name)  # type: ignore[arg-type]
        return replace(first.fit(task), path=Nested(tuple(self.path)))


def every_circuit() -> Iterator[tuple[str, str, str]]:
    """Search, level, ablation: all of them."""
    for search in ("greedy", "eap-ig", "exact"):
        for level in ("node", "edge", "subspace"):
            for ablation in ("zero", "mean"):
                yield search, level, ablation


def searched(rows: Any) -> list[str]:
    return [f"circuit:search={s},level={level},ablation={a}" for s, level, a in rows]


def examples_of(folder: Path) -> Examples:
    """What `train` left to score on; its answers are not needed."""
    with np.load(folder / DATA) as found:
        return Examples(found["tokens"], found["measured"], found["tokens"])


def growth(model: Model, examples: Examples, console: Console) -> tuple[dict[str, Any], list[Decomposition]]:
    """The textbook's circuits: what they leave, and the edges that are added to them; and these as explanations."""
    heads = head_scores(model, examples)
    books = textbooks(heads)
    found: dict[str, Any] = {"previous": heads.previous, "induction": heads.induction, "circuits": {}}
    rows: list[Decomposition] = []
    graph = Graph.of(model.config)
    for ablation in ("zero", "mean"):
        masks = Masks.of(model, examples, ablation)
        ends = masks.bits(np.stack([np.zeros_like(graph.possible), graph.possible]))
        found[f"null ({ablation})"], found[f"all ({ablation})"] = (float(b) for b in ends)
        for name, edges in books.items():
            mask = graph.mask(edges)
            added = masks.grown(mask)
            left = float(masks.bits(mask[None])[0])
            console.print(
                f"{name}, {ablation}: {len(edges)} edges leave {left:.3f} of {ends[0]:.3f} bits; + {added[:4]}"
            )
            found["circuits"][f"{name} ({ablation})"] = {"edges": edges, "kl_bits": left, "added": added}
            path = np.stack([graph.mask([*edges, *(e for e, _ in added[:n])]) for n in range(len(added) + 1)])
            levels = ("edge", "subspace") if ablation == "mean" else ("edge",)
            for level in levels:
                label = f"{level}, {ablation}"
                rows.append(Circuit(edges=mask, level=level, ablation=ablation, name=f"{name} ({label})"))
                rows.append(Grown(f"{name} and more ({label})", path, level, ablation))
    return found, rows


def rows_of(card: Scorecard, messages: Path, model: Model) -> list[dict[str, Any]]:
    """A row for each score: totals at every horizon, each with the precision chosen for it, and what was sent."""
    share = card.task["measured_tokens"] / card.task["held_out_tokens"]
    found = []
    for score in card.scores:
        same = [score, *(s for s in card.envelope if s.explanation == score.explanation)]
        row: dict[str, Any] = {"explanation": score.explanation}
        for n in HORIZONS:
            best = min(same, key=lambda s, n=n: float(s.total(n)))
            row[f"{n:g}"] = {
                "total_bits": float(best.total(n)),
                "static_bits": float(best.static.at(n)),
                "kl_bits_a_measured_token": best.kl_bits / share,
                "kl_stderr": best.kl_stderr / share,
                **sent(best, messages, model),
            }
        found.append(row)
    return found


def sent(score: Score, messages: Path, model: Model) -> dict[str, Any]:
    """Of a circuit how many edges were sent, of a clock its frequencies; from the message itself."""
    section = next(
        (s for s in decode_message((messages / score.message_file).read_bytes()) if s.kind != "special"), None
    )
    if section is None or section.kind not in ("circuit", "fourier", "fourier-weights"):
        return {}
    if section.kind == "circuit":
        network = TransformerRegion.of(model, "tokens", "logits")
        return {"edges": int(CircuitDecoder.from_section(section).kept(network).edges.sum())}
    return {"frequencies": np.cumsum(section.header[1].symbols[0]).tolist()}


def explain(
    name: str, folder: Path, full: bool, cheap: bool, sequences: int, fit: int, console: Console
) -> dict[str, Any]:
    """Everything about one model; `cheap`: of explanations, those alone that send none of its weights."""
    started = time.time()
    model, examples = load_model(folder / MODEL), examples_of(folder)
    assert isinstance(model, Model)
    result: dict[str, Any] = json.loads((folder / FIGURES).read_text())
    wanted: list[str | Decomposition] = [*(YARDSTICKS[:2] if cheap else YARDSTICKS)]
    if name.startswith("induction"):
        some = examples[np.arange(min(SEARCHED, len(examples)))]
        result["textbook"], own = growth(model, some, console)
        wanted += [] if cheap else own
    if name == "modular-addition":
        result["spectrum"] = spectrum(model, MODULUS)
        wanted += [*CLOCKS, *(() if cheap else WAVES)]
    wanted += [] if cheap else searched(every_circuit() if full else FEW)
    with progress_bar(Console(stderr=True)) as progress:
        card = compare(
            folder / MODEL,
            "model",
            tokens=folder / DATA,
            explanations=wanted,
            phenomena=["behaviour"],
            sequences=sequences,
            fit_sequences=fit,
            horizon=HORIZONS[-1],
            envelope=HORIZONS[:-1],
            out=folder / "scores",
            progress=progress,
        )
    result["task"] = {k: card.task[k] for k in ("null_kl_bits", "held_out_tokens", "measured_tokens", "held_out_units")}
    result["rows"] = rows_of(card, folder / "scores" / "messages", model)
    result["scoring_seconds"] = time.time() - started
    return result


@click.command()
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs/small_circuits"), show_default=True)
@click.option("--model", "names", multiple=True, help="Which; all that were trained by default.")
@click.option("--full", multiple=True, default=("induction-2",), show_default=True, help="Models with every search.")
@click.option("--cheap", is_flag=True, help="Only what sends no weights: tables and clocks.")
@click.option("--sequences", default=100, show_default=True, help="Held-out sequences.")
@click.option("--fit", default=300, show_default=True, help="Sequences to fit on.")
def main(runs: Path, names: tuple[str, ...], full: tuple[str, ...], cheap: bool, sequences: int, fit: int) -> None:
    """Score, print the tables, and write results.json."""
    from experiments.small_circuits.report import print_model

    console, file = Console(width=150, highlight=False), HERE / "results.json"
    for name in names or [n for n in models() if (runs / n / FIGURES).exists()]:
        model_named(name)
        found = explain(name, runs / name, name in full, cheap, sequences, fit, console)
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, name: found}, indent=1) + "\n")
        print_model(found, console)


if __name__ == "__main__":
    main()
