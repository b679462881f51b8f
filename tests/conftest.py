"""What the tests of several packages share: a tiny random language model, data for it, and the task made of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest
import torch
import transformers
from jax.experimental.compilation_cache import compilation_cache

from decompositions.baselines import Nothing
from estimators.fidelity import Bench
from estimators.solver import Solution, Solver
from mdl.data import Dataset
from mdl.models import load_model
from mdl.models.model import Model
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


@pytest.fixture(scope="session")
def task_of_sizes(tiny_model: Model) -> Callable[..., Task]:
    """A task with given numbers of sequences to fit on, to tune on and to score."""

    def make(fit: int, tune: int, held_out: int) -> Task:
        tokens = markov_tokens(fit + tune + held_out, CONTEXT, VOCABULARY, seed=2)
        data = dataset_of(tokens, (fit, tune, held_out))
        return build_task(tiny_model, "upstream of blocks.1.hook_resid_pre", data, no_progress)

    return make


@pytest.fixture(scope="session")
def tiny_bench(tiny_task: Task) -> Bench:
    """The tiny task set up for evaluation, at a horizon of a million tokens."""
    return Bench(tiny_task, 1e6)


@pytest.fixture(scope="session")
def nothing_at_one_percent(tiny_bench: Bench, tiny_task: Task) -> Solution:
    """The yardstick: the standard coder alone, at 1 % of the null's KL."""
    return Solver(tiny_bench, Nothing().fit(tiny_task.for_fitting())).solve(0.01 * tiny_bench.null_kl)


@pytest.fixture(scope="module")
def in_little_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every comparison compiles the same functions anew; here they are compiled once and read back. Annotations are
    checked in the tests of the parts: a million checks a comparison are most of its time."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    compilation_cache.reset_cache()
    for name, value in options.items():
        jax.config.update(name, value)
    checked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", checked)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
