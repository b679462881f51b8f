"""Weight processing of the scored model, as an SAE's configuration asks for it."""

from __future__ import annotations

import numpy as np
import pytest

from mdl.cli import compare as command
from mdl.errors import TaskError
from mdl.models.load import PROCESSING
from mdl.models.model import Model
from mdl.score import compare, embedded_model


def test_the_embedded_model_with_centred_weights():
    model = embedded_model(["center_writing_weights"])
    tokens = np.arange(12, dtype=np.int32)[None]
    stream = np.asarray(model.run(tokens, ["blocks.2.hook_resid_pre"])["blocks.2.hook_resid_pre"])
    assert np.abs(stream.mean(-1)).max() < 1e-4 * np.abs(stream).max()
    as_it_is = embedded_model()
    assert model.fingerprint != as_it_is.fingerprint
    logits = [np.asarray(m.run(tokens, ["logits"])["logits"]) for m in (model, as_it_is)]
    np.testing.assert_allclose(*logits, atol=2e-3)


def test_what_cannot_be_processed_is_refused(tiny_model: Model):
    with pytest.raises(TaskError, match=r"'center_writing_weight'\. Did you mean 'center_writing_weights'"):
        compare(process=["center_writing_weight"])
    with pytest.raises(TaskError, match="loaded already"):
        compare(tiny_model, process=["center_writing_weights"])


def test_the_command_line_has_every_switch():
    (option,) = [p for p in command.params if p.name == "process"]
    assert set(option.type.choices) == set(PROCESSING)
