"""Block-sparse features: groups of a few atoms that are on together; which, and a dense code within each.

    prediction = bias + sum over active groups g, i < b of q_tgi * row_gi

A group spans a small subspace, in which the sender chooses the basis: orthonormal in the metric in force, along the
principal axes of its code, so that all rows share one step and the first coordinates carry most. A part is a group, its
b rows together. The state is the support over groups, and then b integers for each active group, those of a token put
in the order of the groups' ranks (loudest first), so that a column of integers holds like with like.

Source: block-sparse featurizers, arXiv:2606.25234. The values of a support are least squares in the metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import scipy.sparse

from decompositions.block_sparse_training import Blocks, Schedule, encode_groups, train
from decompositions.dictionary import Remembered
from mdl.alphabets import DenseAlphabet, JoinedAlphabet, SparseAlphabet
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section
from mdl.protocols import Inputs, Sample, Settings
from mdl.state import DenseState, JoinedState, SparseState, State
from mdl.static_rows import metric_rows, predict_columns
from mdl.task import Task

KIND = "block-sparse"
MOST_GROUPS = 1 << 24
MOST_ACTIVE = 256
CHUNK = 2048  # tokens whose least-squares problems are solved at a time
RIDGE = 1e-3  # of a row's own energy: groups that overlap share what both explain
MEASURED_TOKENS = 8192  # of the fit data, on which bases and frequencies are measured
KNOBS: Mapping[str, Sequence[float]] = {
    "static": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    "value": (0.7, 1.0, 1.4, 2.0, 3.0, 4.5, 7.0, 10.0),
}


def slots_of(support: SparseState, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, groups and, for each of these entries, its place among its token's groups by rank."""
    order = np.lexsort((ranks[support.features], support.tokens))
    tokens, groups = support.tokens[order], support.features[order]
    starts = np.searchsorted(tokens, tokens)
    return tokens, groups, np.arange(len(tokens)) - starts


@dataclass(frozen=True)
class BlockSparseDecoder:
    """Rows of every group [G, b, d], a bias [d], the groups' `ranks` [G], and how many groups a token has at most."""

    bias: np.ndarray
    rows: np.ndarray
    ranks: np.ndarray
    active: int

    @classmethod
    def from_section(cls, section: Section) -> BlockSparseDecoder:
        """Header: bias [1, d], most active groups [1, 1]. Parts: ranks [G, 1], then the first, second ... row of each
        group [G, d]. **Raises:** `MessageError` if the arrays do not fit together."""
        if len(section.header) != 2 or len(section.parts) < 2 or len(section.header[1].symbols) != 1:
            counts = f"{len(section.header)} header and {len(section.parts)} part arrays"
            raise MessageError(
                f"a 'block-sparse' section has two header arrays and two of parts at least, not {counts}"
            )
        bias = section.header[0].vector("the bias of a 'block-sparse' section")
        active = int(section.header[1].integers("the number of active groups", 0, MOST_ACTIVE, 1)[0, 0])
        rows = [a.values() for a in section.parts[1:]]
        if any(r.shape != (section.n_parts, len(bias)) for r in rows):
            raise MessageError(f"'block-sparse': rows {[r.shape for r in rows]} do not fit a bias of {len(bias)}")
        ranks = section.parts[0].integers("the array of ranks", 0, MOST_GROUPS, 1)[:, 0]
        return cls(bias, np.stack(rows, 1), ranks, active)

    @property
    def size(self) -> int:
        """Rows b of a group."""
        return int(self.rows.shape[1])

    @property
    def alphabet(self) -> JoinedAlphabet:
        """Groups that are on (every value is 1), then `active` times b integers a token."""
        support = SparseAlphabet(np.zeros(len(self.rows), np.int64), signed=False)
        return JoinedAlphabet((support, DenseAlphabet(self.active * self.size, parts=False)))

    def coefficients(self, state: State) -> scipy.sparse.csr_array:
        """Integers of all rows [n, G b]. **Raises:** `MessageError` for a token with more groups than there is room."""
        support, values = _streams(state)
        tokens, groups, slots = slots_of(support, self.ranks)
        if slots.max(initial=-1) >= self.active:
            raise MessageError(
                f"'block-sparse': a token with {slots.max() + 1} groups; there are values for {self.active}"
            )
        place = slots[:, None] * self.size + np.arange(self.size)
        entries = values.values[tokens[:, None], place].astype(np.float32)
        columns = groups[:, None] * self.size + np.arange(self.size)
        where = (np.repeat(tokens, self.size), columns.ravel())
        shape = (state.n_tokens, len(self.rows) * self.size)
        return scipy.sparse.coo_array((entries.ravel(), where), shape=shape).tocsr()

    def predict(self, inputs: Inputs, state: State) -> np.ndarray:
        """The region's outputs at the scored positions, float32 [n, d]."""
        flat = self.rows.reshape(-1, len(self.bias))
        return np.asarray(self.coefficients(state) @ flat, np.float32) + self.bias

    def touched(self, inputs: Inputs, state: State) -> scipy.sparse.csr_array | None:
        """The groups that are on, [n, G]."""
        return _streams(state)[0].touched()

    def flops_per_token(self, inputs: Inputs, state: State) -> float:
        on = len(_streams(state)[0].values) / max(state.n_tokens, 1)
        return 2.0 * len(self.bias) * self.size * on


