"""Bits of weights against the KL that their rounding makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np


def draw_lines(lines: dict[str, Any], path: Path) -> None:
    """Coded messages as points, the bound as a line, lambda log2 n as horizontal ones where the chains are at rest."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5.5))
    count = lines["parameters"]
    for name, points in lines.items():
        if name in ("bound", "parameters", "null_kl", "learning_coefficient"):
            continue
        kl, bits = np.array(points).T
        axis.plot(kl / lines["null_kl"], bits / count, marker="o", markersize=4, linewidth=1, label=f"{name} (coded)")
    kl, bits = np.array(lines["bound"]).T
    axis.plot(kl / lines["null_kl"], bits / count, "k--", label="water-filling bound (estimate)")
    for found in lines["learning_coefficient"]:
        label = f"lambda log2 n, localisation {found['localisation']:g} (estimate)"
        axis.axhline(found["bits"] / count, color="0.6", linestyle=":", linewidth=1)
        axis.annotate(label, (2e-4, found["bits"] / count), fontsize=7, color="0.4", va="bottom")
    axis.set(xscale="log", xlim=(1e-4, 1.2), ylim=(0, 8), xlabel="KL / null's KL", ylabel="bits a weight")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
