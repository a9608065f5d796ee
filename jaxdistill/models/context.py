"""Context extension: more positions than a model was made for, the one change of config.json that a recipe may ask."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.models.config import read_rope, write_rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextExtension:
    """How positions past the old limit are encoded; training has to teach the model the new encoding."""

    positions: int  # the new limit, in tokens
    rope_theta: float | None = None  # a larger base, which slows every rotation (arXiv 2309.16039)
    yarn: bool = False  # interpolate the slow rotations by new limit / old (arXiv 2309.00071)

    def __post_init__(self):
        if self.rope_theta is None and not self.yarn:
            raise UserError(
                f"context.positions is {self.positions} with nothing to encode them; expected context.rope_theta, "
                "context.yarn, or both"
            )

    def apply(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of the extended model; RoPE is spelled in both schemas of transformers.

        Raises:
          UserError: the model has as many positions already, its RoPE is scaled, or theta would shrink.
        """
        old = hf.get("max_position_embeddings", 0)
        rope = read_rope(hf, old)
        if rope.kind != "default":
            raise UserError(f"the model's context is extended already (RoPE {rope.kind!r}); context cannot do it again")
        if self.positions <= old:
            raise UserError(f"context.positions is {self.positions}; expected more than the model's own {old}")
        if self.rope_theta is not None and self.rope_theta <= rope.theta:
            raise UserError(f"context.rope_theta is {self.rope_theta}; expected more than the model's own {rope.theta}")
        values: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta or rope.theta}
        if self.yarn:
            values |= {
                "rope_type": "yarn",
                "factor": self.positions / old,
                "original_max_position_embeddings": old,
            }
        return write_rope({**hf, "rope_parameters": values, "max_position_embeddings": self.positions})
