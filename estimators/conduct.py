"""How an explanation behaves while it is scored: what a message and its length alone do not show.

A third party's decoder has to be a function: of its message, the inputs and the state up to a token, and of nothing
else. Ours are, and are tested to be. Of every explanation, what is sent must not depend on what it was shown only in
order to encode it, and nobody changes the task.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse

from estimators.fidelity import Attempt, Bench, encoded
from mdl.errors import ExplanationError, MessageError
from mdl.message import Section, decode_message
from mdl.protocols import Explanation, Inputs, Settings
from mdl.receiver import decoder_of, predicted, trusted
from mdl.seal import check_seal, seal
from mdl.state import DenseState, IndexState, JoinedState, NoState, SparseState, State

SECONDS = (2.0, 0.005)  # of one core that decoding may take: at least, and a token
TOLERANCE = 1e-4  # of the prediction's spread: batches of other shapes may be summed in another order


@dataclass(frozen=True)
class Conduct:
    """Watches one explanation. `pristine` is a copy of it that never sees held-out data, `sealed` what the task was."""

    bench: Bench
    explanation: Explanation
    pristine: Explanation
    sealed: Mapping[str, Any]

    @classmethod
    def of(cls, bench: Bench, explanation: Explanation, sealed: Mapping[str, Any]) -> Conduct:
        """Before anything is encoded. **Raises:** `ExplanationError` for an explanation that cannot be copied."""
        try:
            pristine = copy.deepcopy(explanation)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ExplanationError(
                f"{explanation.name} cannot be copied ({error}), so that nobody can tell whether it learns from "
                "held-out data. Keep arrays and functions in it, no open files, locks or generators."
            ) from error
        return cls(bench, explanation, pristine, sealed)

    def check_decoder(self, knobs: Mapping[str, float]) -> None:
        """The decoder on a look at the probe data, before any long work. **Raises:** `ExplanationError`."""
        bench = self.bench
        metric, outputs = bench.metrics[0], bench.probe.sample.outputs
        spread = metric.spread(outputs)
        settings = Settings(bench.horizon, spread / 4, metric.root, dict(knobs))
        section = self.explanation.section(settings)
        if not trusted(section.kind):
            bench.source_sections(section.kind)  # refused before it runs
            state = encoded(self.explanation, section, bench.probe.sample, settings)
            check_decoder(self.explanation.name, section, bench.probe.sample.inputs, state)

    def check(self, attempt: Attempt) -> None:
        """What is about to become a score. **Raises:** `ExplanationError`, which names the cheat."""
        name, stated = self.explanation.name, self.pristine.section(attempt.settings)
        if not _same(stated, attempt.stated):
            raise ExplanationError(
                f"{name} tunes itself on held-out data: what it sends for the same settings is not what it sent before "
                "it was given the held-out sample to encode. An explanation is fitted once, on fit data."
            )
        if not trusted(stated.kind):
            section = decode_message(attempt.message.data)[1]
            check_decoder(name, section, self.bench.held_out.sample.inputs, attempt.state)

    def finish(self) -> None:
        """After the last setting. **Raises:** `ExplanationError` if the task is no longer what it was."""
        check_seal(self.sealed, bench_seal(self.bench), self.explanation.name)


def _same(first: Section, second: Section) -> bool:
    """Whether two sections carry the same integers."""
    arrays = [(*s.header, *s.parts) for s in (first, second)]
    shapes = [(s.kind, len(s.header), len(s.parts)) for s in (first, second)]
    if shapes[0] != shapes[1]:
        return False
    integers = [[a.integer_arrays() for a in every] for every in arrays]
    return all(
        len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(*integers, strict=True)
    )


def bench_seal(bench: Bench) -> dict[str, Any]:
    """What identifies the task and all that is measured against."""
    further: dict[str, np.ndarray] = {}
    for name, split in {"probe": bench.probe, "held-out": bench.held_out}.items():
        further |= {
            f"outputs of the {name} sample": split.sample.outputs,
            f"M's own run on {name} data": split.reference,
        }
    return seal(bench.task, further)


def check_decoder(name: str, section: Section, inputs: Inputs, state: State) -> None:
    """That a decoder is a function of the past alone, and needs the parts that it says it needs, and no others.

    **Raises:** `ExplanationError`, which names the cheat.
    """
    started = time.process_time()
    first = predicted(decoder_of(section), inputs, state)
    spent, allowed = time.process_time() - started, max(SECONDS[0], SECONDS[1] * inputs.n_tokens)
    if spent > allowed:
        raise ExplanationError(
            f"{name}: its decoder takes {spent:.1f} s of one core for {inputs.n_tokens} tokens; {allowed:.1f} s are "
            "allowed. Computing is not charged in bits, so it is bounded: a decoder that trains or searches is refused."
        )
    tolerance = TOLERANCE * float(first.std() + np.abs(first).mean())
    again = decoder_of(section)
    for _ in range(2):
        if predicted(again, inputs, state).tobytes() != first.tobytes():
            raise ExplanationError(
                f"{name}: its decoder is not repeatable. Decoding the same message twice gives different bytes: it "
                "draws random numbers, or keeps state between calls."
            )
    _check_independent(name, section, inputs, state, first, tolerance)
    _check_causal(name, section, inputs, state, first, tolerance)
    _check_touched(name, section, inputs, state, tolerance)


def _check_independent(
    name: str, section: Section, inputs: Inputs, state: State, first: np.ndarray, tolerance: float
) -> None:
    """The last half of the sequences, backwards, by a decoder that has seen nothing, and by one that has."""
    sequences = np.arange(len(inputs.tokens))[: len(inputs.tokens) // 2 - 1 : -1]
    grid = np.broadcast_to(sequences[:, None], (len(sequences), inputs.tokens.shape[1]))
    chosen, told, rows = _picked(inputs, state, grid)
    used = decoder_of(section)
    predicted(used, inputs, state)
    for decoder in (decoder_of(section), used):
        if _differ(predicted(decoder, chosen, told), first[rows], tolerance):
            raise ExplanationError(
                f"{name}: its decoder keeps state between calls, or looks across sequences. A sequence decoded in "
                "other company, or another order, comes out otherwise: what it knows beyond its message was not sent."
            )


def _check_causal(
    name: str, section: Section, inputs: Inputs, state: State, first: np.ndarray, tolerance: float
) -> None:
    """Behind a cut, every sequence goes on as the one before it does: nothing in front of the cut may change."""
    sequences, positions = inputs.tokens.shape
    for cut in sorted({positions // 3, positions // 2, positions - 1} - {0}):
        own = np.broadcast_to(np.arange(sequences)[:, None], inputs.tokens.shape)
        grid = np.where(np.arange(positions) < cut, own, np.roll(own, 1, 0))
        changed, told, _ = _picked(inputs, state, grid)
        before = np.broadcast_to(np.arange(positions) < cut, inputs.tokens.shape)
        found = predicted(decoder_of(section), changed, told)[before[changed.scored]]
        if _differ(found, first[before[inputs.scored]], tolerance):
            raise ExplanationError(
                f"{name} leaks the future: with other tokens, inputs and symbols from position {cut} on, its "
                "predictions before that change. M is causal; what a token is told must come from it and from those "
                "before it (is a gate bidirectional, or a statistic taken over the whole sequence?)."
            )


def _check_touched(name: str, section: Section, inputs: Inputs, state: State, tolerance: float) -> None:
    """Parts that no token of a batch touches, by the decoder's own account, are zeroed: nothing may change."""
    if not section.n_parts:
        return
    sequences, positions = inputs.tokens.shape
    whole = decoder_of(section).touched(inputs, state)
    for chosen in (np.arange(sequences), np.arange(sequences // 2), np.arange(1)):
        some, told, rows = _picked(inputs, state, np.broadcast_to(chosen[:, None], (len(chosen), positions)))
        touched = decoder_of(section).touched(some, told)
        if touched is None and whole is None:
            return
        uses = scipy.sparse.csr_array((0, 0)) if touched is None else scipy.sparse.csr_array(touched)
        if uses.shape != (some.n_tokens, section.n_parts) or _other_parts(whole, rows, uses):
            raise ExplanationError(
                f"{name} lies about what it touches: of the same tokens it says one thing in one batch, another in "
                f"another, or something other than [{some.n_tokens} tokens, {section.n_parts} parts]."
            )
        unused = np.bincount(uses.indices, minlength=section.n_parts) == 0
        if unused.any() and _needs(section, unused, some, told, tolerance):
            raise ExplanationError(
                f"{name} lies about what it touches: its decoder says that {unused.sum()} of {len(unused)} parts are "
                "not needed for some tokens, so that nobody pays for them, but without them its predictions change."
            )


def _other_parts(whole: Any, rows: np.ndarray, uses: scipy.sparse.csr_array) -> bool:
    """Whether tokens touch other parts in company than by themselves."""
    if whole is None or whole.shape != (whole.shape[0], uses.shape[1]) or whole.shape[0] <= rows.max(initial=-1):
        return True
    return bool(((scipy.sparse.csr_array(whole)[rows] != 0) != (uses != 0)).nnz)


def _needs(section: Section, unused: np.ndarray, inputs: Inputs, state: State, tolerance: float) -> bool:
    """Whether predictions change, or cannot be made, once the unused parts are zeros."""
    zeroed = [replace(a, symbols=np.where(unused[:, None], 0, a.symbols)) for a in section.parts]
    try:
        without = predicted(decoder_of(replace(section, parts=tuple(zeroed))), inputs, state)
    except (MessageError, ExplanationError):
        return True
    return _differ(without, predicted(decoder_of(section), inputs, state), tolerance)


def _differ(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return a.shape != b.shape or bool((np.abs(a - b) > tolerance).any())


def _picked(inputs: Inputs, state: State, source: np.ndarray) -> tuple[Inputs, State, np.ndarray]:
    """Inputs and state of sequences put together from others: position p of sequence i is that of source[i, p].

    **Returns:** these, and for each of their scored positions the row that it has in the original.
    """
    place = np.arange(inputs.tokens.shape[1])
    index = np.full(inputs.tokens.shape, -1)
    index[inputs.scored] = np.arange(inputs.n_tokens)
    scored = inputs.scored[source, place]
    values = None if inputs.values is None else inputs.values[source, place]
    rows = index[source, place][scored]
    picked = Inputs(inputs.tokens[source, place], scored, values, inputs.network)
    return picked, _of_tokens(state, rows), rows


def _of_tokens(state: State, rows: np.ndarray) -> State:
    """The symbols of some tokens, in a given order."""
    if isinstance(state, NoState):
        return NoState(len(rows))
    if isinstance(state, DenseState):
        return DenseState(state.values[rows], state.parts)
    if isinstance(state, IndexState):
        return IndexState(state.indices[rows], state.n_parts)
    if isinstance(state, SparseState):
        return SparseState.from_matrix(scipy.sparse.csr_array(state.matrix()[rows]), state.classes, state.signed)
    if isinstance(state, JoinedState):
        return JoinedState(tuple(_of_tokens(s, rows) for s in state.streams))
    raise ExplanationError(f"a state of an unknown kind, {type(state).__name__}")
