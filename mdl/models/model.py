"""A model: configuration, weights, name, fingerprint and tokenizer, with its sites."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mdl.errors import ModelError
from mdl.models import flops, sites
from mdl.models.config import TransformerConfig
from mdl.models.transformer import Params, Write, run


def named_weights(params: Params) -> Iterator[tuple[str, Array]]:
    """Each weight with its TransformerLens name, `blocks.0.attn.W_Q`, in the order of the names."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    yield from sorted(
        ((jax.tree_util.keystr(p, simple=True, separator="."), leaf) for p, leaf in leaves), key=itemgetter(0)
    )


def fingerprint_of(config: TransformerConfig, params: Params) -> str:
    """SHA-256 (hex) of the configuration and of every weight's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, weight in named_weights(params):
        array = np.ascontiguousarray(np.asarray(weight))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Model:
    """A transformer with its weights, run by pure functions.

    **Arguments:** `params`: weights under TransformerLens's names; `fingerprint`: what identifies weights and
    configuration in a score; `tokenizer`: a `tokenizers.Tokenizer`, where the checkpoint has one.
    """

    config: TransformerConfig
    params: Params
    name: str
    fingerprint: str
    tokenizer: Any | None = None

    def sites(self) -> tuple[str, ...]:
        """All site names, in the order in which they are computed."""
        return sites.site_names(self.config)

    def check_site(self, name: str) -> None:
        """**Raises:** `ModelError`, with the nearest names, for a site that does not exist."""
        sites.check_site(name, self.sites())

    def site_shape(self, name: str, batch: int, positions: int) -> tuple[int, ...]:
        """Shape of the activation at a site, for `batch` sequences of `positions` tokens."""
        self.check_site(name)
        return sites.site_shape(self.config, name, batch, positions)

    def site_width(self, name: str) -> int:
        """Numbers per token at a site, heads and their channels together."""
        self.check_site(name)
        return sites.site_width(self.config, name)

    def start_of(self, site: str) -> tuple[int, bool, str]:
        """`(layer, from_mid, boundary)`: the latest start of a run that can replace `site`.

        `boundary` names the activation to start from: `site` itself when it is a residual stream, `"tokens"` when the
        embedding has to be run (`layer` is then -1).
        """
        self.check_site(site)
        return sites.start_of(self.config, site)

    def run(
        self,
        start: Any,
        reads: Collection[str],
        writes: Mapping[str, Write] | None = None,
        layer: int = -1,
        from_mid: bool = False,
    ) -> dict[str, Array]:
        """Run with this model's weights; see `mdl.models.transformer.run`.

        **Raises:** also `ModelError` for token ids outside the vocabulary, unless they are traced.
        """
        start = jnp.asarray(start)
        if layer < 0:
            self._check_tokens(start)
        return run(self.config, self.params, start, reads, writes, layer, from_mid)

    def _check_tokens(self, tokens: Array) -> None:
        if isinstance(tokens, jax.core.Tracer) or tokens.size == 0:
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.d_vocab:
            raise ModelError(
                f"token ids run from {low} to {high}, but {self.name!r} has a vocabulary of {self.config.d_vocab}. "
                "The tokens were probably made by another model's tokenizer."
            )

    def run_suffix(
        self, params: Params, site: str, value: Any, boundary: Any | None, reads: Collection[str]
    ) -> dict[str, Array]:
        """Run from the boundary activation with `value` in place of what the model has at `site`.

        **Arguments:** `params`: the weights (an argument, so that they can be traced and differentiated); `value`: at
        `site`, heads possibly flattened; `boundary`: the activation that `start_of(site)` names, or None when that is
        `site` itself.

        **Raises:** `ModelError` when a boundary is needed and missing.
        """
        layer, from_mid, boundary_site = self.start_of(site)
        if boundary_site == site:
            later = [name for name in reads if name != site]
            found = run(self.config, params, jnp.asarray(value), later, None, layer, from_mid)
            return {**found, site: jnp.asarray(value)} if site in reads else found
        if boundary is None:
            raise ModelError(
                f"replacing {site!r} runs the model from {boundary_site!r}, whose value was not given. "
                f"Read {boundary_site!r} first and pass it as the boundary."
            )
        return run(self.config, params, jnp.asarray(boundary), reads, {site: value}, layer, from_mid)

    @property
    def n_parameters(self) -> int:
        """How many numbers the weights are; a tied unembedding is counted once."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))

    def flops_per_token(self, n_context: int) -> int:
        """FLOPs per token of a forward pass (2 a multiply-add) over sequences of `n_context` tokens."""
        return flops.flops_per_token(self.config, n_context)

    def flops_upstream(self, site: str, n_context: int) -> int:
        """FLOPs per token that the activation at `site` depends on."""
        self.check_site(site)
        return flops.flops_upstream(self.config, site, n_context)
