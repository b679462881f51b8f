from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from mdl.cli import main
from mdl.errors import PluginError, TaskError
from mdl.ledger import SCHEMA_VERSION, read_scorecard

SYNTHETIC = Path(__file__).parent / "report" / "synthetic.py"


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """`mdl.score.compare` replaced by one that records its arguments and writes a synthetic scorecard."""
    made = runpy.run_path(str(SYNTHETIC))["synthetic_scorecard"]()
    recorded = []

    def compare(**arguments):
        recorded.append(arguments)
        print("a library that prints to stdout")
        out = arguments["out"]
        assert (out / ".in-progress").exists()
        (out / "messages").mkdir()
        made.save(out / "scorecard.json")
        return made

    module = ModuleType("mdl.score")
    module.compare = compare
    monkeypatch.setitem(sys.modules, "mdl.score", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return recorded


def failing(monkeypatch, error):
    def compare(**arguments):
        raise error

    monkeypatch.setattr(sys.modules["mdl.score"], "compare", compare)


def test_all_defaults_reach_compare_as_none(calls):
    result = CliRunner().invoke(main, ["compare"])
    assert result.exit_code == 0, result.output
    (arguments,) = calls
    assert arguments.pop("out") == Path("run")
    assert arguments.pop("seed") == 0
    assert arguments.pop("envelope") == ()
    assert arguments.pop("process") == ()
    assert set(arguments) == {
        "model", "region", "phenomena", "fidelities", "text", "tokens", "dataset", "explanations", "horizon",
        "training_tokens", "loss_curve", "scaling_law", "sequences", "fit_sequences", "context", "progress",
    }  # fmt: skip
    assert set(arguments.values()) == {None}
    assert sorted(os.listdir("run")) == ["compare.png", "messages", "scorecard.json"]
    assert "table has the shortest total" in result.stdout
    assert "run/compare.png" in result.stdout
    assert result.stderr == ""


def test_every_option_reaches_compare(calls, tmp_path):
    (tmp_path / "t.npy").touch()
    command = "compare --model m --phenomenon activations --phenomenon behaviour --fidelity 1% --fidelity 0.001"
    command += " --tokens t.npy --with pca:rank=16 --with sae:path=a --horizon 1e6 --sequences 20 --context 64"
    command += " --fit-sequences 30 --process center_writing_weights"
    command += " --seed 3 --out there --envelope 10k --envelope 1e8 --scaling-law 1.7,400,0.2,1e15 --loss-curve t.npy"
    result = CliRunner().invoke(main, [*command.split(), "--region", "upstream of blocks.3.hook_resid_pre"])
    assert result.exit_code == 0, result.output
    assert calls == [
        {
            "model": "m",
            "region": "upstream of blocks.3.hook_resid_pre",
            "phenomena": ["activations", "behaviour"],
            "fidelities": [0.01, 0.001],
            "text": None,
            "tokens": Path("t.npy"),
            "dataset": None,
            "explanations": ["pca:rank=16", "sae:path=a"],
            "horizon": 1e6,
            "envelope": (1e4, 1e8),
            "training_tokens": None,
            "loss_curve": Path("t.npy"),
            "scaling_law": (1.7, 400.0, 0.2, 1e15),
            "sequences": 20,
            "fit_sequences": 30,
            "process": ("center_writing_weights",),
            "context": 64,
            "seed": 3,
            "out": Path("there"),
            "progress": None,
        }
    ]


@pytest.mark.parametrize("law", ["1.7", "1,2", "a,b,c", "1,2,3,4,5", ""])
def test_what_is_no_scaling_law_is_refused(calls, law):
    result = CliRunner().invoke(main, ["compare", "--scaling-law", law])
    assert result.exit_code == 2
    assert "is no scaling law: write E,A,alpha or E,A,alpha,C" in result.output
    assert calls == []


def test_score_adds_the_yardstick_once(calls):
    assert CliRunner().invoke(main, ["score", "pca:rank=4", "--out", "a", "--horizon", "2M"]).exit_code == 0
    assert CliRunner().invoke(main, ["score", "nothing", "--out", "b"]).exit_code == 0
    assert [c["explanations"] for c in calls] == [["nothing", "pca:rank=4"], ["nothing"]]
    assert calls[0]["horizon"] == 2e6


def test_json_is_alone_on_stdout_and_is_the_saved_scorecard(calls, tmp_path):
    result = CliRunner().invoke(main, ["compare", "--json", "--out", "r"])
    assert json.loads(result.stdout)["schema"] == SCHEMA_VERSION
    assert result.stdout == (tmp_path / "r" / "scorecard.json").read_text()
    again = CliRunner().invoke(main, ["show", "r", "--json"])
    assert again.stdout == result.stdout
    (tmp_path / "copy.json").write_text(result.stdout)
    assert read_scorecard(tmp_path / "copy.json") == read_scorecard(tmp_path / "r" / "scorecard.json")


def test_quiet_prints_the_answer_alone(calls):
    result = CliRunner().invoke(main, ["compare", "--quiet"])
    lines = [line for line in result.stdout.splitlines() if "library" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("At 1 % of the null's KL")


def test_show_prints_a_run_again_and_draws(calls, tmp_path):
    first = CliRunner().invoke(main, ["compare"])
    again = CliRunner().invoke(main, ["show", "run", "--picture", "again.png"])
    assert again.exit_code == 0
    assert again.stdout in first.stdout
    assert len(again.stdout) > 4000
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "run" / "compare.png").read_bytes()


def test_show_refuses_what_is_no_run(calls, tmp_path):
    result = CliRunner().invoke(main, ["show", "."])
    assert result.exit_code == 1
    assert "is not a scorecard" in result.stderr


def test_a_folder_in_use_is_refused_before_any_work(calls):
    assert CliRunner().invoke(main, ["compare"]).exit_code == 0
    result = CliRunner().invoke(main, ["compare"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the output folder run holds an earlier run (compare.png, messages")
    assert "--out" in result.stderr
    assert len(calls) == 1


def test_errors_are_messages_with_exit_code_1_and_leave_no_folder(calls, monkeypatch, tmp_path):
    failing(monkeypatch, PluginError("no decomposition named 'pka'. Did you mean 'pca'?"))
    result = CliRunner().invoke(main, ["compare", "--with", "pka"])
    assert (result.exit_code, result.stderr) == (1, "Error: no decomposition named 'pka'. Did you mean 'pca'?\n")
    assert not (tmp_path / "run").exists()
    failing(monkeypatch, TaskError("no region"))
    assert CliRunner().invoke(main, ["score", "pca"]).stderr == "Error: no region\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fidelity", "5"], "Did you mean 5%?"),
        (["--fidelity", "x"], "write 0.01 or 1%"),
        (["--fidelity", "0%"], "not between 0 and 1"),
        (["--horizon", "0"], "at least 1"),
        (["--horizon", "many"], "write 1e6 or 1M"),
        (["--sequences", "0"], "x>=1"),
        (["--text", "absent.txt"], "does not exist"),
        (["--phenomenon", "activation"], "activations"),
        (["--text", "t", "--tokens", "t"], "--text and --tokens each name the data"),
        (["--tokns", "t"], "--tokens"),
    ],
)
def test_bad_options_are_refused_before_any_work(calls, tmp_path, arguments, message):
    (tmp_path / "t").touch()
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert calls == []
    assert not (tmp_path / "run").exists()


