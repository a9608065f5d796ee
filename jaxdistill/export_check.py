"""An export held against what it was made from, tensor by tensor, layer by layer: neither is in memory whole."""

import dataclasses
import functools
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill import hf, sharding, weights
from jaxdistill.checkpoint import load_model
from jaxdistill.data import chat
from jaxdistill.errors import RunError
from jaxdistill.hf_tensors import Source, Tensors, differing
from jaxdistill.models import decoder
from jaxdistill.models.config import Config
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig

_LOGIT_LIMIT = 1e-4  # of the largest logit, where the export does not round; rounding has its own error
_ROWS = 8192  # of the embedding, and of the head, in memory at a time
_TEXT_TOKENS = 32
_TEXT_SHARE = 0.7  # of free memory that a model may take to be sampled from
_QUESTION = "What is 6 * 7?"


@dataclasses.dataclass(frozen=True)
class Found:
    """What a check saw; it raises where it saw something wrong."""

    logit_error: float  # largest difference over the largest logit, to the weights before they were rounded
    positions: int  # of the last token of the logits check, and 1
    text: str | None  # why no text was compared

    def __str__(self) -> str:
        logits = f"logits at positions up to {self.positions} within {self.logit_error:.1e} of the largest"
        text = f"no text compared ({self.text})" if self.text else f"{_TEXT_TOKENS} greedy tokens the same"
        return f"reloaded: every tensor equal bit for bit, {logits}, {text}"


def check(folder: Path, model: Path, step: int | None, source: Source, c: Config, tokens: int, positions: int) -> Found:
    """Reads an export and compares it with the model that was exported, its architecture included.

    Args:
      tokens: of the logits check, spread over so many positions.

    Raises:
      RunError: a tensor is not the trained one, rounded once; or the architecture, the logits or the text of the export
        are others, as they are where a reader of config.json loses a RoPE setting.
    """
    found, values = hf.read_config(folder)
    dtype = jnp.dtype(values["dtype"])
    with Tensors(folder) as export:
        if wrong := differing(export, source, decoder.template(c), dtype):
            raise RunError(
                f"{folder}: these tensors differ from the model's: {', '.join(wrong)}; do not use the export"
            )
        if found != c:
            fields = [f.name for f in dataclasses.fields(c) if getattr(c, f.name) != getattr(found, f.name)]
            raise RunError(
                f"{folder}: config.json says another {', '.join(fields)} than the model; do not use the export"
            )
        error, last = logit_error((source, c), (export, found), tokens, positions)
    if not error <= (_LOGIT_LIMIT if dtype == jnp.float32 else 1.0):  # not >: a NaN must not pass
        raise RunError(f"{folder}: its logits differ by {error:.1e} of the largest; do not use the export")
    text = _no_text(c)
    if text is None:
        before, after = _greedy(model, step, folder, dtype), _greedy(folder, None, folder, dtype)
        if before != after:
            raise RunError(f"{folder}: it goes on with other words than the model; do not use the export")
    return Found(error, last, text)


# --- logits, a layer at a time ---------------------------------------------------------------------------------------


