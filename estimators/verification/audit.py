"""The auditor: starts receivers, measures what they reconstructed, and works every figure of a scorecard out again.

The auditor holds the whole model, for it has to compare; the receivers hold it without the region. Two of them decode
with different numbers of threads, and must decode the same integers.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from estimators.categorical_kernels import CategoricalEvaluator
from estimators.certify import AUDIT_SEQUENCES, Certificate, audit_seed, certify
from estimators.gaussian_kernels import GaussianEvaluator
from estimators.kernels import Evaluator
from estimators.transcript import Claim, Transcript
from estimators.verification.job import Job
from mdl.errors import MDLError, TaskError
from mdl.ledger import Score, Scorecard
from mdl.message import Message, decode_message, encode_message
from mdl.models import TorchModel
from mdl.receiver import Streams

if TYPE_CHECKING:
    from estimators.accounting import SurpriseAccounting

MEASURED_TOLERANCE = 1e-4  # relative, of what is measured in float32; sizes and lengths must agree to 1e-9
EXACT_TOLERANCE = 1e-9
RESAMPLED_TOLERANCE = 1e-2  # of crossings and intervals, which magnify what is measured
PATIENCE = 900.0  # seconds for one message
POLL = 0.05
AUDIT_ROWS = 2048  # inputs whose labels are sampled, where a sequence is one
RECEIVER = "estimators.verification.receiver"
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


def label(score: Score, horizon: float) -> str:
    """A score's name in findings; its N where that is not the run's."""
    setting = score.phenomenon if score.fidelity is None else f"{100 * score.fidelity:g} %"
    return f"{score.explanation} @ {setting}" + (f" for N = {score.horizon:g}" if score.horizon != horizon else "")


def audit(accounting: SurpriseAccounting, card: Scorecard, sent: Mapping[str, tuple[bytes, Streams]]) -> list[Finding]:
    """Recompute a scorecard from the bytes that were sent, by message file.

    **Raises:** `TaskError` for a model that runs as a torch module, which cannot be handed over in part; `MDLError`
    with the receiver's own words if one fails.
    """
    model, bench = accounting.task.model, accounting.bench
    if isinstance(model, TorchModel):
        raise TaskError(f"{model.name} runs as a torch module: it cannot be handed to a receiver without its region")
    findings: list[Finding] = [_measured("task", "null_kl_bits", card.task["null_kl_bits"], bench.null_kl)]
    found: list[Score] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "job").mkdir()
        scores = (*card.scores, *card.envelope)
        names = [f"{i:04d}" for i in range(len(scores))]
        named = {n: sent[s.message_file] for n, s in zip(names, scores, strict=True)}
        held_out = bench.held_out.activations
        job = Job.write(folder / "job", model, accounting.task.region, held_out, bench.special[0], named)
        with receivers(job, folder) as outs:
            for name, score in zip(names, scores, strict=True):
                data, where = named[name][0], label(score, card.task["horizon"])
                message = encode_message(decode_message(data))
                hashes = [out.wait(f"{name}.sha256").read_text() for out in outs]
                findings += [
                    _exact(where, "message encoded again", data.hex(), message.data.hex()),
                    _exact(where, "integers decoded with 1 and 2 threads", *hashes),
                ]
                again, certificate = _account_again(accounting, score, message, outs[0], name)
                findings += _differences(where, score, again)
                findings += [] if certificate is None else [_certified(where, certificate)]
                found.append(again)
    return findings + _compared(card, accounting.compare(found))


def _account_again(
    accounting: SurpriseAccounting, score: Score, message: Message, out: Out, name: str
) -> tuple[Score, Certificate | None]:
    """A score worked out from what a receiver left of it, and its KL certified; the files are removed.

    A Gaussian KL is a closed form of what was decoded: there is nothing to certify.
    """
    split, evaluator = accounting.bench.held_out, accounting.bench.evaluator
    assert isinstance(evaluator, Evaluator | GaussianEvaluator | CategoricalEvaluator)
    path, hidden_path = out.wait(f"{name}.npz"), out.wait(f"{name}.hidden.npz")
    with np.load(hidden_path, allow_pickle=False) as hidden:
        damage, alone = (evaluator.compare(split.activations, split.reference, hidden[k]) for k in ("values", "alone"))
        certificate = None
        if not isinstance(evaluator, GaussianEvaluator):
            sampled = (evaluator, split.activations, split.reference, hidden["values"], damage.kl_bits)
            rows = split.activations.tokens.shape[1] == 1
            many = AUDIT_ROWS if rows else AUDIT_SEQUENCES
            certificate = certify(*sampled, audit_seed(message.data), sequences=many)
    transcript = Transcript.load(path)
    path.unlink()
    hidden_path.unlink()
    return accounting.account(Claim.of(score), message, transcript, damage, alone), certificate


@dataclass(frozen=True)
class Out:
    """A running receiver and the folder that it fills."""

    process: subprocess.Popen[str]
    folder: Path

    def wait(self, name: str) -> Path:
        """A file, once it is there. **Raises:** `MDLError` if the receiver stops before, or takes far too long."""
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / name).exists():
            if self.process.poll() not in (None, 0) or time.monotonic() > deadline:
                self.process.kill()
                said = (self.folder / "said").read_text().strip()[-2000:]
                raise MDLError(f"a receiver failed, or took over {PATIENCE:.0f} s for one message: {said}")
            time.sleep(POLL)
        return self.folder / name


@contextlib.contextmanager
def receivers(job: Job, scratch: Path) -> Iterator[list[Out]]:
    """One process for each number of threads; the first reconstructs and measures, the others only decode."""
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from {RECEIVER} import main; main(*sys.argv[1:])"
    outs: list[Out] = []
    try:
        for threads in THREADS:
            folder = scratch / f"out{threads}"
            folder.mkdir()
            mode = "all" if not outs else "decode"
            command = [sys.executable, "-I", "-c", code, str(job.folder), str(folder), mode]
            environment = {k: os.environ[k] for k in KEPT_ENVIRONMENT if k in os.environ} | _threads(threads)
            with (folder / "said").open("w") as said:
                process = subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL, text=True
                )
            outs.append(Out(process, folder))
        yield outs
    finally:
        for out in outs:
            out.process.kill()
            out.process.wait()


def _threads(count: int) -> dict[str, str]:
    eigen = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if count == 1 else ""
    return {
        "OMP_NUM_THREADS": str(count),
        "OPENBLAS_NUM_THREADS": str(count),
        "XLA_FLAGS": eigen,
        "HF_HUB_OFFLINE": "1",
    }


def _certified(where: str, certificate: Certificate) -> Finding:
    """Samples of M, really coded under M_E and under M: the difference in length is the KL of the same tokens."""
    error = f"±{certificate.stderr:.2g}"
    figure = f"KL of {certificate.tokens:,} tokens, as {certificate.draws} samples of each were coded ({error})"
    return Finding(where, figure, certificate.kl_bits, certificate.difference, certificate.agrees)


def _exact(where: str, figure: str, claimed: str, found: str) -> Finding:
    return Finding(where, figure, claimed[:12], found[:12], claimed == found)


def _measured(where: str, figure: str, claimed: Any, found: Any) -> Finding:
    return Finding(where, figure, claimed, found, _agree(claimed, found, MEASURED_TOLERANCE))


def _agree(claimed: Any, found: Any, tolerance: float) -> bool:
    if isinstance(claimed, float | int) and isinstance(found, float | int):
        both_nan = math.isnan(claimed) and math.isnan(found)
        close = math.isclose(claimed, found, rel_tol=tolerance, abs_tol=tolerance)
        return both_nan or bool(claimed == found) or close
    return bool(claimed == found)


def _differences(where: str, score: Score, again: Score) -> Iterator[Finding]:
    """Every figure of a score but its search, as claimed and as found."""
    exact = ("entries.", "static.", "sequence_tokens")
    claimed, found = (dict(_leaves(asdict(s))) for s in (score, again))
    for figure in sorted(claimed.keys() | found.keys()):
        if figure.split(".")[0] in NOT_RECOMPUTED:
            continue
        a, b = claimed.get(figure), found.get(figure)
        measured = "KL" in figure or "stderr" in figure or not figure.startswith(exact)
        yield Finding(where, figure, a, b, _agree(a, b, MEASURED_TOLERANCE if measured else EXACT_TOLERANCE))


def _compared(card: Scorecard, comparisons: Sequence[Any]) -> list[Finding]:
    claimed, found = ([dict(_leaves(asdict(c))) for c in group] for group in (card.comparisons, comparisons))
    names = [f"{c.first} against {c.second}" for c in card.comparisons]
    findings = [Finding("comparisons", "number of pairs", len(claimed), len(found), len(claimed) == len(found))]
    for name, a, b in zip(names, claimed, found, strict=False):
        # Crossings and intervals come from totals that differ by rounding, and from resampling with the seed saved.
        pairs = [(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys())]
        findings += [Finding(name, k, x, y, _agree(x, y, RESAMPLED_TOLERANCE)) for k, x, y in pairs]
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
