"""What outputs owe to the token and to the pair of tokens that they stand behind: nested random effects.

Tables are made of these. The noise of a token's mean is not that of its positions alone: those of one pair are alike,
so that a token seen a hundred times behind one and the same token has told little of what it is elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse

from mdl.errors import ExplanationError
from mdl.models.vectors import VECTORS
from mdl.protocols import Inputs

LARGEST_TOKEN = (1 << 31) - 1
OWN = 0  # the code of a token's own row; a pair's is FIRST + the previous id, and FIRST - 1 = 1 is "no token before"
FIRST = 2
SPAN = LARGEST_TOKEN + FIRST + 1  # codes per token, in one key
SMALL = 1e-9


def previous_tokens(inputs: Inputs) -> np.ndarray:
    """Token ids before the scored positions, special ones included, [n]; -1 at the beginning of a sequence."""
    before = np.concatenate([np.full((len(inputs.tokens), 1), -1), inputs.tokens[:, :-1]], 1)
    return before[inputs.scored].astype(np.int64)


def own_keys(inputs: Inputs) -> np.ndarray:
    """One integer for the token of each scored position, [n]: the key of its own row."""
    return inputs.scored_tokens().astype(np.int64) * SPAN + OWN


def pair_keys(inputs: Inputs) -> np.ndarray:
    """One integer for the pair at each scored position, [n]: the key of its row."""
    return inputs.scored_tokens().astype(np.int64) * SPAN + FIRST + previous_tokens(inputs)


class Pairs(NamedTuple):
    """Pairs that occur: `keys` [pairs] increase; `pair` [n]: the number of each position's; `counts` [pairs]; `tokens`:
    ids that occur, ascending; `owner` [pairs]: the number of each pair's token among them."""

    keys: np.ndarray
    pair: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    owner: np.ndarray


def check_tokens(output: str, name: str) -> None:
    """**Raises:** `ExplanationError` where there are no token ids."""
    if output == VECTORS:
        raise ExplanationError(f"{name}: rows of numbers have no token ids to look anything up by")


def numbered_pairs(inputs: Inputs) -> Pairs:
    """The pairs at the scored positions."""
    keys, pair, counts = np.unique(pair_keys(inputs), return_inverse=True, return_counts=True)
    tokens, owner = np.unique(keys // SPAN, return_inverse=True)
    return Pairs(keys, pair, counts, tokens, owner)


def group_sums(index: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    """Sums of the rows of `values` [n, d] that share an `index` [n], [groups, d]."""
    n = len(index)
    select = scipy.sparse.csr_array((np.ones(n), index, np.arange(n + 1)), (n, groups))
    return np.asarray(select.T @ values)


def nested_effects(
    outputs: np.ndarray, owner: np.ndarray, pair: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Best linear predictions of x = mean + a[token] + b[pair] + noise.

    In the directions that diagonalise the covariances of b and of the noise at once (variances l and 1 there), with
    \bar x_p the mean of a pair seen c_p times:

    $$\hat a_t = \frac{v}{v + 1/w_t} \Big(\frac{1}{w_t} \sum_{p \in t} w_p \bar x_p - \mu\Big), \quad
      w_p = \frac{1}{l + 1/c_p}, \quad w_t = \sum_{p \in t} w_p, \quad
      \hat b_p = \frac{l}{l + 1/c_p} (\bar x_p - \mu - \hat a_t)$$

    Covariances by the method of moments (analysis of variance, Searle, Casella and McCulloch 1992, "Variance
    Components", 3.6 and 7.4); the shrinkage is that of James and Stein 1961 at both levels.

    **Arguments:** `outputs` [n, d]; `owner` [pairs]: the number of each pair's token; `pair` [n]: the pair's number.

    **Returns:** mean [d], a [tokens, d], b [pairs, d].
    """
    x = outputs.astype(np.float64)
    n, pairs, tokens = len(x), len(owner), int(owner.max()) + 1
    mean, counts = x.mean(0), np.bincount(pair, minlength=pairs).astype(np.float64)
    means = group_sums(pair, x, pairs) / counts[:, None] - mean
    total = np.bincount(owner, counts)
    beyond = means - (group_sums(owner, means * counts[:, None], tokens) / total[:, None])[owner]
    inner = x - mean - means[pair]
    noise = inner.T @ inner / max(n - pairs, 1)
    noise += (SMALL * (np.trace(noise) + np.trace(x.T @ x / n)) / len(noise) + SMALL**2) * np.eye(len(noise))
    spread = (beyond * counts[:, None]).T @ beyond - (pairs - tokens) * noise
    spread /= max(n - (np.bincount(owner, counts**2) / total).sum(), 1.0)
    variances, basis = scipy.linalg.eigh((spread + spread.T) / 2, noise)
    variances = np.maximum(variances, SMALL)
    z, back = means @ basis, np.linalg.inv(basis)
    weight = 1.0 / (variances + 1.0 / counts[:, None])
    mass = group_sums(owner, weight, tokens)
    own = group_sums(owner, weight * z, tokens) / mass
    between = np.maximum((total @ (np.square(own) - 1.0 / mass)) / n, SMALL)
    own *= between / (between + 1.0 / mass)
    return mean, own @ back, (variances * weight * (z - own[owner])) @ back
