"""The error types. Each message states the fact, the numbers, the likely cause and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MDLError(Exception):
    """Anything this package refuses, with a message meant for its user."""


class CodeError(MDLError):
    """A symbol that a code cannot carry, or a bitstream that does not decode."""


class MessageError(MDLError):
    """A message that cannot be written, or bytes that are not a message."""


class ModelError(MDLError):
    """A checkpoint that cannot be read, or a site that the model does not have."""


class DataError(MDLError):
    """Texts or tokens that cannot be scored."""


class TaskError(MDLError):
    """A region, phenomenon or fidelity that makes no sense for this model."""


class ExplanationError(MDLError):
    """An explanation that does not fit the task, or breaks the contract."""


class PluginError(MDLError):
    """An unknown plug-in, a collision of names, or an option it does not have."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean ...?" with up to three near names, or an empty string."""
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
