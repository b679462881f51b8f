"""Two explanations added: the second is fitted on what the first leaves, and told what the first cannot know.

    prediction = first(inputs) + second(inputs, state)

The first is a function of the inputs (a table, an affine map); the second may be anything. At encode time the second
sees outputs minus what the first *decodes* to, so that it also mends how coarsely the first was sent.

One section carries both. Its parts are the second's, then the first's: features keep the numbers that the state gives
them, and whoever puts them in the order of first use leaves the first's where they are. Each child's arrays keep their
own columns; in the other child's rows they hold zeros under an exponent of their own, at the cost of a bit or so a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse

from mdl.alphabets import Alphabet, NoAlphabet
from mdl.codes.steps import LARGEST_EXPONENT
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section
from mdl.plugins import make_decomposition
from mdl.protocols import Decoder, Decomposition, Explanation, Inputs, Sample, Settings
from mdl.receiver import decoder_of
from mdl.state import NoState, State
from mdl.task import Activations, Task

KIND = "sum"
# Kinds that a sum may hold, by their place: append only, a message names the place. A third party's decoder is charged
# for its source, which a sum has no place for.
KINDS = (
    *("constant", "table", "affine", "token-pairs", "components", "clusters", "dictionary", "random-dictionary"),
    *("predictor", "block-sparse", "skip-dictionary"),
)
LAYOUT = 8  # of each child, first and second: kind, header arrays, part arrays, parts
MOST = 1 << 31
APART = 24  # quarter octaves between a child's coarsest rows and the zeros in the other's
EXACT_SHARE = 1e-4  # of the outputs' spread: the step at which a prediction counts as not quantised


def _padded(array: QuantisedArray, before: int, after: int) -> QuantisedArray:
    """The rows of one child, with zeros in the rows of the other."""
    coarse = min(int(array.exponents.max(initial=0)) + APART, LARGEST_EXPONENT)
    symbols = np.pad(array.symbols, ((before, after), (0, 0)))
    return QuantisedArray(symbols, np.pad(array.exponents, (before, after), constant_values=coarse), array.lattice)


def joined_section(first: Section, second: Section) -> Section:
    """Both in one. **Raises:** `ExplanationError` for a kind that a sum cannot hold."""
    for section in (first, second):
        if section.kind not in KINDS:
            raise ExplanationError(f"a sum holds {', '.join(KINDS)}; {section.kind!r} is none of them")
    layout = [[KINDS.index(s.kind), len(s.header), len(s.parts), s.n_parts] for s in (first, second)]
    own, other = first.n_parts, second.n_parts
    parts = [_padded(a, 0, own) for a in second.parts] + [_padded(a, other, 0) for a in first.parts]
    counts = QuantisedArray.from_integers(np.array(layout).reshape(1, LAYOUT))
    return Section(KIND, (counts, *first.header, *second.header), tuple(parts))


def split_section(section: Section) -> tuple[Section, Section]:
    """First and second. **Raises:** `MessageError` where the arrays are not those that the layout says."""
    if not section.header or section.header[0].symbols.shape != (1, LAYOUT):
        raise MessageError(f"a sum begins with its layout, {LAYOUT} integers")
    layout = section.header[0].integers("a sum's layout", 0, MOST, LAYOUT).reshape(2, LAYOUT // 2)
    (kind, headers, arrays, parts), (other_kind, other_headers, other_arrays, other_parts) = layout.tolist()
    if len({len(a.symbols) for a in section.parts}) > 1:
        raise MessageError(f"a sum of part arrays of {[len(a.symbols) for a in section.parts]} rows: all have as many")
    found = (len(section.header) - 1, len(section.parts), section.n_parts)
    if (headers + other_headers, arrays + other_arrays, parts + other_parts) != found or (
        (parts > 0 and arrays == 0) or (other_parts > 0 and other_arrays == 0)
    ):
        raise MessageError(f"a sum whose layout {layout.tolist()} does not fit its {found} header arrays, parts, rows")
    if max(kind, other_kind) >= len(KINDS):
        raise MessageError(f"a sum of the kinds {kind} and {other_kind}: this version knows 0 to {len(KINDS) - 1}")
    rows = np.arange(section.n_parts)
    theirs = tuple(a.rows(rows[:other_parts]) for a in section.parts[:other_arrays])
    ours = tuple(a.rows(rows[other_parts:]) for a in section.parts[other_arrays:])
    header = section.header[1:]
    first = Section(KINDS[kind], header[:headers], ours)
    return first, Section(KINDS[other_kind], header[headers:], theirs)


@dataclass(frozen=True)
class SumDecoder:
    """What the first predicts from the inputs, plus what the second makes of the state; `parts`: of each, in order."""

    first: Decoder
    second: Decoder
    parts: tuple[int, int]

    @classmethod
    def from_section(cls, section: Section) -> SumDecoder:
        """**Raises:** `MessageError` if the arrays do not fit together, or the first needs a state."""
        first, second = split_section(section)
        decoders = decoder_of(first), decoder_of(second)
        if not isinstance(decoders[0].alphabet, NoAlphabet):
            raise MessageError(f"a sum's first explanation is a function of the inputs; a {first.kind!r} is told more")
        return cls(*decoders, (first.n_parts, second.n_parts))

    @property
    def alphabet(self) -> Alphabet:
        """The second's."""
        return self.second.alphabet

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]. **Raises:** `MessageError` for two widths."""
        first = self.first.predict(inputs, NoState(inputs.n_tokens))
        second = self.second.predict(inputs, state)
        if first.shape != second.shape:
            raise MessageError(f"a sum of predictions {first.shape} and {second.shape}")
        return (first + second).astype(np.float32)

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        """[n, parts of the second + parts of the first]."""
        n, (own, other) = inputs.n_tokens, self.parts
        if own + other == 0:
            return None
        nothing = NoState(n)
        uses = [self.second.touched(inputs, state), self.first.touched(inputs, nothing)]
        every = [np.ones((n, k), bool) if u is None else u for u, k in zip(uses, (other, own), strict=True)]
        return scipy.sparse.csr_array(scipy.sparse.hstack([scipy.sparse.csr_array(u) for u in every]))

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        return self.first.flops_per_token(inputs, NoState(inputs.n_tokens)) + self.second.flops_per_token(inputs, state)


@dataclass(frozen=True)
class SumExplanation:
    """Knobs are both children's, "first." or "second." before their names."""

    first: Explanation
    second: Explanation
    name: str
    notes: tuple[str, ...] = ()
    kind: str = KIND
    # The latest settings met, with those of the children: these know settings by their identity.
    handed: dict[int, tuple[Settings, Settings, Settings]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def knobs(self) -> Mapping[str, Sequence[float]]:
        children = (("first", self.first), ("second", self.second))
        return {f"{place}.{name}": grid for place, child in children for name, grid in child.knobs.items()}

    def children(self, settings: Settings) -> tuple[Settings, Settings]:
        """The settings of each: its own knobs, all else as it is."""
        known = self.handed.get(id(settings))
        if known is None or known[0] is not settings:
            self.handed.clear()
            made = (_own(settings, "first."), _own(settings, "second."))
            self.handed[id(settings)] = (settings, *made)
        return self.handed[id(settings)][1:]

    def section(self, settings: Settings) -> Section:
        """Both children's, in one."""
        first, second = self.children(settings)
        return joined_section(self.first.section(first), self.second.section(second))

    def encode(self, decoder: SumDecoder, sample: Sample, settings: Settings) -> State:
        """The second's symbols for what the decoded first leaves."""
        left = sample.outputs - decoder.first.predict(sample.inputs, NoState(sample.inputs.n_tokens))
        return self.second.encode(decoder.second, Sample(sample.inputs, left), self.children(settings)[1])


def _own(settings: Settings, prefix: str) -> Settings:
    knobs = {name.removeprefix(prefix): v for name, v in settings.knobs.items() if name.startswith(prefix)}
    return replace(settings, knobs=knobs)


def left_by(first: Explanation, activations: Activations) -> Activations:
    """The same activations with outputs minus the prediction of a stateless explanation, at the scored positions.

    The prediction is sent so finely (1e-4 of the outputs' spread) that it counts as not quantised: it is what a second
    explanation, such as an SAE of what a table leaves, is trained on.

    **Raises:** `ExplanationError` for an explanation that needs a state.
    """
    sample = activations.sample()
    spread = float(np.sqrt(np.mean(np.square(sample.outputs - sample.outputs.mean(0), dtype=np.float64))))
    fine = Settings(1.0, max(EXACT_SHARE * spread, 1e-30), np.eye(sample.outputs.shape[1]))
    decoder = decoder_of(first.section(fine))
    if not isinstance(decoder.alphabet, NoAlphabet):
        raise ExplanationError(
            f"{first.name} needs a state: the first explanation of a sum is a function of the inputs alone "
            "(nothing, token-table, token-pairs, affine). Put it second."
        )
    outputs = activations.outputs.copy()
    outputs[activations.scored] -= decoder.predict(sample.inputs, NoState(sample.inputs.n_tokens))
    return replace(activations, outputs=outputs)


@dataclass(frozen=True)
class Sum:
    """Two explanations added, the second fitted on what the first leaves: option strings, or objects from Python.

    `first` is a function of the inputs: "token-table", "token-pairs", "affine"; `second` is anything, such as
    second='sae:path=folder' (quote what has a comma in it). `name`: what tables show, by default both names.
    """

    first: str | Decomposition = "token-table"
    second: str | Decomposition = "pca"
    name: str = ""

    def check(self, site: str, width: int, model_name: str) -> None:
        """Refuse what a child refuses, before anything is computed. **Raises:** as the children's `check`."""
        for child in self._children():
            if check := getattr(child, "check", None):
                check(site, width, model_name)

    def _children(self) -> tuple[Any, Any]:
        first, second = (make_decomposition(c) if isinstance(c, str) else c for c in (self.first, self.second))
        return first, second

    def fit(self, task: Task) -> SumExplanation:
        """**Raises:** `ExplanationError` for a first explanation with a state, or a child that a sum cannot hold."""
        decompositions = self._children()
        first = decompositions[0].fit(task)
        tune = left_by(first, task.tune_activations)
        second = decompositions[1].fit(
            replace(task, fit_activations=left_by(first, task.fit_activations), tune_activations=tune)
        )
        for child in (first, second):
            if child.kind not in KINDS:
                raise ExplanationError(f"{child.name}: a sum holds {', '.join(KINDS)}, not {child.kind!r}")
        notes = (*getattr(first, "notes", ()), *getattr(second, "notes", ()))
        return SumExplanation(first, second, self.name or f"{first.name} + {second.name}", notes)
