"""Score the ladder on every site: one file a rung, so that an interrupted run goes on where it stopped.

    python -m experiments.sae_vs_pca.run [--model NAME|DIR] [--tokens FILE.npy] [--region TEXT] [--jobs 2]

Cells are one-explanation scorecards, OUT/MODEL/SITE/RUNG.json, with what the rungs are in `_rungs` beside them;
`experiments.sae_vs_pca.report` reads both.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import click

from estimators.accounting import SurpriseAccounting
from experiments.sae_vs_pca.ladder import Rung, ladder
from experiments.sae_vs_pca.models import MAIN_HELD_OUT, MAIN_SITE, OTHER_HELD_OUT, load, sites
from mdl.errors import MDLError
from mdl.ledger import Scorecard
from mdl.plugins import make_decomposition
from mdl.score import load_data
from mdl.task import ACTIVATIONS, BEHAVIOUR, DEFAULT_FIDELITIES, build_task

HORIZON = 1e6
RUNGS_FILE = "_rungs"


def save_json(path: Path, content: object) -> None:
    """Write JSON to a temporary file and rename it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


@dataclass(frozen=True)
class Job:
    """The rungs of one site of one model."""

    model: str
    region: str
    site: str
    saes: Path
    out: Path
    tokens: Path | None
    only: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where its cells lie."""
        return self.out / Path(self.model).name / self.site


def run_job(job: Job) -> list[str]:
    """Score what a site lacks. Returns a line a rung; one that cannot be scored says why, and the others go on."""
    model = load(job.model, job.out.parent / "models")
    rungs = ladder(job.model, job.region, job.site, model.site_width(job.site), job.saes)
    todo = [r for r in rungs if (not job.only or r.key in job.only) and not (job.folder / f"{r.key}.json").exists()]
    if not todo:
        return [f"{job.folder}: nothing to do"]
    main = (job.model, job.site) == ("embedded", MAIN_SITE)
    held_out = MAIN_HELD_OUT if main else OTHER_HELD_OUT
    data = load_data(model, tokens=job.tokens, sequences=held_out)
    task = build_task(model, job.region, data, lambda *_: None)
    estimator = SurpriseAccounting(task, HORIZON)
    description = {**task.description, "horizon": HORIZON, "null_kl_bits": estimator.null_kl_bits}
    job.folder.mkdir(parents=True, exist_ok=True)
    save_json(job.folder / RUNGS_FILE, {rung.key: asdict(rung) for rung in rungs})
    return [_cell(job, rung, estimator, description) for rung in todo]


def _cell(job: Job, rung: Rung, estimator: SurpriseAccounting, description: dict[str, object]) -> str:
    started = time.time()
    try:
        explanation = make_decomposition(rung.text).fit(estimator.task.for_fitting())
        found = estimator.score(explanation, [ACTIVATIONS, BEHAVIOUR], DEFAULT_FIDELITIES, lambda *_: None)
    except MDLError as error:
        return f"{job.site} {rung.key}: {error}"
    seconds = time.time() - started
    Scorecard(description, tuple(f.score for f in found), seconds=seconds).save(job.folder / f"{rung.key}.json")
    rates = ", ".join(f"{f.score.total(HORIZON) / HORIZON:.1f}" for f in found)
    return f"{job.site} {rung.key}: {rates} bits a token at N = {HORIZON:g}; {seconds:.0f} s"


@click.command()
@click.option("--model", default="embedded", show_default=True, help="embedded, shuffled, untrained, or a folder.")
@click.option("--tokens", type=click.Path(exists=True, path_type=Path), help="A .npy of token ids to score on.")
@click.option("--region", "wanted", multiple=True, help="Only this region. Repeatable. [default: all]")
@click.option("--only", multiple=True, help="Only this rung. Repeatable. [default: all]")
@click.option("--saes", type=click.Path(path_type=Path), default="runs/study/saes", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="runs/study/cells", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Sites at a time.")
def main(
    model: str, tokens: Path | None, wanted: tuple[str, ...], only: tuple[str, ...], saes: Path, out: Path, jobs: int
) -> None:
    """Score what is missing; safe to interrupt and to run again."""
    layers = load(model, out.parent / "models").config.n_layers
    regions = [(r, s) for r, s in sites(layers) if not wanted or r in wanted]
    regions.sort(key=lambda pair: pair[1] != MAIN_SITE)
    todo = [Job(model, r, s, saes / Path(model).name, out, tokens, only) for r, s in regions]
    if jobs == 1 or len(todo) == 1:
        for job in todo:
            click.echo("\n".join(run_job(job)))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_job, job) for job in todo]):
            click.echo("\n".join(done.result()))


if __name__ == "__main__":
    main()
