"""Attention of new tokens to the pages their request holds."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.errors import UserError
from jaxdistill.models.attention import PLAIN, Scores
from jaxdistill.models.layers import capped
from jaxdistill.sample import mosaic, triton
from jaxdistill.sample.triton import MASKED

_GROUP_BYTES = 2**21  # keys of one page of each row that a CPU's second-level caches hold
Stored = Any  # a jax.Array, or what stands for one: its letters, a layout


@struct.dataclass
class Pages:
    """One layer's keys and values: P pages, laid out as `page_dims` says.

    In 8 bits each position and head has a scale, which keys and values are to be multiplied with.
    """

    keys: Stored
    values: Stored
    key_scales: Stored | None = None  # [P, K, p] float32
    value_scales: Stored | None = None


def page_dims() -> tuple[str, str]:
    """How keys and values are laid out: as attention's two products read them, where new ones can be written in place.

    On a CPU the product with queries reads positions last faster. TPUs' compiler writes into one position of all heads
    in place where heads come after positions; else it copies the whole cache, twice in every step.
    """
    platform = _platform()
    if platform == "tpu":
        return "PpKH", "PpKH"
    return "PKHp" if platform == "cpu" else "PKpH", "PKpH"


def page_sizes(pages: Pages) -> tuple[int, int]:
    """Heads and positions of a page on this device."""
    sizes = dict(zip(page_dims()[1], pages.values.shape, strict=True))
    return sizes["K"], sizes["p"]


Kernel = Literal["xla", "triton", "mosaic"]
# Both only where asked for: no GPU or TPU has run them yet, and what they gain over XLA there is not known
_KERNELS: Mapping[Kernel, tuple[str, Any]] = {"triton": ("gpu", triton), "mosaic": ("tpu", mosaic)}  # platform, module


@dataclasses.dataclass(frozen=True)
class Seeing:
    """What a layer's queries see, and how."""

    scores: Scores = PLAIN
    window: int | None = None  # keys at most, a query's own the last of them
    kernel: Kernel = "xla"


ALL = Seeing()


def unavailable(kernel: Kernel, device: Any) -> str | None:
    """Why a kernel cannot run on a device, whatever the model, or None.

    Args:
      device: what has a `platform` and a `device_kind`.
    """
    if kernel == "xla":
        return None
    platform, module = _KERNELS[kernel]
    if device.platform == platform or module.INTERPRET:
        return None
    return f"{kernel} runs on {platform.upper()}s, found {device.device_kind}"


def check_kernel(kernel: Kernel, head_dim: int, page_tokens: int, cache_dtype: str = "compute") -> None:
    """Ends the run where a kernel cannot read such a cache on the current mesh.

    Args:
      page_tokens: positions of a page on one device.

    Raises:
      UserError: it cannot.
    """
    if kernel == "xla":
        return
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    _, module = _KERNELS[kernel]
    if why := unavailable(kernel, device) or module.misfit(head_dim, page_tokens, cache_dtype):
        raise UserError(f"attention {kernel}: {why}; use xla, which runs everywhere")


def attend(
    q: Float[Array, "B T N H"],
    pages: Pages,
    tables: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    live: Bool[Array, "B T"],
    how: Seeing = ALL,
) -> Float[Array, "B T N H"]:
    """Each query sees the keys of its row up to its own position, or its window's, page by page.

    The order of additions, and with it a result's last bits, depends on the page size, and on how many devices share
    the pages along context: not on the other rows, nor on where the pages lie.
    """
    (B, T, _, H), (K, p) = q.shape, page_sizes(pages)
    q_BKXH = rearrange(q, "B T (K G) H -> B K (G T) H", K=K)
    size = _group_size(B, K * H * p * pages.keys.dtype.itemsize)
    if how.kernel == "triton" or (how.kernel == "mosaic" and T <= mosaic.MOST_NEW):
        out = _finish(*_by_kernel(q_BKXH, pages, tables, positions, live, how), q.dtype)
    elif size == B:
        out = _attend_together(q_BKXH, pages, tables, positions, live, how)
    else:

        def group(first: Array) -> Array:
            own = [jax.lax.dynamic_slice_in_dim(a, first, size) for a in (q_BKXH, tables, positions, live)]
            return _attend_together(own[0], pages, *own[1:], how=how)

        out = jax.lax.map(group, jnp.arange(0, B, size)).reshape(q_BKXH.shape)
    return rearrange(out, "B K (G T) H -> B T (K G) H", T=T)


