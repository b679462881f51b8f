"""An architecture as plain JSON, and back: how a receiver is told which network it is that it lacks the weights of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mdl.errors import ModelError, did_you_mean
from mdl.models.toys.gated import GatedFunctions
from mdl.models.toys.modular import ModularAddition
from mdl.models.toys.residual import ResidualMLP
from mdl.models.toys.superposition import Superposition

NETWORKS = (Superposition, ResidualMLP, ModularAddition, GatedFunctions)


def described(network: Any) -> dict[str, Any]:
    """Class name and fields. **Raises:** `ModelError` for a network that is none of NETWORKS."""
    if not isinstance(network, NETWORKS):
        raise ModelError(
            f"a network of class {type(network).__name__} cannot be described to a receiver; those that can are "
            f"{', '.join(sorted(kind.__name__ for kind in NETWORKS))}"
        )
    return {"class": type(network).__name__, **asdict(network)}


def from_description(description: Mapping[str, Any]) -> Any:
    """The network that `described` describes. **Raises:** `ModelError` for a description of none."""
    known = {kind.__name__: kind for kind in NETWORKS}
    name = str(description.get("class"))
    if name not in known:
        raise ModelError(f"no network {name!r}.{did_you_mean(name, known)} Known are {', '.join(sorted(known))}.")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items() if k != "class"}
    try:
        return known[name](**fields)
    except TypeError as error:
        raise ModelError(f"{name} does not take the fields {', '.join(fields)} ({error})") from error
