"""What of a model a run trains: all of its weights, or adapters beside them, which then stay as they are."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxdistill import lora, weights
from jaxdistill.checkpoint import load_model
from jaxdistill.checkpoint_store import newest_input
from jaxdistill.models import decoder
from jaxdistill.models import lora as adapters
from jaxdistill.models.config import Config
from jaxdistill.train.config import TrainConfig


class Trained:
    """The trained weights of a run on the current mesh.

    Attributes:
      c: the model's architecture.
      lora: the configuration of adapters, None where all weights are trained.
      template: the trained weights, declared.
      frozen: what the step takes beside state and batch: the weights that stay, where adapters are trained.
    """

    def __init__(self, config: TrainConfig, c: Config):
        self._config, self.c, self._model = config, c, decoder.template(c)
        self.lora = config.lora if config.lora.rank else None
        self.template: Any = adapters.template(self.lora, self._model) if self.lora else self._model
        self.frozen: tuple[decoder.Params, ...] = ()

    def read(self, model: Path) -> None:
        """Reads the weights that stay; they are only multiplied with, so in the compute dtype."""
        if self.lora:
            self.frozen = (load_model(model, dtype=jnp.dtype(self._config.step.compute_dtype))[0],)

    def abstract_frozen(self) -> tuple[Any, ...]:
        """What `frozen` is once read, without data."""
        return (weights.abstract(self._model, jnp.dtype(self._config.step.compute_dtype)),) if self.lora else ()

    def first(self, model: Path, dtype: Any) -> Any:
        """The trained weights before the first step of a phase that starts from a model."""
        if not self.lora:
            return load_model(model, dtype=dtype)[0]
        if self.lora.start is not None:
            return lora.load(self.lora.start, self._model, self.lora, dtype)
        return weights.init(self.template, self._config.seed, dtype)

    def whole(self, params: Any) -> decoder.Params:
        """The model with these trained weights, as the loss takes it."""
        return adapters.apply(self.frozen[0], params, self.lora) if self.lora else params

    def merged(self, params: Any) -> decoder.Params:
        """The model with these trained weights, as the sampler takes it."""
        return lora.merge(self.frozen[0], params, self.lora) if self.lora else params

    def facts(self, model: Path) -> dict[str, Any]:
        """What a checkpoint has to hold beside the trained weights of a phase that started from a model."""
        if not self.lora:
            return {}
        found = newest_input(model)  # another phase, whose newest checkpoint the adapters belong to
        config = {**dataclasses.asdict(self.lora), "start": None}
        return {"lora": {"config": config, "model": str(model.resolve()), "step": found[0] if found else None}}

    def flops_per_token(self, attended: Any) -> Any:
        """As the architecture says, without the gradients of weights that stay."""
        return self.c.flops_per_token(attended, trains_all=not self.lora)

    def __str__(self) -> str:
        added = f" and {weights.count(self.template):,} of adapters, which are trained" if self.lora else ""
        return f"{decoder.size(self.c)}{added}"
