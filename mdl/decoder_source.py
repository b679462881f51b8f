"""A third party's decoder is charged for: its source travels in the message, compressed, and is checked.

Our own decoders are part of the machine on which every explanation runs; anybody else's is part of the explanation. The
source of the module that defines the decoder, and of every module of the same distribution that it imports, is what the
message carries, comments and names included. The receiver executes none of it: it uses the installed decoder, and only
if that is what the message says.

`mdl/decoder_rules.py` refuses source that could hold or fetch what was not paid for.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import lzma
import re
import sys
import zlib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np

from mdl.decoder_rules import Imported, check_module, imported_modules
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section
from mdl.plugins import available, load

KIND = "source"
OURS = "mdl-interp"
ZLIB, LZMA = 0, 1
LARGEST_SOURCE = 1 << 20  # bytes
BYTE = 256  # bytes are sent as 256 to 511: with one exponent, the adaptive code has nothing to learn but that
LZMA_FILTERS = ({"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": LARGEST_SOURCE},)


def is_ours(kind: str) -> bool:
    """Whether a decoder kind comes with this distribution. **Raises:** `PluginError` if nothing installed offers it."""
    points = available("decoder")
    if kind not in points:
        load("decoder", kind)  # says what there is
    owner = points[kind].dist
    return owner is not None and re.sub(r"[-_.]+", "-", owner.name).lower() == OURS


def source_text(decoder: type) -> str:
    """The source of a decoder's module and of those of its distribution that it imports, each behind its name and size.

    **Raises:** `ExplanationError` if a module has no Python source, or breaks the rules for decoders.
    """
    modules = _modules(decoder)
    return "".join(f"{name} {len(text)}\n{text}" for name, text in sorted(modules.items()))


def compressed(text: str) -> bytes:
    """The shorter of zlib's and lzma's raw streams, behind a byte that says which."""
    data = text.encode()
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    streams = (
        bytes([ZLIB]) + deflate.compress(data) + deflate.flush(),
        bytes([LZMA]) + lzma.compress(data, lzma.FORMAT_RAW, filters=LZMA_FILTERS),
    )
    return min(streams, key=len)


def source_bits(decoder: type) -> float:
    """What a third party's decoder costs, in bits: 8 a byte of its compressed source, the compressor's name included.

    The container adds some 200 bits to it (`source_section`). **Raises:** `ExplanationError` as `source_text` does.
    """
    return 8.0 * len(compressed(source_text(decoder)))


def source_section(decoder: type) -> Section:
    """What travels: kind "source", one header array, a column with 256 more than each byte.

    **Raises:** `ExplanationError` as `source_text` does, or for more than a megabyte of source.
    """
    text = source_text(decoder)
    if len(text.encode()) > LARGEST_SOURCE:
        raise ExplanationError(f"{len(text.encode())} bytes of decoder source: more than the {LARGEST_SOURCE} allowed")
    data = np.frombuffer(compressed(text), np.uint8)
    return Section(KIND, (QuantisedArray.from_integers(BYTE + data.astype(np.int64)),))


def received_source(section: Section) -> str:
    """The source in a section: to be compared, never executed.

    **Raises:** `MessageError` if it is not such a section.
    """
    if section.kind != KIND or len(section.header) != 1 or section.parts or section.header[0].symbols.shape[1] != 1:
        raise MessageError("a 'source' section has one header array, a column, and no parts")
    symbols = section.header[0].symbols[:, 0]
    if not len(symbols) or not section.header[0].plain or (symbols >> 8 != 1).any():
        raise MessageError(
            f"the {len(symbols)} integers of a 'source' section are not bytes from {BYTE} to {2 * BYTE - 1}"
        )
    return _decompressed((symbols - BYTE).astype(np.uint8).tobytes())


def check_source(section: Section, decoder: type) -> None:
    """That the installed decoder is the one whose source the message carries, and pays for.

    **Raises:** `MessageError` if it is another, `ExplanationError` if its source breaks the rules for decoders.
    """
    sent, here = received_source(section), source_text(decoder)
    if sent == here:
        return
    names = [", ".join(re.findall(r"^([\w.]+) \d+$", text, re.M)[:4]) for text in (sent, here)]
    raise MessageError(
        f"the message carries {len(sent)} characters of decoder source ({names[0]}), and the installed "
        f"{decoder.__module__}.{decoder.__qualname__} has {len(here)} others ({names[1]}). Install the version of the "
        "plug-in that made the message; a decoder whose source was not sent is not used."
    )


def _decompressed(data: bytes) -> str:
    """At most a megabyte of it, however much the stream would give."""
    codec, stream = data[0], data[1:]
    unpack: Any
    try:
        if codec == ZLIB:
            unpack = zlib.decompressobj(-15)
            text = unpack.decompress(stream, LARGEST_SOURCE)
        elif codec == LZMA:
            unpack = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
            text = unpack.decompress(stream, LARGEST_SOURCE)
        else:
            raise MessageError(f"decoder source under compressor {codec}; this version knows {ZLIB} and {LZMA}")
        if not unpack.eof or unpack.unused_data:
            raise MessageError(f"decoder source that does not end where it says, or is longer than {LARGEST_SOURCE}")
        return str(text.decode())
    except (zlib.error, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise MessageError(f"{len(data)} bytes of decoder source that cannot be unpacked: {error}") from error


def _modules(decoder: type) -> dict[str, str]:
    """Name and source of every module that is part of the decoder, each one checked."""
    first = decoder.__module__
    found: dict[str, str] = {}
    pending = [(name, Imported(name, first, 0)) for name in _with_parents(first)]
    while pending:
        name, why = pending.pop()
        if name in found:
            continue
        text = _read(name, why)
        found[name] = text
        tree = check_module(name, text)
        for wanted in imported_modules(name, tree, is_package=_spec(name).submodule_search_locations is not None):
            if wanted.allowed:
                continue
            own = _own_module(wanted, first)
            pending += [(parent, wanted) for parent in _with_parents(own)]
    _check_defined(decoder, found)
    return found


def _with_parents(name: str) -> list[str]:
    """A module and the packages that it lies in: their source runs when it is imported."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _own_module(wanted: Imported, first: str) -> str:
    """The module that an import of the same distribution names. **Raises:** `ExplanationError` for anybody else's."""
    if not _same_distribution(wanted.name, first):
        raise ExplanationError(wanted.refusal())
    if _spec_or_none(wanted.name) is not None:
        return wanted.name
    parent = wanted.name.rpartition(".")[0]  # `from package.module import name`
    if parent and _spec_or_none(parent) is not None:
        return parent
    raise ExplanationError(f"{wanted.where()} imports {wanted.name}, which is not installed: its source cannot be sent")


