"""The command line: parse, call one function, print."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdl.errors import MDLError

if TYPE_CHECKING:
    from rich.console import Console

    from mdl.ledger import Scorecard

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_MULTIPLES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

ProgressCallback = Callable[[str, int, int], None]


class FidelityType(click.ParamType):
    """A fraction between 0 and 1: 0.01 or 1%."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            fraction = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"{text!r} is not a fraction of the null's KL: write 0.01 or 1%", param, ctx)
        if not 0 < fraction < 1:
            hint = f" Did you mean {text}%?" if 1 <= fraction < 100 else ""
            self.fail(f"{text} is not between 0 and 1 (or 0% and 100%).{hint}", param, ctx)
        return fraction


class TokensType(click.ParamType):
    """A number of tokens, at least 1: 1000000, 1e6 or 1M."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            number = float(text[:-1]) * _MULTIPLES[text[-1]] if text[-1:] in _MULTIPLES else float(text)
        except ValueError:
            self.fail(f"{text!r} is not a number of tokens: write 1e6 or 1M", param, ctx)
        if not 1 <= number < float("inf"):
            self.fail(f"{text} is not a number of tokens: it has to be at least 1", param, ctx)
        return number


class LawType(click.ParamType):
    """A scaling law: E,A,alpha or E,A,alpha,C."""

    name = "law"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (3, 4):
            self.fail(f"{value!r} is no scaling law: write E,A,alpha or E,A,alpha,C of E + A C^-alpha", param, ctx)
        return numbers


@dataclass(frozen=True)
class Request:
    """What `mdl compare` was asked for. None means the default of `mdl.score.compare`."""

    model: str | None
    process: tuple[str, ...]
    region: str | None
    phenomenon: tuple[str, ...]
    fidelity: tuple[float, ...]
    text: Path | None
    tokens: Path | None
    dataset: Path | None
    horizon: float | None
    envelope: tuple[float, ...]
    training_tokens: float | None
    loss_curve: Path | None
    scaling_law: tuple[float, ...] | None
    sequences: int | None
    fit_sequences: int | None
    context: int | None
    seed: int
    out: Path
    as_json: bool
    quiet: bool


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_OPTIONS = (
    click.option("--model", metavar="DIR|NAME", help="Checkpoint folder or hub name. [default: the embedded model]"),
    click.option(
        "--process",
        type=click.Choice(["center_writing_weights", "fold_layer_norm", "center_unembed", "fold_value_biases"]),
        multiple=True,
        help="Load the model so, as an SAE's configuration asks. Repeatable. [default: weights as they are]",
    ),
    click.option("--region", metavar="TEXT", help='E.g. "upstream of blocks.2.hook_resid_pre", blocks.1.mlp, model.'),
    click.option(
        "--phenomenon",
        type=click.Choice(["behaviour", "activations"]),
        multiple=True,
        help="What has to be reproduced. Repeatable. [default: by region]",
    ),
    click.option(
        "--fidelity",
        type=FidelityType(),
        multiple=True,
        help="Fraction of the null's KL that may remain, 0.01 or 1%. Repeatable. [default: 10%, 1%, 0.1%]",
    ),
    click.option("--text", type=_FILE, help="A text file to score on. [default: the embedded model's own]"),
    click.option("--tokens", type=_FILE, help="Token ids to score on: .npy, or .npz with `measured` positions."),
    click.option("--dataset", type=_FOLDER, help="A Hugging Face dataset on disk to score on."),
    click.option("--horizon", type=TokensType(), help="N, the tokens over which static bits are spread. [default: 1M]"),
    click.option(
        "--envelope",
        type=TokensType(),
        multiple=True,
        help="Another N for which explanations are quantised anew. Repeatable. [default: none]",
    ),
    click.option("--training-tokens", type=TokensType(), help="What the model was trained on: one more N to show."),
    click.option("--loss-curve", type=_FILE, help="Its training: JSON lines with flops, tokens or step; loss (nats)."),
    click.option(
        "--scaling-law",
        type=LawType(),
        metavar="E,A,ALPHA[,C]",
        help="Its training as a law, nats: E + A C^-ALPHA. [C: 6 x parameters x training tokens]",
    ),
    click.option("--sequences", type=_COUNT, help="Held-out sequences to score."),
    click.option("--fit-sequences", type=_COUNT, help="Sequences to fit explanations on. [default: 800]"),
    click.option("--context", type=_COUNT, help="Tokens a sequence."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of the split and of random choices."),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        default="run",
        show_default=True,
        help="Folder for the results; it must not exist, or be empty.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the scorecard as JSON, and nothing else, on stdout."),
    click.option("--quiet", is_flag=True, help="No progress bar and no table: only the answer."),
)


def _task_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="mdl-interp", prog_name="mdl")
def main() -> None:
    """Which decomposition of a neural network explains it better, and by how many bits."""


@main.command()
@_task_options
@click.option(
    "--with",
    "explanations",
    metavar="NAME[:KEY=VALUE,...]",
    multiple=True,
    help="An explanation to compare, e.g. pca:rank=16. Repeatable. [default: all that apply; see mdl plugins]",
)
def compare(explanations: tuple[str, ...], **options: Any) -> None:
    """Compare explanations of a region of a model, in bits.

    Leaves scorecard.json, compare.png and messages/ in the folder of --out.
    """
    with _reported():
        _compare(Request(**options), list(explanations) or None)


@main.command()
@click.argument("name", metavar="NAME[:KEY=VALUE,...]")
@_task_options
def score(name: str, **options: Any) -> None:
    """Score one explanation against the yardstick, the standard coder alone."""
    with _reported():
        _compare(Request(**options), ["nothing"] if name == "nothing" else ["nothing", name])


@main.command()
def plugins() -> None:
    """List what is installed: explanations with their options, decoders, estimators."""
    from mdl.plugins import describe

    with _reported():
        console = _console(sys.stdout)
        for kind in ("decomposition", "decoder", "estimator"):
            _print_plugins(console, kind, describe(kind))


@main.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the scorecard as JSON instead.")
@click.option("--picture", type=click.Path(path_type=Path), help="Also draw the picture into this PNG file.")
def show(run: Path, as_json: bool, picture: Path | None) -> None:
    """Print a saved run again. RUN is its folder, or its scorecard.json."""
    from mdl.ledger import read_scorecard

    with _reported():
        scorecard = read_scorecard(run / "scorecard.json" if run.is_dir() else run)
        if as_json:
            click.echo(scorecard.to_json(), nl=False)
        else:
            _print_table(scorecard)
        if picture is not None:
            from mdl.report.picture import draw

            draw(scorecard, picture)


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", metavar="DIR|NAME", help="Where the model is now, if not where the run says.")
@click.option("--all", "everything", is_flag=True, help="Print every figure, not a line a score.")
def verify(run: Path, model: str | None, everything: bool) -> None:
    """Decode a saved run in fresh processes and work every figure of it out again.

    The processes hold the model without the region's weights, the inputs and the message files; no network. The exit
    status is 1 if a figure does not agree.
    """
    from mdl.report.findings import print_findings
    from mdl.verify import verify as run_verification

    with _reported():
        with _progress(shown=True) as progress:
            verification = run_verification(run, model, progress)
        print_findings(verification.findings, _console(sys.stdout), everything)
    if not verification.agrees:
        raise SystemExit(1)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Errors meant for the user as one message and exit code 1; an interrupt as exit code 130."""
    try:
        yield
    except MDLError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("\ninterrupted", err=True)
        raise SystemExit(INTERRUPTED) from None


