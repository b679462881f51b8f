"""Regions from text, tasks from data, and what is refused before any long work."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdl.data import Dataset
from mdl.errors import DataError, MDLError, ModelError, TaskError
from mdl.models.config import TransformerConfig
from mdl.models.model import Model
from mdl.task import Region, Task, build_task, collect, parse_region, region_flops

REGIONS = {
    "model": ("tokens", "logits"),
    "upstream of blocks.1.hook_resid_pre": ("tokens", "blocks.1.hook_resid_pre"),
    "upstream of blocks.0.hook_resid_mid": ("tokens", "blocks.0.hook_resid_mid"),
    "upstream of blocks.1.hook_resid_post": ("tokens", "blocks.1.hook_resid_post"),
    "blocks.1.mlp": ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"),
    "blocks.0.attn": ("blocks.0.ln1.hook_normalized", "blocks.0.hook_attn_out"),
}


def silent(*_: Any) -> None:
    """Reports of progress go nowhere."""


@pytest.mark.parametrize("text", REGIONS)
def test_regions_that_exist(text: str, tiny_model: Model) -> None:
    assert parse_region(text, tiny_model) == Region(text, *REGIONS[text])
    spaced = "  " + text.replace(" ", "   ") + " "
    assert parse_region(spaced, tiny_model).name == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("upstream of blocks.1.hook_resid_per", r"Did you mean .*'blocks\.1\.hook_resid_pre'"),
        ("upstream of blocks.9.hook_resid_pre", r"Layers run from 0 to 1"),
        ("upstream of block.1.hook_resid_pre", r"Did you mean .*'blocks\.1\.hook_resid_pre'"),
        ("upstream of blocks.1.hook_mlp_out", "does not cut the model in two"),
        ("upstream of blocks.1.attn.hook_z", "does not cut the model in two"),
        ("upstream of hook_embed", "does not cut the model in two"),
        ("upstream of logits", "does not cut the model in two"),
        ("blocks.2.mlp", r"the model has 2 layers, blocks\.0 to blocks\.1"),
        ("blocks.7.attn", r"the model has 2 layers"),
        ("blocks.1.mpl", r"no region 'blocks\.1\.mpl'.*A region is one of"),
        ("modle", r"Did you mean 'model'"),
        ("", "no region ''"),
        ("downstream of blocks.1.hook_resid_pre", "A region is one of"),
        ("upstream of", "A region is one of"),
    ],
)
def test_regions_that_do_not(text: str, message: str, tiny_model: Model) -> None:
    with pytest.raises((TaskError, ModelError), match=message) as caught:
        parse_region(text, tiny_model)
    assert isinstance(caught.value, MDLError)


def test_attention_only_models_have_no_mlp_region(tiny_model: Model) -> None:
    config = dataclasses.replace(tiny_model.config, d_mlp=0)
    bare = dataclasses.replace(tiny_model, config=config)
    with pytest.raises(TaskError, match="attention-only and has no MLPs"):
        parse_region("blocks.0.mlp", bare)
    assert parse_region("blocks.0.attn", bare).output == "blocks.0.hook_attn_out"


def test_flops_of_regions_add_up(tiny_model: Model) -> None:
    whole = region_flops(tiny_model, parse_region("model", tiny_model), 16)
    upstream = region_flops(tiny_model, parse_region("upstream of blocks.1.hook_resid_post", tiny_model), 16)
    mlp = region_flops(tiny_model, parse_region("blocks.1.mlp", tiny_model), 16)
    assert 0 < mlp < upstream < whole
    assert mlp >= 2 * 2 * tiny_model.config.d_model * tiny_model.config.d_mlp


@pytest.mark.parametrize("text", ["model", "upstream of blocks.1.hook_resid_pre", "blocks.1.mlp"])
def test_activations_are_the_models_own(text: str, tiny_model: Model, tiny_data: Dataset) -> None:
    task = build_task(tiny_model, text, tiny_data, silent)
    source, output = REGIONS[text]
    for activations, (_, tokens, groups, _) in zip(
        (task.fit_activations, task.tune_activations, task.held_out), tiny_data.splits(), strict=True
    ):
        reads = [output] if source == "tokens" else [source, output]
        expected = tiny_model.run(tokens, reads)
        assert np.allclose(activations.outputs, expected[output], rtol=1e-4, atol=1e-4)
        assert np.array_equal(activations.groups, groups)
        assert np.array_equal(activations.scored, tokens != 0)
        if source != "tokens":
            assert np.allclose(activations.inputs, expected[source], rtol=1e-4, atol=1e-4)
    assert task.width == tiny_model.site_width(output)
    sample = task.fit
    assert sample.outputs.shape == (int(task.fit_activations.scored.sum()), task.width)
    assert sample.inputs.n_tokens == len(sample.outputs) == len(sample.inputs.scored_tokens())


def test_what_the_receiver_knows_of_the_input(tiny_model: Model, tiny_data: Dataset) -> None:
    """A tied embedding lies outside the region (the unembedding is downstream), so its rows are known."""
    tied = build_task(tiny_model, "upstream of blocks.1.hook_resid_pre", tiny_data, silent)
    assert np.array_equal(tied.fit_activations.inputs, np.asarray(tiny_model.params["embed"]["W_E"])[tiny_data.fit])
    assert build_task(tiny_model, "model", tiny_data, silent).fit_activations.inputs is None
    config = dataclasses.replace(tiny_model.config, tied=False)
    params = {**tiny_model.params, "unembed": {"W_U": jnp.asarray(tiny_model.params["embed"]["W_E"]).T}}
    untied = dataclasses.replace(tiny_model, config=config, params=params)
    assert build_task(untied, "upstream of blocks.1.hook_resid_pre", tiny_data, silent).fit_activations.inputs is None


def test_a_decomposition_never_sees_held_out_data(tiny_task: Task) -> None:
    view = tiny_task.for_fitting()
    assert view.held_out is None
    assert view.fit_activations is tiny_task.fit_activations
    assert tiny_task.held_out is not None


def test_the_description_says_what_was_scored(tiny_task: Task, tiny_model: Model) -> None:
    found = tiny_task.description
    assert found["model_fingerprint"] == tiny_model.fingerprint
    assert found["region"] == "upstream of blocks.1.hook_resid_pre"
    assert found["held_out_tokens"] == 48 * 15
    assert found["held_out_units"] == 48
    assert found["width"] == 16
    assert found["data"] == "markov"


def test_sums_over_documents(tiny_task: Task) -> None:
    activations = dataclasses.replace(tiny_task.held_out, groups=np.arange(48) // 3)
    sums = activations.group_sums(np.ones(activations.n_tokens))
    assert sums.tolist() == [45.0] * 16
    values = np.random.default_rng(0).normal(size=activations.n_tokens)
    assert activations.group_sums(values).sum() == pytest.approx(values.sum())
    assert activations.group_sums(values)[0] == pytest.approx(values[:45].sum())


def test_the_head_of_a_split(tiny_task: Task) -> None:
    head = tiny_task.held_out.head(5)
    assert head.tokens.shape[0] == head.outputs.shape[0] == len(head.groups) == 5
    assert head.boundary is None


def changed(data: Dataset, **arrays: np.ndarray) -> Dataset:
    return dataclasses.replace(data, **arrays)


def test_sequences_beyond_the_context_are_refused(tiny_model: Model, tiny_data: Dataset) -> None:
    long = {name: np.tile(getattr(tiny_data, name), (1, 2)) for name in ("fit", "tune", "held_out")}
    with pytest.raises(DataError, match="sequences of 32 tokens exceed the model's context of 16: use --context"):
        build_task(tiny_model, "model", changed(tiny_data, **long), silent)


@pytest.mark.parametrize("split", ["fit", "tune", "held_out"])
def test_tokens_beyond_the_vocabulary_are_refused(split: str, tiny_model: Model, tiny_data: Dataset) -> None:
    tokens = getattr(tiny_data, split).copy()
    tokens[1, 5] = 40
    with pytest.raises(DataError, match="token id 40 is outside the model's vocabulary of 40"):
        build_task(tiny_model, "model", changed(tiny_data, **{split: tokens}), silent)


def poisoned(model: Model, layer: int, value: float) -> Model:
    """One number of an MLP's output weights is not finite."""
    params = jax.tree.map(lambda w: w, model.params)
    weight = params["blocks"][layer]["mlp"]["W_out"]
    params["blocks"][layer]["mlp"]["W_out"] = weight.at[0, 0].set(value)
    return dataclasses.replace(model, params=params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("region", "site"),
    [
        ("upstream of blocks.1.hook_resid_pre", r"blocks\.1\.hook_resid_pre"),
        ("blocks.0.mlp", r"blocks\.0\.hook_mlp_out"),
    ],
)
def test_activations_that_are_not_finite_are_named(
    value: float, region: str, site: str, tiny_model: Model, tiny_data: Dataset
) -> None:
    with pytest.raises(DataError, match=rf"\d+ of \d+ activations at {site} are NaN or infinite: check the weights"):
        build_task(poisoned(tiny_model, 0, value), region, tiny_data, silent)


def test_batches_of_the_prefix_do_not_show(
    tiny_model: Model, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven sequences a call do not divide 48: the last call is padded, and the padding is cut off again."""
    region = parse_region("blocks.1.mlp", tiny_model)
    arguments = (tiny_model, region, tiny_data.held_out, tiny_data.held_out != 0, np.arange(48))
    whole = collect(*arguments)
    monkeypatch.setattr("mdl.task.PREFIX_TOKENS", 7 * 16)
    cut = collect(*arguments)
    for name in ("outputs", "inputs", "boundary"):
        assert getattr(cut, name).shape == getattr(whole, name).shape
        assert np.allclose(getattr(cut, name), getattr(whole, name), rtol=1e-4, atol=1e-4)


def test_rotary_models_have_no_hard_context() -> None:
    assert TransformerConfig(1, 8, 2, 4, 10, 16, positions="rotary").positions != "learned"
