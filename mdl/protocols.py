"""The nouns that a plug-in author meets.

A *decomposition* is fitted to a task and gives an *explanation*, which is the sender's side: it can state itself as a
section of a message, and turn activations into state symbols. A *decoder* is the receiver's side: rebuilt from the
section alone, it predicts the region's outputs from the inputs and the state. The scorer only ever evaluates what the
decoder returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse

from mdl.alphabets import Alphabet
from mdl.message import Section
from mdl.state import Context, State

if TYPE_CHECKING:
    from mdl.models.networks import Network
    from mdl.task import Task


@dataclass(frozen=True)
class Inputs:
    """What the receiver can compute at the region's input boundary.

    **Arguments:** `tokens` [sequences, positions]: token ids; `scored` [sequences, positions]: the positions that are
    explained (special tokens are replaced by a constant, charged once); `values`
    [sequences, positions, width]: activations that enter the region, or None where the input is the token ids alone
    (for a model with tied embeddings: the token's embedding, which the receiver knows); `network`: the region's
    architecture, without any weight, where it has one that is known.
    """

    tokens: np.ndarray
    scored: np.ndarray
    values: np.ndarray | None = None
    network: Network | None = None

    @property
    def n_tokens(self) -> int:
        """Number of scored tokens n."""
        return int(self.scored.sum())

    def scored_tokens(self) -> np.ndarray:
        """Token ids of the scored positions, [n], in stream order."""
        return self.tokens[self.scored]

    def numbers(self) -> np.ndarray:
        """The number of each scored position in stream order, [sequences, positions]; -1 elsewhere."""
        index = np.full(self.tokens.shape, -1)
        index[self.scored] = np.arange(self.n_tokens)
        return index

    def context(self) -> Context:
        """What the receiver knows of each scored token while it reads the state's symbols."""
        index = self.numbers()
        previous = np.concatenate([np.full((len(index), 1), -1), index[:, :-1]], 1)
        return Context(self.scored_tokens(), previous[self.scored])

    def scored_values(self) -> np.ndarray:
        """Region inputs at the scored positions, [n, width]. The region must have them (see `values`)."""
        if self.values is None:
            raise ValueError("this region's input is token ids alone")
        return self.values[self.scored]


@dataclass(frozen=True)
class Sample:
    """Inputs of some sequences, and M's own outputs of the region at the scored positions, `outputs` [n, d]."""

    inputs: Inputs
    outputs: np.ndarray


@dataclass(frozen=True)
class Settings:
    """What the sender's choices of precision depend on. None of it is known to the receiver unless it is sent.

    **Arguments:** `horizon`: N, the declared exchange rate between static and per-token bits; `step`: the residual
    coder's step, in the metric; `root` [d, d]: G^(1/2) of the metric in force (errors are measured as
    |root @ error|); `knobs`: the values chosen for the explanation's own knobs; `corrected`: whether a residual coder
    mends the prediction, or its KL is left as it is (behaviour).
    """

    horizon: float
    step: float
    root: np.ndarray
    knobs: Mapping[str, float] = field(default_factory=dict)
    corrected: bool = True

    def metric_step(self, energy: np.ndarray | float, frequency: np.ndarray | float = 1.0) -> np.ndarray:
        r"""The step, in the metric, of a static row that is used with coefficient c, `energy` = E[c^2] a token.

        $$s = p \, \Delta / \sqrt{n \, E[c^2]}, \quad n = N / (1 - (1 - f)^N)$$, with f the row's `frequency` of use:
        a row is paid for with probability 1 - (1 - f)^N, so that what is paid is used more often than N alone says. All
        directions are worth one step there; `static_step` is this for rows that are rounded number by number.
        """
        scale = self.knobs.get("static", 1.0) * self.step
        never = np.log1p(-np.clip(frequency, 1e-12, 1.0 - 1e-12)) * self.horizon
        tokens = self.horizon / -np.expm1(never)
        return np.asarray(scale / np.sqrt(tokens * np.maximum(energy, 1e-12)))

    def static_step(self, energy: np.ndarray | float, frequency: np.ndarray | float = 1.0) -> np.ndarray:
        r"""Quantiser step for the entries of a static row that is used with coefficient c, `energy` = E[c^2] a token.

        $$s = p \, \Delta / \sqrt{n \, E[c^2] \, \bar g}$$, with n of `metric_step` and $\bar g = tr(G)/d$: the optimal
        two-part step $\sqrt{12/(n h)}$ for the Fisher information h = 12 E[c^2] g / Delta^2 that the error's share of
        the distortion Delta^2/12 implies. The knob `static` is p, 1 by default: what a later residual coder can mend
        may be coarser.
        """
        return np.asarray(self.metric_step(energy, frequency) / np.sqrt(np.sum(self.root**2) / len(self.root)))


@runtime_checkable
class Decoder(Protocol):
    """The receiver's side of an explanation. Built by a class method `from_section(section)` and nothing else.

    A function of the section, and of inputs and state up to each token: repeatable, causal, the same in any batch. That
    is checked (`estimators.conduct`) of every decoder that does not come with this package; its source is charged.
    """

    @classmethod
    def from_section(cls, section: Section) -> Decoder:
        """Rebuild from the decoded section. **Raises:** `MessageError` if the arrays do not fit together."""
        ...

    @property
    def alphabet(self) -> Alphabet:
        """What symbols it is told, of `mdl.alphabets`."""
        ...

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]."""
        ...

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        """Which parts each token needs, [n, n_parts]; None if every token needs every part."""
        ...

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        """Floating-point operations a token of `predict` (a multiply-add is two)."""
        ...


@runtime_checkable
class AdditiveDecoder(Decoder, Protocol):
    """A decoder that may say which sum its prediction is; what others' formulas are worked out from."""

    def terms(self, state: State) -> tuple[scipy.sparse.csr_array, np.ndarray]:
        """Coefficients [n, parts], stored where symbols are not zero, and rows [parts, d].

        The prediction is coefficients @ rows and what does not depend on which parts are on.
        """
        ...


@runtime_checkable
class Explanation(Protocol):
    """The sender's side of an explanation of one region.

    `name` is what tables show; `kind` names the decoder (an entry point of the group `mdl.decoders`); `knobs` gives for
    each knob its grid of values, from fine to coarse, out of which the scorer chooses for the shortest total. It begins
    in the middle of each grid, or where an attribute `start`, if there is one, says by the knob's name.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def knobs(self) -> Mapping[str, Sequence[float]]: ...

    def section(self, settings: Settings) -> Section:
        """The explanation, quantised for these settings: what is sent once."""
        ...

    def encode(self, decoder: Any, sample: Sample, settings: Settings) -> State:
        """The state symbols for a sample. The decoder is the one that was rebuilt from the message."""
        ...


@runtime_checkable
class Decomposition(Protocol):
    """A way to explain a region: options are its dataclass fields, `fit` gives the explanation.

    `fit` sees the task without its held-out data.
    """

    def fit(self, task: Task) -> Explanation: ...
