"""Circuits of GPT-2 (or any model) on greater-than or IOI, graded as the literature does and in bits.

python -m experiments.gpt2_circuits.run --model FOLDER --prompts greater_than_data.csv --task greater-than

Edges are ranked by EAP, EAP-IG (on inputs, on activations) or exact patching, or pruned by ACDC at a threshold, with
the corrupted prompts' activations in the place of what is dropped. Of each size: faithfulness, (m(C) - m(corrupted)) /
(m(M) - m(corrupted)); the KL at the answer; and the pointer's bits. Then CPR and CMD under both conventions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from decompositions.circuits.formats import LoadedCircuit
from decompositions.circuits.formats.eap_ig import save_eap_ig
from estimators.published.circuit_metrics import SHARES, fixed_axis_areas, self_normalised_areas
from experiments.gpt2_circuits.prompts import TASKS, Pairs, metric_of, read_pairs
from mdl.codes.edges import list_bits
from mdl.errors import MDLError, ModelError
from mdl.models import Model, load_model
from mdl.models.circuits.ablations import Counterfactual
from mdl.models.circuits.acdc import acdc
from mdl.models.circuits.attribution import clean_corrupted, eap, eap_ig_activations, eap_ig_inputs, exact
from mdl.models.circuits.graph import Graph
from mdl.models.circuits.masked import MaskedModel, masked_model, masked_run
from mdl.models.circuits.metrics import mean_kl
from mdl.units import nats_to_bits

KEPT = 0.01  # the share of the edges that is written as the circuit, when edges are ranked
METHODS: dict[str, Callable[..., np.ndarray]] = {
    "eap": eap,
    "clean-corrupted": clean_corrupted,
    "eap-ig-inputs": eap_ig_inputs,
    "eap-ig-activations": eap_ig_activations,
    "exact": exact,
}


@dataclass(frozen=True)
class Row:
    """One circuit: edges that it has, its metric, faithfulness, KL (bits a prompt) and the pointer's bits."""

    share: float
    edges: int
    metric: float
    faithfulness: float
    kl_bits: float
    name_bits: float


@dataclass(frozen=True, eq=False)
class Study:
    """A model on the pairs of a task, ready for masks, one entry for each length of prompts."""

    graph: Graph
    models: tuple[MaskedModel, ...]
    metrics: tuple[Callable[[Any, Any], Any], ...]
    counts: np.ndarray

    @classmethod
    def of(cls, model: Model, task: str, pairs: Sequence[Pairs]) -> Study:
        """**Raises:** `DataError` as `metric_of`; `ModelError` for a model that has no graph."""
        graph = Graph.of(model.config)
        make = partial(_ready, model, graph)
        metrics = tuple(metric_of(task, p, model.tokenizer) for p in pairs)
        return cls(graph, tuple(map(make, pairs)), metrics, np.array([len(p.clean) for p in pairs]))

    def mean(self, values: Sequence[Any]) -> Any:
        """Of a figure for each length, over prompts."""
        return sum(n * v for n, v in zip(self.counts, values, strict=True)) / self.counts.sum()

    def scores(self, method: str) -> np.ndarray:
        """Of all edges, [sources, destinations]."""
        found = (METHODS[method](m, metric) for m, metric in zip(self.models, self.metrics, strict=True))
        return np.asarray(self.mean(list(found)))

    def measured(self, edges: np.ndarray) -> tuple[float, float]:
        """The task's metric, and the KL at the answer in bits, of a circuit."""
        mask, whole = jnp.asarray(edges, jnp.float32), jnp.asarray(self.graph.possible, jnp.float32)
        runs = [(masked_run(m, mask, skip=True), masked_run(m, whole)) for m in self.models]
        metric = self.mean([-float(f(*run)) for f, run in zip(self.metrics, runs, strict=True)])
        return float(metric), nats_to_bits(self.mean([float(mean_kl(*run)) for run in runs]))

    def row(self, share: float, edges: np.ndarray) -> Row:
        """A circuit graded, dead ends left out."""
        edges = self.graph.pruned(edges)
        (metric, kl), (full, _), (none, _) = map(
            self.measured, (edges, self.graph.possible, np.zeros_like(self.graph.possible))
        )
        named = float(list_bits(self.graph.n_edges, int(edges.sum())))
        return Row(share, int(edges.sum()), metric, (metric - none) / (full - none), kl, named)


