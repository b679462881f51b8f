"""A look-up table by (previous token, token) behind the table by token: what a bigram tells.

    prediction = mean + row[token] + row[previous token, token]

each row where the table has one. Rows are the best linear predictions of nested random effects, shrunk in every
direction by what the variance components there ask for: a pair's mean towards its token's, a token's towards the mean
of all. A row is one part, paid with its first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.sparse

from decompositions.baselines import STATIC_KNOB
from decompositions.token_effects import (
    LARGEST_TOKEN,
    OWN,
    SPAN,
    check_tokens,
    nested_effects,
    numbered_pairs,
    own_keys,
    pair_keys,
)
from mdl.alphabets import NoAlphabet
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, encode_message
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import NoState, State
from mdl.static_rows import metric_rows, predict_columns
from mdl.task import Task

KIND = "token-pairs"
# What a squared error of one step of the residual coder costs: 12 / (2 ln 2) bits (see `Settings.static_step`).
BITS_PER_SQUARE = 6.0 / np.log(2.0)
DEFAULT_COUNT = 2  # about as good as 3 and 5 on the embedded model at a million tokens, better beyond


@dataclass(frozen=True)
class TokenPairsDecoder:
    """mean + the token's row + the pair's row, where there are such; `keys` [r] increase."""

    mean: np.ndarray
    keys: np.ndarray
    rows: np.ndarray

    @classmethod
    def from_section(cls, section: Section) -> TokenPairsDecoder:
        """Header: mean [1, d]. Parts: token increments [r, 1], codes of what precedes [r, 1] (increments within a
        token), rows [r, d]. **Raises:** `MessageError` if the arrays do not fit together."""
        if len(section.header) != 1 or len(section.parts) != 3:
            counts = f"{len(section.header)} header and {len(section.parts)} part arrays"
            raise MessageError(f"a 'token-pairs' section has one header array and three part arrays, not {counts}")
        mean, rows = section.header[0].vector("the mean of a 'token-pairs' section"), section.parts[2].values()
        if rows.shape[1] != len(mean) or any(len(a.symbols) != len(rows) for a in section.parts[:2]):
            lengths = [len(a.symbols) for a in section.parts[:2]]
            raise MessageError(f"'token-pairs': rows {rows.shape} do not fit a mean of {len(mean)}, or {lengths} keys")
        return cls(mean, decoded_keys(*section.parts[:2]), rows)

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def _found(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that have a row, and which."""
        if not len(self.keys):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        tokens = np.flatnonzero(self.keys[place] == keys)
        return tokens, place[tokens]

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        out = np.broadcast_to(self.mean, (inputs.n_tokens, len(self.mean))).astype(np.float32)
        for keys in (own_keys(inputs), pair_keys(inputs)):
            tokens, rows = self._found(keys)
            out[tokens] += self.rows[rows]
        return out

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        own, pair = self._found(own_keys(inputs)), self._found(pair_keys(inputs))
        tokens, rows = (np.concatenate(both) for both in zip(own, pair, strict=True))
        shape = (inputs.n_tokens, len(self.keys))
        return scipy.sparse.coo_array((np.ones(len(tokens), bool), (tokens, rows)), shape=shape).tocsr()

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        return 2.0 * len(self.mean)


def coded_keys(keys: np.ndarray) -> tuple[QuantisedArray, QuantisedArray]:
    """Increasing keys [r] as token increments, and as codes that start anew with each token."""
    tokens, codes = keys // SPAN, keys % SPAN
    increments = np.diff(tokens, prepend=-1)
    same = increments == 0
    codes = codes - np.where(same, np.concatenate([[0], codes[:-1]])[: len(codes)], 0)
    return QuantisedArray.from_integers(increments), QuantisedArray.from_integers(codes)


