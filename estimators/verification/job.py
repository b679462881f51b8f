"""What the auditor hands a receiver, and what it gets back: a folder of plain files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdl.models import Model, Vectors
from mdl.models.outside import load_outside, save_outside
from mdl.models.toys.description import described as network_description
from mdl.models.toys.description import from_description
from mdl.receiver import Streams
from mdl.task import Activations, Region, collect_boundary

INPUTS, DESCRIPTION, MESSAGES = "inputs.npz", "job.json", "messages"


@dataclass(frozen=True)
class Job:
    """A receiver's whole world: the model outside the region, the inputs, the message files.

    `names`: message files without their suffix; `special`: special token ids, whose positions get constants;
    `width`: of rows of numbers, of which a receiver knows no more, but for the inputs and the architecture (`network`,
    as `mdl.models.toys.description` has it) of a network that they come from; `likelihood`, `noise`: of theirs.
    """

    folder: Path
    region: Region
    names: tuple[str, ...]
    special: tuple[int, ...]
    width: int | None = None
    network: dict[str, Any] | None = None
    likelihood: str = "gaussian"
    noise: float | None = None

    @classmethod
    def write(
        cls,
        folder: Path,
        model: Model | Vectors,
        region: Region,
        held_out: Activations,
        special: tuple[int, ...],
        sent: dict[str, tuple[bytes, Streams]],
    ) -> Job:
        """Leave everything that the receiver may know in an empty folder."""
        rows: dict[str, Any] = {}
        if isinstance(model, Model):
            save_outside(model, region.input, region.output, folder)
        else:
            network = None if model.network is None else network_description(model.network)
            rows = {"width": model.site_width(region.output), "network": network}
            rows |= {"likelihood": model.likelihood, "noise": model.noise}
        values: dict[str, Any] = {} if not rows or held_out.inputs is None else {"values": held_out.inputs}
        np.savez(folder / INPUTS, tokens=held_out.tokens, scored=held_out.scored, groups=held_out.groups, **values)
        (folder / MESSAGES).mkdir()
        for name, (message, streams) in sent.items():
            for suffix, data in ((".mdl", message), (".state", streams.state), (".residual", streams.residual)):
                (folder / MESSAGES / (name + suffix)).write_bytes(data)
        boundaries = [region.name, region.input, region.output]
        described = {"region": boundaries, "names": [*sent], "special": [*special], "rows": rows}
        (folder / DESCRIPTION).write_text(json.dumps(described))
        return cls(folder, region, tuple(sent), special, **rows)

    @classmethod
    def read(cls, folder: Path) -> Job:
        """What `write` left."""
        described = json.loads((folder / DESCRIPTION).read_text())
        region, names, special = (tuple(described[key]) for key in ("region", "names", "special"))
        return cls(folder, Region(*region), names, special, **described["rows"])

    def model(self) -> Model | Vectors:
        """The model without the region's weights; of rows of numbers, their width; of a network, its inputs too."""
        if self.width is None:
            return load_outside(self.folder)
        with np.load(self.folder / INPUTS, allow_pickle=False) as arrays:
            values = arrays["values"][:, 0] if "values" in arrays.files else None
        network = None if self.network is None else from_description(self.network)
        return Vectors.outside(self.width, values, network, self.likelihood, self.noise)

    def activations(self, model: Model | Vectors) -> Activations:
        """The held-out inputs with what the receiver computes of them."""
        with np.load(self.folder / INPUTS, allow_pickle=False) as arrays:
            tokens, scored, groups = (arrays[name] for name in ("tokens", "scored", "groups"))
        if isinstance(model, Vectors):  # a row goes by its number, and the receiver's inputs are these rows'
            tokens = np.arange(len(tokens), dtype=np.int32)[:, None]
        return collect_boundary(model, self.region, tokens, scored, groups)

    def sent(self, name: str) -> tuple[bytes, Streams]:
        """The bytes of one score: message and streams."""
        message, state, residual = (
            (self.folder / MESSAGES / (name + suffix)).read_bytes() for suffix in (".mdl", ".state", ".residual")
        )
        return message, Streams(state, residual)
