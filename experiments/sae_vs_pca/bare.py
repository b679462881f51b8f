"""PCA and autoencoders without a residual coder, as people use them: rate against KL of the prediction alone.

    python -m experiments.sae_vs_pca.bare [--saes SAES] [--out CELLS]

Each point is an explanation quantised at one step: its state, coded, in bits a token, and the KL that the decoded
prediction causes on the held-out data. No dictionary reaches a fidelity by more precise values: what it misses stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from estimators.fidelity import Bench, Coding
from experiments.sae_vs_pca.ladder import ENCODER, Rung, ladder
from experiments.sae_vs_pca.models import MAIN_HELD_OUT, MAIN_SITE, load
from experiments.sae_vs_pca.run import HORIZON, save_json
from mdl.plugins import make_decomposition
from mdl.protocols import Settings
from mdl.score import EMBEDDED_REGION, load_data
from mdl.streams import choose
from mdl.task import build_task

FILE = "_bare"
RANKS = (8, 16, 24, 48, 72, 96, 144, 192)
STEPS = (0.07, 0.15, 0.3, 0.6)  # of the Fisher metric: from that of 1 % of the null's KL to that of over 10 %


def rungs(saes: Path, width: int) -> Iterator[Rung]:
    """PCA of several ranks, and every autoencoder with its own encoder."""
    for rank in RANKS:
        yield Rung(f"pca-{rank}", "PCA", f"pca:rank={rank}")
    yield from (r for r in ladder("embedded", EMBEDDED_REGION, MAIN_SITE, width, saes) if r.family == ENCODER)


def points(bench: Bench, rung: Rung) -> Iterator[dict[str, float]]:
    """Step, state bits a token and KL in bits a token, for each step."""
    explanation = make_decomposition(rung.text).fit(bench.task.for_fitting())
    metric, split = bench.metrics[0], bench.held_out
    context, like = split.sample.inputs.context(), None
    for step in STEPS:
        settings = Settings(HORIZON, step, metric.root, {"static": 1.0, "value": 1.0})
        attempt = Coding.prepare(bench, explanation, metric, settings, step, None).attempt(bench, split)
        like = choose(attempt.state, context, like)
        yield {"step": step, "rate": like.length.total / split.sample.inputs.n_tokens, "kl": attempt.kl}


@click.command()
@click.option("--saes", type=click.Path(path_type=Path), default="runs/study/saes", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="runs/study/cells", show_default=True)
def main(saes: Path, out: Path) -> None:
    """Measure what is missing; safe to interrupt and to run again."""
    folder = out / "embedded" / MAIN_SITE / FILE
    folder.mkdir(parents=True, exist_ok=True)
    model = load("embedded", out)
    data = load_data(model, sequences=MAIN_HELD_OUT)
    bench = Bench(build_task(model, EMBEDDED_REGION, data, lambda *_: None), HORIZON)
    for rung in rungs(saes / "embedded", model.site_width(MAIN_SITE)):
        if (path := folder / f"{rung.key}.json").exists():
            continue
        found = list(points(bench, rung))
        save_json(path, found)
        click.echo(f"{rung.key}: " + ", ".join(f"{p['rate']:.1f} bits at {p['kl'] / bench.null_kl:.2%}" for p in found))


if __name__ == "__main__":
    main()
