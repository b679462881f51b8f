"""What the tests of several packages share: a tiny random language model, data for it, and the task made of both."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mdl.data import Dataset
from mdl.models import load_model
from mdl.models.model import Model, fingerprint_of
from mdl.task import Task, build_task

VOCABULARY, CONTEXT, WIDTH = 40, 16, 16
START = 0


def no_progress(*_: Any) -> None:
    """What a task reports its progress to, when nobody looks."""


def gpt2(scale: float = 0.5, **sizes: int) -> transformers.GPT2LMHeadModel:
    """A random GPT-2 whose weights are large enough for ablation to matter."""
    arguments = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": CONTEXT} | sizes
    config = transformers.GPT2Config(**arguments, bos_token_id=START, eos_token_id=START)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def markov_tokens(sequences: int, context: int, vocabulary: int, seed: int) -> np.ndarray:
    """Sequences of a first-order source, each behind the start token: every token has a few likely followers."""
    rng = np.random.default_rng(seed)
    follow = rng.dirichlet(np.full(vocabulary - 1, 0.2), vocabulary)
    tokens = np.full((sequences, context), START, np.int32)
    for position in range(1, context):
        cumulative = np.cumsum(follow[tokens[:, position - 1]], 1)
        draw = (rng.random((sequences, 1)) * cumulative[:, -1:] >= cumulative).sum(1)
        tokens[:, position] = 1 + np.minimum(draw, vocabulary - 2)
    return tokens


def dataset_of(tokens: np.ndarray, sizes: tuple[int, int, int], special: tuple[int, ...] = (START,)) -> Dataset:
    """The first sequences to fit on, the next to tune on, the next to score; each sequence is its own unit."""
    cuts = np.cumsum(sizes)
    parts = [np.ascontiguousarray(p) for p in np.split(tokens[: cuts[-1]], cuts[:2])]
    fit, tune, held_out = (np.arange(len(p)) for p in parts)
    return Dataset(*parts, (fit, tune, held_out), special, {"data": "markov"})


def without_tie(model: Model) -> Model:
    """The same function with an unembedding of its own."""
    config = dataclasses.replace(model.config, tied=False)
    params = {**model.params, "unembed": {"W_U": jnp.asarray(model.params["embed"]["W_E"]).T}}
    return Model(config, params, model.name, fingerprint_of(config, params), model.tokenizer)


def with_weight(model: Model, path: tuple[str | int, ...], value: float) -> Model:
    """The model with one number of the weight at `path` replaced."""

    def change(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = tuple(getattr(k, "key", getattr(k, "idx", None)) for k in keys)
        return leaf.at[(0,) * leaf.ndim].set(value) if names == path else leaf

    params = jax.tree_util.tree_map_with_path(change, model.params)
    return dataclasses.replace(model, params=params)


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    """GPT-2 with two layers of width 16, a vocabulary of 40 and a context of 16."""
    return load_model(gpt2())


@pytest.fixture(scope="session")
def tiny_data() -> Dataset:
    return dataset_of(markov_tokens(176, CONTEXT, VOCABULARY, seed=2), (80, 48, 48))


@pytest.fixture(scope="session")
def tiny_task(tiny_model: Model, tiny_data: Dataset) -> Task:
    return build_task(tiny_model, "upstream of blocks.1.hook_resid_pre", tiny_data, no_progress)


@pytest.fixture(scope="session")
def last_task(tiny_model: Model, tiny_data: Dataset) -> Task:
    """Behind this region there is only the final norm and the unembedding."""
    return build_task(tiny_model, "upstream of blocks.1.hook_resid_post", tiny_data, no_progress)
