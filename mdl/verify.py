"""verify(run): is every figure of a saved run what its messages say?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mdl import plugins
from mdl.data import Dataset
from mdl.errors import DataError, MDLError, MessageError, TaskError
from mdl.ledger import Score, Scorecard, read_scorecard
from mdl.models import AnyModel
from mdl.models.load import load_processed
from mdl.receiver import Streams
from mdl.score import DATA_FILE, EMBEDDED_SOURCE, ESTIMATOR, SCORECARD_FILE, embedded_model, stream_file
from mdl.task import Task, build_task

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Verification:
    """Every figure that was checked: records with `score`, `figure`, `claimed`, `found`, `agrees`."""

    findings: tuple[Any, ...]

    @property
    def agrees(self) -> bool:
        """Whether all of them agree."""
        return all(f.agrees for f in self.findings)


def verify(run: Path, model: str | Path | object | None = None, progress: Progress | None = None) -> Verification:
    """Check a run that `mdl compare` left.

    Fresh processes without the region's weights decode every message and stream, and every figure is worked out again
    from what they decoded.

    **Arguments:** `model`: where the model is now, if not where the scorecard says.

    **Raises:** `MDLError` for a run that is incomplete or damaged, or that belongs to another model or other data.
    """
    watch = progress or (lambda description, completed, total: None)
    card = read_scorecard(run / SCORECARD_FILE, older=False)
    data = Dataset.load(run / DATA_FILE)
    if data.description["data_sha256"] != card.task["data_sha256"]:
        raise DataError(f"{run / DATA_FILE} is not the data of this scorecard: its hash is another")
    sent = {score.message_file: _sent(run, score) for score in (*card.scores, *card.envelope)}
    task = _task(card, _model(card, model), data, watch)
    watch("decoding in fresh processes", 0, 1)
    accounting = plugins.load("estimator", ESTIMATOR)(task, card.task["horizon"], card.task["seed"])
    return Verification(tuple(accounting.verify(card, sent)))


def _sent(run: Path, score: Score) -> tuple[bytes, Streams]:
    """The bytes of one score. **Raises:** `MessageError` where a file that it needs is missing."""
    folder = run / "messages"
    if not (folder / score.message_file).is_file():
        raise MessageError(f"{folder / score.message_file}, the message of {score.explanation}, is missing")
    streams = [folder / stream_file(score.message_file, suffix) for suffix in (".state", ".residual")]
    return (folder / score.message_file).read_bytes(), Streams(
        *(p.read_bytes() if p.is_file() else b"" for p in streams)
    )


def _model(card: Scorecard, given: str | Path | object | None) -> AnyModel:
    source = card.task.get("model_source", "") if given is None else given
    if source == "":
        raise TaskError("this run was made from a model object: say where the model is with --model")
    if isinstance(source, AnyModel):
        return source
    process = card.task.get("model_processing", [])
    return embedded_model(process) if source == EMBEDDED_SOURCE else load_processed(source, process)


def _task(card: Scorecard, model: AnyModel, data: Dataset, progress: Progress) -> Task:
    """The task of a scorecard. **Raises:** `MDLError` where model or data turn out to be others."""
    if model.fingerprint != card.task["model_fingerprint"]:
        raise TaskError(
            f"{model.name}: its fingerprint is {model.fingerprint[:12]}..., the scorecard's is "
            f"{card.task['model_fingerprint'][:12]}...: other weights, or another configuration"
        )
    task = build_task(model, card.task["region"], data, progress)
    for key, value in task.description.items():
        if key in card.task and card.task[key] != value:
            raise MDLError(f"the scorecard says {key} = {card.task[key]!r}; this model and data give {value!r}")
    return replace(task, description={**card.task})
