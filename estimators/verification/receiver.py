"""The fresh receiver process: decodes every message of a job, runs the rest of the model, leaves what it found.

    python -I -c "...; from estimators.verification.receiver import main; main(FOLDER, OUT, MODE)"

It is started with an empty environment in an empty folder, and gives up the network, other processes and every file
but Python's own, the libraries' and the job's before it reads the first message (an audit hook refuses them).
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from estimators.categorical_kernels import CategoricalEvaluator
from estimators.gaussian_kernels import GaussianEvaluator
from estimators.kernels import Evaluator, evaluator_for
from estimators.transcript import Transcript
from estimators.verification.job import Job
from mdl.message import Section, decode_message
from mdl.receiver import Receiver
from mdl.state import DenseState, IndexState, JoinedState, SparseState, State

FORBIDDEN_EVENTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen")
# Shipped with the package, and no business of a receiver's: the embedded model, whose weights hold the region's.
WITHHELD = Path(__file__).resolve().parents[2] / "mdl" / "embedded"


def confine(readable: Sequence[Path], writable: Path) -> None:
    """Refuse, from now on and for good: sockets, processes, and files outside a few folders.

    **Arguments:** `readable`: folders that may be read besides Python's own and its libraries'; `writable`: the only
    one that may be written. Whatever tries is met with `PermissionError`, which names it.
    """
    roots = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(__file__).resolve().parents[2])}
    libraries = [Path(root).resolve() for root in roots] + [Path("/proc"), Path("/sys"), Path("/dev"), Path("/etc")]
    allowed = [*libraries, *(path.resolve() for path in readable), writable.resolve()]

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN_EVENTS):
            raise PermissionError(f"a receiver has no network and starts no process ({event})")
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            _check_file(Path(os.fsdecode(arguments[0])), arguments[1], arguments[2], allowed, writable.resolve())

    sys.addaudithook(guard)


def _check_file(path: Path, mode: str | None, flags: int | None, allowed: Sequence[Path], writable: Path) -> None:
    resolved = path.resolve()
    writes = any(c in (mode or "") for c in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
    inside = [writable, Path("/dev")] if writes else allowed
    if not any(resolved.is_relative_to(root) for root in inside) or resolved.is_relative_to(WITHHELD):
        raise PermissionError(
            f"a receiver may not {'write' if writes else 'read'} {path}: it is told by messages alone"
        )


def main(folder: str, out: str, mode: str) -> None:
    """Decode the job in `folder`; leave in `out`, for each message, a hash of all integers decoded and (mode "all") its
    transcript and the final hidden states of the model with the reconstruction in place."""
    job, target = Job.read(Path(folder)), Path(out)
    confine([Path(folder)], target)
    model = job.model()
    activations, evaluator = job.activations(model), evaluator_for(model, job.region)
    assert isinstance(evaluator, Evaluator | GaussianEvaluator | CategoricalEvaluator)
    inputs = activations.sample().inputs
    for name in job.names:
        message, streams = job.sent(name)
        receiver = Receiver.of(message)
        state, codes = receiver.read(streams, inputs)
        symbols = [state.state] if codes is None else [state.state, codes.state]
        digest = _hash(decode_message(message), symbols)
        _leave(target / f"{name}.sha256", partial(Path.write_text, data=digest))
        if mode != "all":
            continue
        received = receiver.reconstruct(inputs, state.state, None if codes is None else codes.state)
        constants = dict(zip(job.special, receiver.special, strict=True))
        filled = {"values": received.values, "alone": received.prediction}
        hidden = {k: evaluator.hidden(activations, activations.filled(v, constants)) for k, v in filled.items()}
        transcript = Transcript.of(streams, state, codes, received, receiver.terms(state.state))
        _leave(target / f"{name}.npz", transcript.save)
        _leave(target / f"{name}.hidden.npz", partial(_save, arrays=hidden))


def _leave(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under another name, then rename: the auditor waits for the whole file."""
    temporary = path.with_name(path.name + ".partial")
    write(temporary)
    temporary.replace(path)


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _hash(sections: Sequence[Section], states: Sequence[State]) -> str:
    """SHA-256 (hex) of every integer that was decoded."""
    digest = hashlib.sha256()
    for section in sections:
        digest.update(section.kind.encode())
        for array in (*section.header, *section.parts):
            for integers in array.integer_arrays():
                digest.update(np.ascontiguousarray(integers, np.int64).tobytes())
    for state in states:
        for symbols in _symbols(state):
            digest.update(np.ascontiguousarray(symbols, np.int64).tobytes())
    return digest.hexdigest()


def _symbols(state: State) -> list[np.ndarray]:
    if isinstance(state, DenseState):
        return [state.values]
    if isinstance(state, SparseState):
        return [state.tokens, state.features, state.values]
    if isinstance(state, IndexState):
        return [state.indices]
    if isinstance(state, JoinedState):
        return [symbols for stream in state.streams for symbols in _symbols(stream)]
    return []
