"""What is to be explained: a region of a model, on some data, as one of two phenomena.

A region is a contiguous piece of the computational graph: the receiver can compute what enters it, and runs the rest of
the model behind it. It is given as text: "upstream of blocks.2.hook_resid_pre", "blocks.1.mlp", "blocks.1.attn", or
"model"; for a torch module without an adapter, "upstream of " a submodule's name, or "model"; for rows of numbers,
"vectors".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from mdl.data import Dataset, refuse_repeats
from mdl.errors import DataError, TaskError, did_you_mean
from mdl.models import AnyModel
from mdl.models.model import Model
from mdl.models.networks import Network, TransformerRegion, network_flops
from mdl.models.torch_path import TorchModel
from mdl.models.transformer import run
from mdl.models.vectors import VECTORS, Vectors
from mdl.protocols import Inputs, Sample

BEHAVIOUR, ACTIVATIONS = "behaviour", "activations"
DEFAULT_FIDELITIES = (0.1, 0.01, 0.001)
HEADLINE_FIDELITY = 0.01
PREFIX_TOKENS = 4096  # tokens per call of the prefix
TORCH_TOKENS = 1024  # tokens per call of a torch module, which goes on to the logits


@dataclass(frozen=True)
class Region:
    """A piece of the model between an input boundary and an output boundary.

    `input` is "tokens" or a site name; `output` a site name or "logits".
    """

    name: str
    input: str
    output: str


def parse_region(text: str, model: AnyModel) -> Region:
    """Read a region's text. **Raises:** `TaskError` with the forms that exist, or the nearest site names."""
    text = " ".join(text.split())
    if isinstance(model, Vectors):
        if text != VECTORS:
            raise TaskError(f"no region {text!r}: {model.name} are rows of numbers, and their region is {VECTORS!r}")
        return Region(text, "nothing" if model.inputs is None else "inputs", VECTORS)
    if text == "model":
        return Region(text, "tokens", "logits")
    if isinstance(model, TorchModel):
        return _torch_region(text, model)
    if match := re.fullmatch(r"blocks\.(\d+)\.(mlp|attn)", text):
        layer, part = int(match[1]), match[2]
        if layer >= model.config.n_layers:
            layers = model.config.n_layers
            raise TaskError(f"region {text!r}: the model has {layers} layers, blocks.0 to blocks.{layers - 1}")
        if part == "mlp" and model.config.d_mlp == 0:
            raise TaskError(f"region {text!r}: this model is attention-only and has no MLPs")
        norm, out = ("ln2", "hook_mlp_out") if part == "mlp" else ("ln1", "hook_attn_out")
        return Region(text, f"blocks.{layer}.{norm}.hook_normalized", f"blocks.{layer}.{out}")
    if match := re.fullmatch(r"upstream of (\S+)", text):
        model.check_site(match[1])
        if model.start_of(match[1])[2] != match[1]:
            raise TaskError(
                f"region {text!r}: {match[1]} does not cut the model in two (the residual stream passes beside it). "
                "Take a residual-stream site (hook_resid_pre, hook_resid_mid, hook_resid_post), or the region "
                "'blocks.L.mlp' or 'blocks.L.attn' whose output it is."
            )
        return Region(text, "tokens", match[1])
    forms = ["upstream of blocks.L.hook_resid_pre", "blocks.L.mlp", "blocks.L.attn", "model"]
    raise TaskError(f"no region {text!r}.{did_you_mean(text, forms)} A region is one of: {', '.join(forms)}.")


def _torch_region(text: str, model: TorchModel) -> Region:
    match = re.fullmatch(r"upstream of (\S+)", text)
    if not match:
        near = did_you_mean(text, [f"upstream of {site}" for site in model.sites()])
        raise TaskError(
            f"no region {text!r}.{near} {model.name} runs as a torch module, without an adapter: its regions are "
            "'upstream of NAME', NAME being a submodule's, and 'model'."
        )
    model.check_site(match[1])
    return Region(text, "tokens", match[1])