def _ready(model: Model, graph: Graph, pairs: Pairs) -> MaskedModel:
    values = Counterfactual(pairs.corrupted).values(model.config, model.params, pairs.clean, graph)
    return masked_model(model.config, model.params, pairs.clean, values, graph, pairs.last)


@click.command()
@click.option("--model", "source", required=True, help="A checkpoint's folder or hub name, with its tokenizer.")
@click.option("--prompts", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The csv.")
@click.option("--task", required=True, type=click.Choice([*TASKS]))
@click.option("--method", default="eap-ig-inputs", show_default=True, type=click.Choice([*METHODS, "acdc"]))
@click.option("--threshold", default=0.0575, show_default=True, help="ACDC's, nats of KL an edge.")
@click.option("--limit", type=int, help="The first so many pairs.")
@click.option("--out", type=click.Path(path_type=Path), help="A folder for rows.json and the edges as EAP-IG's json.")
def main(
    source: str, prompts: Path, task: str, method: str, threshold: float, limit: int | None, out: Path | None
) -> None:
    """Find circuits of a model on a task, and grade them."""
    try:
        model = load_model(source)
        if not isinstance(model, Model) or model.tokenizer is None:
            raise ModelError(f"{source} has no adapter or no tokenizer.json: prompts are texts, and edges need both")
        study = Study.of(model, task, read_pairs(prompts, task, model.tokenizer, limit))
        rows, loaded = graded(study, method, threshold)
    except MDLError as error:
        raise click.ClickException(str(error)) from error
    show(rows, f"{task}, {method}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        save_eap_ig(out / "edges.json", loaded, model.config.d_model)
        (out / "rows.json").write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")


def graded(study: Study, method: str, threshold: float) -> tuple[list[Row], LoadedCircuit]:
    """Rows at MIB's shares, or ACDC's one circuit; and the edges with their scores."""
    if method != "acdc":
        scores = study.scores(method)
        ranking = LoadedCircuit(study.graph, "eap-ig", None, scores)
        sizes = {share: max(1, round(share * study.graph.n_edges)) for share in SHARES}
        chosen = {share: ranking.top(size, prune=False) for share, size in sizes.items()}
        rows = [study.row(share, edges) for share, edges in chosen.items()]
        return rows, replace(ranking, edges=chosen[KEPT])
    if len(study.models) > 1:
        raise ModelError(f"ACDC removes edges on one batch; these prompts have {len(study.models)} different lengths")
    with Progress(transient=True) as bar:
        line = bar.add_task("edges tried", total=study.graph.n_edges)
        edges = acdc(study.models[0], mean_kl, threshold, lambda done, _: bar.update(line, completed=done))
    row = study.row(float(edges.sum() / study.graph.n_edges), edges)
    return [row], LoadedCircuit(study.graph, "eap-ig", study.graph.pruned(edges))


def show(rows: Sequence[Row], title: str) -> None:
    """The table, and the areas under both conventions."""
    table = Table(title=title)
    for column in ("share asked", "edges", "metric", "faithfulness", "KL, bits a prompt", "pointer, bits"):
        table.add_column(column)
    for r in rows:
        figures = (f"{r.metric:.3f}", f"{r.faithfulness:.3f}", f"{r.kl_bits:.3f}", f"{r.name_bits:,.0f}")
        table.add_row(f"{r.share:.3%}", f"{r.edges:,}", *figures)
    console = Console(width=110)
    console.print(table)
    if len(rows) == len(SHARES):
        faithfulness, edges = np.array([r.faithfulness for r in rows]), np.array([r.edges for r in rows])
        for areas in (fixed_axis_areas(faithfulness), self_normalised_areas(faithfulness, edges)):
            console.print(f"CPR {areas.cpr:.3f}, CMD {areas.cmd:.3f} ({areas.convention})")


if __name__ == "__main__":
    main()
