"""A program as a transformer: heads and neurons of its operations in the layers where they can run.

An operation goes into the earliest layer behind all that it reads; one that heads compute into attention, others into
the MLP, a selector's width into both. Every head computes one operation; those of one layer's MLP lie side by side.

**Source:** Lindner et al. 2023, "Tracr", arXiv:2301.05062, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax.numpy as jnp
import numpy as np

from mdl.errors import ModelError
from mdl.models.compiled.language import (
    BOS,
    PAD,
    Aggregate,
    Indices,
    Program,
    SelectorWidth,
    Tokens,
    Value,
    dependencies,
    interpret,
)
from mdl.models.compiled.occurrence import Occurrence
from mdl.models.compiled.parts import ONE, START, Head, Neurons, Space, inverse_name, silent_at_start
from mdl.models.config import TransformerConfig
from mdl.models.model import Model, fingerprint_of
from mdl.models.transformer import Params

BETA = 10.0  # logit of the right answer; of numbers, by how much the next one is behind
SHARPNESS = 100.0


@dataclass(frozen=True)
class Compiled:
    """A program and the model that computes it.

    **Arguments:** `token_ids`: the model's number of each token, BOS is 0 and PAD is 1; `outputs`: the value that each
    logit stands for; `subspaces`: coordinates of each operation, by name; `components`: by the name of a source of the
    model's graph (`a0.h1`, `m2`) the operations that it computes; `sharpness`: as of `compile_program`.
    """

    program: Program
    model: Model
    token_ids: Mapping[Value, int]
    outputs: tuple[Value, ...]
    subspaces: Mapping[str, slice]
    components: Mapping[str, tuple[str, ...]]
    sharpness: float

    def encode(self, sequences: Sequence[Sequence[Value]]) -> np.ndarray:
        """Token ids, int32 [sequences, 1 + longest]: BOS, the tokens, PAD. **Raises:** `ModelError` for a token that
        the program does not know, and for a sequence that is too long."""
        rows = [[self.token_ids[t] for t in (BOS, *self.program.padded(s))] for s in sequences]
        return np.array(rows, np.int32).reshape(len(rows), 1 + self.program.longest)

    def expected(self, sequence: Sequence[Value]) -> list[Value]:
        """What the program gives for each token of a sequence."""
        return interpret(self.program, sequence)[self.program.output.name][: len(sequence)]

    def decode(self, logits: np.ndarray) -> list[Value]:
        """The values of the largest of logits [positions, outputs]."""
        return [self.outputs[i] for i in np.asarray(logits).argmax(-1)]


def compile_program(program: Program, seed: int | None = None, sharpness: float = SHARPNESS) -> Compiled:
    """The model of a program: no norms, no biases but that of a numerical read-out, ReLU, attention in both directions.

    Categorical outputs: logit BETA for the value that is on. Numerical ones are read out at the finite set of values
    v_j that occur, by logit_j = (x v_j - v_j^2 / 2) / sigma^2, which are the log-likelihoods of a Gaussian about v_j up
    to what they have in common, with sigma such that the nearest other value is BETA behind. Bins, and not a density,
    so that all programs' behaviour is the same notion, a distribution over finitely many answers; a Gaussian, for it is
    linear in x and needs no further operation.

    **Arguments:** `seed`: draws the order of token ids, of subspaces in the stream, and of values within each; None:
    the order in which they are written; `sharpness`: scores of attention where a predicate holds.

    **Raises:** `ModelError` for a program of too many inputs, and for an output that is always the same.
    """
    met, vocabulary = Occurrence.of(program), list(program.vocabulary)
    names = [ONE, START, *met.values, *(inverse_name(o) for o in met.order if isinstance(o, SelectorWidth))]
    if seed is not None:
        rng = np.random.default_rng(seed)
        met.shuffle(rng)
        rng.shuffle(vocabulary)
        rng.shuffle(names)
    sizes = {o.name: len(met.values[o.name]) for o in met.order if o.encoding == "categorical"}
    ends = np.cumsum([0, *(sizes.get(name, 1) for name in names)]).tolist()
    coordinates = {name: slice(a, b) for name, (a, b) in zip(names, pairwise(ends), strict=True)}
    silent = silent_at_start(met.order)
    space = Space(ends[-1], coordinates, met.values, met.pairs, sharpness, silent)
    layers = _layers(met, space)
    token_ids = {token: i for i, token in enumerate((BOS, PAD, *vocabulary))}
    unembed, outputs = _unembedding(program, space)
    config = _config(program, layers, space.width, len(token_ids), len(outputs))
    embeddings = _embeddings(program, met, space, token_ids)
    params: Params = {**embeddings, "blocks": [_block(config, layer) for layer in layers], "unembed": unembed}
    name = f"compiled {program.name}"
    model = Model(config, params, name, fingerprint_of(config, params))
    return Compiled(program, model, token_ids, outputs, coordinates, _components(layers), sharpness)


@dataclass(frozen=True)
class _Layer:
    heads: list[Head]
    neurons: list[Neurons]


def _layers(met: Occurrence, space: Space) -> list[_Layer]:
    """Operations, each as early as it can be. Attention of layer l runs at time 2 l, its MLP at 2 l + 1."""
    time: dict[str, int] = {}
    found: list[_Layer] = []
    for operation in met.order:
        after = max((time[d.name] for d in dependencies(operation)), default=-1)
        if isinstance(operation, Tokens | Indices):
            time[operation.name] = -1
            continue
        attends = isinstance(operation, Aggregate | SelectorWidth)
        layer = (after + (2 if attends else 1)) // 2
        found += [_Layer([], []) for _ in range(layer + 1 - len(found))]
        if isinstance(operation, Aggregate):
            found[layer].heads.append(space.aggregate(operation))
            time[operation.name] = 2 * layer
            continue
        if isinstance(operation, SelectorWidth):
            found[layer].heads.append(space.width_head(operation))
        found[layer].neurons.append(space.neurons(operation))
        time[operation.name] = 2 * layer + 1
    return found or [_Layer([], [])]


def _components(layers: list[_Layer]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for number, layer in enumerate(layers):
        found |= {f"a{number}.h{i}": (head.name,) for i, head in enumerate(layer.heads)}
        found |= {f"m{number}": tuple(n.name for n in layer.neurons)} if layer.neurons else {}
    return found


def _config(program: Program, layers: list[_Layer], width: int, tokens: int, outputs: int) -> TransformerConfig:
    heads = [head for layer in layers for head in layer.heads]
    return TransformerConfig(
        n_layers=len(layers),
        d_model=width,
        n_heads=max(1, *(len(layer.heads) for layer in layers)),
        d_head=max((max(h.query.shape[1], h.value.shape[1]) for h in heads), default=1),
        d_vocab=tokens,
        n_ctx=1 + program.longest,
        d_mlp=max(1, *(sum(len(n.write) for n in layer.neurons) for layer in layers)),
        norm="none",
        activation="relu",
        attention_scale=1.0,
        causal=False,
        d_vocab_out=outputs,
    )


def _embeddings(program: Program, met: Occurrence, space: Space, token_ids: Mapping[Value, int]) -> Params:
    tokens, positions = np.zeros((len(token_ids), space.width)), np.zeros((1 + program.longest, space.width))
    tokens[:, space.at(ONE)] = 1.0
    tokens[token_ids[BOS], space.at(START)] = 1.0
    for operation in met.order:
        for value in met.values[operation.name]:
            if isinstance(operation, Tokens):
                tokens[token_ids[value]] += space.result(operation, value)
            elif isinstance(operation, Indices):
                positions[1 + value] += space.result(operation, value)
    return {"embed": {"W_E": _array(tokens)}, "pos_embed": {"W_pos": _array(positions)}}


def _block(config: TransformerConfig, layer: _Layer) -> Params:
    attention = {f"W_{name}": np.zeros((config.n_heads, config.d_model, config.d_head)) for name in "QKV"}
    attention["W_O"] = np.zeros((config.n_heads, config.d_head, config.d_model))
    for i, head in enumerate(layer.heads):
        for name, matrix in (("W_Q", head.query), ("W_K", head.key), ("W_V", head.value)):
            attention[name][i, :, : matrix.shape[1]] = matrix
        attention["W_O"][i, : len(head.output)] = head.output
    read, write = np.zeros((config.d_model, config.d_mlp)), np.zeros((config.d_mlp, config.d_model))
    start = 0
    for part in layer.neurons:
        here = slice(start, start + len(part.write))
        read[:, here], write[here], start = part.read, part.write, here.stop
    return {
        "attn": {name: _array(matrix) for name, matrix in attention.items()},
        "mlp": {"W_in": _array(read), "W_out": _array(write)},
    }


def _unembedding(program: Program, space: Space) -> tuple[Params, tuple[Value, ...]]:
    """The read-out, and the value of each logit."""
    output, values = program.output, tuple(sorted(space.values[program.output.name], key=str))
    if len(values) < 2:
        raise ModelError(f"the output of {program.name!r} is always {values}: there is nothing to explain")
    if output.encoding == "categorical":
        return {"W_U": _array(BETA * np.array([space.result(output, v) for v in values]).T)}, values
    values = tuple(sorted(values))
    gap = min(float(b - a) for a, b in pairwise(values))
    precision = 2.0 * BETA / gap**2
    numbers = np.array([float(v) for v in values])
    matrix = space.rows(len(values))
    matrix[space.at(output.name)] = precision * numbers
    return {"W_U": _array(matrix), "b_U": _array(-precision * np.square(numbers) / 2.0)}, values


def _array(values: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(values, jnp.float32)
