"""Components of weights with gates, as an explanation: the sender's side.

Parts may come from anybody (`Factors`, a safetensors file) or from the weights themselves
(`decompositions.weights.parts`). What they lack of the weights is worked out here, and either dropped or sent, never
assumed away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from decompositions.baselines import STATIC_KNOB
from decompositions.weights.curvature import MeasuredCurvature, leading
from decompositions.weights.factors import Factors
from decompositions.weights.gated import KIND, MODES, GatedDecoder
from decompositions.weights.packing import Packing
from decompositions.weights.parts import KINDS
from decompositions.weights.selection import Selector
from decompositions.weights.usage import Usage, activations, importances
from mdl.errors import ExplanationError
from mdl.message import Section
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import NoState, SparseState, State
from mdl.task import Task

GATE_KNOB = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # above which a gate counts as open, for index lists
GATE_STEPS = (2.0**-7, 2.0**-6, 2.0**-5, 2.0**-4, 2.0**-3, 2.0**-2)  # of a gate's weights, in their spread
USAGE_TOKENS = 4096
SEARCH_COMPONENTS = 512  # without gates, the sender tries all of them on every token
EXACT = 1e-3  # of |W|: a sum within it is exact
FIRST_SHARE = 0.001  # of the outputs' variance: the error at which the first look at the components' use is taken
FIRST_PRICE = 0.5  # bits a component there: those that are any use are
# Bits of the residual coder for each bit of 1/2 log2(1 + (u / Delta)^2): on toys, where most outputs are zero, its
# symbols cost four to eight times as much, as measured.
EFFORT = 6.0


@dataclass(frozen=True)
class Components:
    """A decomposition of a region's weights into components, gated.

    **Arguments:** `path`: a safetensors file (`Factors`), or `parts`: one of whole, singular, columns, neurons, random,
    or `object`: `Factors`; `gates`: "indices" (the sender lists the components that are on, for each token), "program"
    (the file's gates run at the receiver's), "static" (all are on); `leftover`: what the components lack of the
    weights is dropped or sent; `exact`: refuse components that do not sum to the weights; `name`: what tables show.
    """

    path: str = ""
    parts: str = ""
    object: Any = field(default=None, repr=False)
    gates: Literal["indices", "program", "static"] = "indices"
    leftover: Literal["drop", "send"] = "drop"
    exact: bool = False
    name: str = ""

    def fit(self, task: Task) -> ComponentsExplanation:
        """**Raises:** `ExplanationError` for parts that do not fit the region's matrices, that claim to sum to them and
        do not, or whose gates cannot do what is asked; `TaskError` for a region whose weights are not known."""
        curvature = MeasuredCurvature.of(task)
        factors = self._factors(curvature)
        factors.check(curvature.network)
        shares = _lacking(factors, curvature.weights)
        if self.exact and max(shares.values()) > EXACT:
            worst = max(shares, key=lambda name: shares[name])
            raise ExplanationError(
                f"{factors.name}: the components are said to sum to the weights, but {worst} lacks "
                f"{100 * shares[worst]:.2g} % of its norm (at most {100 * EXACT:g} %). Send what is left over "
                "(leftover=send), or do not claim it (exact=false)."
            )
        if self.gates == "program" and not factors.gated:
            raise ExplanationError(f"{factors.name} comes without gates: gates=program has nothing to run")
        if self.gates == "program" and (several := _of_several_terms(factors)):
            raise ExplanationError(
                f"{factors.name}: components {several[:5]} have several terms in one matrix. With gates=program each "
                "has one, whose gate reads its V: number them one by one, or take gates=indices."
            )
        searched = self.gates == "indices" and not factors.gated
        if searched and (task.fit.inputs.tokens.shape[1] > 1 or factors.n_components > SEARCH_COMPONENTS):
            raise ExplanationError(
                f"{factors.name}: without gates the sender tries every component on every token, which takes inputs "
                f"without sequences and at most {SEARCH_COMPONENTS} components, here {factors.n_components}: give gates"
            )
        name = self.name or factors.name + ("" if self.gates == "indices" else f" ({self.gates})")
        note = f"components lack {100 * max(shares.values()):.2g} % of the norm of a matrix; {self.leftover}"
        notes = (*factors.notes, note) if max(shares.values()) > EXACT else factors.notes
        some = replace(curvature, inputs=leading(curvature.inputs, USAGE_TOKENS))
        outputs = task.fit.outputs[: some.inputs.n_tokens]
        return ComponentsExplanation(name, factors, some, self.gates, self.leftover == "send", outputs, notes)

    def _factors(self, curvature: MeasuredCurvature) -> Factors:
        given = [bool(self.path), bool(self.parts), self.object is not None]
        if sum(given) != 1:
            raise ExplanationError(
                f"components are given by path, as parts, or as an object; got path={self.path!r}, "
                f"parts={self.parts!r}, object={type(self.object).__name__}"
            )
        if self.path:
            return Factors.load(Path(self.path))
        if self.parts:
            if self.parts not in KINDS:
                raise ExplanationError(f"no parts {self.parts!r}: there are {', '.join(KINDS)}")
            return KINDS[self.parts](curvature.network, curvature.weights)
        if not isinstance(self.object, Factors):
            raise ExplanationError(f"components are given as Factors, not as {type(self.object).__name__}")
        return self.object


def _lacking(factors: Factors, weights: Mapping[str, np.ndarray]) -> dict[str, float]:
    """|W - sum| / |W| of every decomposed matrix."""
    left = factors.leftover(weights)
    return {name: _norm(a) / max(_norm(weights[name]), 1e-30) for name, a in left.items()}


def _of_several_terms(factors: Factors) -> list[int]:
    """Components with more than one subcomponent in a matrix."""
    counts = [np.bincount(t.component, minlength=factors.n_components) for t in factors.tensors.values()]
    return [int(c) for c in np.flatnonzero(np.max(counts, 0) > 1)]


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array))


@dataclass(frozen=True)
class ComponentsExplanation:
    """`gates`: of MODES; `rest`: whether what the components lack is sent; `outputs`: the region's, of the sample on
    which use is measured."""

    name: str
    factors: Factors
    curvature: MeasuredCurvature
    gates: str
    rest: bool
    outputs: np.ndarray = field(repr=False)
    notes: tuple[str, ...] = ()
    kind: str = KIND
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def knobs(self) -> Mapping[str, Sequence[float]]:
        if self.gates == "program":
            return {"static": STATIC_KNOB, "gates": GATE_STEPS}
        if self.gates == "indices" and self.factors.gated:
            return {"static": STATIC_KNOB, "gate": GATE_KNOB}
        return {"static": STATIC_KNOB}

    def section(self, settings: Settings) -> Section:
        """The components, each a part, and what every token needs; the latest is kept, for `encode`."""
        if (known := self.known.get("section")) is None or known[0] is not settings:
            self.known["section"] = known = (settings, self._packing(settings).section(settings))
        found: Section = known[1]
        return found

    def encode(self, decoder: GatedDecoder, sample: Sample, settings: Settings) -> State:
        """Which components each token has on."""
        if self.gates != "indices":
            return NoState(sample.inputs.n_tokens)
        if self.factors.gated:
            on = self._importances(sample.inputs) > settings.knobs["gate"]
        else:
            start = self._first_choice(sample.inputs, sample.outputs)
            on = self._selector(decoder, settings).choose(sample.inputs, sample.outputs, start)
        tokens, features = np.nonzero(on)
        ones, classes = np.ones(len(tokens), np.int64), np.zeros(on.shape[1], np.int64)
        return SparseState(tokens, features, ones, classes, len(on), signed=False)

    def _selector(self, decoder: GatedDecoder, settings: Settings) -> Selector:
        packing = self._packing(settings)
        network, prices = packing.network, packing.prices(settings, self.section(settings))
        if not settings.corrected:
            return Selector(network, *decoder.weights(network), settings.root, None, prices)
        return Selector(network, *decoder.weights(network), settings.root, settings.step, prices / EFFORT)

    def _packing(self, settings: Settings) -> Packing:
        curvature = self.curvature.under(settings.root)
        mode, network = MODES.index(self.gates), self.curvature.network
        return Packing(network, self.curvature.weights, self.factors, curvature, self._usage(settings), mode, self.rest)

    def _usage(self, settings: Settings) -> Usage:
        """How components are used where the settings' gates open them."""
        key = settings.knobs.get("gate") if self.gates == "indices" and self.factors.gated else None
        if ("usage", key) not in self.known:
            seen = self._once("seen", lambda: activations(*self._network(), self.curvature.inputs))
            self.known["usage", key] = Usage.of(self.factors, seen, self._masks(key))
        found: Usage = self.known["usage", key]
        return found

    def _masks(self, gate: float | None) -> np.ndarray:
        """[n, C] on the sample that use is measured on."""
        inputs = self.curvature.inputs
        if self.gates == "static":
            return np.ones((inputs.n_tokens, self.factors.n_components), np.float32)
        if self.factors.gated:
            opened = self._importances(inputs)
            return opened if gate is None else (opened > gate).astype(np.float32)
        return self._first_choice(inputs, self.outputs).astype(np.float32)

    def _first_choice(self, inputs: Inputs, outputs: np.ndarray) -> np.ndarray:
        """What each token needs for an error of FIRST_SHARE of the outputs' variance, components unrounded, [n, C]."""
        return self._of_sample("chosen", inputs, lambda: self._chosen(inputs, outputs))

    def _chosen(self, inputs: Inputs, outputs: np.ndarray) -> np.ndarray:
        spread = self.outputs - self.outputs.mean(0)
        step = float(np.sqrt(12.0 * FIRST_SHARE * np.mean(np.square(spread)))) + 1e-12
        width = outputs.shape[1]
        matrices, others = Packing.unrounded(self.curvature.network, self.curvature.weights, self.factors, self.rest)
        prices = np.full(self.factors.n_components, FIRST_PRICE)
        selector = Selector(self.curvature.network, matrices, others, np.eye(width), step, prices)
        return selector.choose(inputs, outputs)

    def _importances(self, inputs: Inputs) -> np.ndarray:
        """Gates on the model's own activations, [n, C]."""
        seen = partial(activations, *self._network(), inputs)
        return self._of_sample("importances", inputs, lambda: importances(self.factors, seen()))

    def _of_sample(self, key: str, inputs: Inputs, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What does not depend on the settings, of the latest samples; a sample is known by its inputs' identity."""
        held: list[tuple[Inputs, np.ndarray]] = self._once(key, list)
        for known, values in held:
            if known is inputs:
                return values
        values = make()
        held[:] = [*held[-5:], (inputs, values)]
        return values

    def _network(self) -> tuple[Any, Any]:
        return self.curvature.network, self.curvature.weights

    def _once(self, key: str, make: Any) -> Any:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]
