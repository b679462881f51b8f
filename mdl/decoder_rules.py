"""What the source of a third party's decoder may not contain: the ways in which bits come in without being paid.

They leave a decoder numpy, sparse matrices, and the arrays of its section; anything else, and any place to keep
something between calls, is refused with the name of the cheat. They go by the syntax tree, and so they are not complete
(an alias of an object's own dictionary passes): a program (`mdl.program`) is the strict way.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from mdl.errors import ExplanationError

ALLOWED = (
    *("__future__", "collections.abc", "dataclasses", "math", "typing"),
    *("numpy", "numpy.linalg", "numpy.typing", "scipy.sparse", "scipy.special"),
    *("mdl.alphabets", "mdl.errors", "mdl.message", "mdl.program", "mdl.protocols", "mdl.state"),
)
CACHES = "a cache: nothing is kept between calls that the message did not bring"
FILES = "reading files: a decoder's only source is its section of the message"
MODEL = "reading the model: the receiver has no weights of the region, and a decoder no way to the model"
INSTALLED = "installed packages: what they hold was not sent, and is not paid for"
ESCAPE = "running what is not in the source: a decoder is the text that was charged"
RANDOM = "a seed that is not sent: numbers that the message does not fix"

Table = tuple[tuple[str, tuple[str, ...]], ...]
MODULES: Table = (
    (CACHES, ("functools", "weakref", "threading", "contextvars", "atexit", "gc")),
    (FILES, ("io", "os", "pathlib", "pickle", "json", "shelve", "sqlite3", "tempfile", "csv", "zipfile", "mmap")),
    (FILES, ("socket", "urllib", "http", "requests", "pkgutil", "importlib.resources", "scipy.io", "safetensors")),
    (MODEL, ("torch", "jax", "transformers", "transformer_lens", "sae_lens")),
    (MODEL, ("mdl", "decompositions", "estimators", "experiments")),
    (ESCAPE, ("importlib", "ctypes", "sys", "inspect", "builtins", "types", "subprocess", "codecs", "ast")),
    (RANDOM, ("random", "secrets", "time", "datetime", "uuid")),
)
# Attributes of whatever object they are taken from: an alias changes nothing.
ATTRIBUTES: Table = (
    (FILES, ("load", "loadtxt", "fromfile", "genfromtxt", "fromregex", "memmap", "DataSource", "load_npz")),
    (FILES, ("save", "savez", "savez_compressed", "savetxt", "save_npz", "tofile", "dump", "read_text", "read_bytes")),
    (ESCAPE, ("lib", "ctypeslib", "f2py", "testing", "distutils", "core", "ctypes", "io", "datasets")),
    (RANDOM, ("seed", "rand", "randn", "randint", "random_sample", "get_state", "set_state", "RandomState")),
)
NAMES: Table = (
    (FILES, ("open", "input", "__file__")),
    (ESCAPE, ("eval", "exec", "compile", "globals", "locals", "vars", "breakpoint", "getattr", "setattr", "delattr")),
)
GENERATORS = ("default_rng", "SeedSequence", "Philox", "PCG64", "PCG64DXSM", "MT19937", "SFC64")
CHANGING = (
    *("append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"),
    *("sort", "reverse", "fill", "put", "resize"),
)
CONSTANT_CALLS = ("frozenset", "tuple", "float", "int", "bool", "str", "bytes", "range", "len")
CONSTRUCTORS = ("__init__", "__post_init__", "__new__")


def _reason(table: Table, name: str) -> str:
    """Why a name is refused, or nothing."""
    return next((reason for reason, names in table if name in names), "")


@dataclass(frozen=True)
class Imported:
    """A module that `importer` imports in a line of it, or a name of a module; `allowed` if anybody may."""

    name: str
    importer: str
    line: int
    allowed: bool = False

    def where(self) -> str:
        """As "plugin.decoder, line 3"."""
        return f"{self.importer}, line {self.line}"

    def refusal(self) -> str:
        """Why a decoder may not import it."""
        parts = self.name.split(".")
        prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
        reason = next((_reason(MODULES, p) for p in prefixes if _reason(MODULES, p)), INSTALLED)
        allowed = ", ".join(ALLOWED)
        return (
            f"{self.where()} imports {self.name}. That is {reason}. A decoder may import {allowed} and its own modules."
        )


def imported_modules(module: str, tree: ast.Module, is_package: bool = False) -> list[Imported]:
    """Every module, or name of a module, that is imported anywhere in a module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Imported(a.name, module, node.lineno, a.name in ALLOWED) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node, is_package)
            # `from scipy import sparse` names a module, `from numpy import float32` does not: both read "base.name".
            for full in (f"{base}.{alias.name}" for alias in node.names):
                found.append(Imported(full, module, node.lineno, base in ALLOWED or full in ALLOWED))
    return found


