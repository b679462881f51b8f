"""SPD and APD on toy models of superposition, beside the published table: `python -m experiments.parameter_decomposition.run`.

Trains each model and its decomposition for every seed, and writes `results.json` (a row as soon as it is known, so that
a run that was stopped goes on) beside this file. Nothing here looks at the truth before the decomposition is finished.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decompositions.weights.apd import APDSettings, train_apd
from decompositions.weights.batches import SparseUniform
from decompositions.weights.factors import Factors
from decompositions.weights.masks import Bench, under_masks
from decompositions.weights.spd import SPDSettings, train_spd
from estimators.published.matching import column_match, column_parts, matrix_match
from mdl.models.toys.superposition import Superposition, superposition_inputs, train_superposition

HERE = Path(__file__).parent
TEST_INPUTS = 512
IN_USE = 0.005  # mean gate, or share of inputs, from which a component counts as in use: a tenth of a feature's


@dataclass(frozen=True)
class Case:
    """A toy model and how SPD and APD are trained on it."""

    network: Superposition
    batch: int
    spd: SPDSettings
    apd: APDSettings | None


def cases() -> dict[str, Case]:
    """Fewer steps and smaller batches than published, at higher learning rates; README.md has both."""
    small = {"gate_hidden": 8, "one_sided": True, "chunk": 1000}
    five = SPDSettings((("W", 20),), FIVE_STEPS, FIVE_RATE, importance=3e-3, **small)  # type: ignore[arg-type]
    forty = SPDSettings((("W", 200),), FORTY_STEPS, FORTY_RATE, importance=1e-4, power=2.0, **small)  # type: ignore[arg-type]
    with_identity = (("W", 20), ("identity", 20)), (("W", 200), ("identity", 200))
    apd_five = APDSettings(("W",), 5, 10_000, 1e-2, top_k=0.211, minimality=0.05, power=0.7, chunk=1000)
    from dataclasses import replace

    return {
        "5-2": Case(Superposition(5, 2), 1024, five, apd_five),
        "40-10": Case(Superposition(40, 10), 1024, forty, None),
        "5-2 identity": Case(Superposition(5, 2, True), 1024, replace(five, components=with_identity[0]), None),
        "40-10 identity": Case(Superposition(40, 10, True), 1024, replace(forty, components=with_identity[1]), None),
    }
