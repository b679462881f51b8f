"""An output folder belongs to one run: claimed before any work, released at its end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdl.errors import MDLError

LOCK_NAME = ".in-progress"
_SHOWN = 4  # names listed of a folder that is not empty


def claim(out: Path) -> None:
    """Create the folder and a lock file in it, or refuse.

    The lock is created exclusively, so that of two runs which claim one folder at once only one succeeds.

    **Raises:** `MDLError` if `out` is a file, is not empty, is claimed by another run, or cannot be written.
    """
    try:
        created = _create(out)
        _refuse_unless_empty(out)
        handle = os.open(out / LOCK_NAME, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        raise MDLError(_in_use(out)) from None
    except OSError as error:
        raise MDLError(
            f"cannot write to the output folder {out}: {error.strerror}. Choose another with --out."
        ) from error
    with os.fdopen(handle, "w") as lock:
        json.dump({"process": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S"), "created": created}, lock)


def release(out: Path) -> None:
    """Remove the lock; and the folder too, if the claim created it and nothing was written there."""
    lock = out / LOCK_NAME
    created = bool(json.loads(lock.read_text())["created"])
    lock.unlink()
    if created and not any(out.iterdir()):
        out.rmdir()


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """`claim`, and `release` at the end however it ends."""
    claim(out)
    try:
        yield out
    finally:
        release(out)


def _create(out: Path) -> bool:
    """Make the folder; whether it was missing."""
    if out.exists() and not out.is_dir():
        raise MDLError(f"the output {out} is a file, and has to be a folder: choose another with --out, or delete it")
    missing = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    return missing


def _refuse_unless_empty(out: Path) -> None:
    names = sorted(p.name for p in out.iterdir())
    if LOCK_NAME in names:
        raise FileExistsError(out)
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        kind = "holds an earlier run" if "scorecard.json" in names else "is not empty"
        raise MDLError(
            f"the output folder {out} {kind} ({', '.join(names[:_SHOWN])}{more}), and nothing is ever overwritten: "
            "choose another with --out, or delete it"
        )


def _in_use(out: Path) -> str:
    try:
        lock = json.loads((out / LOCK_NAME).read_text())
        process, started = int(lock["process"]), lock["started"]
    except (OSError, ValueError, KeyError):
        return f"the output folder {out} is in use by another run: choose another with --out"
    if _alive(process):
        return f"the output folder {out} is in use by process {process} (since {started}): choose another with --out"
    return (
        f"the output folder {out} is left over from a run that was killed (process {process}, {started}): "
        "delete it, or choose another with --out"
    )


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