def check_module(name: str, text: str) -> ast.Module:
    """Refuse what a decoder's module may not contain. **Raises:** `ExplanationError`, which names the cheat."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ExplanationError(f"{name} is not Python source: {error}") from error
    for line, fact, reason in _offences(tree):
        raise ExplanationError(f"{name}, line {line}: {fact}. That is {reason}.")
    return tree


def _absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


Offence = tuple[int, str, str]


def _offences(tree: ast.Module) -> Iterator[Offence]:
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    roots = {(a.asname or a.name).partition(".")[0] for n in imports for a in n.names}
    yield from _at_the_top(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from _in_a_class(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _defaults(node)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            yield node.lineno, f"`{'global' if isinstance(node, ast.Global) else 'nonlocal'}`", CACHES
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from _imports(node)
        elif isinstance(node, ast.Attribute):
            yield from _attribute(node, roots)
        elif isinstance(node, ast.Name):
            yield from _name(node)
        elif isinstance(node, ast.Call):
            yield from _call(node)
    yield from _kept(tree, inside="")


def _at_the_top(body: list[ast.stmt]) -> Iterator[Offence]:
    """Docstring, imports, definitions and constants: nothing else runs when a module is imported."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not node.orelse:
            yield from _at_the_top(node.body)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and _is_constant(node.value):
            continue
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield node.lineno, f"module state that can be changed: `{_short(node)}`", CACHES
        else:
            yield node.lineno, f"a statement that runs at import: `{_short(node)}`", ESCAPE


def _in_a_class(node: ast.ClassDef) -> Iterator[Offence]:
    for one in node.body:
        value = one.value if isinstance(one, (ast.Assign, ast.AnnAssign)) else None
        field = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] == "field"
        if value is not None and not field and not _is_constant(value):
            yield one.lineno, f"a class attribute that can be changed: `{_short(one)}`", CACHES
    for decorator in node.decorator_list:
        written = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)
        if written.split(".")[-1] not in ("dataclass", "final", "runtime_checkable"):
            yield decorator.lineno, f"the decorator @{written}", ESCAPE
    if node.keywords:
        yield node.lineno, f"class {node.name} has a metaclass or other keywords", ESCAPE


def _defaults(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> Iterator[Offence]:
    for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]:
        if not _is_constant(default):
            yield default.lineno, f"a default that can be changed: `{ast.unparse(default)}`", CACHES
    for decorator in getattr(node, "decorator_list", ()):
        written = ast.unparse(decorator)
        if written not in ("classmethod", "staticmethod", "property"):
            reason = CACHES if "cache" in written else ESCAPE
            yield decorator.lineno, f"the decorator @{written}", reason


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[Offence]:
    for alias in node.names:
        if alias.name == "*":
            yield node.lineno, "`import *`", INSTALLED
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            reason = _reason(ATTRIBUTES, alias.name) or _reason(MODULES, alias.name)
            reason = reason or (ESCAPE if alias.name.startswith("_") else "")
            if reason and not node.level:
                yield node.lineno, f"the name {alias.name!r} of {node.module}", reason
        elif isinstance(node, ast.Import) and "." in alias.name and not alias.asname and alias.name != "scipy.sparse":
            yield (
                node.lineno,
                f"`import {alias.name}` without a name: it opens all of {alias.name.split('.')[0]}",
                INSTALLED,
            )


