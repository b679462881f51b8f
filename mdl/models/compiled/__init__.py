"""Small programs compiled into the weights of a transformer: models whose circuits are known, for we put them there.

The language and the construction are those of RASP (Weiss et al. 2021, arXiv:2106.06981) and Tracr (Lindner et al.
2023, arXiv:2301.05062); the code is ours.
"""

from mdl.models.compiled.assembly import Compiled, compile_program
from mdl.models.compiled.language import (
    BOS,
    PAD,
    Aggregate,
    Indices,
    Linear,
    Map,
    Program,
    Select,
    SelectorWidth,
    SequenceMap,
    Tokens,
    interpret,
)
from mdl.models.compiled.library import PROGRAMS

__all__ = [
    "BOS",
    "PAD",
    "PROGRAMS",
    "Aggregate",
    "Compiled",
    "Indices",
    "Linear",
    "Map",
    "Program",
    "Select",
    "SelectorWidth",
    "SequenceMap",
    "Tokens",
    "compile_program",
    "interpret",
]
