"""score(task, explanation) and compare(...): the few lines that everything else serves."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mdl import plugins
from mdl.data import Dataset, Sizes, embedded_text, from_dataset, from_rows, from_text, from_tokens
from mdl.errors import DataError, ExplanationError, TaskError, did_you_mean
from mdl.ledger import Score, Scorecard
from mdl.models import AnyModel, Model, TorchModel, Vectors
from mdl.models.load import PROCESSING, load_processed
from mdl.models.vectors import VECTORS
from mdl.protocols import Decomposition, Explanation
from mdl.seal import check_seal, seal
from mdl.task import ACTIVATIONS, BEHAVIOUR, DEFAULT_FIDELITIES, Task, build_task, parse_region
from mdl.training import loss_curve as checked_curve
from mdl.training import read_loss_curve, training_flops
from mdl.training import scaling_law as checked_law

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_SOURCE = "embedded"
EMBEDDED_NAME = "embedded-python-gpt2"
EMBEDDED_TRAINING_TOKENS = 2800 * 16 * 255  # steps, sequences and tokens of experiments/embedded_model/train.py
EMBEDDED_REGION = "upstream of blocks.2.hook_resid_pre"
EMBEDDED_MLP = "blocks.1.mlp"  # of the transcoder
DEFAULT_HORIZON = 1e6
DEFAULT_CONTEXT = 256
SCORECARD_FILE, DATA_FILE = "scorecard.json", "data.npz"
MESSAGE_SUFFIX = ".mdl"
ESTIMATOR = "surprise-accounting"
YARDSTICK = "nothing"
VERSIONED = ("mdl-interp", "jax", "numpy", "torch", "sae-lens", "constriction")

Progress = Callable[[str, int, int], None]


def _silent(description: str, completed: int, total: int) -> None:
    """Progress that nobody watches."""


def embedded_model(process: Sequence[str] = ()) -> Model:
    """The small language model of Python's standard library that ships with the package."""
    model = load_processed(EMBEDDED / EMBEDDED_NAME, process)
    assert isinstance(model, Model)
    return model


def embedded_saes() -> list[Path]:
    """Folders of the sparse autoencoders that ship with the embedded model."""
    return sorted(p.parent for p in (EMBEDDED / "saes").glob("*/cfg.json"))


def embedded_transcoders() -> list[Path]:
    """Folders of the transcoders that ship with the embedded model."""
    return sorted(p.parent for p in (EMBEDDED / "transcoders").glob("*/cfg.json"))


def default_explanations(model: AnyModel, region_text: str) -> list[str]:
    """The yardsticks that make sense for the region, and the embedded SAEs or transcoders where it is theirs."""
    region = parse_region(region_text, model)
    if isinstance(model, Vectors):
        known = [] if model.network is None else ["affine", "weights", "low-rank"]
        return [YARDSTICK, f"pca:rank={max(1, model.site_width(VECTORS) // 8)}", "random-dictionary", *known]
    names = [YARDSTICK, "token-table"]
    if region.output == "logits":
        return names
    if isinstance(model, Model):
        names += ["token-pairs", "weights"]
    if region.input != "tokens" or (isinstance(model, Model) and model.config.tied):
        names.append("affine")
    width = model.site_width(region.output)
    names += [f"pca:rank={width // 8}", "clusters:k=256", "random-dictionary"]
    if region_text == EMBEDDED_REGION and model.name == EMBEDDED_NAME:
        names += [f'sae:path="{path}"' for path in embedded_saes()]
    if region_text == EMBEDDED_MLP and model.name == EMBEDDED_NAME:
        names += [f'sae:path="{path}"{sent}' for path in embedded_transcoders() for sent in ("", ",encoder=sent")]
    return names


