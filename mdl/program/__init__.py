"""Decoders as programs: a small total language that travels in the message, and its fixed interpreter.

`LANGUAGE.md` beside this file lists the instructions and what they cost.
"""

from mdl.program.builder import Node, Program, prices, render
from mdl.program.decoder import ProgramDecoder

__all__ = ["Node", "Program", "ProgramDecoder", "prices", "render"]