def region_flops(model: AnyModel, region: Region, context: int) -> int | float:
    """FLOPs per token (a multiply-add is two) between the region's boundaries; NaN for a torch module: unknown."""
    if isinstance(model, Vectors):
        if model.network is None or model.inputs is None:
            return 0
        return network_flops(model.network, model.inputs.shape[1])
    if isinstance(model, TorchModel):
        return math.nan
    if region.output == "logits":
        return model.flops_per_token(context)
    before = 0 if region.input == "tokens" else model.flops_upstream(region.input, context)
    return model.flops_upstream(region.output, context) - before


@dataclass(frozen=True)
class Activations:
    """Tokens and what M computes on them at the region's boundaries; [sequences, positions, ...] throughout.

    `boundary` is the residual stream from which a suffix can be run when the output site lies beside it, else None;
    `groups` [sequences] numbers the documents, the unit of sampling; `network` is the region's architecture;
    `measured` marks where M's predictions are asked for (None: at every scored position).
    """

    tokens: np.ndarray
    scored: np.ndarray
    groups: np.ndarray
    outputs: np.ndarray
    inputs: np.ndarray | None
    boundary: np.ndarray | None
    network: Network | None = None
    measured: np.ndarray | None = None

    @property
    def asked(self) -> np.ndarray:
        """Scored positions at which M's predictions are asked for, bool [sequences, positions]."""
        return self.scored if self.measured is None else self.scored & self.measured

    def boundary_of(self, chosen: slice) -> np.ndarray | None:
        return None if self.boundary is None else self.boundary[chosen]

    @property
    def n_tokens(self) -> int:
        return int(self.scored.sum())

    def sample(self) -> Sample:
        """The scored positions as a decomposition sees them."""
        return Sample(Inputs(self.tokens, self.scored, self.inputs, self.network), self.outputs[self.scored])

    def group_sums(self, per_token: np.ndarray) -> np.ndarray:
        """Sums of a per-token figure [n] over each document, the unit of sampling."""
        owner = np.broadcast_to(self.groups[:, None], self.tokens.shape)[self.scored]
        return np.bincount(owner, per_token, self.groups.max() + 1)

    def filled(self, values: np.ndarray, constants: Mapping[int, np.ndarray]) -> np.ndarray:
        """Region outputs [sequences, positions, d] with `values` [n, d] at the scored positions and a constant [d] at
        those of each special token."""
        full = np.zeros_like(self.outputs)
        full[self.scored] = values
        for token, row in constants.items():
            full[self.tokens == token] = row
        return full

    def head(self, sequences: int) -> Activations:
        """The first sequences only, for a quick look."""
        return self.some(slice(sequences))

    def some(self, chosen: np.ndarray | slice) -> Activations:
        """Some sequences, by number."""
        cut: dict[str, Any] = {k: v[chosen] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **cut)


@dataclass(frozen=True)
class Task:
    """Model, region, data and phenomenon: what a score is a score of.

    **Arguments:** `fit`: what explanations are fitted on; `tune`: disjoint from it, for the residual coder's transform
    and all choices of knobs; `held_out`: what rates are measured on, None in the view that decompositions get;
    `description`: model, data and their hashes, which go into the scorecard.
    """

    model: AnyModel
    region: Region
    fit_activations: Activations
    tune_activations: Activations
    held_out: Activations | None
    description: dict[str, Any]

    @property
    def fit(self) -> Sample:
        return self.fit_activations.sample()

    @property
    def width(self) -> int:
        """Width d of the region's output."""
        return int(self.fit_activations.outputs.shape[-1])

    def for_fitting(self) -> Task:
        """The task as a decomposition sees it: without the held-out data."""
        return replace(self, held_out=None)


