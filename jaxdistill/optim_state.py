"""Where the optimizer's state is kept, in which dtype, and how an update works on it: in float32, on the devices."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PRNGKeyArray

from jaxdistill import rounding, weights
from jaxdistill.sharding import HOST_MEMORY


def abstract(optimizer: optax.GradientTransformation, params: Any, on_host: bool = False) -> optax.OptState:
    """Shape, dtype, layout and memory of each array of the optimizer's state on the current mesh, without data.

    Args:
      params: arrays, or what stands in for them: the state has their dtype.
      on_host: all but scalars is in the host's pinned memory, laid out as on the devices.
    """

    def moved(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x.update(sharding=x.sharding.with_memory_kind(HOST_MEMORY)) if x.ndim and x.sharding else x

    state = weights.on_mesh(jax.eval_shape(optimizer.init, params))
    return jax.tree.map(moved, state) if on_host else state


def init(optimizer: optax.GradientTransformation, params: Any, on_host: bool = False) -> optax.OptState:
    """The optimizer's state before the first step; arguments as of `abstract`."""
    if not on_host:
        return jax.jit(optimizer.init)(params)
    layouts = jax.tree.map(lambda x: x.sharding, abstract(optimizer, params, on_host))
    return jax.jit(optimizer.init, out_shardings=layouts)(params)


def apply(
    optimizer: optax.GradientTransformation,
    grads: Any,
    state: optax.OptState,
    params: Any,
    key: PRNGKeyArray,
    accept: Bool[Array, ""] | None = None,
) -> tuple[Any, optax.OptState]:
    """Weights and state after one update, each array in the dtype and in the memory where it was found.

    Computed in float32 on the devices. What is kept in bfloat16 is rounded stochastically. When to fetch what waits on
    the host is left to the compiler: the TPU's does it before the forward pass if there is room, and later if not.

    Args:
      grads: in float32.
      accept: where it is false, weights and moments stay as they are; counts of steps, and so the schedule, go on.
    """
    wide_state, wide_params = jax.tree.map(_widened, (state, params))
    updates, new_state = optimizer.update(grads, wide_state, wide_params)
    new_params = optax.apply_updates(wide_params, updates)
    if accept is not None:
        kept = (wide_params, wide_state)
        new_params, new_state = jax.tree.map(lambda n, o: _chosen(accept, n, o), (new_params, new_state), kept)
    found, tree = jax.tree.flatten((params, state))
    made = zip(jax.tree.leaves((new_params, new_state)), found, jax.random.split(key, len(found)), strict=True)
    return jax.tree.unflatten(tree, [_as_found(new, old, key) for new, old, key in made])


def _chosen(accept: Bool[Array, ""], new: Array, old: Array) -> Array:
    return jnp.where(accept, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new


def _on_host(x: Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _widened(x: Array) -> Array:
    if _on_host(x):
        x = jax.device_put(x, jax.memory.Space.Device)
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def _as_found(new: Array, old: Array, key: PRNGKeyArray) -> Array:
    if old.dtype == jnp.bfloat16:
        new = rounding.stochastic(new, key)
    return jax.device_put(new, jax.memory.Space.Host) if _on_host(old) else new
