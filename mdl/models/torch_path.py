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


def _first(output: Any) -> Any:
    """The tensor in a module's output: itself, its `logits`, or the first of a tuple."""
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple | list) else output


def _with_first(output: Any, tensor: Any) -> Any:
    if hasattr(output, "logits"):
        output.logits = tensor
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

        writes = writes or {}
        for name in (*reads, *writes):
            self.check_site(name)
        found: dict[str, np.ndarray] = {}
        with self._hooked(frozenset(reads), writes, found) as calls, torch.no_grad():
            device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
            inputs = torch.as_tensor(np.asarray(start)).to(device)
            self.module(inputs.long() if not inputs.is_floating_point() else inputs)
        for name in {*reads, *writes}:
            if calls[name] != 1:
                raise ModelError(
                    f"site {name!r} ran {calls[name]} times in one forward pass, so it has no one value. "
                    "Choose a submodule that runs exactly once."
                )
        return found

    @contextmanager
    def _hooked(
        self, reads: frozenset[str], writes: Mapping[str, TorchWrite], found: dict[str, np.ndarray]
    ) -> Iterator[Counter[str]]:
        calls: Counter[str] = Counter()
        modules = dict(self.module.named_modules())

        def hook(name: str) -> Callable[[Any, Any, Any], Any]:
            def on_output(_: Any, __: Any, output: Any) -> Any:
                calls[name] += 1
                if name in writes:
                    output = _with_first(output, _written(name, writes[name], _first(output)))
                if name in reads:
                    found[name] = as_numpy(_first(output))
                return output

            return on_output

        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        wanted = {*reads, *writes}
        handles = [modules["" if n == LOGITS else n].register_forward_hook(hook(n)) for n in wanted]
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