def build_task(model: AnyModel, region_text: str, data: Dataset, progress: Callable[..., Any]) -> Task:
    """Run the model once over all the data and keep what the region's boundaries carry.

    **Raises:** `TaskError` for the region, `DataError` for sequences longer than the model's context or token ids
    beyond its vocabulary, all before any long work; `DataError` for activations that are not finite.
    """
    region = parse_region(region_text, model)
    context, vocabulary = _limits(model)
    if data.fit.shape[1] > context:
        raise DataError(
            f"sequences of {data.fit.shape[1]} tokens exceed the model's context of {context}: use --context"
        )
    largest = max(int(t.max()) for t in (data.fit, data.tune, data.held_out))
    if largest >= vocabulary:
        raise DataError(
            f"token id {largest} is outside the model's vocabulary of {vocabulary}: the tokens were probably made by "
            "another tokenizer"
        )
    if isinstance(model, TorchModel):
        _check_cut(model, region, data.fit[:2])
    refuse_repeats(_contents(model, data) if isinstance(model, Vectors) else data)
    parts = []
    for index, (name, tokens, groups, measured) in enumerate(data.splits()):
        progress(f"running the model on {name} data", index, 3)
        found = collect(model, region, tokens, ~np.isin(tokens, data.special_tokens), groups)
        parts.append(replace(found, measured=measured))
        if not parts[-1].asked.any():
            raise DataError(f"no position of the {name} data is measured: there is nothing to be reproduced")
    description = {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "parameters": model.n_parameters,
        "region": region.name,
        "region_input": region.input,
        "region_output": region.output,
        "region_flops": region_flops(model, region, data.fit.shape[1]),
        "width": int(parts[0].outputs.shape[-1]),
        **data.description,
        "fit_tokens": parts[0].n_tokens,
        "tune_tokens": parts[1].n_tokens,
        "held_out_tokens": parts[2].n_tokens,
        "held_out_units": int(parts[2].groups.max()) + 1,
        **({} if data.measured is None else {"measured_tokens": int(parts[2].asked.sum())}),
    }
    return Task(model, region, parts[0], parts[1], parts[2], description)


def _limits(model: AnyModel) -> tuple[int | float, int]:
    """The longest sequence (infinite where positions have no end, or none is known), and the number of token ids."""
    if isinstance(model, TorchModel):
        return model.n_ctx or math.inf, model.site_width("logits")
    if isinstance(model, Vectors):
        return 1, len(model.rows)
    return model.config.n_ctx if model.config.positions == "learned" else math.inf, model.config.d_vocab


def _contents(model: Vectors, data: Dataset) -> Dataset:
    """The data with equal rows under one number."""
    same = model.first_equal
    return replace(data, fit=same[data.fit], tune=same[data.tune], held_out=same[data.held_out])


def _check_cut(model: TorchModel, region: Region, tokens: np.ndarray) -> None:
    if region.output != "logits" and not model.is_cut_by(region.output, tokens):
        raise TaskError(
            f"region {region.name!r}: {region.output} does not cut the model in two: with its output held fixed, the "
            "logits still change with the tokens, so something passes beside it (such as the residual stream). Take a "
            "submodule through which everything passes, such as a whole block."
        )


def collect(model: AnyModel, region: Region, tokens: np.ndarray, scored: np.ndarray, groups: np.ndarray) -> Activations:
    """M's activations at the region's boundaries. **Raises:** `DataError` naming the site that is not finite."""
    if isinstance(model, TorchModel):
        outputs = _torch_outputs(model, region.output, tokens)
        _check_finite(region.output, outputs)
        return Activations(tokens, scored, groups, outputs, None, None)
    if isinstance(model, Vectors):
        return _vectors(model, tokens, scored, groups, model.rows[tokens])
    known = _receivers_sites(model, region)
    arrays = _read_sites(model, {region.output, *known}, tokens)
    boundary = _boundary(model, region, tokens, arrays)
    return Activations(tokens, scored, groups, arrays[region.output], *boundary, _network(model, region))


