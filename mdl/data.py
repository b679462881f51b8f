"""Texts and token streams. The sequence is the unit of sampling.

The embedded text is the running Python's own standard library: the documentation in `pydoc_data.topics` and the
sources of its modules, split by file. Nothing is downloaded, and the hash of what was read goes into every score.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Parts of the standard library that many distributions leave out, or that are data rather than text: held-out text
# must be the same wherever the package is installed, so these are only ever trained on.
OPTIONAL_PACKAGES = frozenset({"idlelib", "tkinter", "lib2to3", "distutils", "ensurepip", "turtledemo", "pydoc_data"})
SKIPPED_PACKAGES = frozenset({"site-packages", "dist-packages", "encodings", "__pycache__", "lib-dynload"})


@dataclass(frozen=True)
class Document:
    """A text, its name, and the split that its name puts it in: "train", "fit" or "held-out"."""

    name: str
    text: str
    split: str


def split_of(name: str) -> str:
    """84 % train, 8 % fit, 8 % held-out, by a hash of the name, so that a file never changes sides."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 84 else "fit" if bucket < 92 else "held-out"


def _module_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PACKAGES & set(relative.parts):
            continue
        tests = any("test" in part for part in relative.parts[:-1])
        train_only = tests or relative.parts[0] in OPTIONAL_PACKAGES
        name = relative.as_posix()
        if relative.parts[0] == "pydoc_data":
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield Document(name, text, "train" if train_only else split_of(name))


def standard_library() -> list[Document]:
    """Documentation topics and module sources of the running Python, in a fixed order."""
    from pydoc_data.topics import topics

    found = [Document(f"topics/{name}", text, split_of(f"topics/{name}")) for name, text in sorted(topics.items())]
    return found + list(_module_documents())
