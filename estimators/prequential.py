"""Prequential estimate of total(N): each block is coded under what was learnt from the blocks before; nothing is sent.

    L(N) = sum over blocks b of L(outputs of b | inputs; explanation and residual coder refitted on blocks before b)

Blocks are of 1, 1, 2, 4, 8, ... sequences, in a seeded random order. What both ends learn from are inputs and
*reconstructions*, for the receiver has no others. What is sent beside symbols is a step for each block, so that every
block meets the fidelity, and so does every prefix. The explanation's static column is empty: it is paid for by
the bits that blocks cost too much before it was learnt.

Sources: Dawid 1984 (J. R. Stat. Soc. A 147(2)); Rissanen 1984 (IEEE Trans. Inf. Theory 30(4)); for networks, Blier and
Ollivier 2018 (arXiv:1802.07044).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from estimators.fidelity import Bench, Split
from estimators.fisher import Metric
from estimators.meeting import meet
from estimators.primed import CODE_BITS, carried_bits, primed_bits
from estimators.relearning import (
    BlockCode,
    Past,
    exponent_of,
    first_code,
    joined,
    learnt_metric,
    metric_scale,
    next_code,
    step_of,
)
from mdl.codes.integers import signed_count_bits
from mdl.message import encode_message
from mdl.protocols import Decomposition
from mdl.receiver import special_section
from mdl.state import DenseState, State
from mdl.task import Activations
from mdl.transform_coding import fit_quantiser
from mdl.units import bits_to_nats

TOLERANCE = 0.08  # of a block's KL; the rest is made good along the slope of the rate
PRIME_TOKENS = 16384  # the latest tokens that adaptive codes have seen before a block
OBTAINED = "codelength"
SOME_SHARE = 0.3  # of the outputs' root mean square: the step to begin with
SPECIAL_SHARE = 0.25  # of the first step: that of the constants at special positions


@dataclass(frozen=True)
class Block:
    """One block's bits: `header` (steps; special positions in the first), `state` and `residual` at exactly eps.

    `correction`: the part of `residual`, in bits, that moves it from the measured `kl` to eps along the slope of the
    rate. `step`: the residual coder's; `tokens` scored.
    """

    tokens: int
    header: float
    state: float
    residual: float
    correction: float
    kl: float
    step: float

    @property
    def bits(self) -> float:
        return self.header + self.state + self.residual


@dataclass(frozen=True)
class Prequential:
    """The blocks of one order of the data, all at a KL of `eps` bits a token."""

    name: str
    eps: float
    blocks: tuple[Block, ...]

    def total(self, n: float) -> float:
        """Bits of the first `n` tokens, linear inside a block. **Raises:** ValueError beyond the data."""
        ends = np.cumsum([0, *(b.tokens for b in self.blocks)])
        if not 0 <= n <= ends[-1]:
            raise ValueError(f"a total of {n:g} tokens is asked for; the blocks hold {ends[-1]}")
        return float(np.interp(n, ends, np.cumsum([0.0, *(b.bits for b in self.blocks)])))


@dataclass(frozen=True)
class Stream:
    """All the data of a task in one order, cut into blocks, with what evaluations on them need.

    Made once by `of` and shared by all explanations; `bench` holds metrics and kernels.
    """

    bench: Bench
    splits: tuple[Split, ...]

    @classmethod
    def of(cls, bench: Bench, seed: int, sequences: int | None = None) -> Stream:
        """Fit, tuning and held-out data together, in the order of a seed; at most so many sequences."""
        task = bench.task
        pool = joined([p for p in (task.fit_activations, task.tune_activations, task.held_out) if p is not None])
        order = np.random.default_rng(seed).permutation(len(pool.tokens))[:sequences]
        edges = block_edges(len(order))
        parts = [pool.some(order[a:b]) for a, b in pairwise(edges)]
        return cls(bench, tuple(Split.of(bench.evaluator, part) for part in parts))


def block_edges(sequences: int) -> list[int]:
    """0, 1, 2, 4, 8, ... up to all."""
    edges = [0]
    while edges[-1] < sequences:
        edges.append(min(max(1, 2 * edges[-1]), sequences))
    return edges


@dataclass(frozen=True)
class _Trial:
    """A block at one step."""

    exponent: int
    codes: np.ndarray
    values: np.ndarray
    kl: float

    @property
    def step(self) -> float:
        return step_of(self.exponent)


@dataclass(frozen=True)
class _Sender:
    """One block to be sent, under the code that both ends have."""

    bench: Bench
    split: Split
    code: BlockCode
    special: np.ndarray

    @cached_property
    def state(self) -> State:
        return self.code.encode(self.split.sample)

    @cached_property
    def prediction(self) -> np.ndarray:
        return self.code.predict(self.split.sample.inputs, self.state)

    @cached_property
    def coordinates(self) -> np.ndarray:
        return self.code.axes.transform(self.split.sample.outputs - self.prediction)

    def coded(self, step: float) -> tuple[int, np.ndarray, np.ndarray]:
        """Exponent, symbols and reconstruction. Thresholds are the sender's own, from the block itself."""
        exponent = exponent_of(step)
        rule = fit_quantiser(self.coordinates, step_of(exponent))
        codes = rule.quantise(self.coordinates).astype(np.int64)
        return exponent, codes, self.code.corrected(self.prediction, codes, step_of(exponent))

    def trial(self, step: float) -> _Trial:
        exponent, codes, values = self.coded(step)
        damage = self.bench.measure(self.split, values, self.special)
        return _Trial(exponent, codes, values, float(damage.kl_bits.mean()))

    def first_step(self, metric: Metric, eps: float) -> float:
        """A step whose second-order distortion is eps, to begin with; by halving on the logarithm, no model run."""
        low, high = 1e-6, float(np.abs(self.coordinates).max()) + 1e-6
        for _ in range(16):
            middle = math.sqrt(low * high)
            left = self.split.sample.outputs - self.coded(middle)[2]
            low, high = (middle, high) if metric.distortion(left) / 2 < bits_to_nats(eps) else (low, middle)
        return low


