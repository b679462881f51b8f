"""What `load_model` refuses, and the checkpoints that we write."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer

from mdl.errors import ModelError
from mdl.models import Model, TransformerConfig, load_model
from mdl.models.gpt2 import save_gpt2_checkpoint
from mdl.models.model import fingerprint_of
from mdl.models.settings import rotary_frequencies


@pytest.fixture
def copy(folders, tmp_path):
    """A GPT-2 checkpoint to damage, and functions that change its configuration and tensors."""
    folder = tmp_path / "copy"
    shutil.copytree(folders["gpt2"][1], folder)

    def configure(**entries):
        config = json.loads((folder / "config.json").read_text()) | entries
        (folder / "config.json").write_text(json.dumps(config))

    def change(function):
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file(tensors, folder / "model.safetensors")

    return folder, configure, change


def test_an_unknown_model_type_lists_the_supported_ones(copy):
    folder, configure, _ = copy
    configure(model_type="gpt_neo")
    with pytest.raises(ModelError, match=r"'gpt_neo' has no adapter; supported: \['gemma2', .*Did you mean 'gpt_neox'"):
        load_model(folder)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"activation_function": "mish"}, "activation function 'mish'"),
        ({"n_embd": None}, "no 'n_embd'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_layer": 3}, r"missing 'transformer\.h\.2\.ln_1\.weight'"),
        ({"n_layer": 1}, r"unexpected 'transformer\.h\.1\."),
        (
            {"vocab_size": 62},
            r"'transformer\.wte\.weight' has shape \(61, 24\), the configuration asks for \(62, 24\)",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(copy, entries, said):
    folder, configure, _ = copy
    configure(**entries)
    with pytest.raises(ModelError, match=said):
        load_model(folder)


def test_rotary_scaling_that_we_do_not_have_is_refused(folders, tmp_path):
    shutil.copytree(folders["llama"][1], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "yarn"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'yarn' is not supported"):
        load_model(tmp_path)


def test_rotary_scaling_without_its_factor_is_refused():
    with pytest.raises(ModelError, match="has no 'factor'"):
        rotary_frequencies({"rope_scaling": {"type": "linear"}}, 8)


def test_nan_weights_are_refused_with_name_and_count(copy):
    folder, _, change = copy

    def damage(tensors):
        tensors["transformer.h.1.mlp.c_fc.weight"][3, :5] = torch.nan
        tensors["transformer.h.1.mlp.c_fc.weight"][4, 0] = torch.inf

    change(damage)
    with pytest.raises(ModelError, match=r"h\.1\.mlp\.c_fc\.weight' .* has 5 NaN and 1 infinite values of 2304"):
        load_model(folder)


def test_damaged_and_missing_files_are_refused(copy, tmp_path):
    folder, _, _ = copy
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors .* cannot be read"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"no weights in .*config\.json"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"gone\.safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        load_model(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json in"):
        load_model(tmp_path / "empty")
    with pytest.raises(ModelError, match="is a file"):
        load_model(folder / "config.json")


def test_pickles_that_are_not_tensors_are_not_run(copy):
    folder, _, _ = copy
    (folder / "model.safetensors").unlink()
    torch.save({"a": ByteLevelBPETokenizer}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin .* cannot be read"):
        load_model(folder)


def test_a_hub_name_out_of_reach_says_what_to_put_where(monkeypatch):
    def offline(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=r"'someone/some-model' is no folder.*unreachable.*config\.json"):
        load_model("someone/some-model")


def test_a_hub_name_is_fetched_and_is_the_models_name(monkeypatch, folders):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folders["gpt2"][1]))
    assert load_model("someone/some-model").name == "someone/some-model"


def test_what_is_no_model_is_refused(folders):
    with pytest.raises(ModelError, match="a int is no model"):
        load_model(3)
    with pytest.raises(ModelError, match="'float23' is not one of"):
        load_model(folders["gpt2"][1], dtype="float23")


def test_weights_can_be_held_in_half_precision(folders, tokens):
    full, half = (load_model(folders["gpt2"][1], dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.params["embed"]["W_E"].dtype == "bfloat16"
    expected, got = (np.asarray(m.run(tokens, ["logits"])["logits"], np.float32) for m in (full, half))
    assert 0 < np.abs(got - expected).max() < 0.2 * expected.std()


def trained_like(seed: int, **changes) -> Model:
    """A model as the embedded one's training leaves it: tied, GPT-2's shapes, random numbers."""
    sizes = {
        "n_layers": 2,
        "d_model": 24,
        "n_heads": 4,
        "d_head": 6,
        "d_vocab": 300,
        "n_ctx": 16,
        "d_mlp": 40,
        "tied": True,
    }
    config = TransformerConfig(**(sizes | changes))
    rng = np.random.default_rng(seed)
    make = lambda *shape: jax.numpy.asarray(0.3 * rng.standard_normal(shape), "float32")  # noqa: E731
    norm = lambda: {"w": 1.0 + make(24), "b": make(24)}  # noqa: E731
    blocks = []
    for _ in range(2):
        heads = {f"W_{n}": make(4, 24, 6) for n in "QKV"} | {f"b_{n}": make(4, 6) for n in "QKV"}
        mlp = {"W_in": make(24, 40), "b_in": make(40), "W_out": make(40, 24), "b_out": make(24)}
        attn = {**heads, "W_O": make(4, 6, 24), "b_O": make(24)}
        blocks.append({"ln1": norm(), "attn": attn, "ln2": norm(), "mlp": mlp})
    params = {"embed": {"W_E": make(300, 24)}, "pos_embed": {"W_pos": make(16, 24)}, "blocks": blocks}
    params["ln_final"] = norm()
    return Model(config, params, "trained", fingerprint_of(config, params))


@pytest.fixture(scope="module")
def tokenizer():
    built = ByteLevelBPETokenizer()
    text = ["def function(argument):\n    return argument\n"]
    built.train_from_iterator(text, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    return built._tokenizer


def test_a_saved_checkpoint_is_transformerss_too(tmp_path, tokenizer):
    model = trained_like(0)
    save_gpt2_checkpoint(model, tmp_path, dtype="float32", tokenizer=tokenizer)
    assert load_model(tmp_path).fingerprint == model.fingerprint
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    text = "return function"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert ids == tokenizer.encode(text).ids == load_model(tmp_path).tokenizer.encode(text).ids
    batch = np.array([[0, *ids]])
    with torch.no_grad():
        expected = theirs(torch.as_tensor(batch)).logits.numpy()
    np.testing.assert_allclose(model.run(batch, ["logits"])["logits"], expected, atol=1e-4)
    assert theirs.generation_config.eos_token_id == 0


def test_half_precision_is_the_default_and_rounds_only(tmp_path, tokenizer):
    model = trained_like(1)
    save_gpt2_checkpoint(model, tmp_path, tokenizer=tokenizer)
    again = load_model(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].dtype == torch.float16
    leaves = zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True)
    assert all(np.array_equal(np.asarray(a).astype(np.float16), b) for a, b in leaves)
    assert again.config == model.config


def test_what_is_no_gpt2_is_not_saved_as_one(tmp_path, folders):
    with pytest.raises(ModelError, match=r"no GPT-2 .*'norm': 'rms'"):
        save_gpt2_checkpoint(load_model(folders["llama"][1]), tmp_path)
    model = trained_like(2)
    model.params["ln_final"]["w"] = model.params["ln_final"]["w"].at[0].set(1e6)
    with pytest.raises(ModelError, match=r"ln_f\.weight' reaches 1e\+06, beyond float16"):
        save_gpt2_checkpoint(model, tmp_path)