def collect_boundary(
    model: Model | Vectors, region: Region, tokens: np.ndarray, scored: np.ndarray, groups: np.ndarray
) -> Activations:
    """What the receiver computes for itself: inputs and boundary. The outputs are zeros, for an explanation to fill.

    **Raises:** `DataError` naming a site that is not finite, as it is where the receiver lacks weights that it needs.
    """
    outputs = np.zeros((*tokens.shape, model.site_width(region.output)), np.float32)
    if isinstance(model, Vectors):
        return _vectors(model, tokens, scored, groups, outputs)
    arrays = _read_sites(model, _receivers_sites(model, region), tokens)
    return Activations(
        tokens, scored, groups, outputs, *_boundary(model, region, tokens, arrays), _network(model, region)
    )


def _vectors(
    model: Vectors, tokens: np.ndarray, scored: np.ndarray, groups: np.ndarray, outputs: np.ndarray
) -> Activations:
    inputs = None if model.inputs is None else model.inputs[tokens]
    return Activations(np.zeros_like(tokens), scored, groups, outputs, inputs, None, model.network)


def _network(model: Model, region: Region) -> TransformerRegion:
    return TransformerRegion.of(model, region.input, region.output)


def region_weights(task: Task) -> dict[str, np.ndarray]:
    """The region's own weights, by the names of its network: what a sender may describe.

    **Raises:** `TaskError` for a region without an architecture that is known: rows of numbers, a torch module.
    """
    network = task.fit_activations.network
    if isinstance(task.model, Model) and isinstance(network, TransformerRegion):
        return network.weights(task.model)
    if isinstance(task.model, Vectors) and network is not None and task.model.weights is not None:
        return {name: np.asarray(w, np.float32) for name, w in task.model.weights.items()}
    raise TaskError(
        f"region {task.region.name!r} of {task.model.name} has no weights to describe: rows of numbers come from "
        "nowhere, and a torch module without an adapter has no architecture that a receiver knows"
    )


def _receivers_sites(model: Model, region: Region) -> set[str]:
    """Sites before the region whose values an explanation or the rest of the model needs."""
    start = "tokens" if region.output == "logits" else model.start_of(region.output)[2]
    return {region.input, start} - {"tokens", region.output}


def _boundary(
    model: Model, region: Region, tokens: np.ndarray, arrays: dict[str, np.ndarray]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The region's inputs, and the residual stream beside its output, where there are such."""
    inputs = arrays.get(region.input)
    if region.output == "logits":
        return inputs, None
    if region.input == "tokens" and model.config.tied:
        inputs = np.asarray(model.params["embed"]["W_E"])[tokens]
    start = model.start_of(region.output)[2]
    return inputs, None if start == region.output else arrays.get(start)


def _read_sites(model: Model, reads: set[str], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The model's activations at some sites, float32 [sequences, positions, ...]."""
    compiled = jax.jit(partial(run, model.config, reads=tuple(sorted(reads))))
    sequences = len(tokens)
    size = max(1, min(sequences, PREFIX_TOKENS // tokens.shape[1]))
    found: dict[str, list[np.ndarray]] = {name: [] for name in reads}
    for start in range(0, sequences if reads else 0, size):
        batch = tokens[start : start + size].astype(np.int32)
        padded = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), 0)])  # one shape, one compilation
        for name, value in compiled(model.params, padded).items():
            found[name].append(np.asarray(value[: len(batch)], np.float32))
    arrays = {name: np.concatenate(values) for name, values in found.items()}
    for name, value in arrays.items():
        _check_finite(name, value)
    return arrays


def _torch_outputs(model: TorchModel, site: str, tokens: np.ndarray) -> np.ndarray:
    """The module's activations at one site, float32 [sequences, positions, d]."""
    size = max(1, TORCH_TOKENS // tokens.shape[1])
    batches = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    return np.concatenate([np.asarray(model.run(batch, [site])[site], np.float32) for batch in batches])


def _check_finite(name: str, value: np.ndarray) -> None:
    if bad := int((~np.isfinite(value)).sum()):
        raise DataError(f"{bad} of {value.size} activations at {name} are NaN or infinite: check the weights")
