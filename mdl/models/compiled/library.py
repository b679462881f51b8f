"""Programs: those of RASP and Tracr that are usual, each from how many tokens a sequence may have.

**Source:** Weiss et al. 2021 (arXiv:2106.06981); Lindner et al. 2023 (arXiv:2301.05062), which has the same programs
by the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations, product

from mdl.models.compiled.language import (
    PAD,
    Aggregate,
    Indices,
    Linear,
    Map,
    Operation,
    Program,
    Select,
    SelectorWidth,
    SequenceMap,
    Tokens,
    Value,
)


def all_sequences(vocabulary: tuple[Value, ...], longest: int) -> tuple[tuple[Value, ...], ...]:
    """All sequences of 1 to `longest` tokens."""
    return tuple(s for n in range(1, longest + 1) for s in product(vocabulary, repeat=n))


def length_of(tokens: Operation) -> SelectorWidth:
    """How many tokens there are: positions that are not filled up."""
    return SelectorWidth("length", Select(tokens, tokens, lambda k, q: k != PAD))


def reverse(longest: int = 5, vocabulary: tuple[Value, ...] = ("a", "b", "c")) -> Program:
    """The sequence backwards: length - index - 1 is looked up."""
    tokens, indices = Tokens(), Indices()
    rest = SequenceMap("length minus index", lambda n, i: n - i, length_of(tokens), indices)
    opposite = Map("opposite", lambda i: i - 1, rest)
    output = Aggregate("reverse", Select(indices, opposite, lambda k, q: k == q), tokens)
    return Program("reverse", output, vocabulary, longest, all_sequences(vocabulary, longest))


def frac_prevs(longest: int = 5, vocabulary: tuple[Value, ...] = ("w", "x", "y", "z")) -> Program:
    """The share of "x" among the tokens so far."""
    tokens, indices = Tokens(), Indices()
    is_x = Map("is x", lambda t: int(t == "x"), tokens, "numerical")
    output = Aggregate("share of x", Select(indices, indices, lambda k, q: k <= q), is_x)
    return Program("frac_prevs", output, vocabulary, longest, all_sequences(vocabulary, longest))


def hist(longest: int = 5, vocabulary: tuple[Value, ...] = ("a", "b", "c")) -> Program:
    """How often each token occurs in the sequence."""
    tokens = Tokens()
    output = SelectorWidth("count", Select(tokens, tokens, lambda k, q: k == q))
    return Program("hist", output, vocabulary, longest, all_sequences(vocabulary, longest))


def sort(longest: int = 4, vocabulary: tuple[Value, ...] = (1, 2, 3, 4, 5, 6)) -> Program:
    """The tokens, all different, in ascending order: each goes where as many positions are before it as are smaller."""
    tokens, indices = Tokens(), Indices()
    smaller = Select(tokens, tokens, lambda k, q: k != PAD and (q == PAD or k < q))
    place = SelectorWidth("place", smaller)
    output = Aggregate("sorted", Select(place, indices, lambda k, q: k == q), tokens)
    inputs = tuple(s for n in range(1, longest + 1) for s in permutations(vocabulary, n))
    return Program("sort", output, vocabulary, longest, inputs)


def _balance(tokens: Operation, indices: Operation) -> Linear:
    """Shares of opening less shares of closing brackets among the tokens so far."""
    before = Select(indices, indices, lambda k, q: k <= q)
    opening = Map("opens", lambda t: int(t == "("), tokens, "numerical")
    closing = Map("closes", lambda t: int(t == ")"), tokens, "numerical")
    shares = [Aggregate(f"share that {x.name}", before, x) for x in (opening, closing)]
    return Linear("balance", 1, shares[0], -1, shares[1])


def pair_balance(longest: int = 5, vocabulary: tuple[Value, ...] = ("(", ")", "x")) -> Program:
    """Opening less closing brackets among the tokens so far, as a share of these."""
    return Program(
        "pair_balance", _balance(Tokens(), Indices()), vocabulary, longest, all_sequences(vocabulary, longest)
    )


def dyck(longest: int = 8, vocabulary: tuple[Value, ...] = ("(", ")")) -> Program:
    """Whether the brackets are balanced: never more closed than opened, and none open at the end (Dyck-1)."""
    tokens, indices = Tokens(), Indices()
    balance = _balance(tokens, indices)
    negative = Map("negative", lambda b: b < 0, balance)
    times = SelectorWidth("times negative", Select(negative, negative, lambda k, q: k))
    ever = Map("ever negative", lambda n: n > 0, times)
    even = Map("even", lambda b: b == 0, balance)
    last = Select(indices, length_of(tokens), lambda k, q: k == q - 1)
    output = SequenceMap("balanced", lambda e, n: e and not n, Aggregate("even at the end", last, even), ever)
    return Program("dyck-1", output, vocabulary, longest, all_sequences(vocabulary, longest))


PROGRAMS: Mapping[str, Callable[[], Program]] = {
    "reverse": reverse,
    "frac_prevs": frac_prevs,
    "hist": hist,
    "sort": sort,
    "pair_balance": pair_balance,
    "dyck-1": dyck,
}
