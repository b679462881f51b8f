"""The auditor: starts receivers, measures what they reconstructed, and works every figure of a scorecard out again.

The auditor holds the whole model, for it has to compare; the receivers hold it without the region. Two of them decode
with different numbers of threads, and must decode the same integers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from estimators.kernels import Evaluator
from estimators.transcript import Transcript
from estimators.verification.job import Job
from mdl.errors import MDLError, TaskError
from mdl.ledger import Score, Scorecard
from mdl.message import decode_message, encode_message
from mdl.models.model import Model
from mdl.receiver import Streams

if TYPE_CHECKING:
    from estimators.accounting import SurpriseAccounting

MEASURED_TOLERANCE = 1e-4  # relative, of what is measured in float32; sizes and lengths must agree to 1e-9
EXACT_TOLERANCE = 1e-9
THREADS = (1, 2)
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "JAX_PLATFORMS", "LANG")
# How a setting was found: the sender's search, which a receiver does not repeat.
NOT_RECOMPUTED = ("evaluations", "curve", "notes", "settings", "slope", "message_file")


@dataclass(frozen=True)
class Finding:
    """One figure of a scorecard, as claimed and as found."""

    score: str
    figure: str
    claimed: Any
    found: Any
    agrees: bool


def label(score: Score) -> str:
    """A score's name in findings."""
    return f"{score.explanation} @ {score.phenomenon if score.fidelity is None else f'{100 * score.fidelity:g} %'}"


def audit(accounting: SurpriseAccounting, card: Scorecard, sent: Mapping[str, tuple[bytes, Streams]]) -> list[Finding]:
    """Recompute a scorecard from the bytes that were sent, by message file.

    **Raises:** `TaskError` for a model that runs as a torch module, which cannot be handed over in part; `MDLError` with
    the receiver's own words if it fails.
    """
    from estimators.accounting import Claim

    model, bench = accounting.task.model, accounting.bench
    if not isinstance(model, Model):
        raise TaskError(f"{model.name} runs as a torch module: it cannot be handed to a receiver without its region")
    evaluator = bench.evaluator
    assert isinstance(evaluator, Evaluator)
    findings: list[Finding] = [_finding("task", "null_kl_bits", card.task["null_kl_bits"], bench.null_kl)]
    found: list[Score] = []
    with tempfile.TemporaryDirectory() as scratch:
        names = {s.message_file: f"{i:04d}" for i, s in enumerate(card.scores)}
        for name in {"job", *(f"out{t}" for t in THREADS)}:
            (Path(scratch) / name).mkdir()
        held_out = bench.held_out
        named = {names[s.message_file]: sent[s.message_file] for s in card.scores}
        job = Job.write(
            Path(scratch) / "job", model, accounting.task.region, held_out.activations, bench.special[0], named
        )
        _run_receivers(job, Path(scratch))
        hashes = [json.loads((Path(scratch) / f"out{t}" / "hashes.json").read_text()) for t in THREADS]
        for score in card.scores:
            name = names[score.message_file]
            folder = Path(scratch) / f"out{THREADS[0]}"
            data, streams = sent[score.message_file]
            message = encode_message(decode_message(data))
            findings.append(_same(score, "bytes of the message, encoded again", data, message.data))
            findings.append(_same(score, "integers decoded with 1 and 2 threads", hashes[0][name], hashes[1][name]))
            transcript = Transcript.load(folder / f"{name}.npz")
            with np.load(folder / f"{name}.hidden.npz") as hidden:
                damage, alone = (
                    evaluator.compare(held_out.activations, held_out.reference, hidden[k])
                    for k in ("explained", "alone")
                )
            again = accounting.account(Claim.of(score), message, transcript, damage, alone)
            findings += _differences(score, again)
            found.append(again)
    findings += _compared(card, accounting.compare(found))
    return findings


def _run_receivers(job: Job, scratch: Path) -> None:
    """One process for each number of threads, at the same time. **Raises:** `MDLError` with what a failed one said."""
    root = str(Path(__file__).resolve().parents[2])
    running = []
    for threads in THREADS:
        code = f"import sys; sys.path.insert(0, {root!r}); from estimators.verification.receiver import main; main(*sys.argv[1:])"
        out = scratch / f"out{threads}"
        environment = {k: os.environ[k] for k in KEPT_ENVIRONMENT if k in os.environ} | _threads(threads)
        command = [sys.executable, "-I", "-c", code, str(job.folder), str(out)]
        running.append(
            subprocess.Popen(
                command, cwd=out, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    for process in running:
        _, errors = process.communicate()
        if process.returncode:
            for other in running:
                other.kill()
            raise MDLError(f"a receiver failed (exit status {process.returncode}): {errors.strip()[-2000:]}")


def _threads(count: int) -> dict[str, str]:
    eigen = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if count == 1 else ""
    return {
        "OMP_NUM_THREADS": str(count),
        "OPENBLAS_NUM_THREADS": str(count),
        "XLA_FLAGS": eigen,
        "HF_HUB_OFFLINE": "1",
    }


def _same(score: Score, figure: str, claimed: Any, found: Any) -> Finding:
    return Finding(
        label(score),
        figure,
        claimed if isinstance(claimed, str) else len(claimed),
        found if isinstance(found, str) else len(found),
        claimed == found,
    )


def _finding(where: str, figure: str, claimed: Any, found: Any) -> Finding:
    return Finding(where, figure, claimed, found, _agree(claimed, found, MEASURED_TOLERANCE))


def _agree(claimed: Any, found: Any, tolerance: float) -> bool:
    if isinstance(claimed, float | int) and isinstance(found, float | int):
        both_nan = math.isnan(claimed) and math.isnan(found)
        return both_nan or claimed == found or math.isclose(claimed, found, rel_tol=tolerance, abs_tol=tolerance)
    return claimed == found


def _differences(score: Score, again: Score) -> Iterator[Finding]:
    """Every figure of a score but its search, as claimed and as found."""
    exact = ("entries.", "static.", "sequence_tokens")
    claimed, found = (dict(_leaves(asdict(s))) for s in (score, again))
    for figure in sorted(claimed.keys() | found.keys()):
        if figure.split(".")[0] in NOT_RECOMPUTED:
            continue
        a, b = claimed.get(figure), found.get(figure)
        measured = "KL" in figure or "stderr" in figure or not figure.startswith(exact)
        yield Finding(label(score), figure, a, b, _agree(a, b, MEASURED_TOLERANCE if measured else EXACT_TOLERANCE))


def _compared(card: Scorecard, comparisons: Sequence[Any]) -> list[Finding]:
    claimed, found = ([dict(_leaves(asdict(c))) for c in group] for group in (card.comparisons, comparisons))
    names = [f"{c.first} against {c.second}" for c in card.comparisons]
    findings = [Finding("comparisons", "number of pairs", len(claimed), len(found), len(claimed) == len(found))]
    for name, a, b in zip(names, claimed, found, strict=False):
        # Crossings and intervals come from totals that differ by rounding, and from resampling with the seed saved.
        findings += [
            Finding(name, k, a.get(k), b.get(k), _agree(a.get(k), b.get(k), 100 * MEASURED_TOLERANCE)) for k in a
        ]
    return findings


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Figures of nested records, by a dotted name; an entry is named by what it is, not by where it stands."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            key = part["name"] if isinstance(part, Mapping) and "name" in part else index
            yield from _leaves(part, f"{name}.{key}")
    else:
        yield name, value
