"""Bad input through the command line: one clear message, exit code 1, no traceback, early, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sae_lens
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mdl.cli import main

VOCABULARY, CONTEXT, WIDTH = 30, 8, 16
SITE = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 as a checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": CONTEXT}
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)
    words = {"[UNK]": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokens(tmp_path_factory.mktemp("tokens") / "tokens.npy", CONTEXT)


def save_tokens(path: Path, context: int, largest: int = VOCABULARY - 1) -> Path:
    array = np.random.default_rng(0).integers(1, VOCABULARY, (40, context))
    array[0, 0] = largest
    np.save(path, array)
    return path


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def damaged(checkpoint: Path, folder: Path, name: str, position: tuple[int, ...], value: float) -> Path:
    """A copy of the checkpoint with one number of one tensor replaced."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[name][position] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sae_folder(folder: Path, width: int = WIDTH, site: str = SITE, bad: float | None = None) -> str:
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=site, model_name="tiny")
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=width, d_sae=2 * width, metadata=metadata))
    if bad is not None:
        sae.W_dec.data[3, 2] = bad
    sae.save_model(folder)
    return f'sae:path="{folder}"'


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def assert_refused(result: Result, *texts: str, code: int = 1) -> None:
    """The message says every one of the texts; exit code; no traceback; no output folder."""
    said = " ".join(result.stderr.split())
    assert result.exit_code == code, (said, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for text in texts:
        assert text in said
    assert said.count("Error: ") == 1
    assert not Path("run").exists()


@pytest.fixture
def no_model_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be known before the model runs has to be refused before it does."""

    def collect(*_: object, **__: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr("mdl.task.collect", collect)


@pytest.mark.usefixtures("no_model_is_run", "in_folder")
class TestBeforeTheModelRuns:
    def compare(self, checkpoint: Path, tokens: Path, *more: str | Path) -> Result:
        return run("compare", "--model", checkpoint, "--tokens", tokens, *more)

    def test_a_hook_name_that_does_not_exist(self, checkpoint: Path, tokens: Path):
        result = self.compare(checkpoint, tokens, "--region", "upstream of blocks.1.hook_resid_pres")
        assert_refused(result, "no site 'blocks.1.hook_resid_pres'", f"Did you mean '{SITE}'", "0 to 1")

    def test_a_layer_that_does_not_exist(self, checkpoint: Path, tokens: Path):
        result = self.compare(checkpoint, tokens, "--region", "upstream of blocks.7.hook_resid_pre")
        assert_refused(result, "no site 'blocks.7.hook_resid_pre'", "Did you mean", "Layers run from 0 to 1")
        result = self.compare(checkpoint, tokens, "--region", "blocks.2.mlp")
        assert_refused(result, "the model has 2 layers, blocks.0 to blocks.1")

    def test_a_region_that_is_none(self, checkpoint: Path, tokens: Path):
        result = self.compare(checkpoint, tokens, "--region", "block.1.mlp")
        assert_refused(result, "no region 'block.1.mlp'", "Did you mean 'blocks.L.mlp'")
        result = self.compare(checkpoint, tokens, "--region", "upstream of blocks.1.mlp.hook_post")
        assert_refused(result, "does not cut the model in two")

    def test_an_sae_whose_width_does_not_fit(self, checkpoint: Path, tokens: Path, tmp_path: Path):
        wide = sae_folder(tmp_path / "wide", width=24)
        result = self.compare(checkpoint, tokens, "--with", wide)
        assert_refused(result, "wide: the SAE reads 24 numbers a token", "has 16", "another model or site")

    def test_an_sae_of_another_site(self, checkpoint: Path, tokens: Path, tmp_path: Path):
        other = sae_folder(tmp_path / "other", site="blocks.0.hook_mlp_out")
        result = self.compare(checkpoint, tokens, "--with", other)
        assert_refused(result, "trained at blocks.0.hook_mlp_out", SITE, "any_site=True")

    def test_an_sae_with_nan(self, checkpoint: Path, tokens: Path, tmp_path: Path):
        bad = sae_folder(tmp_path / "bad", bad=float("nan"))
        result = self.compare(checkpoint, tokens, "--with", bad)
        assert_refused(result, "bad: 1 of 512 entries of W_dec are NaN or infinite")

    def test_an_sae_that_is_none(self, checkpoint: Path, tokens: Path, tmp_path: Path):
        (tmp_path / "empty").mkdir()
        result = self.compare(checkpoint, tokens, "--with", f"sae:path={tmp_path / 'empty'}")
        assert_refused(result, "is not a sae-lens SAE", "cfg.json")
        result = self.compare(checkpoint, tokens, "--with", "sae")
        assert_refused(result, "an SAE is given by path")

    @pytest.mark.parametrize(
        ("value", "found"), [(float("nan"), "1 NaN and 0 infinite"), (float("inf"), "0 NaN and 1 infinite")]
    )
    def test_weights_that_are_not_finite(
        self, checkpoint: Path, tokens: Path, tmp_path: Path, value: float, found: str
    ):
        folder = damaged(checkpoint, tmp_path / "bad", "transformer.h.1.mlp.c_fc.weight", (3, 4), value)
        result = self.compare(folder, tokens)
        assert_refused(result, "'transformer.h.1.mlp.c_fc.weight'", f"has {found} values of 1024")

    def test_an_empty_text(self, checkpoint: Path, tmp_path: Path):
        for content in ("", " \n\t\n"):
            (tmp_path / "text.txt").write_text(content)
            result = run("compare", "--model", checkpoint, "--text", tmp_path / "text.txt")
            assert_refused(result, "text.txt is an empty text")

    def test_a_text_too_short_for_three_splits(self, checkpoint: Path, tmp_path: Path):
        (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5")
        result = run("compare", "--model", checkpoint, "--text", tmp_path / "text.txt")
        assert_refused(result, "only 0 sequences of 8 tokens", "--context")

    def test_one_sequence_has_no_standard_error(self, checkpoint: Path, tokens: Path):
        result = self.compare(checkpoint, tokens, "--sequences", "1")
        assert_refused(result, "only 1 sequences of 8 tokens for the held-out split", "at least 2")

    def test_a_text_that_is_no_text(self, checkpoint: Path, tmp_path: Path):
        (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00\x81" * 40)
        result = run("compare", "--model", checkpoint, "--text", tmp_path / "text.txt")
        assert_refused(result, "cannot be read as UTF-8 text")

    def test_tokens_that_are_none(self, checkpoint: Path, tmp_path: Path):
        np.save(tmp_path / "floats.npy", np.zeros((4, 8)))
        assert_refused(self.compare(checkpoint, tmp_path / "floats.npy"), "float64", "expected integer token ids")
        (tmp_path / "text.npy").write_text("no array")
        assert_refused(self.compare(checkpoint, tmp_path / "text.npy"), "is not a readable array of token ids")
        np.save(tmp_path / "flat.npy", np.zeros(8, np.int32))
        assert_refused(self.compare(checkpoint, tmp_path / "flat.npy"), "shape (8,)", "[sequences, positions]")

    def test_tokens_of_another_tokenizer(self, checkpoint: Path, tmp_path: Path):
        many = save_tokens(tmp_path / "many.npy", CONTEXT, largest=VOCABULARY + 5)
        assert_refused(self.compare(checkpoint, many), "token id 35", "vocabulary of 30", "another tokenizer")

    def test_a_context_longer_than_the_models(self, checkpoint: Path, tokens: Path, tmp_path: Path):
        result = self.compare(checkpoint, tokens, "--context", "9")
        assert_refused(result, "a context of 9 tokens is asked for; this model takes 2 to 8")
        result = self.compare(checkpoint, save_tokens(tmp_path / "long.npy", 12))
        assert_refused(result, "sequences of 12 tokens exceed the model's context of 8", "--context")

    def test_an_unreadable_checkpoint(self, checkpoint: Path, tokens: Path, tmp_path: Path):
        cut = damaged(checkpoint, tmp_path / "cut", "transformer.wte.weight", (0, 0), 0.0)
        whole = (cut / "model.safetensors").read_bytes()
        (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        assert_refused(self.compare(cut, tokens), "model.safetensors", "cannot be read", "damaged, cut short")
        (cut / "config.json").write_text('{"model_type": ')
        assert_refused(self.compare(cut, tokens), "config.json is not JSON")
        (cut / "config.json").write_text(json.dumps({"model_type": "gpt3"}))
        assert_refused(self.compare(cut, tokens), "model_type 'gpt3' has no adapter", "Did you mean 'gpt2'")
        (cut / "config.json").unlink()
        assert_refused(self.compare(cut, tokens), "config.json", str(cut))

    def test_a_checkpoint_without_weights(self, checkpoint: Path, tokens: Path, tmp_path: Path):
        folder = damaged(checkpoint, tmp_path / "bare", "transformer.wte.weight", (0, 0), 0.0)
        (folder / "model.safetensors").unlink()
        assert_refused(self.compare(folder, tokens), f"no weights in {folder}")

    def test_a_model_that_does_not_exist(self, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        result = self.compare(tmp_path / "no" / "such", tokens)
        assert_refused(result, str(tmp_path / "no" / "such"))

    @pytest.mark.parametrize(
        ("wanted", "texts"),
        [
            ("pka", ["no decomposition named 'pka'", "Did you mean 'pca'", "Installed:"]),
            ("pca:rnk=4", ["'pca' has no option 'rnk'", "Did you mean 'rank'"]),
            ("pca:rank=four", ["option 'rank' of 'pca' takes a whole number", "'four' is not"]),
            ("pca:rank", ["cannot read 'rank'", "NAME:key=value"]),
            ("pca:rank=4,rank=5", ["gives 'rank' twice"]),
        ],
    )
    def test_unknown_explanations_and_options(self, checkpoint: Path, tokens: Path, wanted: str, texts: Sequence[str]):
        assert_refused(self.compare(checkpoint, tokens, "--with", wanted), *texts)
        assert_refused(run("score", wanted, "--model", checkpoint, "--tokens", tokens), *texts)

    def test_a_fidelity_that_cannot_be_met(self, checkpoint: Path, tokens: Path):
        result = self.compare(checkpoint, tokens, "--fidelity", "0.0000001")
        assert_refused(result, "a fidelity of 1e-07 cannot be met", "float32")

    def test_activations_where_there_are_none(self, checkpoint: Path, tokens: Path):
        result = self.compare(checkpoint, tokens, "--region", "model", "--phenomenon", "activations")
        assert_refused(result, "a region that ends at the logits has no activations to reproduce")

    def test_text_for_a_model_without_a_tokenizer(self, checkpoint: Path, tmp_path: Path):
        folder = damaged(checkpoint, tmp_path / "mute", "transformer.wte.weight", (0, 0), 0.0)
        (folder / "tokenizer.json").unlink()
        (tmp_path / "text.txt").write_text("w1 " * 100)
        result = run("compare", "--model", folder, "--text", tmp_path / "text.txt")
        assert_refused(result, "without a tokenizer.json", "--tokens")
        assert_refused(run("compare", "--model", folder), "without a tokenizer.json", "--tokens")

    def test_an_output_folder_in_use(self, checkpoint: Path, tokens: Path, tmp_path: Path):
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "notes.txt").write_text("mine")
        result = self.compare(checkpoint, tokens, "--out", "taken")
        assert_refused(result, "the output folder taken is not empty (notes.txt)", "--out")
        assert [p.name for p in (tmp_path / "taken").iterdir()] == ["notes.txt"]
        (tmp_path / "file").write_text("mine")
        assert_refused(self.compare(checkpoint, tokens, "--out", "file"), "the output file is a file")

    def test_an_output_folder_that_another_run_claimed(self, checkpoint: Path, tokens: Path, tmp_path: Path):
        from mdl.report.output import claimed

        with claimed(tmp_path / "shared"):
            result = self.compare(checkpoint, tokens, "--out", "shared")
            assert_refused(result, "the output folder shared is in use by process")


@pytest.mark.usefixtures("in_folder")
def test_activations_that_are_not_finite(checkpoint: Path, tokens: Path, tmp_path: Path):
    """Finite weights whose activations overflow: the site is named."""
    folder = damaged(checkpoint, tmp_path / "bad", "transformer.wpe.weight", (2, 0), 3e38)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"][:, 0] = 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("compare", "--model", folder, "--tokens", tokens)
    assert_refused(result, f"activations at {SITE} are NaN or infinite")


@pytest.mark.usefixtures("in_folder")
def test_an_sae_that_is_never_on(checkpoint: Path, tokens: Path, tmp_path: Path):
    name = sae_folder(tmp_path / "silent")
    tensors = load_file(tmp_path / "silent" / "sae_weights.safetensors")
    tensors["b_enc"][:] = -1e6
    save_file(tensors, tmp_path / "silent" / "sae_weights.safetensors")
    result = run("compare", "--model", checkpoint, "--tokens", tokens, "--with", name)
    assert_refused(result, "silent: none of 32 features is on", "another site, model or scale")


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    ("wanted", "text"),
    [("pca:rank=17", "rank 17 is outside 0 to 16"), ("clusters:k=100000", "k = 100000, but there are")],
)
def test_options_that_do_not_fit_the_task(checkpoint: Path, tokens: Path, wanted: str, text: str):
    assert_refused(run("compare", "--model", checkpoint, "--tokens", tokens, "--with", wanted), text)