def _group_size(rows: int, page_bytes: int) -> int:
    """Rows to attend at a time: all on an accelerator; on a CPU as many as its caches hold a page of the keys of."""
    if _platform() != "cpu":
        return rows
    return max((n for n in range(1, rows + 1) if rows % n == 0 and n * page_bytes <= _GROUP_BYTES), default=1)


def _platform() -> str:
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform


def _by_kernel(q_BKXH: Array, pages: Pages, tables: Array, positions: Array, live: Array, how: Seeing) -> triton.Sums:
    """Top, total and sums of each stretch of a row, as `_finish` takes them."""
    _, p = page_sizes(pages)
    page = p * jax.lax.axis_size("context")
    end = jnp.max(jnp.where(live, positions, -1), axis=1) // page + 1
    first = jnp.zeros_like(end)
    if how.window is not None:
        earliest = jnp.min(jnp.where(live, positions, page * end[:, None]), axis=1)
        first = jnp.maximum(earliest - how.window + 1, 0) // page
    # The last key that each of X = G T queries sees, counted from this device's first position
    last_BX = jnp.tile(positions, (1, q_BKXH.shape[2] // positions.shape[1])) - p * jax.lax.axis_index("context")
    held = (pages.keys, pages.values, pages.key_scales, pages.value_scales)
    _, module = _KERNELS[how.kernel]
    return module.sums(q_BKXH, held, tables, last_BX, (first, end), page, how.scores, how.window)


def _attend_together(q_BKXH: Array, pages: Pages, tables: Array, positions: Array, live: Array, how: Seeing) -> Array:
    """Attention [B, K, X, H] of B rows, up to the longest of them."""
    (_, _, X, H), (_, p), dtype = q_BKXH.shape, page_sizes(pages), q_BKXH.dtype
    of_keys, of_values = page_dims()
    devices, device = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    # The last key that each of X = G T queries sees
    last_X = jnp.tile(positions, (1, X // positions.shape[1]))[:, None, :, None]

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # Online softmax. A page with no key to see changes nothing, to the last bit: so a row's result does not
        # depend on how far the loop runs for the sake of longer rows.
        top, total, sums = carry
        at = jax.lax.dynamic_index_in_dim(tables, i, axis=1, keepdims=False)
        held = jax.tree.map(lambda a: a[at], pages)
        keys, with_keys = held.keys.astype(dtype), f"BKXH,B{of_keys[1:]}->BKXp"
        scores = jnp.einsum(with_keys, q_BKXH, keys, preferred_element_type=jnp.float32)
        if held.key_scales is not None:
            scores *= held.key_scales[:, :, None, :]
        key_positions = (i * devices + device) * p + jnp.arange(p)
        visible = key_positions <= last_X
        if how.window is not None:
            visible &= key_positions > last_X - how.window
        scores = jnp.where(visible, capped(scores * how.scores.scale_of(H), how.scores.cap), MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(-1)
        if held.value_scales is not None:
            weights *= held.value_scales[:, :, None, :]
        values, with_values = held.values.astype(dtype), f"BKXp,B{of_values[1:]}->BKXH"
        seen = jnp.einsum(with_values, weights.astype(dtype), values, preferred_element_type=jnp.float32)
        return new_top, total, sums * shrink[..., None] + seen

    zeros = jnp.zeros(q_BKXH.shape, jnp.float32)
    start = (zeros[..., 0] + MASKED, zeros[..., 0], zeros)
    first, page = 0, devices * p
    end = jnp.max(jnp.where(live, positions, 0)) // page + 1
    if how.window is not None:  # pages that are behind every row's window
        first = jnp.maximum(jnp.min(jnp.where(live, positions, end * page)) - how.window + 1, 0) // page
    top, total, sums = jax.lax.fori_loop(first, end, body, start)
    return _finish(top[:, :, None], total[:, :, None], sums[:, :, None], dtype)


def _finish(top_BKSX: Array, total_BKSX: Array, sums_BKSXH: Array, dtype: Any) -> Array:
    """What all stretches and all devices along context saw together [B, K, X, H]."""
    of_all = jnp.max(top_BKSX, axis=2, keepdims=True)
    if jax.lax.axis_size("context") > 1:
        of_all = jax.lax.pmax(of_all, "context")
    shrink = jnp.exp(top_BKSX - of_all)
    total, sums = jnp.sum(total_BKSX * shrink, axis=2), jnp.sum(sums_BKSXH * shrink[..., None], axis=2)
    if jax.lax.axis_size("context") > 1:
        total, sums = jax.lax.psum((total, sums), "context")
    return (sums / jnp.maximum(total, 1e-30)[..., None]).astype(dtype)
