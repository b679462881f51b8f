"""A receiver process: what it does not hold, and what it is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from mdl.errors import DataError
from mdl.models.model import Model, named_weights
from mdl.models.outside import WEIGHTS, load_outside, region_weights, save_outside
from mdl.score import embedded_model
from mdl.task import Region, collect_boundary

ROOT = Path(__file__).resolve().parents[2]
UPSTREAM = Region("upstream of blocks.1.hook_resid_pre", "tokens", "blocks.1.hook_resid_pre")
MLP = Region("blocks.1.mlp", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
ATTENTION = Region("blocks.1.attn", "blocks.1.ln1.hook_normalized", "blocks.1.hook_attn_out")


@pytest.mark.parametrize("region", [UPSTREAM, MLP, ATTENTION], ids=lambda r: r.name)
def test_the_regions_weights_are_not_in_what_it_loads(region: Region, tiny_model: Model, tmp_path: Path) -> None:
    save_outside(tiny_model, region.input, region.output, tmp_path)
    hidden = region_weights(tiny_model, region.input, region.output)
    with safe_open(tmp_path / WEIGHTS, "numpy") as file:
        written = set(file.keys())
    everything = dict(named_weights(tiny_model.params))
    assert written | hidden == set(everything)
    assert not written & hidden
    held = load_outside(tmp_path)
    assert jax.tree.structure(held.params) == jax.tree.structure(tiny_model.params)
    for name, weight in named_weights(held.params):
        if name in hidden:
            assert np.isnan(weight).all()
        else:
            np.testing.assert_array_equal(weight, everything[name])


def test_what_belongs_to_a_region(tiny_model: Model) -> None:
    upstream = region_weights(tiny_model, UPSTREAM.input, UPSTREAM.output)
    assert {"pos_embed.W_pos", "blocks.0.mlp.W_in", "blocks.0.ln1.w"} <= upstream
    assert not any(n.startswith(("blocks.1.", "ln_final.")) for n in upstream)
    assert "embed.W_E" not in upstream  # it is tied to the unembedding, which the receiver runs
    assert region_weights(tiny_model, MLP.input, MLP.output) == {
        *(f"blocks.1.mlp.{n}" for n in ("W_in", "b_in", "W_out", "b_out")),
        *("blocks.1.ln2.w", "blocks.1.ln2.b"),
    }


def test_computing_the_region_without_its_weights_fails(tiny_model: Model, tmp_path: Path) -> None:
    """The receiver can compute what enters the region, and nothing of what the region does."""
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    scored, groups = tokens > 0, np.arange(2)
    save_outside(tiny_model, MLP.input, MLP.output, tmp_path)
    held = load_outside(tmp_path)
    boundary = collect_boundary(held, MLP, tokens, scored, groups)
    expected = tiny_model.run(tokens, [MLP.input])[MLP.input]
    np.testing.assert_allclose(boundary.inputs, expected, rtol=1e-3, atol=1e-5)
    beyond = Region("upstream of the end", MLP.output, "blocks.1.hook_resid_post")
    with pytest.raises(DataError, match=r"activations at blocks\.1\.hook_mlp_out are NaN"):
        collect_boundary(held, beyond, tokens, scored, groups)


def attempt(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a line in a process that is confined as receivers are."""
    readable, writable = tmp_path / "job", tmp_path / "out"
    readable.mkdir()
    writable.mkdir()
    (readable / "message").write_text("told")
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from estimators.verification.receiver import confine
confine([Path({str(readable)!r})], Path({str(writable)!r}))
{code}
"""
    return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=writable)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (f"open({str(ROOT / 'mdl/embedded/embedded-python-gpt2/model.safetensors')!r}, 'rb')", "may not read"),
        ("open('/elsewhere')", "may not read /elsewhere: it is told by messages alone"),
        ("open('../job/message', 'w')", "may not write"),
        ("import socket; socket.create_connection(('localhost', 9))", "no network"),
        ("import subprocess; subprocess.run(['true'])", "starts no process"),
        ("import os; os.system('true')", "starts no process"),
        ("import os; os.open('/elsewhere', os.O_CREAT | os.O_WRONLY)", "may not write"),
        ("import numpy; numpy.load('/elsewhere.npy')", "may not read"),
        ("from mdl.score import embedded_model; embedded_model()", "may not read"),
    ],
)
def test_a_receiver_is_refused_the_world(code: str, words: str, tmp_path: Path) -> None:
    done = attempt(code, tmp_path)
    assert done.returncode != 0
    assert "PermissionError" in done.stderr
    assert words in done.stderr


def test_a_receiver_reads_its_job_and_writes_its_results(tmp_path: Path) -> None:
    done = attempt("text = open('../job/message').read(); open('result', 'w').write(text)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "result").read_text() == "told"


def test_the_embedded_models_region_is_most_of_its_blocks() -> None:
    model = embedded_model()
    hidden = region_weights(model, "tokens", "blocks.2.hook_resid_pre")
    assert {n.split(".")[1] for n in hidden if n.startswith("blocks.")} == {"0", "1"}
