"""The small models: architecture, data and recipe of each, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from experiments.small_circuits.examples import Examples, additions, brackets, repeats
from mdl.errors import ModelError, did_you_mean
from mdl.models.config import TransformerConfig
from mdl.models.sites import Sites
from mdl.models.transformer import Params, mlp, run, unembed

VOCABULARY, POSITIONS, PERIODS = 64, 48, range(8, 24)  # of the induction models
MODULUS = 113
TRAIN_SHARE = 0.3  # of the additions, which are trained on
LONGEST = 30  # string of brackets


@dataclass(frozen=True)
class Small:
    """How a small model is made.

    **Arguments:** `examples(step, seed)`: what it is trained on at a step, the same each time it is asked;
    `test(seed)`: what its figures are measured on; `last`: whether only the last position is ever measured (its logits
    alone are computed then); `warm_up`: steps in which the rate rises to `rate`; `falling`: whether it then falls to
    zero along a cosine, or stays.
    """

    name: str
    config: TransformerConfig
    examples: Callable[[int, int], Examples]
    test: Callable[[int], Examples]
    steps: int
    rate: float
    weight_decay: float
    last: bool = False
    warm_up: int = 10
    falling: bool = True


def _plain(**sizes: int) -> TransformerConfig:
    return TransformerConfig(norm="none", activation="relu", **sizes)  # type: ignore[arg-type]


def _induction(heads: int) -> Small:
    config = _plain(n_layers=2, d_model=64, n_heads=heads, d_head=32, d_vocab=VOCABULARY, n_ctx=POSITIONS)

    def drawn(step: int, seed: int) -> Examples:
        return repeats(64, np.random.default_rng([seed, step]), VOCABULARY, POSITIONS, PERIODS)

    def test(seed: int) -> Examples:
        return repeats(512, np.random.default_rng([seed, 1 << 31]), VOCABULARY, POSITIONS, PERIODS)

    return Small(f"induction-{heads}", config, drawn, test, steps=3000, rate=2e-3, weight_decay=0.01)


def split_additions(seed: int) -> tuple[Examples, Examples]:
    """The additions that are trained on, and the others: a permutation by the seed."""
    everything = additions(MODULUS)
    order = np.random.default_rng(seed).permutation(len(everything))
    cut = int(TRAIN_SHARE * len(everything))
    return everything[np.sort(order[:cut])], everything[np.sort(order[cut:])]


def _addition() -> Small:
    config = _plain(
        n_layers=1, d_model=128, n_heads=4, d_head=32, d_vocab=MODULUS + 1, n_ctx=3, d_mlp=512, d_vocab_out=MODULUS
    )
    return Small(
        "modular-addition",
        config,
        lambda step, seed: split_additions(seed)[0],
        lambda seed: split_additions(seed)[1],
        steps=6000,
        rate=1e-3,
        weight_decay=1.0,
        last=True,
        falling=False,
    )


def _brackets() -> Small:
    config = _plain(
        n_layers=2, d_model=32, n_heads=2, d_head=16, d_vocab=4, n_ctx=LONGEST + 1, d_mlp=64, d_vocab_out=2
    )

    def drawn(step: int, seed: int) -> Examples:
        return brackets(256, np.random.default_rng([seed, step]), LONGEST)

    def test(seed: int) -> Examples:
        return brackets(2048, np.random.default_rng([seed, 1 << 31]), LONGEST)

    return Small("brackets", config, drawn, test, steps=4000, rate=3e-3, weight_decay=0.01)


def models() -> dict[str, Small]:
    """All of them by name."""
    found = [*(_induction(heads) for heads in (1, 2, 4)), _addition(), _brackets()]
    return {small.name: small for small in found}


def model_named(name: str) -> Small:
    """**Raises:** `ModelError` for a name that there is not."""
    known = models()
    if name not in known:
        raise ModelError(f"no small model {name!r}.{did_you_mean(name, known)} There are {', '.join(known)}.")
    return known[name]


def initial_weights(config: TransformerConfig, seed: int) -> Params:
    """Normal, of variance 1 / d_model (1 / d_mlp for `W_out`, 1 / (n_heads d_head) for `W_O`); biases, of MLPs only, zero."""
    keys = iter(jax.random.split(jax.random.key(seed), 4 + 6 * config.n_layers))
    d, h, e, m = config.d_model, config.n_heads, config.d_head, config.d_mlp

    def normal(*shape: int, fan: int = d) -> Array:
        return jax.random.normal(next(keys), shape) / np.sqrt(fan)

    blocks = []
    for _ in range(config.n_layers):
        attn = {**{f"W_{n}": normal(h, d, e) for n in "QKV"}, "W_O": normal(h, e, d, fan=h * e)}
        mlps = {"W_in": normal(d, m), "b_in": jnp.zeros(m), "W_out": normal(m, d, fan=m), "b_out": jnp.zeros(d)}
        blocks.append({"attn": attn, **({"mlp": mlps} if m else {})})
    return {
        "embed": {"W_E": normal(config.d_vocab, d)},
        "pos_embed": {"W_pos": normal(config.n_ctx, d)},
        "blocks": blocks,
        "unembed": {"W_U": normal(d, config.n_logits)},
    }


def last_logits(config: TransformerConfig, params: Params, tokens: ArrayLike) -> Array:
    """The logits at the last position, [n, v], of a model without norms whose attention sees every position from there.

    Nothing else is computed in the last layer, which for sequences of three saves half of everything.
    """
    layer = config.n_layers - 1
    x = run(config, params, tokens, [f"blocks.{layer}.hook_resid_pre"])[f"blocks.{layer}.hook_resid_pre"]
    block = params["blocks"][layer]
    attn = block["attn"]
    with jax.default_matmul_precision("float32"):
        query = jnp.einsum("bd,hde->bhe", x[:, -1], attn["W_Q"])
        # W_K and W_V of what is looked at: keys and values themselves are never made
        scores = jnp.einsum("bhd,btd->bht", jnp.einsum("bhe,hde->bhd", query, attn["W_K"]), x) * config.scale
        mixed = jnp.einsum("bht,btd->bhd", jax.nn.softmax(scores, -1), x)
        z = jnp.einsum("bhd,hde->bhe", mixed, attn["W_V"])
        stream = x[:, -1] + jnp.einsum("bhe,hed->bd", z, attn["W_O"])
        if config.d_mlp:
            stream = stream + mlp(config, block["mlp"], layer, stream[:, None], Sites((), {}))[:, 0]
        return unembed(config, params, stream)
