"""Any torch module, through forward hooks: for models without an adapter. Slow (no compilation, no suffix runs)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdl.errors import ModelError
from mdl.models.sites import LOGITS, check_site
from mdl.models.state_dict import as_float32

TorchWrite = np.ndarray | Callable[[np.ndarray], np.ndarray]
NAMED_OUTPUTS = ("logits", "last_hidden_state")  # where transformers' output classes keep the tensor
CONTEXT_SETTINGS = ("max_position_embeddings", "n_ctx", "block_size")  # of a module's `config`, the usual names
CUT_TOLERANCE = 1e-4  # of the largest logit


def _first(output: Any) -> Any:
    """The tensor in a module's output: itself, its `logits` or `last_hidden_state`, or the first of a tuple."""
    for name in NAMED_OUTPUTS:
        if hasattr(output, name):
            return getattr(output, name)
    return output[0] if isinstance(output, tuple | list) else output


def _with_first(output: Any, tensor: Any) -> Any:
    for name in NAMED_OUTPUTS:
        if hasattr(output, name):
            setattr(output, name, tensor)
            return output
    return type(output)((tensor, *output[1:])) if isinstance(output, tuple | list) else tensor


def fingerprint_of_module(module: Any) -> str:
    """SHA-256 (hex) of the module's printed structure and of every parameter's and buffer's name, shape and bytes."""
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in sorted(module.state_dict().items()):
        raw = np.ascontiguousarray(tensor.detach().cpu().reshape(-1).view(_byte_type()).numpy())
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw.tobytes())
    return digest.hexdigest()


def _byte_type() -> Any:
    import torch

    return torch.uint8


@dataclass(frozen=True, eq=False)
class TorchModel:
    """A torch module whose sites are its submodules' names; a site's value is the submodule's (first) output.

    It always runs from the input, on the module's own device, in evaluation mode and without gradients.
    """

    module: Any
    name: str
    fingerprint: str
    tokenizer: Any | None = None

    def sites(self) -> tuple[str, ...]:
        """Submodule names in the order of their definition, and `logits`, the whole module's output."""
        return (*(name for name, _ in self.module.named_modules() if name), LOGITS)

    def check_site(self, name: str) -> None:
        """**Raises:** `ModelError`, with the nearest names, for a site that does not exist."""
        check_site(name, self.sites())

    @property
    def n_parameters(self) -> int:
        """How many numbers the weights are; shared ones are counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def n_ctx(self) -> int | None:
        """The longest sequence, where the module has a `config` that says it under one of the usual names."""
        config = getattr(self.module, "config", None)
        found = (getattr(config, name, None) for name in CONTEXT_SETTINGS)
        return next((value for value in found if isinstance(value, int)), None)

    def site_width(self, name: str) -> int:
        """Numbers per token at a site, from one run on two tokens.

        **Raises:** `ModelError` for a site whose value is not [sequences, positions, width].
        """
        shape = self.run(np.zeros((1, 2), np.int32), [name])[name].shape
        if len(shape) != 3 or shape[:2] != (1, 2):
            raise ModelError(
                f"on token ids of shape (1, 2), {name!r} gives {shape}; a region ends where the shape is [sequences, "
                "positions, width]. Choose a submodule of that output, such as a whole block."
            )
        return int(shape[2])

    def is_cut_by(self, site: str, tokens: np.ndarray) -> bool:
        """Whether the output depends on the token ids through `site` alone.

        Tried on `tokens` [sequences, positions]: with the value at the site held fixed, other tokens may not change it.
        """
        own = self.run(tokens, [site, LOGITS])
        others = np.ascontiguousarray(tokens.reshape(-1)[::-1].reshape(tokens.shape))
        change = self.run(others, [LOGITS], {site: own[site]})[LOGITS] - own[LOGITS]
        return not (np.abs(change) > CUT_TOLERANCE * np.abs(own[LOGITS]).max()).any()

    def run(
        self, start: Any, reads: Collection[str], writes: Mapping[str, TorchWrite] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the module on `start` and return what was read.

        **Arguments:** `start`: a numpy array, token ids or whatever the module takes; `reads`: site names; `writes`:
        for a site name, an array that takes the place of its value, or a function of it.

        **Raises:** `ModelError` for a site that does not exist, that did not run or ran more than once, and for a
        written value of another shape.
        """
        import torch

        writes, found = writes or {}, {}

        def visitor(name: str) -> Callable[[Any], Any]:
            def visit(value: Any) -> Any:
                if name in writes:
                    value = _written(name, writes[name], value)
                if name in reads:
                    found[name] = as_numpy(value)
                return value

            return visit

        with torch.no_grad():
            self.forward(start, {name: visitor(name) for name in {*reads, *writes}})
        return found

    def forward(self, start: Any, visitors: Mapping[str, Callable[[Any], Any]]) -> Any:
        """Run the module on `start`, each visited site's tensor being replaced by what its visitor makes of it.

        **Returns:** the output's tensor; gradients are recorded as in the caller's mode.

        **Raises:** `ModelError` for a site that does not exist, that did not run or ran more than once, and for what
        the module itself raises.
        """
        import torch

        for name in visitors:
            self.check_site(name)
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        inputs = torch.as_tensor(np.asarray(start)).to(device)
        with self._hooked(visitors) as calls:
            output = self._call(inputs if inputs.is_floating_point() else inputs.long())
        for name in visitors:
            if calls[name] != 1:
                raise ModelError(
                    f"site {name!r} ran {calls[name]} times in one forward pass, so it has no one value. "
                    "Choose a submodule that runs exactly once."
                )
        return _first(output)

    def _call(self, inputs: Any) -> Any:
        try:
            return self.module(inputs)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ModelError(
                f"{self.name} failed on an input of shape {tuple(inputs.shape)}, values {inputs.min()} to "
                f"{inputs.max()}: {type(error).__name__}: {error}. It is called with that one argument; the values are "
                "probably outside its vocabulary, or the sequences longer than its context."
            ) from error

    @contextmanager
    def _hooked(self, visitors: Mapping[str, Callable[[Any], Any]]) -> Iterator[Counter[str]]:
        calls: Counter[str] = Counter()
        modules = dict(self.module.named_modules())

        def hook(name: str) -> Callable[[Any, Any, Any], Any]:
            def on_output(_: Any, __: Any, output: Any) -> Any:
                calls[name] += 1
                value = _first(output)
                if not hasattr(value, "detach"):
                    raise ModelError(f"site {name!r} gives a {type(output).__name__} without a tensor in first place.")
                new = visitors[name](value)
                return output if new is value else _with_first(output, new)

            return on_output

        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        handles = [modules["" if n == LOGITS else n].register_forward_hook(hook(n)) for n in visitors]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()
            for module in training:
                module.training = True


def as_numpy(tensor: Any) -> np.ndarray:
    """A tensor on the host; what numpy has no type for becomes float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()


def _written(name: str, write: TorchWrite, value: Any) -> Any:
    import torch

    new = np.asarray(write(as_numpy(value)) if callable(write) else write)
    if new.shape != tuple(value.shape):
        raise ModelError(f"the value written at {name!r} has shape {new.shape}; the site has {tuple(value.shape)}.")
    return torch.as_tensor(new).to(value)


def wrap(module: Any, tokenizer: Any | None = None) -> TorchModel:
    """A `TorchModel` around a module.

    **Raises:** `ModelError` for NaN or infinite weights, naming the tensor.
    """
    for name, parameter in module.named_parameters():
        as_float32(parameter, name)
    return TorchModel(module, type(module).__name__, fingerprint_of_module(module), tokenizer)