def logit_error(
    one: tuple[Source, Config], other: tuple[Source, Config], tokens: int, positions: int
) -> tuple[float, int]:
    """The largest difference of two models' logits over the largest logit of the first, and the positions it is of.

    Random tokens of one document a row, at positions that are spread over the first `positions`.
    """
    mesh, c = dict(jax.sharding.get_mesh().shape), one[1]
    chunks, positions = 2 * mesh["context"], min(positions, c.max_positions)
    length = -(-min(tokens, positions) // chunks) * chunks
    ids = np.random.default_rng(0).integers(0, c.vocab, (mesh["data"] * mesh["fsdp"], length)).astype(np.int32)
    at = np.linspace(0, positions - 1, length).astype(np.int32)
    hidden = [_hidden(tensors, c, ids, at) for tensors, c in (one, other)]
    worst = largest = 0.0
    for before, after in zip(_logits(*one, hidden[0]), _logits(*other, hidden[1]), strict=True):
        difference = float(np.abs(before - after).max())
        worst = difference if np.isnan(difference) else max(worst, difference)
        largest = max(largest, float(np.abs(before).max()))
        if np.isnan(worst):
            break
    return worst / largest, int(at[-1]) + 1


def _hidden(tensors: Source, c: Config, ids: Int[np.ndarray, "B T"], at: Int[np.ndarray, " T"]) -> np.ndarray:
    """Hidden states before the head, float32, of rows at these positions; one layer of weights is in memory."""
    template = decoder.template(c)
    rows = np.zeros((*ids.shape, c.embed), np.float32)
    for start, some in _by_rows(tensors, template.embed.hf_name, c.vocab):
        inside = (ids >= start) & (ids < start + len(some))
        rows[inside] = some[ids[inside] - start]
    order = sharding.row_order(ids.shape[1], jax.sharding.get_mesh().shape["context"])
    positions = sharding.put(np.broadcast_to(at[order], ids.shape).copy(), "BT")

    @functools.partial(jax.jit, static_argnames="windowed")
    def layer(x: Array, w: Any, positions: Array, windowed: bool) -> Array:
        return decoder.layer(positions, jnp.ones_like(positions), c)(x, w, windowed)[0]

    with jax.default_matmul_precision("highest"):
        x = decoder.scaled(sharding.put(rows[:, order], "BTD"), c)
        for i in range(c.layers):
            w = hf.load_tensors(tensors, template.blocks, layer=i)
            x = layer(x, w, positions, windowed=bool(c.windowed) and c.windowed[i])
        norm = hf.load_tensors(tensors, {"norm": template.final_norm})["norm"]
        x = jax.jit(decoder.normed, static_argnums=2)(x, norm, c)
    return np.asarray(sharding.replicate(x))[:, np.argsort(order)]


def _logits(tensors: Source, c: Config, x: np.ndarray) -> Iterator[np.ndarray]:
    """Logits [B, T, v] of some rows of the head after the other."""
    template = decoder.template(c)
    for _, some in _by_rows(tensors, (template.unembed or template.embed).hf_name, c.vocab):
        logits = x @ some.T
        yield logits if c.logit_cap is None else c.logit_cap * np.tanh(logits / c.logit_cap)


def _by_rows(tensors: Source, name: str, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """The first row and the rows, float32, of one part of a tensor after the other."""
    for start in range(0, count, _ROWS):
        yield start, tensors.rows(name, start, min(start + _ROWS, count)).astype(np.float32)


def logits(params: decoder.Params, ids: Int[np.ndarray, "B T"], c: Config) -> Float[np.ndarray, "B T V"]:
    """Float32 logits, on the host, of plain rows of one document each; of a model that is in memory."""

    @jax.jit
    def run(params: decoder.Params, ids: Array, positions: Array) -> Array:
        x, _ = decoder.hidden(params, ids, positions, jnp.ones_like(ids), c, jnp.float32, "none")
        return sharding.replicate(decoder.logits(params, x, c))

    order = sharding.row_order(ids.shape[1], jax.sharding.get_mesh().shape["context"])
    rows = [sharding.put(x.astype(np.int32), "BT") for x in (ids[:, order], np.broadcast_to(order, ids.shape))]
    with jax.default_matmul_precision("highest"):
        found = np.asarray(run(params, *rows))
    return found[:, np.argsort(order)]


# --- text, where the model fits --------------------------------------------------------------------------------------


def _no_text(c: Config) -> str | None:
    """Why a model is not sampled from on the current mesh, or None."""
    mesh = jax.sharding.get_mesh()
    if mesh.shape["context"] > 1:
        return "sampling does not split positions over mesh.context"
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    needed = 2 * 4 * weights.count(decoder.template(c)) // shards  # as read, and the sampler's own layers
    if needed > _TEXT_SHARE * _free_bytes():
        return f"sampling needs {needed / 1e9:.1f} GB a device, more than {_TEXT_SHARE:.0%} of what is free"
    return None


def _free_bytes() -> float:
    """Memory that a device has left."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return (free if limit == resource.RLIM_INFINITY else min(free, limit)) / jax.local_device_count()


def _greedy(model: Path, step: int | None, folder: Path, dtype: Any) -> tuple[Sequence[int], str]:
    """What a model, rounded to a dtype, answers by the tokenizer and end tokens of the export; its tokens and text."""
    tokenizer = chat.load_tokenizer(folder)
    prompt = tuple(chat.prompt_tokens(tokenizer, [{"role": "user", "content": _QUESTION}]))
    params, c = load_model(model, step)
    params = jax.tree.map(lambda w: w.astype(dtype).astype(jnp.float32), params)
    stops, room = chat.end_tokens(tokenizer, folder), min(_TEXT_TOKENS, c.max_positions - len(prompt))
    engine = Engine(params, c, stops, len(prompt) + room, EngineConfig(slots=1, compute_dtype="float32"))
    (output,) = engine.generate([Request("text", prompt, SamplingConfig(max_new_tokens=room))])
    return output.tokens, tokenizer.decode(output.tokens)