def decoded_keys(increments: QuantisedArray, codes: QuantisedArray) -> np.ndarray:
    """The keys [r]. **Raises:** `MessageError` unless they increase and lie within the format."""
    step = increments.integers("the array of token increments", 0, LARGEST_TOKEN + 1, 1)[:, 0]
    code = codes.integers("the array of preceding tokens", 0, SPAN - 1, 1)[:, 0]
    # No sum of so few terms below 2^32 overflows 63 bits.
    tokens, running = np.cumsum(step) - 1, np.cumsum(code)
    starts = np.flatnonzero(step > 0)
    if len(step) and step[0] == 0:
        raise MessageError("'token-pairs': the first row belongs to no token")
    base = np.repeat(running[starts] - code[starts], np.diff(np.append(starts, len(step))))
    within = running - base
    if len(step) and (tokens[-1] > LARGEST_TOKEN or within.max() >= SPAN):
        raise MessageError(f"'token-pairs': token ids beyond {LARGEST_TOKEN}; there are none")
    keys = tokens * SPAN + within
    if not (np.diff(keys) > 0).all():
        raise MessageError("'token-pairs': rows have to increase, by token and then by what precedes it")
    return keys


@dataclass(frozen=True)
class TokenPairsExplanation:
    """Rows [r, d] by increasing `keys` [r], tokens' own among them; used with `frequency` [r]."""

    mean: np.ndarray
    keys: np.ndarray
    rows: np.ndarray
    frequency: np.ndarray
    name: str = KIND
    kind: str = KIND
    knobs: Mapping[str, Sequence[float]] = field(default_factory=lambda: {"static": STATIC_KNOB})

    @cached_property
    def prediction(self) -> np.ndarray | None:
        """Of columns from those before them; it does not depend on the settings."""
        return predict_columns(self.rows)

    def section(self, settings: Settings) -> Section:
        """The mean, and every row that is worth its bits."""
        rows = metric_rows(self.rows, self.frequency, settings, self.prediction, frequency=self.frequency)
        kept = np.flatnonzero(np.any(rows.symbols, axis=1))
        stated = self._stated(rows, kept, settings)
        worth = self._gain(rows, kept, settings) > encode_message([stated]).part_bits[0]
        return self._stated(rows, kept[worth], settings)

    def _stated(self, rows: QuantisedArray, kept: np.ndarray, settings: Settings) -> Section:
        mean = QuantisedArray.from_values(self.mean, settings.static_step(1.0))
        return Section(self.kind, (mean,), (*coded_keys(self.keys[kept]), rows.rows(kept)))

    def _gain(self, rows: QuantisedArray, kept: np.ndarray, settings: Settings) -> np.ndarray:
        """Bits that each row saves the residual coder by the rule that its own step follows: what it takes off the
        squared error, in squares of that step."""
        step = settings.metric_step(self.frequency, self.frequency)[kept]
        before, left = self.rows[kept], self.rows[kept] - rows.values()[kept]
        energies = [np.square(e @ settings.root).sum(1) for e in (before, left)]
        return BITS_PER_SQUARE * (energies[0] - energies[1]) / np.square(step)

    def encode(self, decoder: TokenPairsDecoder, sample: Sample, settings: Settings) -> NoState:
        return NoState(sample.inputs.n_tokens)


@dataclass(frozen=True)
class TokenPairs:
    """A vector for each token id, and one for each pair of neighbours that fit data hold `count` times or more."""

    count: int = DEFAULT_COUNT

    def fit(self, task: Task) -> TokenPairsExplanation:
        """**Raises:** `ExplanationError` for a count below 1, or where there are no token ids."""
        check_tokens(task.region.output, "token-pairs")
        if self.count < 1:
            raise ExplanationError(f"token-pairs: count = {self.count}; a pair is seen once at least")
        inputs, outputs = task.fit.inputs, task.fit.outputs
        keys, pair, counts, own, owner = numbered_pairs(inputs)
        mean, token_rows, pair_rows = nested_effects(outputs, owner, pair)
        often = counts >= self.count
        every = np.concatenate([own * SPAN + OWN, keys[often]])
        rows = np.concatenate([token_rows, pair_rows[often]])
        uses = np.concatenate([np.bincount(owner, counts), counts[often]]) / inputs.n_tokens
        order = np.argsort(every)
        name = KIND if self.count == DEFAULT_COUNT else f"{KIND}, {self.count} or more"
        return TokenPairsExplanation(mean, every[order], rows[order], uses[order], name)