def _same_distribution(name: str, first: str) -> bool:
    top, own = name.partition(".")[0], first.partition(".")[0]
    if top == own:
        return True
    owners = packages_distributions()
    return bool(set(owners.get(top, ())) & set(owners.get(own, ())))


def _spec_or_none(name: str) -> Any:
    try:
        return _spec(name)
    except ExplanationError:
        return None


def _spec(name: str) -> Any:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        raise ExplanationError(f"the decoder's module {name!r} cannot be found: its source cannot be sent")
    return spec


def _read(name: str, why: Imported) -> str:
    """A module's source. A namespace package has none, and an extension module none that can be read."""
    origin = _spec(name).origin
    if origin is None and _spec(name).submodule_search_locations is not None:
        return ""
    if origin is None or not origin.endswith(".py"):
        raise ExplanationError(
            f"{why.where()} needs {name}, which has no Python source ({origin}): a decoder is charged at its source, "
            "and compiled code or data files are none. Write it in Python, or as a program (mdl.program)."
        )
    text = Path(origin).read_text(encoding="utf-8")
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", origin) != origin:
        raise ExplanationError(f"module {name} was loaded from {loaded.__file__}, but its source is {origin}")
    return text


def _check_defined(decoder: type, modules: dict[str, str]) -> None:
    """That the class is its module's own, and that nothing was put into it or the modules while the program ran.

    **Raises:** `ExplanationError` for what is used and would not be what is charged.
    """
    body = ast.parse(modules[decoder.__module__]).body
    classes = [n for n in body if isinstance(n, ast.ClassDef) and n.name == decoder.__qualname__]
    if len(classes) != 1 or getattr(sys.modules.get(decoder.__module__), decoder.__name__, None) is not decoder:
        raise ExplanationError(
            f"{decoder.__module__} does not define the class {decoder.__qualname__} once, at its top: what is used "
            "would not be what is charged"
        )
    _check_unchanged(f"{decoder.__module__}.{decoder.__qualname__}", decoder, classes[0].body, modules)
    for name, text in modules.items():
        if name in sys.modules:
            _check_unchanged(name, sys.modules[name], ast.parse(text).body, modules)


def _other(value: Any, written: Any) -> bool:
    """Whether a value is not the constant that was written; what replaced it may be of any type."""
    return type(value) is not type(written) or bool(value != written)


def _check_unchanged(where: str, owner: Any, body: list[ast.stmt], modules: dict[str, str]) -> None:
    """Every name of a class or module is bound in its source, functions are the source's, and so are constants."""
    bound = {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    nodes = [n for one in body if not isinstance(one, (ast.FunctionDef, ast.ClassDef)) for n in ast.walk(one)]
    bound |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
    bound |= {(a.asname or a.name).partition(".")[0] for n in imports for a in n.names}
    for name, value in vars(owner).items():
        submodule = inspect.ismodule(value) and value.__name__ in sys.modules and value.__name__ == f"{where}.{name}"
        if name not in bound and not submodule and not name.startswith(("__", "_abc_", "_is_")):
            raise ExplanationError(f"{where}.{name} is not in the source: it was put there while the program ran")
    written = {n.name for n in body if isinstance(n, ast.FunctionDef)}
    for name in written:
        value = vars(owner).get(name)
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        file = getattr(getattr(inspect.unwrap(value), "__code__", None), "co_filename", None) if value else None
        if file not in {_spec(m).origin for m in modules}:
            raise ExplanationError(f"{where}.{name} was replaced by a function of another file ({file})")
    for one in body:
        if isinstance(one, ast.Assign) and isinstance(one.value, ast.Constant):
            names = [t.id for t in one.targets if isinstance(t, ast.Name)]
            if any(_other(vars(owner).get(n), one.value.value) for n in names):
                raise ExplanationError(f"{where}.{names[0]} is not what the source says: it was changed")
