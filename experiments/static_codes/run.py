"""What each part of the code of static rows saves, at equal fidelity, against rounding number by number.

    python -m experiments.static_codes.run [--only topk-16x --only token-table]

Each line is one explanation whose rows are sent in one way: the message is encoded and decoded, the residual coder is
fitted to what was decoded, and state + residual are interpolated at the KL of the fidelity between real evaluations of
held-out data. "exact" has the rows in steps so fine that they are float32, and does not charge for them. Results go to
results.json beside this file after every line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from decompositions.dictionary import DictionaryExplanation, fit_dictionary
from decompositions.shared import shared_bits
from estimators.fidelity import Attempt, Bench, Coding
from mdl.message import QuantisedArray, Section, encode_message
from mdl.plugins import make_decomposition
from mdl.protocols import Sample, Settings
from mdl.score import EMBEDDED_REGION, embedded_model, embedded_saes, load_data
from mdl.static_rows import metric_rows
from mdl.task import build_task

HERE = Path(__file__).parent
HORIZON, FIDELITY = 1e6, 0.01
# The settings that the scorer found for these explanations at 1 % and a million tokens, about.
STEPS = (0.070, 0.074, 0.078)
SETTINGS = {
    "topk-16x": (0.05, {"static": 2.0, "value": 4.4}),
    "jumprelu-8x": (0.05, {"static": 2.0, "value": 4.4}),
    "token-table": (0.07, {"static": 2.0}),
    "affine": (0.07, {"static": 2.0}),
}
WAYS = ("exact", "number by number", "under the metric", "+ prediction")


@dataclass(frozen=True)
class Line:
    """One way of sending one explanation: bits a token at the fidelity, static bits of the message and of its rows."""

    explanation: str
    way: str
    state: float
    residual: float
    static: float
    row_bits: float
    weights: int

    @property
    def total(self) -> float:
        """Bits a token at the horizon."""
        return self.state + self.residual + self.static / HORIZON


@dataclass(frozen=True)
class Resent:
    """An explanation whose rows are rounded in another way."""

    explanation: Any
    way: str

    @property
    def name(self) -> str:
        return self.explanation.name

    def section(self, settings: Settings) -> Section:
        section = self.explanation.section(settings)
        group, index = place_of_rows(section)
        arrays = list(getattr(section, group))
        arrays[index] = self.rows(settings)
        return replace(section, **{group: tuple(arrays)})

    def rows(self, settings: Settings) -> QuantisedArray:
        """The rows as this way sends them."""
        rows, energy, frequency = contents(self.explanation, settings)
        if self.way == "exact":
            return QuantisedArray.from_values(rows, 2.0**-20 * np.abs(rows).max())
        if self.way == "number by number":
            octaves = np.exp2(np.round(np.log2(settings.static_step(energy, frequency))))
            return QuantisedArray.from_values(rows, octaves)
        prediction = None if self.way == "under the metric" else self.explanation.prediction
        return metric_rows(rows, energy, settings, prediction, frequency)

    def encode(self, decoder: Any, sample: Sample, settings: Settings) -> Any:
        return self.explanation.encode(decoder, sample, settings)


def place_of_rows(section: Section) -> tuple[str, int]:
    """Which array of a section holds its rows."""
    return {"dictionary": ("parts", 0), "table": ("parts", 1), "affine": ("header", 0)}[section.kind]


def contents(explanation: Any, settings: Settings) -> tuple[np.ndarray, np.ndarray, np.ndarray | float]:
    """Rows that are sent, their energies, and how often each is used."""
    if isinstance(explanation, DictionaryExplanation):
        kept = explanation.kept(settings)[0]
        statistics = explanation.statistics
        return explanation.atoms[kept], statistics.energy[kept], statistics.frequency[kept]
    if hasattr(explanation, "matrix"):
        return explanation.matrix, explanation.energy, 1.0
    kept = explanation.rounded(settings).symbols.any(1)
    return explanation.rows[kept], explanation.frequency[kept], explanation.frequency[kept]


def at_fidelity(attempts: list[Attempt], eps: float, value: Callable[[Attempt], float]) -> float:
    """A line in ln KL through the attempts, at eps."""
    x = np.log([a.kl / eps for a in attempts])
    return float(np.polyval(np.polyfit(x, [value(a) for a in attempts], 1), 0.0))


def measure(bench: Bench, explanation: Any, way: str, name: str) -> Line:
    """Send it so, and evaluate."""
    step, knobs = SETTINGS[name]
    metric = bench.metrics[0]
    settings = Settings(HORIZON, step, metric.root, knobs)
    resent = Resent(explanation, way)
    coding = Coding.prepare(bench, resent, metric, settings, step, bench.examples)
    attempts = [coding.at(s).attempt(bench, bench.held_out) for s in STEPS]
    eps = FIDELITY * bench.null_kl
    group, index = place_of_rows(coding.section)
    rows = getattr(coding.section, group)[index]
    bits = rows_bits(rows)
    return Line(
        name,
        way,
        at_fidelity(attempts, eps, lambda a: a.state.bits() / a.state.n_tokens),
        at_fidelity(attempts, eps, lambda a: a.residual.bits() / a.state.n_tokens if a.residual else 0.0),
        at_fidelity(attempts, eps, lambda a: a.message.whole_bits) - (bits if way == "exact" else 0.0),
        0.0 if way == "exact" else bits,
        rows.symbols.size,
    )


def rows_bits(rows: QuantisedArray) -> float:
    """What an array takes, its tables, steps and prediction included."""
    return encode_message([Section("x", (), (rows,))]).information_bits


def keep_largest(encoder: Callable[[np.ndarray], Any], k: int, outputs: np.ndarray) -> Any:
    """The k largest activations of each token, out of those that an encoder finds."""
    found = encoder(outputs).tocsr()
    rank = np.empty(found.nnz, np.int64)
    token = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
    order = np.lexsort((-np.abs(found.data), token))
    rank[order] = np.arange(found.nnz) - found.indptr[token[order]]
    found.data = np.where(rank < k, found.data, 0.0)
    found.eliminate_zeros()
    return found


def two_sparsities(explanation: DictionaryExplanation, bench: Bench) -> dict[str, float]:
    """Static bits of a TopK dictionary at its own sparsity and at half of it: alone, and as one message."""
    outputs = bench.task.fit_activations.sample().outputs
    encoder = explanation.activations
    k = int(np.diff(encoder(outputs[:64]).tocsr().indptr).max())
    half = fit_dictionary(
        f"k={k // 2}",
        explanation.atoms,
        explanation.bias,
        lambda values: keep_largest(encoder, k // 2, values),
        outputs,
    )
    step, knobs = SETTINGS["topk-16x"]
    bits = shared_bits((explanation, half), Settings(HORIZON, step, bench.metrics[0].root, knobs))
    return {"k": k, "alone": bits.alone[0], "alone, half": bits.alone[1], "together": bits.together}


def table(lines: list[Line]) -> Table:
    """The lines, each against number by number."""
    found = Table("rows", "way", "row bits", "a weight", "state + residual", "static / N", "total", "against")
    for line in lines:
        base = next((x for x in lines if x.explanation == line.explanation and x.way == WAYS[1]), line)
        found.add_row(
            line.explanation,
            line.way,
            f"{line.row_bits:,.0f}",
            f"{line.row_bits / line.weights:.2f}",
            f"{line.state + line.residual:.2f}",
            f"{line.static / HORIZON:.2f}",
            f"{line.total:.2f}",
            f"{line.total - base.total:+.2f}",
        )
    return found


def save(lines: list[Line], pair: dict[str, float]) -> None:
    """Write results.json."""
    every = [{**asdict(line), "total": line.total} for line in lines]
    text = json.dumps({"horizon": HORIZON, "fidelity": FIDELITY, "lines": every, "two sparsities": pair}, indent=1)
    (HERE / "results.json").write_text(text + "\n")


@click.command()
@click.option("--only", multiple=True, type=click.Choice(sorted(SETTINGS)), help="Explanations (default: all).")
def main(only: tuple[str, ...]) -> None:
    """Measure, print and save."""
    model = embedded_model()
    task = build_task(model, EMBEDDED_REGION, load_data(model, fit_sequences=288), lambda *_: None)
    bench, console = Bench(task, HORIZON), Console(width=140)
    folders = {path.name: path for path in embedded_saes()}
    lines: list[Line] = []
    pair: dict[str, float] = {}
    for name in only or SETTINGS:
        decomposition = make_decomposition(f'sae:path="{folders[name]}"' if name in folders else name)
        explanation = decomposition.fit(task.for_fitting())
        for way in WAYS:
            lines.append(measure(bench, explanation, way, name))
            console.print(f"{name}, {way}: {lines[-1].total:.2f} bits a token")
            save(lines, pair)
        if name == "topk-16x":
            pair = two_sparsities(explanation, bench)
            console.print(pair)
            save(lines, pair)
    console.print(table(lines))


if __name__ == "__main__":
    main()
