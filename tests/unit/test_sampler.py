"""The sampler: what it draws, and that no request notices the others."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import export, sharding
from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.sample import cache as kv
from jaxdistill.sample import engine as engine_module
from jaxdistill.sample.choose import SamplingConfig
from jaxdistill.sample.engine import Engine, Output, Request

POSITIONS, SLOTS, CHUNK = 96, 4, 16
C = tiny.config("qwen3", num_attention_heads=8)
VALUES = tiny.values(C)
DRAWN = SamplingConfig(temperature=1.0, top_k=40, top_p=0.98, min_p=0.001, max_new_tokens=24)
GREEDY = SamplingConfig(max_new_tokens=24)


@pytest.fixture(autouse=True, scope="module")
def _several_key_chunks():
    """The cache is read in three chunks of 32 keys, two of the four slots at a time."""
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(kv, "_KEY_CHUNK", 32)
        patch.setattr(kv, "_GROUP_BYTES", 2 * C.kv_heads * C.head_dim * 32 * 4)
        yield


def build(
    sampling: SamplingConfig, slots: int = SLOTS, stop_tokens: tuple[int, ...] = (), dtype: Any = jnp.float32
) -> Engine:
    return Engine(
        tiny.put(VALUES, C),
        C,
        sampling,
        stop_tokens,
        slots=slots,
        positions=POSITIONS,
        dtype=dtype,
        prefill_tokens=CHUNK,
        steps_per_call=10,
    )


@pytest.fixture(scope="module")
def drawing() -> Iterator[Engine]:
    """An engine that draws at temperature 1, on one device."""
    with tiny.mesh():
        yield build(DRAWN)


@pytest.fixture(scope="module")
def greedy() -> Iterator[Engine]:
    with tiny.mesh():
        yield build(GREEDY)


def prompt(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(length).integers(3, C.vocab, length).tolist())


# Shorter and longer than a prefill chunk, and whole chunks of it
REQUESTS = [Request(f"r{i}", prompt(n), seed=100 + i) for i, n in enumerate((5, 16, 33, 1, 47, 32, 20, 64, 2))]


def run(engine: Engine, requests: list[Request]) -> dict[str, Output]:
    outputs = list(engine.generate(requests))
    assert len(outputs) == len(requests)
    return {output.id: output for output in outputs}


@pytest.fixture(scope="module")
def together(drawing: Engine) -> dict[str, Output]:
    """Nine requests through four slots, so that slots are refilled while others are in mid-sentence."""
    return run(drawing, REQUESTS)


def test_every_request_is_answered(together: dict[str, Output]):
    assert together.keys() == {r.id for r in REQUESTS}
    for output in together.values():
        assert output.finish_reason == "length"
        assert len(output.tokens) == DRAWN.max_new_tokens
    assert len({output.tokens for output in together.values()}) == len(REQUESTS)


def test_request_alone_says_the_same(drawing: Engine, together: dict[str, Output]):
    for request in REQUESTS:
        assert run(drawing, [request]) == {request.id: together[request.id]}


def test_neither_slot_nor_neighbours_matter(drawing: Engine, together: dict[str, Output]):
    assert run(drawing, REQUESTS[::-1]) == together
    shuffled = [REQUESTS[i] for i in np.random.default_rng(0).permutation(len(REQUESTS))]
    assert run(drawing, shuffled) == together
    busy = [Request(f"other{i}", prompt(60), seed=i) for i in range(3)]
    assert run(drawing, [*busy, REQUESTS[0]])["r0"] == together["r0"]


@pytest.mark.parametrize("sizes", [{}, {"data": 2}], ids=str)
def test_bfloat16_request_alone_says_the_same(sizes: dict[str, int]):
    with tiny.mesh(**sizes):
        engine = build(DRAWN, dtype=jnp.bfloat16)
        together = run(engine, REQUESTS)
        assert len({output.tokens for output in together.values()}) == len(REQUESTS)
        for request in REQUESTS[::3]:
            assert run(engine, [request]) == {request.id: together[request.id]}


def test_seed_decides_what_is_drawn(drawing: Engine):
    seeds = [Request(f"s{seed}", REQUESTS[0].prompt, seed=seed) for seed in range(6)]
    first, second = run(drawing, seeds), run(drawing, seeds)
    assert first == second
    assert len({output.tokens for output in first.values()}) == 6
    same = run(drawing, [Request("a", REQUESTS[0].prompt, seed=3), Request("b", REQUESTS[0].prompt, seed=3)])
    assert same["a"].tokens == same["b"].tokens == first["s3"].tokens


def packed_logits(tokens: np.ndarray) -> np.ndarray:
    """Logits of rows of one document each, through the forward pass that training uses."""
    return export.logits(tiny.put(VALUES, C), tokens, C)


def test_cached_logits_equal_the_packed_forward():
    """Two prompts of different lengths, fed in uneven pieces into chosen slots of a cache that was used before."""
    lengths = (45, 29)
    tokens = np.zeros((2, 48), np.int32)
    for row, n in enumerate(lengths):
        tokens[row, :n] = prompt(n)
    with tiny.mesh():
        params = tiny.put(VALUES, C)
        positions = np.broadcast_to(np.arange(48), (2, 48))

        @jax.jit
        def cached(params: Any, cache: Any, tokens: Any, slots: Any, positions: Any, live: Any) -> Any:
            x, cache = engine_module.forward(params, cache, tokens, slots, positions, live, C, jnp.float32)
            return decoder.logits(params, x), cache

        expected = packed_logits(tokens)
        dirty = jax.tree.map(lambda x: x + 7.0, kv.empty(C, 3, POSITIONS, jnp.float32))
        slots = sharding.put(np.array([1, 2], np.int32), "B")
        found, cache = [], dirty
        for start in range(0, 48, CHUNK):
            here = positions[:, start : start + CHUNK]
            live = here < np.array(lengths)[:, None]
            logits, cache = cached(params, cache, tokens[:, start : start + CHUNK], slots, here, live)
            found.append(np.asarray(logits))
    found = np.concatenate(found, axis=1)
    for row, n in enumerate(lengths):
        assert tiny.largest_relative_difference(found[row, :n], expected[row, :n]) < 1e-5
    for kept in (cache.k, jnp.moveaxis(cache.v, -1, -2)):  # both with positions last
        assert (kept[:, 0] == 7.0).all(), "a slot that was not named"
        assert (kept[:, 2, ..., lengths[1] :] == 7.0).all(), "positions that are not live"
        assert (kept[:, 2, ..., : lengths[1]] != 7.0).all()


@pytest.fixture(scope="module")
def greedy_tokens(greedy: Engine) -> dict[str, Output]:
    return run(greedy, REQUESTS)


def test_greedy_tokens_are_the_most_likely_ones(greedy_tokens: dict[str, Output]):
    """Against the packed forward over prompt and output."""
    tokens = np.zeros((len(REQUESTS), POSITIONS), np.int32)
    for row, request in enumerate(REQUESTS):
        whole = request.prompt + greedy_tokens[request.id].tokens
        tokens[row, : len(whole)] = whole
    with tiny.mesh():
        found = packed_logits(tokens)
    for row, request in enumerate(REQUESTS):
        start = len(request.prompt) - 1
        best = found[row, start : start + GREEDY.max_new_tokens].argmax(-1)
        assert greedy_tokens[request.id].tokens == tuple(best.tolist())


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_greedy_tokens_are_the_same_on_every_mesh(sizes: dict[str, int], greedy_tokens: dict[str, Output]):
    with tiny.mesh(**sizes):
        assert run(build(GREEDY), REQUESTS) == greedy_tokens


def test_stop_tokens(greedy_tokens: dict[str, Output]):
    """A stop token ends a request, is not part of its tokens, and frees the slot at once. Slots are on two devices."""
    stops = {output.tokens[7] for output in greedy_tokens.values()} | {greedy_tokens["r0"].tokens[0]}
    with tiny.mesh(data=2):
        found = run(build(GREEDY, stop_tokens=tuple(stops)), REQUESTS)
    for name, output in greedy_tokens.items():
        before = tuple(itertools.takewhile(lambda token: token not in stops, output.tokens))
        assert found[name].tokens == before
        assert found[name].finish_reason == "stop"
    assert found["r0"].tokens == (), "the first token already stops"


def test_output_ends_where_the_positions_end(greedy: Engine):
    long = Request("long", prompt(POSITIONS - 3))
    output = run(greedy, [long, Request("last", prompt(POSITIONS - 1))])
    assert len(output["long"].tokens) == 3
    assert len(output["last"].tokens) == 1
    assert output["long"].finish_reason == "length"


def test_engine_is_used_again_after_a_generator_was_dropped(drawing: Engine, together: dict[str, Output]):
    next(iter(drawing.generate(REQUESTS)))
    assert run(drawing, REQUESTS[:2]) == {name: together[name] for name in ("r0", "r1")}


def test_no_requests(greedy: Engine):
    assert run(greedy, []) == {}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("r", prompt(POSITIONS)), "request r: the prompt has 96 tokens; expected 1 to 95"),
        (Request("r", ()), "request r: the prompt has 0 tokens"),
        (Request("r", (1, C.vocab)), "request r: token 96 .* vocabulary of 96"),
        (Request("r", (1,), seed=2**31), "request r: seed 2147483648"),
    ],
)
def test_requests_that_are_refused(greedy: Engine, request_: Request, message: str):
    with pytest.raises(UserError, match=message):
        list(greedy.generate([REQUESTS[0], request_]))


def test_engines_that_cannot_be():
    with tiny.mesh(context=2), pytest.raises(UserError, match=r"mesh.context is 2, expected 1"):
        build(GREEDY)
    with tiny.mesh(data=2), pytest.raises(UserError, match="slots is 3; expected a multiple of data x fsdp = 2"):
        build(GREEDY, slots=3)
    with tiny.mesh(), pytest.raises(UserError, match=r"300 positions .* made for 256"):
        Engine(tiny.put(VALUES, C), C, GREEDY, (), slots=1, positions=300)