def _attribute(node: ast.Attribute, roots: set[str]) -> Iterator[Offence]:
    root = _root(node)
    imported = root in roots
    # Every module leaves what it imports itself within reach: `typing.sys`.
    reason = _reason(ATTRIBUTES, node.attr) or (
        _reason(MODULES, node.attr) if imported and node.attr != "random" else ""
    )
    if reason:
        yield node.lineno, f"the attribute .{node.attr}", reason
    elif node.attr.startswith("__") and node.attr not in ("__name__", "__init__"):
        yield node.lineno, f"the attribute .{node.attr}", ESCAPE
    elif root == "scipy" and isinstance(node.value, ast.Name) and node.attr != "sparse":
        yield node.lineno, f"scipy.{node.attr}", INSTALLED
    elif imported and node.attr.startswith("_"):
        yield node.lineno, f"{root}'s private {node.attr}", INSTALLED


def _root(node: ast.expr) -> str:
    """The name that a chain of attributes and items begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _name(node: ast.Name) -> Iterator[Offence]:
    dunder = ESCAPE if node.id.startswith("__") and node.id != "__all__" else ""
    reason = _reason(NAMES, node.id) or dunder
    if reason:
        yield node.lineno, f"the name {node.id!r}", reason


def _call(node: ast.Call) -> Iterator[Offence]:
    written = ast.unparse(node.func)
    if (
        written.split(".")[-1] in ("default_rng", "SeedSequence", "Philox", "PCG64", "MT19937", "SFC64")
        and not node.args
    ):
        yield node.lineno, f"{written}() without a seed", RANDOM
    if written == "type" and len(node.args) != 1:
        yield node.lineno, "a class made by type(...)", ESCAPE


def _kept(node: ast.AST, inside: str) -> Iterator[Offence]:
    """Attributes that are assigned or changed, but for a constructor's own: places where something outlasts a call."""
    for child in ast.iter_child_nodes(node):
        name = child.name if isinstance(child, ast.FunctionDef) else inside
        called = child.func if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) else None
        kept: ast.expr | None = None
        if isinstance(child, (ast.Attribute, ast.Subscript)) and isinstance(child.ctx, (ast.Store, ast.Del)):
            kept = child if _holds_attribute(child) else None
        elif called is not None and called.attr in CHANGING and _holds_attribute(called.value):
            kept = called
        if kept is not None and not (inside in CONSTRUCTORS and _root(kept) == "self"):
            yield kept.lineno, f"something is kept by `{ast.unparse(kept)}`", CACHES
        yield from _kept(child, name)


def _holds_attribute(node: ast.expr) -> bool:
    """Whether a chain of attributes and items has an attribute in it."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return isinstance(node, ast.Attribute)


def _is_constant(node: ast.AST | None) -> bool:
    """Numbers, texts, names, tuples of them, arithmetic, and types: nothing with an inside that can change."""
    if node is None or isinstance(node, (ast.Constant, ast.Name, ast.Attribute)):
        return True
    if isinstance(node, (ast.Tuple, ast.BoolOp)):
        return all(_is_constant(e) for e in (node.elts if isinstance(node, ast.Tuple) else node.values))
    if isinstance(node, ast.UnaryOp):
        return _is_constant(node.operand)
    if isinstance(node, ast.BinOp):
        return _is_constant(node.left) and _is_constant(node.right)
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, (ast.Name, ast.Attribute))
    if isinstance(node, ast.Call):
        named = ast.unparse(node.func)
        plain = named in CONSTANT_CALLS or named.startswith("math.")
        inner = [e for a in node.args for e in (a.elts if isinstance(a, (ast.List, ast.Set, ast.Tuple)) else [a])]
        return plain and not node.keywords and all(_is_constant(e) for e in inner)
    return False


def _short(node: ast.AST) -> str:
    text = ast.unparse(node).split("\n")[0]
    return text if len(text) <= 60 else text[:57] + "..."