def test_an_interrupt_exits_130_and_releases_the_folder(calls, monkeypatch, tmp_path):
    failing(monkeypatch, KeyboardInterrupt())
    result = CliRunner().invoke(main, ["compare"])
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_real_interrupt_of_the_process(tmp_path):
    program = """
        import sys, time, types
        module = types.ModuleType("mdl.score")
        def compare(**arguments):
            print("working", flush=True)
            time.sleep(60)
        module.compare = compare
        sys.modules["mdl.score"] = module
        from mdl.cli import main
        main(["compare", "--out", sys.argv[1]])
    """
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "run")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # where the tests run in a shell's background, interrupts are ignored, and a child would inherit that
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=root, preexec_fn=heard, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_plugins_lists_every_kind(calls, monkeypatch):
    from mdl.plugins import Description, Option

    row = Description(
        "pca", "mdl-interp", "Principal components.", (Option("rank", "int", "16"), Option("p", "Path", None))
    )
    broken = dataclasses.replace(row, name="bad", summary="", options=(), problem="cannot be imported")
    monkeypatch.setattr("mdl.plugins.describe", lambda kind: [row, broken] if kind == "decomposition" else [])
    result = CliRunner().invoke(main, ["plugins"])
    assert result.exit_code == 0
    for text in (
        "decompositions",
        "pca",
        "mdl-interp",
        "Principal components.",
        "rank=16, p (required)",
        "cannot be imported",
    ):
        assert text in result.stdout
    assert "estimators: none installed" in result.stdout


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from mdl.cli import main\n"
        "try: main(['compare', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('jax', 'torch', 'matplotlib', 'numpy', 'rich') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--fidelity" in result.stdout


def test_the_progress_bar_shows_on_a_terminal_only():
    import io

    from rich.console import Console

    from mdl.report.progress import progress_bar

    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bar(terminal) as update:
        update("scoring pca", 3, 7)
    assert "scoring pca" in terminal.file.getvalue()
    assert "3/7" in terminal.file.getvalue()