def prequential(
    stream: Stream,
    decomposition: Decomposition,
    eps: float,
    knobs: Mapping[str, float],
    progress: Callable[[str, int, int], object] | None = None,
) -> Prequential:
    """Code all blocks of a stream, each under `decomposition` refitted on the reconstructions of those before.

    **Arguments:** `eps`: the KL of every block, bits a token; `knobs`: the explanation's knobs for values, agreed once
    (those for static precision do not matter: nothing static is sent). **Returns:** exact lengths of named codes;
    nothing was written out.
    """
    bench, blocks = stream.bench, []
    past: Past | None = None
    metric: Metric | None = None
    name = ""
    for index, split in enumerate(stream.splits):
        if progress is not None:
            progress(name or type(decomposition).__name__, index, len(stream.splits))
        if past is None:
            block, past = _first_block(bench, split, eps)
        else:
            metric = learnt_metric(bench, past, metric)
            sender, block, past = _next_block(bench, split, eps, past, metric, decomposition, dict(knobs))
            assert sender.code.explanation is not None
            name = sender.code.explanation.name
        blocks.append(block)
    return Prequential(name, eps, tuple(blocks))


def _special(bench: Bench, split: Split, width: int) -> np.ndarray:
    """Mean outputs at the special positions of the first block, [ids, d]."""
    activations = split.activations
    rows = [activations.outputs[activations.tokens == i].reshape(-1, width) for i in bench.special[0]]
    return np.array([r.mean(0, dtype=np.float64) if len(r) else np.zeros(width) for r in rows]).reshape(-1, width)