def load_data(
    model: AnyModel,
    *,
    text: Path | None = None,
    tokens: Path | None = None,
    dataset: Path | None = None,
    context: int | None = None,
    sequences: int | None = None,
    fit_sequences: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Sequences in three splits, from one source: a text, a token array, a dataset on disk, or the embedded text.

    **Raises:** `DataError` if the context is longer than the model's, or the source cannot be used.
    """
    if isinstance(model, Vectors):
        if (text, tokens, dataset, context) != (None,) * 4:
            raise DataError(f"{model.name}: rows of numbers are their own data: give no text, tokens, dataset, context")
        return from_rows(model.first_equal, sequences, seed, model.name)
    limit = model.n_ctx or sys.maxsize if isinstance(model, TorchModel) else model.config.n_ctx
    if context is not None and not 2 <= context <= limit:
        raise DataError(f"a context of {context} tokens is asked for; this model takes 2 to {limit}")
    length = min(context or DEFAULT_CONTEXT, limit)
    sizes = Sizes(fit=fit_sequences or Sizes.fit, held_out=sequences or Sizes.held_out)
    if tokens is not None:
        return from_tokens(Path(tokens), sizes, seed, context)
    if text is not None:
        return from_text(Path(text), model.tokenizer, length, sizes, seed)
    if dataset is not None:
        return from_dataset(Path(dataset), model.tokenizer, length, sizes, seed)
    if model.tokenizer is None:
        raise DataError("this model came without a tokenizer.json, so the default text cannot be used: give --tokens")
    return embedded_text(model.tokenizer, length, sizes, seed)


def score(
    task: Task,
    explanations: Iterable[Decomposition],
    *,
    phenomena: Sequence[str] | None = None,
    fidelities: Sequence[float] | None = None,
    horizon: float = DEFAULT_HORIZON,
    envelope: Sequence[float] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Scorecard, dict[str, bytes]]:
    """Score decompositions of one task.

    **Arguments:** `phenomena`: "activations", "behaviour" (default: both where the region ends inside the model);
    `fidelities`: fractions of the null's KL; `horizon`: the N for which the sender's precisions are chosen;
    `envelope`: further N for which they are chosen anew, so that the lower envelope over N is known.

    **Returns:** the scorecard, and by file name what was sent: of each score a message (.mdl), the stream of its state
    (.state) and that of the residual coder (.residual), where these have a symbol.

    **Raises:** `TaskError` for phenomena or fidelities that make no sense, `ExplanationError` for an explanation that
    breaks the contract or cannot meet a fidelity.
    """
    started, watch = time.time(), progress or _silent
    phenomena, fidelities = check_phenomena(task.model, task.region.output, phenomena, fidelities)
    check_horizon(horizon)
    fitted = _fitted(task, list(explanations), watch)
    estimator = plugins.load("estimator", ESTIMATOR)(task, horizon, seed)
    scores: list[Score] = []
    messages: dict[str, bytes] = {}
    others = sorted(set(envelope) - {horizon})
    settings = len(fidelities) * (1 + len(others)) * (ACTIVATIONS in phenomena) + (BEHAVIOUR in phenomena)
    for index, explanation in enumerate(fitted):

        def step(description: str, completed: int, total: int, done: int = index * settings) -> None:
            watch(description, done + completed, len(fitted) * settings)

        for found in estimator.score(explanation, phenomena, fidelities, step, others):
            file = _file_name(found.score, horizon)
            streams = {".state": found.streams.state, ".residual": found.streams.residual}
            messages |= {file: found.message} | {
                stream_file(file, suffix): data for suffix, data in streams.items() if data
            }
            scores.append(replace(found.score, message_file=file))
    watch("done", len(fitted) * settings, len(fitted) * settings)
    description = {**task.description, "horizon": horizon, "null_kl_bits": estimator.null_kl_bits}
    comparisons = estimator.compare(scores)
    versions = {name: version(name) for name in VERSIONED}
    main, anew = ([s for s in scores if (s.horizon == horizon) is same] for same in (True, False))
    card = Scorecard(description, tuple(main), comparisons, versions, time.time() - started, tuple(anew))
    return card, messages


def _fitted(task: Task, decompositions: Sequence[Decomposition], watch: Progress) -> list[Explanation]:
    """Every explanation. **Raises:** `ExplanationError` for a changed task, or a name that is taken."""
    fitted: list[Explanation] = []
    sealed = seal(task)
    for index, decomposition in enumerate(decompositions):
        watch(f"fitting {type(decomposition).__name__}", index, len(decompositions))
        fitted.append(decomposition.fit(task.for_fitting()))
    check_seal(sealed, seal(task), "fitting an explanation")
    names = [e.name for e in fitted]
    for decomposition, name in zip(decompositions, names, strict=True):
        if name == YARDSTICK and type(decomposition) is not plugins.load("decomposition", YARDSTICK):
            raise ExplanationError(
                f"{type(decomposition).__name__} calls its explanation {YARDSTICK!r}, which is the yardstick's name: "
                "savings would be measured against a baseline of its own choice. Give it another name."
            )
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ExplanationError(f"two explanations are called {', '.join(twice)}: a table needs distinct names")
    return fitted


def compare(
    model: str | Path | object | None = None,
    region: str | None = None,
    *,
    process: Sequence[str] = (),
    explanations: Sequence[str | Decomposition] | None = None,
    phenomena: Sequence[str] | None = None,
    fidelities: Sequence[float] | None = None,
    text: Path | None = None,
    tokens: Path | None = None,
    dataset: Path | None = None,
    context: int | None = None,
    sequences: int | None = None,
    fit_sequences: int | None = None,
    horizon: float | None = None,
    envelope: Sequence[float] = (),
    training_tokens: float | None = None,
    loss_curve: Path | None = None,
    scaling_law: Sequence[float] | None = None,
    seed: int = 0,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Scorecard:
    """Compare explanations of a region of a model, on some text, in bits.

    `model` may also be rows of numbers, to be reproduced up to a share of their variance (`Vectors`, or an .npy file).
    All defaults: the embedded model, its middle residual stream, its SAEs, every yardstick. `model`: what `load_model`
    takes or gives; a torch module without an adapter needs a region, "upstream of SUBMODULE". `process`: weight
    processing that it is loaded with, switches of `load_model`. Explanations are given as
    "NAME:key=value" or as objects; "nothing", the yardstick of all, is always among them. `training_tokens`: what
    the model was trained on, one more N at which totals are shown; `loss_curve` (JSON lines) or `scaling_law` (E, A,
    alpha and, if known, C): its loss against training compute (`mdl.training`), for the share of that which an
    explanation recovers; where both are given the law counts. `out` gets scorecard.json and messages/, each file
    written whole or not at all.

    **Raises:** `MDLError` of the kind that fits, before any long work where that can be known.
    """
    loaded = _loaded(model, process)
    horizon = DEFAULT_HORIZON if horizon is None else horizon
    region = region or (EMBEDDED_REGION if model is None else _middle(loaded))
    decompositions = _decompositions(explanations, loaded, region)
    place = parse_region(region, loaded)
    check_phenomena(loaded, place.output, phenomena, fidelities)
    for n in (horizon, *envelope):
        check_horizon(n)
    training = _training(model is None, loaded, training_tokens, loss_curve, scaling_law)
    source = partial(load_data, loaded, text=text, tokens=tokens, dataset=dataset, context=context, seed=seed)
    data = source(sequences=sequences, fit_sequences=fit_sequences)
    task = build_task(loaded, region, data, progress or _silent)
    processed = {"model_processing": sorted(process)} if process else {}
    task = replace(task, description={**task.description, "model_source": _source(model), **processed, **training})
    scored = partial(score, task, decompositions, phenomena=phenomena, fidelities=fidelities, horizon=horizon)
    card, messages = scored(envelope=envelope, seed=seed, progress=progress)
    if out is not None:
        write(card, messages, data, Path(out))
    return card


def _training(
    embedded: bool,
    model: AnyModel,
    tokens: float | None,
    curve: Path | None,
    law: Sequence[float] | None,
) -> dict[str, Any]:
    """What is known of the model's training, for the task's description."""
    tokens = EMBEDDED_TRAINING_TOKENS if embedded else tokens
    if isinstance(model, Vectors):
        if (tokens, curve, law) != (None, None, None):
            raise TaskError("rows of numbers were not trained: leave out training tokens, loss curve and scaling law")
        return {}
    known: dict[str, Any] = {} if tokens is None else {"training_tokens": float(tokens)}
    if law is not None:
        flops = None if tokens is None else training_flops(model.n_parameters, tokens)
        return {**known, "training": checked_law(law, flops)}
    vocabulary = model.site_width("logits")
    if curve is not None:
        return {**known, "training": read_loss_curve(Path(curve), vocabulary)}
    if embedded:
        points = json.loads((EMBEDDED / "loss_curve.json").read_text())
        del points["about"]
        return {**known, "training": checked_curve(points, vocabulary)}
    return known


def _decompositions(wanted: Sequence[str | Decomposition] | None, model: AnyModel, region: str) -> list[Decomposition]:
    """The yardstick and what is asked for, or the defaults; refused before any long work where they do not fit."""
    chosen = list(wanted) if wanted else default_explanations(model, region)
    if wanted and YARDSTICK not in chosen:
        chosen.insert(0, YARDSTICK)
    decompositions = [plugins.make_decomposition(e) if isinstance(e, str) else e for e in chosen]
    output = parse_region(region, model).output
    for decomposition in decompositions:
        if check := getattr(decomposition, "check", None):
            check(output, model.site_width(output), model.name)
    return decompositions


def write(card: Scorecard, messages: dict[str, bytes], data: Dataset, out: Path) -> None:
    """Leave scorecard.json, data.npz and messages/ in a folder."""
    (out / "messages").mkdir(parents=True, exist_ok=True)
    for name, content in messages.items():
        partial = out / "messages" / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(out / "messages" / name)
    data.save(out / DATA_FILE)
    card.save(out / SCORECARD_FILE)


def check_phenomena(
    model: AnyModel, output: str, phenomena: Sequence[str] | None, fidelities: Sequence[float] | None
) -> tuple[list[str], list[float]]:
    """Defaults, and refusals: what is unknown, out of range, or makes no sense for a region that ends at the logits."""
    known = {"logits": [BEHAVIOUR], VECTORS: [ACTIVATIONS]}.get(output, [ACTIVATIONS, BEHAVIOUR])
    if isinstance(model, Vectors) and model.behaves:
        known = [ACTIVATIONS, BEHAVIOUR]
    for name in phenomena or ():
        if name not in (ACTIVATIONS, BEHAVIOUR):
            raise TaskError(f"no phenomenon {name!r}: it is {ACTIVATIONS!r} or {BEHAVIOUR!r}")
        if name not in known and output == VECTORS:
            raise TaskError(
                "rows of numbers have no behaviour without a tolerance (`Vectors.tolerating`), for no model runs on "
                "from them: take 'activations'"
            )
        if name not in known:
            raise TaskError("a region that ends at the logits has no activations to reproduce: take 'behaviour'")
    chosen = list(fidelities) if fidelities else list(DEFAULT_FIDELITIES)
    for fidelity in chosen:
        if not 1e-6 <= fidelity < 1:
            raise TaskError(
                f"a fidelity of {fidelity:g} cannot be met: it is a fraction of the null's KL, at least 1e-6 (float32 "
                "resolves no less) and below 1 (which saying nothing meets). 0.01 asks for 1 %."
            )
    return list(phenomena) if phenomena else known, sorted(set(chosen), reverse=True)


def check_horizon(horizon: float) -> None:
    """**Raises:** `TaskError` unless 1 <= N <= 10^15."""
    if not 1 <= horizon <= 1e15:
        raise TaskError(f"a horizon of {horizon:g} tokens: it is the N of total(N), from 1 to 1e15")


def _source(model: str | Path | object | None) -> str:
    """Where a verifier finds the model again: a folder, a hub name, "embedded", or nothing for an object."""
    if model is None:
        return EMBEDDED_SOURCE
    if not isinstance(model, str | Path):
        return ""
    return str(Path(model).resolve()) if Path(model).exists() else str(model)


def _loaded(model: str | Path | object | None, process: Sequence[str]) -> AnyModel:
    for step in process:
        if step not in PROCESSING:
            raise TaskError(f"no weight processing {step!r}.{did_you_mean(step, PROCESSING)} There is {PROCESSING}.")
    if isinstance(model, AnyModel):
        if process:
            raise TaskError(f"process={list(process)} for a model that is loaded already: give load_model the switches")
        return model
    return embedded_model(process) if model is None else load_processed(model, process)


def _middle(model: AnyModel) -> str:
    if isinstance(model, Vectors):
        return VECTORS
    if isinstance(model, TorchModel):
        raise TaskError(
            f"{model.name} runs as a torch module, without an adapter, so it has no default region: give 'upstream of "
            "NAME', NAME being a submodule through which everything passes, such as a whole block."
        )
    return f"upstream of blocks.{model.config.n_layers // 2}.hook_resid_pre"


def stream_file(message_file: str, suffix: str) -> str:
    """The name of a message's stream."""
    return message_file.removesuffix(MESSAGE_SUFFIX) + suffix


def _file_name(found: Score, horizon: float) -> str:
    setting = found.phenomenon if found.fidelity is None else f"{found.fidelity:g}"
    setting += "" if found.horizon == horizon else f"@{found.horizon:g}"
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in found.explanation)
    return f"{safe}@{setting}{MESSAGE_SUFFIX}"
