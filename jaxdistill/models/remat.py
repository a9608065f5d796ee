"""What of a layer is kept for its backward pass, and what is computed again (rematerialized)."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxdistill.models.attention import OUTPUT_NAME
from jaxdistill.models.layers import PROJECTION_NAME
from jaxdistill.sharding import HOST_MEMORY

Remat = Literal["full", "attention", "offload", "offload_inputs", "matmuls", "none"]
Layer = Callable[[Any, Any], tuple[Any, Any]]  # hidden states, weights -> hidden states, what the scan stacks

_INPUT_NAME = "layer_input"


def saving(policy: Remat, layer: Layer) -> Layer:
    """A layer that keeps what the policy says, and computes the rest of it again in the backward pass.

    | policy | kept | values per layer and token | computed again |
    |---|---|---|---|
    | full | the layer's input | D | the whole layer |
    | attention | also attention's output and log-sums | D + N H, N | all but attention |
    | offload | the same, in the host's memory | 0; on the host D + N H, N | all but attention |
    | offload_inputs | the layer's input, in the host's memory | 0; on the host D | the whole layer |
    | matmuls | also the results of the projections | 2 D + 2 (N + K) H + 2 F, N | norms, rotations, activations |
    | none | everything | | nothing |

    Values are in compute dtype, but for the N log-sums in float32; D is whole on each device, the others are split
    over tensor, tokens over the other axes.
    """
    if policy == "none":
        return layer

    def named(x: Any, w: Any) -> tuple[Any, Any]:
        return layer(checkpoint_name(x, _INPUT_NAME), w)

    policies = jax.checkpoint_policies
    kept = {
        "full": policies.nothing_saveable,
        "attention": policies.save_only_these_names(OUTPUT_NAME),
        "offload": _on_host(_INPUT_NAME, OUTPUT_NAME),
        "offload_inputs": _on_host(_INPUT_NAME),
        "matmuls": policies.save_only_these_names(OUTPUT_NAME, PROJECTION_NAME),
    }[policy]
    return jax.checkpoint(named, policy=kept)


def _on_host(*names: str) -> Any:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst=HOST_MEMORY,
    )
