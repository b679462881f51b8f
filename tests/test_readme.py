"""Every example of README.md runs: Python blocks whole, `mdl ...` lines through the program, `make ...` as targets.

A block right behind the comment <!-- not run: REASON --> is left out, and has to say why.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds an example may take
FENCE = re.compile(
    r"^(?P<indent> {0,3})(?P<ticks>`{3,})(?P<language>[^\n`]*)\n(?P<body>.*?)^ {0,3}(?P=ticks)`*[ \t]*$", re.M | re.S
)
NOT_RUN = re.compile(r"<!--\s*not run:(?P<reason>.*?)-->\s*\Z", re.S)
QUICK = {"compare": ["--sequences", "4", "--fidelity", "10%"], "score": ["--sequences", "4", "--fidelity", "10%"]}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line's number, and why it is not run (None: it is)."""

    language: str
    text: str
    line: int
    not_run: str | None


def blocks(text: str) -> list[Block]:
    found, end = [], 0
    for match in FENCE.finditer(text):
        comment = NOT_RUN.search(text[end : match.start()])
        reason = comment["reason"].strip() if comment else None
        language = match["language"].strip().split(" ")[0].lower()
        found.append(Block(language, match["body"], text.count("\n", 0, match.start()) + 2, reason))
        end = match.end()
    return found


def commands(block: Block) -> list[list[str]]:
    """A shell block's commands as words: prompts, comments and continued lines resolved."""
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    words = [shlex.split(re.sub(r"^\s*\$ ", "", line), comments=True) for line in lines]
    return [w for w in words if w]


def make_targets(makefile: str) -> set[str]:
    return {name for match in re.findall(r"^([\w.\- ]+):(?!=)", makefile, re.M) for name in match.split()}


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "Agg"}


def execute(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )


def program(words: list[str]) -> list[str]:
    """The interpreter's arguments for an `mdl ...` command, made quick where the example leaves it open."""
    quick = QUICK.get(words[1], []) if len(words) > 1 else []
    extra = [
        w for option, value in zip(quick[::2], quick[1::2], strict=True) if option not in words for w in (option, value)
    ]
    return ["-c", "from mdl.cli import main; main()", *words[1:], *extra]


README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
BLOCKS = blocks(README)
PYTHON = [b for b in BLOCKS if b.language in ("python", "py") and b.not_run is None]
SHELL = [b for b in BLOCKS if b.language in ("sh", "bash", "shell", "console") and b.not_run is None]


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="README.md has no Python block to run")
@pytest.mark.parametrize("block", PYTHON, ids=lambda b: f"line{b.line}")
def test_python_blocks_run(block: Block, tmp_path: Path):
    script = tmp_path / "example.py"
    script.write_text(block.text, encoding="utf-8")
    result = execute([str(script)], tmp_path)
    assert result.returncode == 0, f"README.md line {block.line}:\n{block.text}\n{result.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.skipif(not SHELL, reason="README.md has no shell block to run")
@pytest.mark.parametrize("block", SHELL, ids=lambda b: f"line{b.line}")
def test_mdl_commands_run(block: Block, tmp_path: Path):
    """In one folder, one after the other, so that `mdl show` finds what `mdl compare` left."""
    for words in commands(block):
        if words[0] == "mdl":
            result = execute(program(words), tmp_path)
            assert result.returncode == 0, f"README.md line {block.line}: {shlex.join(words)}\n{result.stderr[-3000:]}"


@pytest.mark.skipif(not SHELL, reason="README.md has no shell block")
def test_mdl_commands_and_their_options_exist():
    from mdl.cli import main

    for words in (w for b in SHELL for w in commands(b) if w[0] == "mdl" and len(w) > 1):
        command = main.commands.get(words[1])
        assert command is not None or words[1].startswith("-"), f"README.md: no command {shlex.join(words)}"
        known = (
            {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"-h", "--help"} if command else set()
        )
        used = {w.split("=")[0] for w in words[2:] if w.startswith("--")} if command else set()
        assert used <= known, f"README.md: {sorted(used - known)} in {shlex.join(words)}"


@pytest.mark.skipif(not SHELL, reason="README.md has no shell block")
def test_make_targets_exist():
    makefile = ROOT / "Makefile"
    known = make_targets(makefile.read_text()) if makefile.exists() else set()
    for words in (w for b in SHELL for w in commands(b) if w[0] == "make"):
        wanted = {w for w in words[1:] if not w.startswith("-") and "=" not in w}
        assert wanted <= known, f"README.md: {shlex.join(words)}, but the Makefile has {sorted(known)}"


def test_blocks_that_are_not_run_say_why():
    assert all(b.not_run for b in BLOCKS if b.not_run is not None)
    skipped = [b for b in BLOCKS if b.not_run is not None]
    assert len(skipped) + len(PYTHON) + len(SHELL) <= len(BLOCKS)
    assert len(skipped) <= 3, f"too many examples that nothing checks: lines {[b.line for b in skipped]}"


def test_no_fence_is_left_open():
    ticks = [line for line in README.splitlines() if re.match(r" {0,3}```", line)]
    assert len(ticks) == 2 * len(BLOCKS)


SAMPLE = """# Title

```python
print("a")
```

<!-- not run: needs a network -->
```sh
mdl compare --model gpt2
```

Text in between.

```sh
$ make demo   # set-up, too
mdl compare --with pca:rank=4 \\
    --out "my run"
pip install .
```

````text
```python
not a block of its own
```
````
"""


def test_the_extraction_itself():
    found = blocks(SAMPLE)
    assert [(b.language, b.line, b.not_run) for b in found] == [
        ("python", 4, None),
        ("sh", 9, "needs a network"),
        ("sh", 15, None),
        ("text", 22, None),
    ]
    assert found[0].text == 'print("a")\n'
    assert commands(found[2]) == [
        ["make", "demo"],
        ["mdl", "compare", "--with", "pca:rank=4", "--out", "my run"],
        ["pip", "install", "."],
    ]
    assert program(["mdl", "compare", "--sequences", "9"])[2:] == ["compare", "--sequences", "9", "--fidelity", "10%"]
    assert program(["mdl", "plugins"])[2:] == ["plugins"]
    assert make_targets(".PHONY: demo\ndemo test: .venv\n\techo a:b\nX := 3\n") == {".PHONY", "demo", "test"}
    assert blocks("") == []


def test_examples_run_against_this_repository(tmp_path: Path):
    shown = execute(["-c", "import mdl, pathlib; print(pathlib.Path(mdl.__file__).resolve().parents[1])"], tmp_path)
    assert shown.stdout.strip() == str(ROOT)
    helped = execute(program(["mdl", "compare", "--help"]), tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert "--fidelity" in helped.stdout
    assert execute(program(["mdl", "compair"]), tmp_path).returncode == 2
