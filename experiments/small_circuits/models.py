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
from mdl.models.transformer import Params, mlp, unembed

VOCABULARY, POSITIONS, PERIODS = 64, 48, range(8, 24)  # of the induction models
MODULUS = 113
TRAIN_SHARE = 0.4  # of the additions, which are trained on
LONGEST = 30  # string of brackets


@dataclass(frozen=True)
class Small:
    """How a small model is made.

    **Arguments:** `examples(step, seed)`: what it is trained on at a step, the same each time it is asked;
    `test(seed)`: what its figures are measured on; `last`: whether only the last position is ever measured (its logits
    alone are computed then); `warm_up`: steps in which the rate rises to `rate`; `falling`: whether it then falls to
    zero along a cosine, or stays; `scale`: of the initial weights (a small one shortens what is known as grokking: Liu
    et al. 2022, "Omnigrok", arXiv:2210.01117); `smoothing`: share of each label that is spread evenly over all of
    them, so that logits do not grow without end: of a model that is sure of everything, rounded weights make one that
    is wrong and as sure, and its Fisher information says that nothing matters.
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
    scale: float = 1.0
    smoothing: float = 0.0


def _plain(**sizes: int) -> TransformerConfig:
    return TransformerConfig(norm="none", activation="relu", **sizes)  # type: ignore[arg-type]


def _induction(heads: int) -> Small:
    config = _plain(n_layers=2, d_model=64, n_heads=heads, d_head=32, d_vocab=VOCABULARY, n_ctx=POSITIONS)

    def drawn(step: int, seed: int) -> Examples:
        return repeats(32, np.random.default_rng([seed, step]), VOCABULARY, POSITIONS, PERIODS)

    def test(seed: int) -> Examples:
        return repeats(512, np.random.default_rng([seed, 1 << 31]), VOCABULARY, POSITIONS, PERIODS)

    return Small(f"induction-{heads}", config, drawn, test, steps=2000, rate=2e-3, weight_decay=0.01, smoothing=0.02)


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
        steps=1200,
        rate=2e-3,
        weight_decay=1.0,
        last=True,
        falling=False,
        scale=0.5,
    )


def _brackets() -> Small:
    config = _plain(n_layers=2, d_model=32, n_heads=2, d_head=16, d_vocab=4, n_ctx=LONGEST + 1, d_mlp=64, d_vocab_out=2)

    def drawn(step: int, seed: int) -> Examples:
        return brackets(128, np.random.default_rng([seed, step]), LONGEST)

    def test(seed: int) -> Examples:
        return brackets(2048, np.random.default_rng([seed, 1 << 31]), LONGEST)

    return Small("brackets", config, drawn, test, steps=2000, rate=3e-3, weight_decay=0.01, smoothing=0.02)


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


def initial_weights(config: TransformerConfig, seed: int, scale: float = 1.0) -> Params:
    """Normal, of variance scale^2 / d_model (d_mlp for `W_out`, n_heads d_head for `W_O`); biases (MLPs') zero."""
    keys = iter(jax.random.split(jax.random.key(seed), 4 + 6 * config.n_layers))
    d, h, e, m = config.d_model, config.n_heads, config.d_head, config.d_mlp

    def normal(*shape: int, fan: int = d) -> Array:
        return scale * jax.random.normal(next(keys), shape) / np.sqrt(fan)

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
    """The logits at the last position, [n, v], of a one-layer model without norms, of sequences that end in one token.

    Then there is one query, and scores and values are functions of token and position: made once for each and looked
    up, so that the MLP is nearly all there is to compute.
    """
    tokens, attn, heads = jnp.asarray(tokens), params["blocks"][0]["attn"], (config.n_heads, config.d_head)
    length = tokens.shape[1]
    with jax.default_matmul_precision("float32"):
        x = params["embed"]["W_E"][None] + params["pos_embed"]["W_pos"][:length, None]  # [t, v, d]
        end = x[-1, tokens[0, -1]]
        keys = jnp.einsum("hde,he->dh", attn["W_K"], jnp.einsum("d,hde->he", end, attn["W_Q"])) * config.scale
        values = jnp.moveaxis(attn["W_V"], 0, 1).reshape(config.d_model, -1)
        scores = jnp.stack([(x[t] @ keys)[tokens[:, t]] for t in range(length)], 1)  # [n, t, h]
        pattern = jax.nn.softmax(scores, 1)[..., None]
        z = pattern[:, -1] * (end @ values).reshape(heads)
        for t in range(length - 1):
            z = z + pattern[:, t] * (x[t] @ values)[tokens[:, t]].reshape(-1, *heads)
        stream = end + z.reshape(len(tokens), -1) @ attn["W_O"].reshape(-1, config.d_model)
        stream = stream + mlp(config, params["blocks"][0]["mlp"], 0, stream[:, None], Sites((), {}))[:, 0]
        return unembed(config, params, stream)
