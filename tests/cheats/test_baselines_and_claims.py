"""Baselines and claims: what a score is compared with, and what is said of it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cheating.senders import Fitted, nothing

from decompositions.baselines import ConstantExplanation
from estimators.kernels import kl_nats
from mdl.errors import ExplanationError, MDLError
from mdl.ledger import Scorecard, merged
from mdl.message import QuantisedArray, Section, encode_message
from mdl.models.model import named_weights
from mdl.models.outside import load_outside, region_weights, save_outside
from mdl.task import build_task


@pytest.mark.cheat(
    21, "a baseline of one's own choice", "savings are against our `nothing`; its name is taken", "refused"
)
def test_baseline(judge, honest, outcome):
    def worse(state, decoder, sample):
        return state

    with pytest.raises(ExplanationError) as caught:
        judge(nothing("nothing", change_state=worse))
    outcome.refused(caught.value, "the yardstick's name")
    alone = Scorecard({}, (honest["tokens"],))
    with pytest.raises(MDLError, match="lacks 'nothing', the yardstick"):
        alone.saved(honest["tokens"], 1e6)


@pytest.mark.cheat(
    22, "the horizon or the layer where one wins", "scores of different tasks share no scorecard", "refused"
)
def test_other_horizon(honest, outcome):
    here = {"region": "upstream of blocks.1.hook_resid_pre", "horizon": 1e4, "data_sha256": "a"}
    ours, theirs = Scorecard(here, (honest["nothing"],)), Scorecard({**here, "horizon": 1e2}, (honest["tokens"],))
    with pytest.raises(MDLError) as caught:
        merged(ours, theirs)
    outcome.refused(caught.value, "different tasks", "horizon: 10000.0 and 100.0")
    for key, value in (("region", "blocks.0.mlp"), ("data_sha256", "b")):
        with pytest.raises(MDLError, match=key):
            merged(ours, Scorecard({**here, key: value}, (honest["tokens"],)))
    with pytest.raises(MDLError, match="scored in both: nothing"):
        merged(ours, ours)
    assert [s.explanation for s in merged(ours, Scorecard(here, (honest["tokens"],))).scores] == ["nothing", "tokens"]
    tried = honest["tokens"].static  # every N of the grid is shown, not one
    assert len(tried.tokens) >= 80
    assert tried.tokens[0] == 1
    assert tried.tokens[-1] >= 1e9


def priced(weights, step):
    """Bits of matrices as header arrays, with equal steps."""
    arrays = tuple(QuantisedArray.from_values(w, step) for w in weights)
    return encode_message([Section("program", arrays)]).whole_bits


@pytest.mark.cheat(
    23,
    "a copied piece of M as its explanation",
    "the receiver lacks the region; copied weights cost as others do",
    "charged",
)
def test_copied_weights(tiny_model, outcome, tmp_path):
    region = ("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")
    inside = region_weights(tiny_model, *region)
    copied = [np.asarray(w) for name, w in named_weights(tiny_model.params) if name in inside and w.ndim == 2]
    rng = np.random.default_rng(8)
    others = [w.std() * rng.standard_normal(w.shape) for w in copied]
    outcome.charged(priced(others, 2**-6), priced(copied, 2**-6), margin=0.02)
    assert sum(w.size for w in copied) == 2 * 16 * 64
    save_outside(tiny_model, *region, tmp_path)
    held = dict(named_weights(load_outside(tmp_path).params))
    assert all(np.isnan(held[name]).all() for name in inside)


@pytest.mark.cheat(
    24,
    "an explained model that excludes tokens, a clipped KL",
    "forward KL, never clipped; infinite is refused",
    "refused",
)
def test_unsupported(tiny_model, tiny_data, judge_on, outcome):
    task = build_task(
        tiny_model, "model", dataclasses.replace(tiny_data, held_out=tiny_data.held_out[:8]), lambda *p: None
    )
    logits = np.full(task.width, -3e38)
    logits[:5] = 3e38

    @dataclasses.dataclass(frozen=True)
    class Sure(ConstantExplanation):
        def section(self, settings):
            return Section(self.kind, (QuantisedArray.from_values(self.mean, 1e37),))

    with pytest.raises(ExplanationError) as caught:
        judge_on(task)(Fitted(lambda task: Sure(logits, "sure")), phenomena=["behaviour"])
    outcome.refused(caught.value, "infinite or NaN", "unsupported")

    p, q = np.array([1.0, 2.0, 0.5]), np.array([300.0, -900.0, 100.0])
    log_p, log_q = (x - np.log(np.exp(x - x.max()).sum()) - x.max() for x in (p, q))
    exact = float((np.exp(log_p) * (log_p - log_q)).sum())
    assert exact > 700
    assert float(kl_nats(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))) == pytest.approx(exact, rel=1e-5)
