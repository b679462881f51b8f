"""What is compared: TopK autoencoders trained by sae-lens as part of `fit`, and raw pixels as axes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata

from decompositions.dictionary import DictionaryExplanation
from decompositions.pca import SOME_TOKENS, PCAExplanation
from decompositions.sae import SAE
from mdl.models.vectors import VECTORS
from mdl.task import Task
from mdl.transform_coding import moments

BATCH = 128  # images a training step
STEPS = 800
RATE = 3e-3  # of Adam
# Of a value, in steps of the residual coder. The search climbs from the middle of the grid: at a tolerance of 10 % the
# default grid's middle, 7, rounds nearly every value to zero, and a climb that begins with no feature on ends there.
VALUE_STEPS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)


@dataclass(frozen=True)
class TopKSAE:
    """A TopK autoencoder of `width` features, `k` on an image, trained on the fit images and on nothing else."""

    width: int
    k: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"topk-{self.width}-{self.k}"

    def fit(self, task: Task) -> DictionaryExplanation:
        """Train it, then let `decompositions.sae` take it as it takes any sae-lens SAE."""
        sae = train(task.fit.outputs, self.width, self.k, self.seed, task.model.name)
        explanation = SAE(object=sae, name=self.name).fit(task)
        return replace(explanation, knobs={**explanation.knobs, "value": VALUE_STEPS})


@dataclass(frozen=True)
class Pixels:
    """Each pixel an axis of its own: raw pixels, quantised at one step, under an adaptive code for each."""

    name: str = "pixels"

    def fit(self, task: Task) -> PCAExplanation:
        outputs = np.asarray(task.fit.outputs)
        mean, covariance = moments(outputs)
        some = outputs[:: max(1, len(outputs) // SOME_TOKENS)]
        return PCAExplanation(mean, np.diag(np.diag(covariance)), some, task.width, self.name)


def shuffled_batches(images: np.ndarray, seed: int) -> Iterator[torch.Tensor]:
    """Batches without end: epochs, each in a random order of its own."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    while True:
        while len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(len(images))])
        yield torch.from_numpy(images[order[:BATCH]])
        order = order[BATCH:]


def train(images: np.ndarray, width: int, k: int, seed: int, name: str) -> TrainingSAE:
    """One autoencoder; its bias starts at the mean image, and the scale of the images is folded in at the end."""
    torch.manual_seed(seed)
    config = TopKTrainingSAEConfig(
        d_in=images.shape[1],
        d_sae=width,
        k=min(k, width),
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(hook_name=VECTORS, model_name=name),
    )
    sae = TopKTrainingSAE(config)
    scale = np.sqrt(config.d_in) / np.linalg.norm(images, axis=1).mean()
    sae.b_dec.data.copy_(torch.from_numpy(images.mean(0) * scale))
    settings = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=RATE,
        lr_end=RATE / 10,
        lr_warm_up_steps=STEPS // 50,
        lr_decay_steps=STEPS // 4,
        dead_feature_window=STEPS // 20,
        feature_sampling_window=STEPS,
        n_batches_for_norm_estimate=20,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(settings, sae, shuffled_batches(images, seed)).fit()
