"""What do conditional codes take off the state? At 1 % of the null's KL, on the embedded model's held-out text.

    python -m experiments.state_codes.run

Every explanation is solved for its shortest total at 1 % as `mdl compare` does, under today's codes; then the same
symbols are priced by the field's rule of thumb, by their entropy, by today's codes and by the conditional ones. Prints
the table and writes results.json beside this file. With --decode every conditional stream is also written and read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from estimators.fidelity import Bench
from estimators.solver import Solver
from mdl.codes.adaptive_integer import AdaptiveInteger
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.conditional_columns import ConditionalColumnCode
from mdl.codes.conditional_indices import ConditionalIndexCode
from mdl.codes.conditional_supports import ConditionalSupportCode
from mdl.codes.conditional_values import ConditionalValueCode
from mdl.codes.counts import plug_in_bits
from mdl.codes.supports import IntroductionCode
from mdl.plugins import make_decomposition
from mdl.score import DEFAULT_HORIZON, EMBEDDED_REGION, embedded_model, embedded_saes, load_data
from mdl.state import DenseState, IndexState, SparseState, first_use_order
from mdl.task import Task, build_task

FIDELITY = 0.01
RULE_BITS = 7.0  # of a value, by the rule of thumb
FIT_TOKENS = 4096  # an index code's parameters are chosen on so many tokens


@dataclass(frozen=True)
class Side:
    """What the receiver knows at every held-out position: token ids, previous positions."""

    tokens: np.ndarray
    previous: np.ndarray


@dataclass(frozen=True)
class Priced:
    """Bits a token of one explanation's state. None: the code does not apply. `learning`: of the conditional code."""

    explanation: str
    active: float
    rule: float | None
    entropy: float | None
    today: float
    today_support: float | None
    today_values: float | None
    conditional: float
    conditional_support: float | None
    conditional_values: float | None
    learning: float
    residual: float
    residual_conditional: float
    parameters: str
    decoded: bool

    def below(self, reference: float | None) -> float | None:
        """By how much the conditional state + today's residual is below another state + that residual."""
        return None if reference is None else 1.0 - (self.conditional + self.residual) / (reference + self.residual)


def side_of(task: Task) -> Side:
    """Scored positions are consecutive within a sequence, so that each follows the one before it in the stream."""
    assert task.held_out is not None
    scored = task.held_out.scored
    owner = np.repeat(np.arange(len(scored)), scored.sum(1))
    positions = np.arange(owner.size)
    starts = np.r_[True, owner[1:] != owner[:-1]]
    return Side(task.held_out.tokens[scored].astype(np.int64), np.where(starts, -1, positions - 1))


def histogram_entropy(values: np.ndarray, classes: np.ndarray) -> float:
    """In-sample entropy of values within their classes, in bits, nothing paid for learning it."""
    _, counts = np.unique(np.stack([classes, values]), axis=1, return_counts=True)
    return float(np.bincount(classes) @ np.log2(np.maximum(np.bincount(classes), 1)) - counts @ np.log2(counts))


def decodes(write: Callable[[BitWriter], Any], read: Callable[[BitReader], np.ndarray], expected: np.ndarray) -> bool:
    """Whether the stream gives the symbols back."""
    writer = BitWriter()
    write(writer)
    reader = BitReader(writer.to_bytes())
    found = read(reader)
    reader.finish()
    return bool(np.array_equal(found, expected))


def price_sparse(state: SparseState, width: int, side: Side, decode: bool) -> dict[str, Any]:
    """A dictionary's state. Its features are put in the order of first use, as they are sent."""
    state = state.reordered(first_use_order(state.touched()))
    n, known = state.n_tokens, (side.tokens, side.previous)
    support = (state.tokens, state.features)
    classes = state.classes[state.features]
    scales = np.sqrt(2.0) ** classes
    on = np.bincount(state.features)
    today = IntroductionCode().bits(support, n).total
    supports = ConditionalSupportCode.fit(support, *known)
    priced = supports.bits(support, *known)
    values = ConditionalValueCode(state.signed)
    valued = values.bits(support, state.values, scales, *known)
    plain = float(AdaptiveInteger(signed=state.signed, with_zero=False).bits(state.values, classes, 16).sum())
    both = np.stack(support)
    decoded = decode and (
        decodes(
            lambda w: supports.write(w, support, *known),
            lambda r: np.stack(ConditionalSupportCode.read(r, *known)[1]),
            both,
        )
        and decodes(
            lambda w: values.write(w, support, state.values, scales, *known),
            lambda r: values.read(r, support, scales, *known),
            state.values,
        )
    )
    active = state.values.size / n
    return {
        "active": active,
        "rule": active * (np.log2(width) + RULE_BITS),
        "entropy": (float(plug_in_bits(on, n - on).sum()) + histogram_entropy(state.values, classes)) / n,
        "today": state.bits() / n,
        "today_support": today / n,
        "today_values": plain / n,
        "conditional": (priced.total + valued.total) / n,
        "conditional_support": priced.total / n,
        "conditional_values": valued.total / n,
        "learning": (priced.learning + valued.learning) / n,
        "parameters": repr(supports.parameters),
        "decoded": decoded,
    }


