"""Imports run one way, and nothing happens at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mdl", "decompositions", "estimators", "experiments")

# What each piece of mdl may import from mdl: the order of the architecture, written out.
CODES = {"mdl.errors", "mdl.units", "mdl.codes"}
MESSAGE = {"mdl.errors", "mdl.codes", "mdl.message"}
MODELS = {"mdl.errors", "mdl.models"}
REPORT = {"mdl.errors", "mdl.units", "mdl.ledger", "mdl.report"}
ALLOWED: dict[str, set[str]] = {
    "mdl.units": set(),
    "mdl.errors": set(),
    "mdl.codes": CODES,
    "mdl.models": MODELS,
    "mdl.ledger": {"mdl.errors"},
    "mdl.plugins": {"mdl.errors"},
    "mdl.data": {"mdl.errors"},
    "mdl.training": {"mdl.errors"},
    "mdl.message": MESSAGE,
    "mdl.state": {"mdl.errors", "mdl.codes"},
    "mdl.streams": {"mdl.errors", "mdl.codes", "mdl.state"},
    "mdl.alphabets": {"mdl.errors", "mdl.codes", "mdl.state", "mdl.streams"},
    # The annotations of protocols name Task; only a type checker imports it.
    "mdl.protocols": {"mdl.alphabets", "mdl.message", "mdl.state"},
    "mdl.static_rows": {"mdl.errors", "mdl.codes", "mdl.message", "mdl.protocols"},
    "mdl.transform_coding": {
        *("mdl.errors", "mdl.codes", "mdl.message", "mdl.state"),
        *("mdl.alphabets", "mdl.protocols", "mdl.static_rows"),
    },
    "mdl.receiver": {
        *("mdl.errors", "mdl.codes", "mdl.message", "mdl.state"),
        *("mdl.alphabets", "mdl.decoder_source", "mdl.plugins", "mdl.protocols"),
        *("mdl.streams", "mdl.transform_coding"),
    },
    "mdl.program": {
        *("mdl.errors", "mdl.codes", "mdl.message", "mdl.state"),
        *("mdl.alphabets", "mdl.protocols", "mdl.program"),
    },
    "mdl.decoder_rules": {"mdl.errors"},
    "mdl.decoder_source": {"mdl.errors", "mdl.decoder_rules", "mdl.message", "mdl.plugins"},
    "mdl.task": {"mdl.errors", "mdl.data", "mdl.models", "mdl.protocols"},
    "mdl.seal": {"mdl.errors", "mdl.models", "mdl.task"},
    "mdl.report": REPORT,
}
# What starts a program may reach everything below it.
TOP = ("mdl.score", "mdl.verify", "mdl.cli", "mdl.testing")
BELOW = {
    "decompositions": {"mdl", "decompositions"},
    "estimators": {"mdl", "estimators"},
    "experiments": {"mdl", "decompositions", "estimators", "experiments"},
}
# Calls that define something; anything else that runs when a module is imported is work.
DEFINITIONS = {
    "TypeVar",
    "NewType",
    "namedtuple",
    "field",
    "frozenset",
    "tuple",
    "dict",
    "set",
    "range",
    "float",
    "int",
    "log",
    "log2",
    "sqrt",
    "compile",
    "round",
    "unique",
    "logspace",
    "option",
    "Path",
    "resolve",
}


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(path: Path) -> set[str]:
    """Modules of the project that a file imports when it runs, inside functions too."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
        pending.extend(ast.iter_child_nodes(node))
    return {name for name in found if name.split(".")[0] in PACKAGES}


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


def rule_of(name: str) -> set[str] | None:
    """What a module of mdl may import, None for the top."""
    if within(name, set(TOP)) or name == "mdl":
        return None
    matches = [key for key in ALLOWED if within(name, {key})]
    assert matches, f"{name} has no place in the order of imports: give it one here"
    return ALLOWED[max(matches, key=len)]


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("mdl")))
def test_mdl_imports_downwards(name: str) -> None:
    allowed = rule_of(name)
    for imported in imports(MODULES[name]):
        assert imported.startswith("mdl"), f"{name} imports {imported}: mdl reaches plug-ins by name only"
        assert imported != "mdl.cli"
        if allowed is not None:
            assert within(imported, allowed | {name}), f"{name} imports {imported}, which lies above or beside it"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not n.startswith("mdl")))
def test_decompositions_and_estimators_do_not_know_each_other(name: str) -> None:
    allowed = BELOW[name.split(".")[0]]
    for imported in imports(MODULES[name]):
        assert within(imported, allowed), f"{name} imports {imported}"
        if not name.startswith("experiments"):
            assert not within(imported, {"mdl.cli", "mdl.score", "mdl.report"}), f"{name} imports {imported}"


def test_codes_never_see_a_model() -> None:
    for name, path in MODULES.items():
        if within(name, {"mdl.codes"}):
            assert not {"jax", "torch"} & {a.split(".")[0] for a in all_imports(path)}


def all_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "?")


def calls_at_import(node: ast.AST) -> list[ast.Call]:
    """The calls in an expression, without those that wait inside a lambda."""
    if isinstance(node, ast.Lambda):
        return []
    here = [node] if isinstance(node, ast.Call) else []
    return here + [c for child in ast.iter_child_nodes(node) for c in calls_at_import(child)]


def is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.dump(node.test)


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not n.startswith("experiments")))
def test_a_module_only_defines(name: str) -> None:
    """At the top of a module: docstring, imports, definitions, constants. No loops, no files, nothing that acts."""
    for node in ast.parse(MODULES[name].read_text()).body:
        if is_main(node) or is_type_checking(node):
            continue
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{name}, line {node.lineno}: a statement that runs at import"
            continue
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        assert isinstance(node, kinds), f"{name}, line {node.lineno}: {type(node).__name__} at import"
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            calls = {called(c) for c in calls_at_import(node.value)}
            acting = {c for c in calls if c not in DEFINITIONS and not c[:1].isupper()}
            assert not acting, f"{name}, line {node.lineno}: calls {acting} at import"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_constants_cannot_be_changed(name: str) -> None:
    """A list, dictionary or set at the top of a module is state that everybody shares; a Mapping annotation says no."""
    for node in ast.parse(MODULES[name].read_text()).body:
        if isinstance(node, ast.Assign) and not name.startswith("experiments"):
            mutable = isinstance(node.value, (ast.List, ast.Set, ast.ListComp, ast.SetComp))
            target = getattr(node.targets[0], "id", "")
            assert not mutable or target == "__all__", f"{name}, line {node.lineno}: {target} can be changed"
        assert not any(isinstance(n, ast.Global) for n in ast.walk(node)), f"{name}: a global statement"


def test_files_and_functions_keep_their_size() -> None:
    for name, path in MODULES.items():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{name} has {text.count(chr(10))} lines: split it by subject"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                assert size <= 60, f"{name}.{node.name} has {size} lines"


def test_importing_everything_leaves_no_trace(tmp_path: Path) -> None:
    """No file, no download, no backend started: only definitions."""
    names = [n for n in MODULES if not n.startswith("experiments")]
    script = (
        "import importlib, socket, sys\n"
        "def refuse(*a, **k): raise RuntimeError('network at import')\n"
        "socket.socket.connect = refuse\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "import jax._src.xla_bridge as bridge\n"
        "assert not bridge._backends, 'a JAX backend was started at import'\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == []
