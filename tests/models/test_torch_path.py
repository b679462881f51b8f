"""Modules without an adapter, through forward hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdl.errors import ModelError
from mdl.models import TorchModel, load_model


class Twice(torch.nn.Module):
    """Embedding, one layer used twice, a tuple-valued recurrent layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.shared = torch.nn.Linear(6, 6)
        self.recurrent = torch.nn.GRU(6, 5, batch_first=True)
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(5, 11)

    def forward(self, tokens):
        x = self.shared(torch.tanh(self.shared(self.embed(tokens))))
        return self.head(self.dropout(self.recurrent(x)[0]))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Twice()


@pytest.fixture
def inputs():
    return np.arange(8).reshape(2, 4)


def test_an_adapterless_module_runs_through_torch(module, inputs):
    model = load_model(module)
    assert isinstance(model, TorchModel)
    assert model.sites() == ("embed", "shared", "recurrent", "dropout", "head", "logits")
    assert model.n_parameters == sum(p.numel() for p in module.parameters())
    found = model.run(inputs, ["embed", "recurrent", "logits"])
    with torch.no_grad():
        expected = module.eval()(torch.as_tensor(inputs))
    np.testing.assert_allclose(found["logits"], expected.numpy(), atol=1e-6)
    np.testing.assert_array_equal(found["embed"], module.embed.weight.detach().numpy()[inputs])
    assert found["recurrent"].shape == (2, 4, 5)


def test_writing_replaces_a_modules_output(module, inputs):
    model = load_model(module)
    plain = model.run(inputs, ["recurrent", "logits"])
    own = model.run(inputs, ["logits"], {"recurrent": plain["recurrent"]})["logits"]
    np.testing.assert_array_equal(own, plain["logits"])
    zeros = model.run(inputs, ["logits"], {"recurrent": np.zeros_like})["logits"]
    np.testing.assert_allclose(zeros, np.broadcast_to(module.head.bias.detach().numpy(), zeros.shape), atol=1e-6)
    shifted = model.run(inputs, ["logits"], {"logits": lambda value: value + 1.0})["logits"]
    np.testing.assert_allclose(shifted, plain["logits"] + 1.0, atol=1e-6)


def test_the_module_is_left_as_it_was(module, inputs):
    model = load_model(module)
    module.head.eval()
    model.run(inputs, ["embed"])
    assert module.training
    assert module.dropout.training
    assert not module.head.training
    assert not any(m._forward_hooks for m in module.modules())


def test_a_transformers_model_of_an_unknown_family_runs_too(inputs):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(hidden_size=8, ffn_dim=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
    model = load_model(OPTForCausalLM(config))
    assert isinstance(model, TorchModel)
    found = model.run(inputs, ["model.decoder.layers.0", "logits"])
    assert found["logits"].shape == (2, 4, 11)
    moved = model.run(inputs, ["logits"], {"model.decoder.layers.0": lambda x: x[:, ::-1].copy()})["logits"]
    assert np.abs(moved - found["logits"]).max() > 1e-4


def test_the_fingerprint_knows_the_weights(module):
    before = load_model(module).fingerprint
    assert load_model(module).fingerprint == before
    with torch.no_grad():
        module.head.bias[0] += 1e-6
    assert load_model(module).fingerprint != before


def test_what_has_no_one_value_is_refused(module, inputs):
    model = load_model(module)
    with pytest.raises(ModelError, match="'shared' ran 2 times"):
        model.run(inputs, ["shared"])
    with pytest.raises(ModelError, match="Did you mean 'embed'"):
        model.run(inputs, ["embedd"])
    with pytest.raises(ModelError, match=r"\(2, 5\); the site has \(2, 4, 5\)"):
        model.run(inputs, ["logits"], {"recurrent": np.zeros((2, 5))})
    with pytest.raises(ModelError, match="cannot be applied to Twice"):
        load_model(module, center_writing_weights=True)
    with torch.no_grad():
        module.head.bias[0] = torch.nan
    with pytest.raises(ModelError, match=r"'head\.bias' .* 1 NaN"):
        load_model(module)
