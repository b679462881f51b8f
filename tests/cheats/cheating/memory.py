from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mdl.alphabets import IndexAlphabet


@dataclass(frozen=True)
class MemoryDecoder:
    centroids: np.ndarray
    memory = None

    @classmethod
    def from_section(cls, section):
        return cls(section.parts[0].values())

    @property
    def alphabet(self):
        return IndexAlphabet(len(self.centroids))

    def predict(self, inputs, state):
        own = self.centroids[state.indices]
        return self.memory if self.memory is not None and self.memory.shape == own.shape else own

    def touched(self, inputs, state):
        return state.touched()

    def flops_per_token(self, inputs, state):
        return 0.0