def _first_block(bench: Bench, split: Split, eps: float) -> tuple[Block, Past]:
    """Under a code that needs nothing learnt; the constants of special positions are sent with it."""
    width = bench.task.width
    exact = _special(bench, split, width)
    spread = float(np.sqrt(np.mean(np.square(split.sample.outputs))))
    sender = _Sender(bench, split, first_code(width), exact)
    trial = meet(sender.trial, SOME_SHARE * spread, eps, TOLERANCE)[-1]
    header, kept = signed_count_bits(trial.exponent), exact
    if len(exact):
        section = special_section(exact, trial.step * SPECIAL_SHARE)
        header, kept = header + encode_message([section]).whole_bits, section.header[0].values()
    residual = primed_bits(DenseState(trial.codes), split.sample.inputs.context(), None, None)
    nothing = np.zeros((0, width))
    past = Past(_received(sender, trial.values, kept), nothing, nothing.astype(np.int64), trial.exponent)
    return _block(split, header, 0.0, residual, trial, eps), past


def _next_block(
    bench: Bench,
    split: Split,
    eps: float,
    past: Past,
    metric: Metric,
    decomposition: Decomposition,
    knobs: dict[str, float],
) -> tuple[_Sender, Block, Past]:
    """Refit, encode, meet the fidelity, price; and what both ends have then."""
    special = [past.known.outputs[past.known.tokens == i][0] for i in bench.special[0]]
    begins = past.exponent if len(past.errors) else exponent_of(step_of(past.exponent) * metric_scale(metric))
    code = next_code(past, bench.task, decomposition, metric, knobs, step_of(begins))
    sender = _Sender(bench, split, code, np.array(special).reshape(len(special), bench.task.width))
    guess = step_of(begins) if len(past.errors) else sender.first_step(metric, eps)
    trial = meet(sender.trial, guess, eps, TOLERANCE)[-1]
    block = _block(split, signed_count_bits(trial.exponent - begins), *_lengths(sender, trial, past), trial, eps)
    known = joined([past.known, _received(sender, trial.values, sender.special)])
    errors = np.concatenate([past.errors, trial.values - sender.prediction])
    return sender, block, Past(known, errors, np.concatenate([past.codes, trial.codes]), trial.exponent)


def _received(sender: _Sender, values: np.ndarray, special: np.ndarray) -> Activations:
    """A block's sequences as the receiver has them: reconstructions in place of outputs."""
    activations = sender.split.activations
    constants = dict(zip(sender.bench.special[0], special, strict=True))
    return replace(activations, outputs=activations.filled(values, constants))


def _lengths(sender: _Sender, trial: _Trial, past: Past) -> tuple[float, float]:
    """State and residual, each under the shortest of what both ends could do with the past.

    The state behind the past as the new explanation encodes it; the residual behind old errors on the new axes, or its
    columns behind the columns as they were sent, by rank.
    """
    context, codes = sender.split.sample.inputs.context(), DenseState(trial.codes)
    seen = past.latest(PRIME_TOKENS)
    known = None if seen is None else seen.inputs.context()
    state = primed_bits(sender.state, context, None if seen is None else sender.code.encode(seen), known)
    seen = past.latest(min(PRIME_TOKENS, len(past.errors)))
    if seen is None:
        return state, primed_bits(codes, context, None, None)
    n = seen.inputs.n_tokens
    old = DenseState(sender.code.on_axes(past.errors[-n:], trial.step))
    carried = carried_bits(trial.codes, past.codes[-PRIME_TOKENS:]) + CODE_BITS
    return state, min(primed_bits(codes, context, old, seen.inputs.context()), carried) + 1.0


def _block(split: Split, header: float, state: float, residual: float, trial: _Trial, eps: float) -> Block:
    """With the residual moved to eps: half a bit for each non-zero symbol and factor of two in KL, as at high rate."""
    slope = np.count_nonzero(trial.codes) / (2.0 * math.log(2.0))
    correction = slope * math.log(max(trial.kl, 1e-30) / eps)
    tokens = split.activations.n_tokens
    return Block(tokens, header, state, residual + correction, correction, trial.kl, trial.step)
