"""One dictionary, several explanations: the atoms are sent once, and every further explanation is a view of them.

An SAE at two sparsities, or under two encoders, is two explanations with the same decoder. Sent together they pay for
its rows once, precise enough for both; a view adds a bias, and for each atom the step and the class of its values.

    sections = dictionary of the first (all atoms that any of them uses), view of the second, view of the third, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from decompositions.dictionary import (
    KIND,
    DictionaryDecoder,
    DictionaryExplanation,
    FeatureStatistics,
    build_decoder,
    header_arrays,
    value_classes,
    value_exponents,
)
from mdl.errors import ExplanationError, MessageError
from mdl.message import QuantisedArray, Section, encode_message
from mdl.protocols import Settings

VIEW = "dictionary-view"


@dataclass(frozen=True)
class SharedBits:
    """Static bits of whole messages: each explanation `alone`, all of them `together`."""

    alone: tuple[float, ...]
    together: float

    @property
    def saved(self) -> float:
        """Bits that sending them together saves."""
        return sum(self.alone) - self.together


def merged(explanations: Sequence[DictionaryExplanation]) -> DictionaryExplanation:
    """The first, with what all of them together ask of the atoms: energies add up, for N tokens go through each.

    **Raises:** `ExplanationError` if there are none, or their atoms differ.
    """
    if not explanations:
        raise ExplanationError("nothing to send together: no explanation was given")
    first = explanations[0]
    for other in explanations[1:]:
        if not np.array_equal(first.atoms, other.atoms):
            raise ExplanationError(
                f"{first.name} {first.atoms.shape} and {other.name} {other.atoms.shape} have different atoms: only "
                "explanations with one and the same decoder matrix can share it"
            )
    every = [e.statistics for e in explanations]
    statistics = FeatureStatistics(
        frequency=np.max([s.frequency for s in every], axis=0),
        energy=np.sum([s.energy for s in every], axis=0),
        mean=first.statistics.mean,
        scale=first.statistics.scale,
    )
    return replace(first, statistics=statistics, rounded={})


def shared_sections(explanations: Sequence[DictionaryExplanation], settings: Settings) -> list[Section]:
    """The sections of one message: row i of every part array, in all of them, belongs to atom i.

    **Raises:** `ExplanationError` as `merged`.
    """
    kept, atoms = merged(explanations).kept(settings)
    sections: list[Section] = []
    for explanation in explanations:
        exponents = value_exponents(explanation.atoms, explanation.statistics, settings)
        classes = value_classes(explanation.statistics, exponents)
        values = tuple(QuantisedArray.from_integers(a[kept]) for a in (exponents, classes))
        header = header_arrays(explanation.bias, explanation.signed, explanation.side, settings)
        sections.append(Section(VIEW if sections else KIND, header, values if sections else (atoms, *values)))
    return sections


def shared_decoders(sections: Sequence[Section]) -> list[DictionaryDecoder]:
    """The receiver's decoders, one for each section. **Raises:** `MessageError` if the sections do not fit together."""
    kinds = [s.kind for s in sections]
    if kinds != [KIND] + [VIEW] * (len(kinds) - 1):
        raise MessageError(f"a dictionary and then its views are expected, not sections of the kinds {kinds}")
    first = DictionaryDecoder.from_section(sections[0])
    decoders = [first]
    for view in sections[1:]:
        if len(view.header) != 2 or len(view.parts) != 2:
            counts = f"{len(view.header)} header and {len(view.parts)} part arrays"
            raise MessageError(f"a view has 2 header and 2 part arrays; this one has {counts}")
        decoders.append(build_decoder(view, first.atoms, *view.parts))
    return decoders


def shared_bits(explanations: Sequence[DictionaryExplanation], settings: Settings) -> SharedBits:
    """Static bits of each explanation's own message, and of the one that holds them all."""
    alone = tuple(encode_message([e.section(settings)]).whole_bits for e in explanations)
    return SharedBits(alone, encode_message(shared_sections(explanations, settings)).whole_bits)
