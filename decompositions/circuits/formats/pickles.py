"""Pickles, read without importing anything: a short list of names, each standing for something harmless of ours."""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mdl.errors import ExplanationError

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
LARGEST_FILE = 1 << 31  # bytes; adjacency matrices of attribution graphs come near it


class Index:
    """In the place of ACDC's TorchIndex: `hashable_tuple`, such as (None, None, 3)."""

    hashable_tuple: tuple[Any, ...] = ()


class SparseAct:
    """In the place of feature-circuits' SparseAct: `act` of features, `res` of the error, `resc` contracted."""

    act: Any = None
    res: Any = None
    resc: Any = None


class Configuration:
    """In the place of a model's configuration: its attributes, whatever they are."""


class LogitTarget(NamedTuple):
    """In the place of circuit-tracer's."""

    token_str: str
    vocab_idx: int


STAND_INS: Mapping[str, Any] = MappingProxyType(
    {
        "acdc.TLACDCEdge.TorchIndex": Index,
        "acdc.acdc_utils.TorchIndex": Index,
        "activation_utils.SparseAct": SparseAct,
        "circuit_tracer.attribution.targets.LogitTarget": LogitTarget,
        "circuit_tracer.utils.tl_nnsight_mapping.UnifiedConfig": Configuration,
        "transformer_lens.HookedTransformerConfig.HookedTransformerConfig": Configuration,
        "transformer_lens.config.HookedTransformerConfig.HookedTransformerConfig": Configuration,
        "transformer_lens.config.hooked_transformer_config.HookedTransformerConfig": Configuration,
    }
)


def read_pickle(path: Path) -> Any:
    """A plain pickle of containers, numbers, strings, slices, numpy scalars and the stand-ins.

    **Raises:** `ExplanationError` for one that wants to import anything else, naming it, and for what is no pickle.
    """
    try:
        return _Reader(io.BytesIO(_content(path)), path).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ExplanationError(f"{path} is no pickle, or a damaged one: {error}") from error


def read_torch(path: Path) -> Any:
    """What torch.save wrote, read with weights_only and the stand-ins; tensors on the CPU.

    **Raises:** `ExplanationError` for a file that wants to import anything else, naming it, and for what torch did
    not write.
    """
    import torch

    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(v, k) for k, v in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(io.BytesIO(_content(path)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        named = _GLOBAL.search(str(error))
        if named:
            raise ExplanationError(refusal(path, named[1])) from error
        raise ExplanationError(f"{path} is no file of torch.save's, or a damaged one: {error}") from error


def is_torch(path: Path) -> bool:
    """Whether a file looks like torch.save's: a zip archive with a pickle in it."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def refusal(path: Path, name: str) -> str:
    """What is said of a file that wants to import something."""
    return (
        f"{path} wants to import {name}, which no circuit needs: a pickle can run any program. Nothing was run. If the "
        "file is your own, convert it to json or to plain tensors with the tool that wrote it."
    )


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise ExplanationError(f"there is no file {path}")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ExplanationError(f"{path} has {size} bytes; circuits of up to {LARGEST_FILE} are read")
    return path.read_bytes()


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path) -> None:
        pickle.Unpickler.__init__(self, file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        known: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "builtins.slice": slice,
            "numpy.dtype": np.dtype,
            "numpy.core.multiarray.scalar": _scalar,
            "numpy._core.multiarray.scalar": _scalar,
            **STAND_INS,
        }
        if full not in known:
            raise ExplanationError(refusal(self._path, full))
        return known[full]


def _scalar(dtype: Any, content: bytes) -> Any:
    """A numpy scalar of a numeric dtype, from its bytes."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or len(content) != dtype.itemsize:
        raise pickle.UnpicklingError(f"a numpy scalar of {dtype} in {len(content)} bytes")
    return np.frombuffer(content, dtype)[0]
