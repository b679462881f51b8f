from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mdl.alphabets import IndexAlphabet


@dataclass(frozen=True)
class HeavyDecoder:
    centroids: np.ndarray

    @classmethod
    def from_section(cls, section):
        return cls(section.parts[0].values())

    @property
    def alphabet(self):
        return IndexAlphabet(len(self.centroids))

    def predict(self, inputs, state):
        found = self.centroids
        for _ in range(3000):
            found = np.linalg.qr(found.T)[0].T + self.centroids
        return found[state.indices] * 0.0 + self.centroids[state.indices]

    def touched(self, inputs, state):
        return state.touched()

    def flops_per_token(self, inputs, state):
        return 0.0
