"""Models as pure JAX functions with named sites."""

from mdl.models.config import TransformerConfig
from mdl.models.load import load_model
from mdl.models.model import Model
from mdl.models.torch_path import TorchModel
from mdl.models.transformer import run
from mdl.models.vectors import Vectors

AnyModel = Model | TorchModel | Vectors

__all__ = ["AnyModel", "Model", "TorchModel", "TransformerConfig", "Vectors", "load_model", "run"]
