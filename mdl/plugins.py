"""Plug-ins by name: installed packages offer them as entry points, ours among them.

Groups: `mdl.decompositions`, `mdl.decoders`, `mdl.estimators`. An option string "NAME:key=value,key=value" becomes the
frozen dataclass that the entry point names, each value read as its field's annotation says.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from mdl.errors import MDLError, PluginError, did_you_mean

Kind = Literal["decomposition", "decoder", "estimator"]

# One option: a key, then a quoted value, or everything up to the next comma.
_OPTION = re.compile(r"""\s*(?P<key>[^=,\s]+)\s*=(?P<value>"[^"]*"|'[^']*'|[^,"'][^,]*|)\s*(?:,|$)""")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_EXAMPLE = "write NAME:key=value,key=value, and quote a value that contains a comma: key='a,b'"


@dataclass(frozen=True)
class Option:
    """An option of a plug-in: its type as text, and its default as it would be typed (None: it must be given)."""

    name: str
    type: str
    default: str | None


@dataclass(frozen=True)
class Description:
    """A plug-in as `mdl plugins` shows it; `problem` says why it cannot be imported, else it is empty."""

    name: str
    owner: str
    summary: str
    options: tuple[Option, ...]
    problem: str = ""


def available(kind: Kind) -> dict[str, EntryPoint]:
    """Every installed plug-in of one kind, by name, ours included. Imports none of them.

    **Raises:** `PluginError` if two packages offer one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=f"mdl.{kind}s"), key=lambda p: (p.name, _owner(p))):
        if point.name in found:
            owners = f"{_owner(found[point.name])} ({found[point.name].value}) and {_owner(point)} ({point.value})"
            raise PluginError(f"two packages offer the {kind} {point.name!r}: {owners}. Uninstall one of them.")
        found[point.name] = point
    return found


def load(kind: Kind, name: str) -> Any:
    """What a plug-in's entry point names, usually a class.

    **Raises:** `PluginError` if nothing of that name is installed (it says what is), or if it cannot be imported.
    """
    points = available(kind)
    if name not in points:
        installed = ", ".join(points) or "none; is the package itself installed (pip install -e .)?"
        raise PluginError(f"no {kind} named {name!r}.{did_you_mean(name, points)} Installed: {installed}.")
    try:
        return points[name].load()
    except (ImportError, AttributeError) as error:
        point = points[name]
        raise PluginError(
            f"the {kind} {name!r} of {_owner(point)} cannot be imported from {point.value}: {error}. "
            "Its package is probably installed without something that it needs."
        ) from error


def describe(kind: Kind) -> list[Description]:
    """Every installed plug-in of one kind, imported: name, owner, first line of its docstring, options with defaults."""
    rows = []
    for name, point in available(kind).items():
        try:
            loaded = load(kind, name)
        except PluginError as error:
            rows.append(Description(name, _owner(point), "", (), problem=str(error)))
        else:
            summary = (inspect.getdoc(loaded) or "").partition("\n")[0]
            rows.append(Description(name, _owner(point), summary, tuple(_option(f) for f in _fields(loaded).values())))
    return rows


def make_decomposition(text: str) -> Any:
    """The decomposition that "NAME:key=value,key=value" describes; "NAME" alone takes every default.

    Values are read as the dataclass field's annotation says: int, float, str, bool (true or false), `tuple[int, ...]` as
    1+2+3, a path, one of a `Literal`, and "none" where None is allowed. A value with a comma is quoted.

    **Raises:** `PluginError` for an unknown name or option (it says which exist), a value of the wrong type, an option
    given twice or missing, or text that is not of this form.
    """
    name, _, rest = text.strip().partition(":")
    made_by = load("decomposition", name)
    fields, given = _fields(made_by), _split_options(text, rest)
    for key in given:
        if key not in fields:
            known = ", ".join(_show(_option(f)) for f in fields.values())
            options = f"Its options: {known}." if known else "It has none."
            raise PluginError(f"{name!r} has no option {key!r}.{did_you_mean(key, fields)} {options}")
    hints = typing.get_type_hints(made_by) if fields else {}
    values = {key: _read(name, key, hints[key], value) for key, value in given.items()}
    missing = [f.name for f in fields.values() if _required(f) and f.name not in values]
    if missing:
        needs = ",".join(f"{m}=..." for m in missing)
        raise PluginError(f"{name!r} cannot do without {', '.join(missing)}: write {name}:{needs}")
    try:
        return made_by(**values)
    except MDLError:
        raise
    except (ValueError, TypeError) as error:
        raise PluginError(f"{text!r} is refused: {error}") from error


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an unnamed package"


def _fields(plugin: Any) -> dict[str, dataclasses.Field[Any]]:
    found = dataclasses.fields(plugin) if dataclasses.is_dataclass(plugin) else ()
    return {f.name: f for f in found if f.init}


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _option(field: dataclasses.Field[Any]) -> Option:
    kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
    if _required(field):
        return Option(field.name, kind, None)
    default = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
    return Option(field.name, kind, _typed(default))


def _typed(value: Any) -> str:
    """A default as it would be typed on the command line."""
    if isinstance(value, tuple):
        return "+".join(str(v) for v in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _show(option: Option) -> str:
    return f"{option.name} ({option.type}, " + ("required)" if option.default is None else f"default {option.default})")


def _split_options(text: str, rest: str) -> dict[str, str]:
    """The options as typed, quotes taken off."""
    given: dict[str, str] = {}
    position = 0
    while position < len(rest):
        match = _OPTION.match(rest, position)
        if match is None:
            raise PluginError(f"cannot read {rest[position:]!r} in {text!r}: {_EXAMPLE}")
        key, value = match["key"], match["value"].strip()
        if key in given:
            raise PluginError(f"{text!r} gives {key!r} twice")
        given[key] = value[1:-1] if value[:1] in ("'", '"') else value
        position = match.end()
    return given


def _read(name: str, key: str, annotation: Any, text: str) -> Any:
    """One value, read as its annotation says."""
    choices = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if type(None) in choices and text.lower() == "none":
        return None
    wanted = [c for c in choices if c is not type(None)]
    readers = [(c, _reader(c)) for c in wanted]
    # str is tried last: it takes any text, and would hide the other members of a union.
    known = sorted((r for r in readers if r[1] is not None), key=lambda r: r[0] is str)
    if not known:
        shown = inspect.formatannotation(annotation)
        raise PluginError(
            f"option {key!r} of {name!r} is a {shown}, which cannot be written as text: set it from Python"
        )
    for _, reader in known:
        try:
            return reader(text)  # type: ignore[misc]
        except ValueError:
            continue
    expected = " or ".join(_expected(c) for c, _ in known)
    raise PluginError(
        f"option {key!r} of {name!r} takes {expected}, and {text!r} is not: try {key}={_sample(known[0][0])}"
    )


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _reader(annotation: Any) -> Callable[[str], Any] | None:
    """How to read text as this type, or None where text cannot say it. Readers raise `ValueError`."""
    simple: dict[Any, Callable[[str], Any]] = {
        int: _read_int,
        float: _read_float,
        str: str,
        bool: _read_bool,
        Path: Path,
    }
    if annotation in simple:
        return simple[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple and arguments in ((int, ...), (float, ...), (str, ...)):
        return lambda text: tuple(simple[arguments[0]](part) for part in text.split("+") if part)
    if origin is Literal:
        return lambda text: _read_literal(text, arguments)
    return None


def _read_int(text: str) -> int:
    value = float(text)
    if not value.is_integer():
        raise ValueError(text)
    return int(value) if "e" in text.lower() or "." in text else int(text)


def _read_float(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError(text)
    return value


def _read_bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


def _read_literal(text: str, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if str(choice) == text:
            return choice
    raise ValueError(text)


def _expected(annotation: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    if annotation in names:
        return names[annotation]
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(a) for a in typing.get_args(annotation))
    return "several joined by +"


def _sample(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return str(typing.get_args(annotation)[0])
    return {int: "16", float: "0.5", bool: "true", str: "text", Path: "some/folder"}.get(annotation, "1+2+3")
