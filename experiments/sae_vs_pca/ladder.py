"""The rungs: explanations of one site from dumb to clever, as plug-in texts with the family that each belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.sae_vs_pca.models import MAIN_SITE
from mdl.score import EMBEDDED

ENCODER, PURSUIT = "SAE", "SAE, re-encoded by pursuit"
SHIPPED = {"jumprelu-8x": ("jumprelu", 8, 0.15), "topk-16x": ("topk", 16, 16), "topk-4x": ("topk", 4, 16)}
SHIPPED |= {"standard-4x": ("standard", 4, 1.2)}


@dataclass(frozen=True)
class Rung:
    """An explanation to score: `text` as `mdl compare --with` takes it; `family` is what tables group by.

    For autoencoders: `architecture`, `factor` (width over the activations'), `sparsity` (k, or the penalty), the
    number of activations it was trained on, and its training `seed`.
    """

    key: str
    family: str
    text: str
    architecture: str = ""
    factor: int = 0
    sparsity: float = 0.0
    samples: int = 0
    seed: int = 0


def yardsticks(region: str, width: int) -> Iterator[Rung]:
    """What needs no training beyond its own `fit`."""
    yield Rung("nothing", "nothing", "nothing")
    yield Rung("token-table", "table", "token-table")
    yield Rung("token-pairs", "pair table", "token-pairs")
    yield Rung("affine", "affine", "affine")
    yield Rung("predictor", "predictor", "predictor")
    for rank in (width // 24, width // 8, width // 2):
        yield Rung(f"pca-{rank}", "PCA", f"pca:rank={rank}")
    for k in (256, 1024):
        yield Rung(f"clusters-{k}", "clusters", f"clusters:k={k}")
    yield Rung("random-dictionary", "random dictionary", f"random-dictionary:features={4 * width},k=16")
    yield Rung("dictionary-learning", "dictionary learning", f"dictionary-learning:features={4 * width},k=16")
    yield Rung("block-sparse", "block-sparse", "block-sparse")
    yield Rung("table+pca", "table + PCA", f"sum:first=token-table,second='pca:rank={width // 8}'")
    yield Rung("pairs+pca", "pair table + PCA", f"sum:first=token-pairs,second='pca:rank={width // 8}'")


def trained(folder: Path) -> Iterator[Rung]:
    """The autoencoders in a folder, by their own metrics.json."""
    for path in sorted(folder.glob("*/metrics.json")):
        told = json.loads(path.read_text())
        name = path.parent.name
        what = (told["architecture"], told["factor"], told["sparsity"], told["training_tokens"], told["seed"])
        if told.get("leftover"):
            first = told["leftover"]
            text = f"sum:first={first},second='sae:path=\"{path.parent}\",any_site=true,name={name}'"
            yield Rung(f"{first}+{name}", f"{first} + SAE", text, *what)
        else:
            yield Rung(name, ENCODER, f'sae:path="{path.parent}",name={name}', *what)


def shipped() -> Iterator[Rung]:
    """The embedded model's own autoencoders."""
    for name, (architecture, factor, sparsity) in SHIPPED.items():
        folder = EMBEDDED / "saes" / name
        samples = json.loads((folder / "metrics.json").read_text())["training_tokens"]
        yield Rung(name, ENCODER, f'sae:path="{folder}"', architecture, factor, sparsity, samples)


def ladder(model: str, region: str, site: str, width: int, saes: Path) -> list[Rung]:
    """All rungs of one site of a model, the dumb ones first."""
    rungs = list(yardsticks(region, width))
    if (model, site) == ("embedded", MAIN_SITE):
        rungs += shipped()
        for name in ("jumprelu-8x", "topk-16x"):
            folder = EMBEDDED / "saes" / name
            architecture, factor, sparsity = SHIPPED[name]
            text = f'sae:path="{folder}",encoder=pursuit,k=16'
            rungs.append(Rung(f"{name}+pursuit", PURSUIT, text, architecture, factor, sparsity))
    return rungs + list(trained(saes / site))