def price_dense(state: DenseState, side: Side, decode: bool) -> dict[str, Any]:
    """Quantised coefficients."""
    values, known = state.values.astype(np.int64), (side.tokens, side.previous)
    n, width = values.shape
    code = ConditionalColumnCode.fit(values, *known)
    found = code.bits(values, *known)
    decoded = decode and decodes(
        lambda w: code.write(w, values, *known), lambda r: ConditionalColumnCode.read(r, width, *known)[1], values
    )
    entropy = histogram_entropy(values.ravel(), np.tile(np.arange(width), n))
    return {
        **others(entropy / n, state.bits() / n, found.total / n, found.learning / n),
        "active": float(np.count_nonzero(values)) / n,
        "parameters": repr(code),
        "decoded": decoded,
    }


def price_indices(state: IndexState, side: Side, decode: bool) -> dict[str, Any]:
    """Clusters, numbered by first use as they are sent."""
    state = state.reordered(first_use_order(state.touched()))
    indices, n = state.indices.astype(np.int64), state.n_tokens
    head = (indices[:FIT_TOKENS], side.tokens[:FIT_TOKENS], side.previous[:FIT_TOKENS])
    code, known = ConditionalIndexCode.fit(*head), (side.tokens, side.previous)
    found = code.bits(indices, *known)
    decoded = decode and decodes(
        lambda w: code.write(w, indices, *known), lambda r: ConditionalIndexCode.read(r, *known)[1], indices
    )
    entropy = histogram_entropy(indices, np.zeros(n, dtype=np.int64))
    return {
        **others(entropy / n, state.bits() / n, found.total / n, found.learning / n),
        "active": 1.0,
        "parameters": repr(code),
        "decoded": decoded,
    }


def others(entropy: float, today: float, conditional: float, learning: float) -> dict[str, Any]:
    """What states without a support have no figure for."""
    names = ("rule", "today_support", "today_values", "conditional_support", "conditional_values")
    figures = {"entropy": entropy, "today": today, "conditional": conditional, "learning": learning}
    return {**dict.fromkeys(names), **figures}


def price(name: str, width: int, state: Any, residual: DenseState, side: Side, decode: bool) -> Priced:
    """Price the symbols of one explanation of `width` features, and those of the residual coder behind it."""
    if isinstance(state, SparseState):
        figures = price_sparse(state, width, side, decode)
    elif isinstance(state, DenseState):
        figures = price_dense(state, side, decode)
    else:
        assert isinstance(state, IndexState)
        figures = price_indices(state, side, decode)
    n = state.n_tokens
    conditional = ConditionalColumnCode().bits(residual.values.astype(np.int64), side.tokens, side.previous).total / n
    return Priced(explanation=name, residual=residual.bits() / n, residual_conditional=conditional, **figures)


def solve(bench: Bench, text: str, side: Side, decode: bool) -> Priced:
    """Solve one explanation at 1 % under today's codes, and price its symbols."""
    explanation = make_decomposition(text).fit(bench.task.for_fitting())
    attempt = Solver(bench, explanation).solve(FIDELITY * bench.null_kl).attempt
    assert attempt.residual is not None
    width = len(getattr(explanation, "atoms", ()))
    return price(explanation.name, width, attempt.state, attempt.residual, side, decode)


def show(rows: list[Priced]) -> Table:
    """The table, bits a token."""
    table = Table(title=f"State at {FIDELITY:.0%} of the null's KL, bits a token")
    headers = ("on", "k log2 n + 7k", "entropy", "today", "conditional", "residual")
    for header in ("", *headers, "below rule", "below entropy", "below today"):
        table.add_column(header, justify="right" if header else "left")
    for row in rows:
        figures = (row.active, row.rule, row.entropy, row.today, row.conditional, row.residual)
        shares = (row.below(row.rule), row.below(row.entropy), row.below(row.today))
        cells = ["" if x is None else f"{x:.1f}" for x in figures] + ["" if x is None else f"{x:.1%}" for x in shares]
        table.add_row(row.explanation, *cells)
    table.caption = "below: conditional state + residual against the other state + the same residual"
    return table


@click.command()
@click.option("--decode", is_flag=True, help="Also write every conditional stream, and read it back.")
def main(decode: bool) -> None:
    """Print the table and write results.json."""
    task = build_task(
        embedded_model(), EMBEDDED_REGION, load_data(embedded_model(), fit_sequences=288), lambda *_: None
    )
    bench, side = Bench(task, DEFAULT_HORIZON), side_of(task)
    texts = [f'sae:path="{path}"' for path in embedded_saes()] + ["pca:rank=24", "clusters:k=256"]
    rows = []
    for text in texts:
        rows.append(solve(bench, text, side, decode))
        Console(stderr=True).print(f"{rows[-1].explanation}: {rows[-1].today:.2f} -> {rows[-1].conditional:.2f}")
    report(rows, len(side.tokens), task.description["data"])


def report(rows: list[Priced], tokens: int, data: str) -> None:
    """Print the table and write results.json."""
    Console().print(show(rows))
    figures = {"fidelity": FIDELITY, "tokens": tokens, "data": data}
    result = {**figures, "unit": "bits a token", "states": [asdict(row) for row in rows]}
    (Path(__file__).parent / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