def _streams(state: State) -> tuple[SparseState, DenseState]:
    assert isinstance(state, JoinedState)
    support, values = state.streams
    assert isinstance(support, SparseState)
    assert isinstance(values, DenseState)
    return support, values


def least_squares(rows: np.ndarray, points: np.ndarray, chosen: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Coefficients [n, l, b] that bring points [n, d] nearest in the metric.

    **Arguments:** `rows` [G, b, d]; `chosen` [n, l]: each point's groups, -1 where there is none (coefficients zero).
    """
    size = rows.shape[1]
    flat = (rows.reshape(-1, rows.shape[2]) @ root).astype(np.float64)
    gram = flat @ flat.T
    found = np.zeros((*chosen.shape, size))
    for start in range(0, len(points), CHUNK):
        some = slice(start, start + CHUNK)
        absent = np.repeat(chosen[some] < 0, size, 1)
        index = (np.maximum(chosen[some], 0)[:, :, None] * size + np.arange(size)).reshape(len(absent), -1)
        goal = np.take_along_axis((points[some] @ root) @ flat.T, index, 1) * ~absent
        matrix = gram[index[:, :, None], index[:, None, :]] * ~(absent[:, :, None] | absent[:, None, :])
        own = np.arange(matrix.shape[1])
        matrix[:, own, own] += np.where(absent, 1.0, RIDGE * matrix[:, own, own] + 1e-12)
        found[some] = np.linalg.solve(matrix, goal[:, :, None])[:, :, 0].reshape(found[some].shape)
    return found


@dataclass(frozen=True)
class Bases:
    """Of each group in one metric: rows [G, b, d] orthonormal in it, E[y^2] a token of their coefficients [G, b], the
    share of tokens that it is on for [G], its rank, and each row array's prediction of columns."""

    rows: np.ndarray
    energy: np.ndarray
    frequency: np.ndarray
    ranks: np.ndarray
    predictions: tuple[np.ndarray | None, ...]

    @classmethod
    def of(cls, decoder: np.ndarray, points: np.ndarray, chosen: np.ndarray, root: np.ndarray) -> Bases:
        """From trained rows [G, b, d], and some centred points with their groups."""
        groups, size, _ = decoder.shape
        # decoder_g @ root = lower_g @ orthonormal_g
        orthonormal, _ = np.linalg.qr(np.swapaxes(decoder.astype(np.float64) @ root, 1, 2))
        inverse = np.linalg.inv(root)
        rows = np.swapaxes(orthonormal, 1, 2) @ inverse
        codes = least_squares(rows, points, chosen, root).reshape(-1, size)
        owner = chosen.ravel()
        outer = (codes[:, :, None] * codes[:, None, :]).reshape(len(codes), -1)
        select = scipy.sparse.csr_array((np.ones(len(owner)), owner, np.arange(len(owner) + 1)), (len(owner), groups))
        second = np.asarray(select.T @ outer).reshape(groups, size, size) / max(len(points), 1)
        variances, vectors = np.linalg.eigh(second)
        vectors, variances = vectors[:, :, ::-1], np.maximum(variances[:, ::-1], 0.0)
        turned = np.swapaxes(vectors, 1, 2) @ rows
        frequency = np.bincount(owner, minlength=groups) / max(len(points), 1)
        ranks = np.argsort(np.argsort(-variances[:, 0] / np.maximum(frequency, 1e-12), kind="stable"))
        predictions = tuple(predict_columns(turned[frequency > 0, i]) for i in range(size))
        return cls(turned, variances, frequency, ranks, predictions)


@dataclass(frozen=True)
class BlockSparseExplanation:
    """Trained blocks. `groups_of`: outputs [n, d] to the groups that are on, sparse [n, G]; `some` [n, d]: fit outputs
    on which the groups are measured."""

    decoder: np.ndarray
    bias: np.ndarray
    active: int
    groups_of: Remembered
    some: np.ndarray
    name: str
    kind: str = KIND
    knobs: Mapping[str, Sequence[float]] = field(default_factory=lambda: dict(KNOBS))
    # Bases of each metric met so far, by its identity, and what the latest settings send.
    known: dict[int, tuple[np.ndarray, Bases]] = field(default_factory=dict, compare=False, repr=False)
    rounded: dict[int, tuple[Settings, np.ndarray, tuple[QuantisedArray, ...]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def bases(self, root: np.ndarray) -> Bases:
        """The groups' bases in a metric."""
        known = self.known.get(id(root))
        if known is None or not np.array_equal(known[0], root):  # a copy of this object outlives the metrics it met
            found = Bases.of(self.decoder, self.some - self.bias, self._chosen(self.some), root)
            self.known[id(root)] = (root, found)
        return self.known[id(root)][1]

    def _chosen(self, outputs: np.ndarray) -> np.ndarray:
        """Each token's groups, [n, active]."""
        return self.groups_of(outputs).indices.reshape(len(outputs), self.active).astype(np.int64)

    def kept(self, settings: Settings) -> tuple[np.ndarray, tuple[QuantisedArray, ...]]:
        """The groups that are sent, and their rounded rows: those that are used, and do not round to zero."""
        known = self.rounded.get(id(settings))
        if known is None or known[0] is not settings:
            self.rounded.clear()
            self.rounded[id(settings)] = (settings, *self._rounded(settings))
        return self.rounded[id(settings)][1:]

    def _rounded(self, settings: Settings) -> tuple[np.ndarray, tuple[QuantisedArray, ...]]:
        bases, step = self.bases(settings.root), settings.step * settings.knobs.get("value", 1.0)
        used = np.flatnonzero(bases.frequency > 0)
        arrays = [
            metric_rows(
                step * bases.rows[used, i],
                np.maximum(bases.energy[used, i] / step**2, 1e-6),
                settings,
                prediction,
                frequency=bases.frequency[used],
            )
            for i, prediction in enumerate(bases.predictions)
        ]
        sent = np.flatnonzero(np.any([a.symbols.any(1) for a in arrays], axis=0))
        return used[sent], tuple(a.rows(sent) for a in arrays)

    def section(self, settings: Settings) -> Section:
        """Bias and the number of active groups once; of every group its rank and its rows."""
        kept, rows = self.kept(settings)
        bias = QuantisedArray.from_values(self.bias, settings.static_step(1.0))
        header = (bias, QuantisedArray.from_integers(np.array([[self.active]])))
        return Section(self.kind, header, (QuantisedArray.from_integers(self.bases(settings.root).ranks[kept]), *rows))

    def encode(self, decoder: BlockSparseDecoder, sample: Sample, settings: Settings) -> JoinedState:
        """Least squares on the decoded rows, rounded; groups whose integers are all zero are off."""
        kept = self.kept(settings)[0]
        place = np.full(len(self.decoder), -1)
        place[kept] = np.arange(len(kept))
        chosen = place[self._chosen(sample.outputs)]
        points = sample.outputs - decoder.bias
        exact = least_squares(decoder.rows, points, chosen, settings.root)
        return state_of(np.rint(exact).astype(np.int64), chosen, decoder)


def state_of(integers: np.ndarray, chosen: np.ndarray, decoder: BlockSparseDecoder) -> JoinedState:
    """Both streams, from the integers [n, l, b] of chosen groups [n, l] (-1: none)."""
    n, most, size = integers.shape
    on = integers.any(2) & (chosen >= 0)
    tokens, slots = np.nonzero(on)
    classes = np.zeros(len(decoder.rows), np.int64)
    marks = scipy.sparse.coo_array(
        (np.ones(len(tokens), np.int64), (tokens, chosen[tokens, slots])), shape=(n, len(classes))
    ).tocsr()
    support = SparseState.from_matrix(marks, classes, signed=False)
    # Active groups first, by rank; those that are off behind them.
    last = np.iinfo(np.int64).max
    keys = np.where(on, decoder.ranks[np.maximum(chosen, 0)] if len(classes) else last, last)
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(np.where(on[:, :, None], integers, 0), order[:, :, None], 1)
    return JoinedState((support, DenseState(ordered.reshape(n, most * size), parts=False)))


def groups_on(blocks: Blocks, mean: np.ndarray, outputs: np.ndarray) -> scipy.sparse.csr_array:
    """Which groups the trained encoder takes for outputs [n, d], [n, G] with as many ones in every row."""
    chosen = encode_groups(blocks, outputs - mean)
    ends = np.arange(len(chosen) + 1) * blocks.active
    return scipy.sparse.csr_array(
        (np.ones(chosen.size, np.float32), chosen.ravel(), ends), shape=(len(chosen), len(blocks.decoder))
    )


@dataclass(frozen=True)
class BlockSparse:
    """Groups of `size` atoms, `active` of them a token, trained on fit data for `steps` steps.

    `seed`: of the first atoms and of the batches.
    """

    groups: int = 384
    size: int = 4
    active: int = 8
    steps: int = 1000
    seed: int = 0

    def fit(self, task: Task) -> BlockSparseExplanation:
        """**Raises:** `ExplanationError` for options out of range."""
        most = min(self.groups, MOST_ACTIVE)
        if not 1 <= self.active <= most or not 1 <= self.size <= task.width or self.steps < 1 or self.seed < 0:
            raise ExplanationError(
                f"block-sparse: groups={self.groups}, size={self.size}, active={self.active}, steps={self.steps}, "
                f"seed={self.seed}; needed are 1 <= active <= groups, 1 <= size <= {task.width} (the width of "
                f"{task.region.output}), a step at least and a seed that is not negative"
            )
        outputs = np.asarray(task.fit.outputs)
        mean = outputs.mean(0, dtype=np.float64).astype(np.float32)
        blocks = train(outputs - mean, self.groups, self.size, self.active, Schedule(self.steps), self.seed)
        some = outputs[:: max(1, len(outputs) // MEASURED_TOKENS)]
        name = f"block-sparse ({self.groups} x {self.size}, l={self.active})"
        encoder = Remembered(partial(groups_on, blocks, mean))
        return BlockSparseExplanation(blocks.decoder, mean, self.active, encoder, some, name)
