"""PCA of a given rank as a base under the standard residual coder.

It is the same transform code as the residual coder's own (`mdl/transform_coding.py`): rank 0 is "nothing", and any rank
must give the yardstick's total, which a test demands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mdl.errors import ExplanationError
from mdl.message import Section
from mdl.protocols import Sample, Settings
from mdl.state import DenseState
from mdl.task import Task
from mdl.transform_coding import KIND, Axes, ComponentsDecoder, TransformCoder, moments, principal_axes

SOME_TOKENS = 8192


@dataclass(frozen=True)
class PCAExplanation:
    """Coefficients on the first `rank` principal axes, in the metric in force, quantised with a step for each fidelity.

    The knob `value` is the ratio of the coefficients' step to the residual coder's. `mean` and `covariance` are the fit
    data's; `some` [n, d] is a sample of it, on which thresholds and reconstruction points are fitted.
    """

    mean: np.ndarray
    covariance: np.ndarray
    some: np.ndarray
    rank: int
    name: str
    kind: str = KIND
    knobs: Mapping[str, Sequence[float]] = field(default_factory=lambda: {"value": (1.0,)})
    # Axes of each metric met so far, by its identity: they do not depend on the step.
    known: dict[int, tuple[np.ndarray, Axes]] = field(default_factory=dict, compare=False, repr=False)

    def _coder(self, settings: Settings) -> TransformCoder:
        root = settings.root
        if id(root) not in self.known:
            self.known[id(root)] = (root, principal_axes(self.mean, self.covariance, root).first(self.rank))
        axes = self.known[id(root)][1]
        return TransformCoder.fit(axes, self.some, settings.step * settings.knobs.get("value", 1.0))

    def section(self, settings: Settings) -> Section:
        return self._coder(settings).section(settings)

    def encode(self, decoder: ComponentsDecoder, sample: Sample, settings: Settings) -> DenseState:
        return self._coder(settings).encode(sample.outputs)


@dataclass(frozen=True)
class PCA:
    """Principal components; `rank` from 0 to the width of the site."""

    rank: int = 16

    def fit(self, task: Task) -> PCAExplanation:
        if not 0 <= self.rank <= task.width:
            raise ExplanationError(
                f"pca: rank {self.rank} is outside 0 to {task.width}, the width of {task.region.output}"
            )
        outputs = np.asarray(task.fit.outputs)
        some = outputs[:: max(1, len(outputs) // SOME_TOKENS)]
        return PCAExplanation(*moments(outputs), some, self.rank, f"pca-{self.rank}")
