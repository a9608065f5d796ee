"""Model families: a family is the file named after Hugging Face's `model_type`, with `Block`, `config` and `block`."""

import importlib
import pkgutil
from types import ModuleType

from jaxdistill.errors import UserError

_SHARED = {"attention", "config", "context", "decoder", "embedding", "layers", "lora", "quantized", "remat", "routing"}
FAMILIES = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def family(model_type: str) -> ModuleType:
    """The module that implements a `model_type`.

    Raises:
      UserError: there is none.
    """
    if model_type == "None":
        raise UserError(
            "config.json has no model_type: it is not a model's. Is this the folder of a training run? "
            "Then give the folder of one of its phases"
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"config.json has model_type {model_type!r}; implemented are {', '.join(FAMILIES)}. "
            f"To add it, write jaxdistill/models/{model_type}.py (CONTRIBUTING.md)"
        )
    return importlib.import_module(f"{__name__}.{model_type}")