def _compare(request: Request, explanations: list[str] | None) -> None:
    _refuse_two_sources(request)
    from mdl.report.output import claimed

    with claimed(request.out):
        with _progress(shown=not (request.quiet or request.as_json)) as progress, _stdout_kept_clean(request.as_json):
            scorecard = _call(request, explanations, progress)
            from mdl.report.picture import draw

            draw(scorecard, request.out / "compare.png")
        _show_result(request, scorecard)


def _refuse_two_sources(request: Request) -> None:
    given = [f"--{name}" for name in ("text", "tokens", "dataset") if getattr(request, name) is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} each name the data to score on: give one of them")


def _call(request: Request, explanations: list[str] | None, progress: ProgressCallback | None) -> Scorecard:
    from mdl.score import compare as run_comparison

    return run_comparison(
        model=request.model,
        process=request.process,
        region=request.region,
        phenomena=list(request.phenomenon) or None,
        fidelities=list(request.fidelity) or None,
        text=request.text,
        tokens=request.tokens,
        dataset=request.dataset,
        explanations=explanations,
        horizon=request.horizon,
        envelope=request.envelope,
        training_tokens=request.training_tokens,
        loss_curve=request.loss_curve,
        scaling_law=request.scaling_law,
        sequences=request.sequences,
        fit_sequences=request.fit_sequences,
        context=request.context,
        seed=request.seed,
        out=request.out,
        progress=progress,
    )


def _show_result(request: Request, scorecard: Scorecard) -> None:
    if request.as_json:
        click.echo(scorecard.to_json(), nl=False)
    elif request.quiet:
        from mdl.report.answer import answer

        click.echo(answer(scorecard))
    else:
        _print_table(scorecard)
        out = request.out
        click.echo(f"\n{out / 'compare.png'}  the picture\n{out / 'scorecard.json'}  every figure (mdl show {out})")
        click.echo(f"{out / 'messages'}  what was sent, one file an explanation  ({scorecard.seconds:.0f} s)")


def _print_table(scorecard: Scorecard) -> None:
    from mdl.report.table import print_scorecard

    print_scorecard(scorecard, _console(sys.stdout))


def _console(file: Any) -> Console:
    """A console on a terminal at its own width, elsewhere at 160 columns, so that a saved table is not cut."""
    from rich.console import Console

    known = file.isatty() or "COLUMNS" in os.environ
    return Console(file=file, highlight=False, width=None if known else 160)


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[ProgressCallback | None]:
    """A progress bar on stderr, or None where it is not wanted or stderr is no terminal."""
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    from mdl.report.progress import progress_bar

    with progress_bar(_console(sys.stderr)) as update:
        yield update


@contextlib.contextmanager
def _stdout_kept_clean(wanted: bool) -> Iterator[None]:
    """While this lasts, what libraries print goes to stderr, so that stdout carries JSON alone."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def _print_plugins(console: Console, kind: str, rows: list[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{kind}s", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for header in ("name", "package", "what it is", "options (default)"):
        table.add_column(header, header_style="dim", overflow="fold")
    for row in rows:
        options = ", ".join(
            f"{o.name}={o.default}" if o.default is not None else f"{o.name} (required)" for o in row.options
        )
        summary = Text(row.problem or row.summary, style="red" if row.problem else "")
        table.add_row(Text(row.name, style="bold"), Text(row.owner), summary, Text(options))
    console.print(table if rows else Text(f"{kind}s: none installed"))
    console.print()
