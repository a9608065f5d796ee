"""The sampler: what it draws, and that no request notices the others."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import export_check, sharding
from jaxdistill.errors import UserError
from jaxdistill.models import decoder
from jaxdistill.sample import attention, programs
from jaxdistill.sample import cache as kv
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import STOP_TOKENS, Event, Output, Request, SamplingConfig
from jaxdistill.sample.schedule import Scheduler

POSITIONS, SLOTS, CHUNK, PAGE = 96, 4, 16, 32
C = tiny.config("qwen3", num_attention_heads=8)
VALUES = tiny.values(C)
DRAWN = SamplingConfig(temperature=1.0, top_k=40, top_p=0.98, min_p=0.001, max_new_tokens=24)
GREEDY = SamplingConfig(max_new_tokens=24)


@pytest.fixture(autouse=True, scope="module")
def _groups():
    """Attention takes two of the four slots at a time, and reads up to three pages of each; compiled in a hurry."""
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(attention, "_GROUP_BYTES", 2 * C.kv_heads * C.head_dim * PAGE * 4)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def build(slots: int = SLOTS, stop_tokens: Any = (), dtype: Any = "float32", **changes: Any) -> Engine:
    settings = {"page_tokens": PAGE, "prefill_tokens": CHUNK, "steps_per_call": 10, "prefill_calls": 2, **changes}
    config = EngineConfig(slots=slots, compute_dtype=dtype, **settings)
    return Engine(tiny.put(VALUES, C), C, stop_tokens, POSITIONS, config)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine on one device."""
    with tiny.mesh():
        yield build()


def prompt(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(length).integers(3, C.vocab, length).tolist())


def requests(sampling: SamplingConfig) -> list[Request]:
    """Prompts shorter and longer than a prefill chunk, and whole chunks of it."""
    lengths = (5, 16, 33, 1, 47, 32, 20, 64, 2)
    return [Request(f"r{i}", prompt(n), sampling, seed=100 + i) for i, n in enumerate(lengths)]


REQUESTS = requests(DRAWN)


def run(engine: Engine, requests: list[Request]) -> dict[str, Output]:
    outputs = list(engine.generate(requests))
    assert len(outputs) == len(requests)
    assert not engine.busy
    assert all(pool.available == pool.pages for pool in engine.schedule.pools), "every page was given back"
    return {output.id: output for output in outputs}


@pytest.fixture(scope="module")
def together(engine: Engine) -> dict[str, Output]:
    """Nine requests through four slots, so that slots are refilled while others are in mid-sentence."""
    return run(engine, REQUESTS)


def test_every_request_is_answered(together: dict[str, Output]):
    assert together.keys() == {r.id for r in REQUESTS}
    for output in together.values():
        assert output.finish_reason == "length"
        assert len(output.tokens) == DRAWN.max_new_tokens
    assert len({output.tokens for output in together.values()}) == len(REQUESTS)


def test_request_alone_says_the_same(engine: Engine, together: dict[str, Output]):
    for request in REQUESTS:
        assert run(engine, [request]) == {request.id: together[request.id]}


def test_neither_slot_nor_neighbours_matter(engine: Engine, together: dict[str, Output]):
    assert run(engine, REQUESTS[::-1]) == together
    shuffled = [REQUESTS[i] for i in np.random.default_rng(0).permutation(len(REQUESTS))]
    assert run(engine, shuffled) == together
    busy = [Request(f"other{i}", prompt(60), GREEDY, seed=i) for i in range(3)]
    assert run(engine, [*busy, REQUESTS[0]])["r0"] == together["r0"]


@pytest.mark.parametrize("sizes", [{}, {"data": 2}], ids=str)
def test_bfloat16_request_alone_says_the_same(sizes: dict[str, int]):
    with tiny.mesh(**sizes):
        engine = build(dtype="bfloat16")
        together = run(engine, REQUESTS)
        assert len({output.tokens for output in together.values()}) == len(REQUESTS)
        for request in REQUESTS[::3]:
            assert run(engine, [request]) == {request.id: together[request.id]}


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({}, {"prefill_tokens": 24, "steps_per_call": 3, "prefill_calls": 1}),
        ({}, {"slots": 7}),
        ({"data": 2}, {}),
    ],
    ids=str,
)
def test_neither_chunk_nor_slots_nor_devices_matter(
    sizes: dict[str, int], changes: dict[str, int], together: dict[str, Output]
):
    with tiny.mesh(**sizes):
        assert run(build(**changes), REQUESTS) == together


@pytest.mark.parametrize("sizes", [{}, {"data": 2}], ids=str)
def test_who_gives_way_says_the_same(sizes: dict[str, int], engine: Engine):
    """A cache of four pages on each device, and requests that grow to three."""
    growing = dataclasses.replace(DRAWN, max_new_tokens=76)
    several = [dataclasses.replace(r, sampling=growing) for r in REQUESTS if len(r.prompt) <= 20]
    expected = run(engine, several)
    devices = sizes.get("data", 1)
    with tiny.mesh(**sizes):
        small = build(cache_tokens=4 * PAGE * devices, slots=2 * devices)
        assert run(small, several) == expected
    assert small.schedule.preemptions > 0


def test_samples_of_a_prompt_share_its_whole_pages(engine: Engine):
    """64 tokens are two pages; the second holds the last token, whose logits each sample needs, so one is shared."""
    samples = [Request(f"s{i}", prompt(64), DRAWN, seed=i) for i in range(6)]
    alone = {}
    for request in samples:
        alone |= run(engine, [request])
    assert len({output.tokens for output in alone.values()}) == 6
    engine.schedule = Scheduler(engine.shape)  # nothing is known of the prompt
    for request in samples:
        engine.submit(request)
    events: list[Event] = []
    while len(running := engine.schedule.running()) < 2:
        events += engine.step()
    assert len({s.pages[0] for s in running}) == 1
    assert len({page for s in running for page in s.pages[1:]}) == sum(len(s.pages) - 1 for s in running)
    while engine.busy:
        events += engine.step()
    said = {r.id: tuple(itertools.chain(*[e.tokens for e in events if e.id == r.id])) for r in samples}
    assert said == {name: output.tokens for name, output in alone.items()}


def test_seed_decides_what_is_drawn(engine: Engine):
    seeds = [Request(f"s{seed}", REQUESTS[0].prompt, DRAWN, seed=seed) for seed in range(6)]
    first, second = run(engine, seeds), run(engine, seeds)
    assert first == second
    assert len({output.tokens for output in first.values()}) == 6
    same = run(engine, [dataclasses.replace(seeds[3], id=name) for name in ("a", "b")])
    assert same["a"].tokens == same["b"].tokens == first["s3"].tokens


def test_each_request_has_settings_of_its_own(engine: Engine, together: dict[str, Output]):
    """Together they need a program that does everything; alone each one has less to do, and says the same."""
    settings = [
        GREEDY,
        SamplingConfig(temperature=0.7, max_new_tokens=9),
        SamplingConfig(temperature=1.0, top_p=0.5, max_new_tokens=30),
        SamplingConfig(repetition_penalty=1.8, max_new_tokens=20),
        SamplingConfig(temperature=0.9, presence_penalty=1.0, frequency_penalty=0.5, top_k=5, max_new_tokens=20),
    ]
    mixed = [Request(f"m{i}", prompt(10 + i), c, seed=i, logprobs=i == 1) for i, c in enumerate(settings)]
    found = run(engine, [*mixed, *REQUESTS])
    for request in mixed:
        assert run(engine, [request]) == {request.id: found[request.id]}
        assert len(found[request.id].tokens) == request.sampling.max_new_tokens
    assert {name: found[name] for name in together} == together


def test_penalties_against_transformers(engine: Engine):
    """Greedy with a repetition penalty, whose processor sees prompt and output; and a presence penalty that is so high
    that no token comes twice."""
    import torch
    from transformers import generation

    request = Request("r", prompt(20), SamplingConfig(repetition_penalty=1.3, max_new_tokens=20))
    tokens = run(engine, [request])["r"].tokens
    whole = np.array([request.prompt + tokens], np.int32)
    padded = np.zeros((1, 48), np.int32)
    padded[:, : whole.shape[1]] = whole
    with tiny.mesh():
        logits = packed_logits(padded)
    processor = generation.RepetitionPenaltyLogitsProcessor(1.3)
    for i, token in enumerate(tokens):
        seen: Any = torch.from_numpy(whole[:, : 20 + i].astype(np.int64))
        found: Any = torch.from_numpy(logits[:, 19 + i].astype(np.float32))
        scores = processor(seen, found)
        assert token == int(scores.argmax())
    once = run(engine, [Request("o", prompt(5), SamplingConfig(presence_penalty=1e4, max_new_tokens=60))])["o"].tokens
    assert len(set(once)) == 60
    # 0.5 once it has been said, and as much again for each time: what a count of any other kind would not give
    often = SamplingConfig(presence_penalty=0.5, frequency_penalty=0.5, max_new_tokens=30)
    said = run(engine, [Request("f", prompt(20), often)])["f"].tokens
    padded = np.zeros((1, 50), np.int32)
    padded[0] = prompt(20) + said
    with tiny.mesh():
        logits = packed_logits(padded)
    for i, token in enumerate(said):
        count = np.bincount(np.array(said[:i], np.int32), minlength=C.vocab)
        assert token == int((logits[0, 19 + i] - 0.5 * count - 0.5 * (count > 0)).argmax())


def test_log_probabilities_are_those_of_the_training_forward(engine: Engine):
    request = dataclasses.replace(REQUESTS[4], logprobs=True, prompt_logprobs=True)
    others = [dataclasses.replace(r, prompt_logprobs=r.id == "r7") for r in REQUESTS if r.id != request.id]
    outputs = run(engine, [*others, request])
    output = outputs[request.id]
    whole = request.prompt + output.tokens
    padded = np.zeros((1, POSITIONS), np.int32)
    padded[0, : len(whole)] = whole
    with tiny.mesh():
        expected = np.asarray(jax.nn.log_softmax(packed_logits(padded), axis=-1))[0]
    found = output.prompt_logprobs + output.logprobs
    assert len(found) == len(whole) - 1
    for position, one in enumerate(found):
        assert one.token == whole[position + 1]
        np.testing.assert_allclose(one.logprob, expected[position, one.token], atol=1e-4)
        best = np.sort(expected[position])[::-1][: len(one.top)]
        np.testing.assert_allclose([value for _, value in one.top], best, atol=1e-4)
        assert len(one.top) == 20
    assert len(outputs["r7"].prompt_logprobs) == 63
    assert outputs["r7"].logprobs == outputs["r6"].prompt_logprobs == ()


def test_cancelled_requests_make_room_and_are_not_heard_of_again(engine: Engine, together: dict[str, Output]):
    for request in REQUESTS:
        engine.submit(request)
    engine.step()
    gone = {engine.schedule.running()[0].request.id, engine.schedule.running()[-1].request.id, "r8"}
    for id_ in gone:
        engine.cancel(id_)
    said: dict[str, tuple[int, ...]] = {r.id: () for r in REQUESTS}
    while engine.busy:
        for event in engine.step():
            assert event.id not in gone
            said[event.id] += event.tokens
    left = [r.id for r in REQUESTS if r.id not in gone]
    assert len(left) == 6
    tail = {name: together[name].tokens[-len(said[name]) :] for name in left}
    assert {name: said[name] for name in left} == tail  # what the first step told is missing here
    assert run(engine, REQUESTS[:1])["r0"] == together["r0"]


def test_prompts_are_read_in_turn_with_decoding(engine: Engine):
    """While a prompt of four pieces is read, two at a time, the other request goes on."""
    engine.submit(Request("fast", prompt(3), dataclasses.replace(GREEDY, max_new_tokens=80)))
    engine.step()
    engine.submit(Request("slow", prompt(61), GREEDY))  # no other test's, whose pages it would share
    [event] = engine.step()
    assert event.id == "fast"
    assert len(event.tokens) == 10, "a whole decode call, between two halves of the slow one's prompt"
    assert [s.decoding for s in engine.schedule.running()] == [True, False]
    while engine.busy:
        engine.step()


def test_slots_are_filled_first_where_only_whole_outputs_count(engine: Engine):
    """Of four prompts of three pieces a step reads two pieces, unless it is to fill the slots."""
    for fill, decoding in ((False, 1), (True, 4)):
        for i in range(4):
            engine.submit(Request(f"{fill}{i}", prompt(40 + i), dataclasses.replace(GREEDY, max_new_tokens=60), i))
        engine.step(fill=fill)
        assert sum(s.decoding for s in engine.schedule.running()) == decoding
        while engine.busy:
            engine.step()


def packed_logits(tokens: np.ndarray) -> np.ndarray:
    """Logits of rows of one document each, through the forward pass that training uses."""
    return export_check.logits(tiny.put(VALUES, C), tokens, C)


def test_cached_logits_equal_the_packed_forward():
    """Two prompts of different lengths, fed in uneven pieces into scattered pages of a cache that was used before."""
    lengths = (45, 29)
    tokens = np.zeros((2, 48), np.int32)
    for row, n in enumerate(lengths):
        tokens[row, :n] = prompt(n)
    with tiny.mesh():
        params = programs.per_layer(tiny.put(VALUES, C), C, jnp.float32)
        positions = np.broadcast_to(np.arange(48), (2, 48))

        @jax.jit
        def cached(params: Any, cache: Any, tokens: Any, tables: Any, positions: Any, live: Any) -> Any:
            x, cache = programs.forward(params, cache, tokens, tables, positions, live, C, jnp.float32)
            return decoder.logits(params, x, C), cache

        expected = packed_logits(tokens)
        dirty = jax.tree.map(lambda x: x + 7.0, kv.empty(C, 5, PAGE, jnp.float32))
        tables = sharding.put(np.array([[3, 1], [4, 0]], np.int32), "BM")
        found, cache = [], dirty
        for start in range(0, 48, CHUNK):
            here = positions[:, start : start + CHUNK]
            live = here < np.array(lengths)[:, None]
            logits, cache = cached(params, cache, tokens[:, start : start + CHUNK], tables, here, live)
            found.append(np.asarray(logits))
    found = np.concatenate(found, axis=1)
    for row, n in enumerate(lengths):
        assert tiny.largest_relative_difference(found[row, :n], expected[row, :n]) < 1e-5
    for pages in cache:
        for kept in (np.asarray(pages.keys), np.moveaxis(np.asarray(pages.values), -1, -2)):  # both with positions last
            assert (kept[[0, 2]] == 7.0).all(), "pages that hold nothing yet, or are nobody's"
            assert (kept[1, ..., 45 - PAGE :] == 7.0).all(), "positions that are not live"
            assert (kept[4, ..., 29:] == 7.0).all()
            assert (kept[1, ..., : 45 - PAGE] != 7.0).all()
            assert (kept[3] != 7.0).all()


@pytest.fixture(scope="module")
def greedy_tokens(engine: Engine) -> dict[str, Output]:
    return run(engine, requests(GREEDY))


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


@pytest.mark.parametrize(
    "sizes",
    [{"tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 4}, {"fsdp": 2, "context": 2, "tensor": 2}],
    ids=str,
)
def test_greedy_tokens_are_the_same_on_every_mesh(sizes: dict[str, int], greedy_tokens: dict[str, Output]):
    with tiny.mesh(**sizes):
        assert run(build(), requests(GREEDY)) == greedy_tokens


@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        ({"weight_dtype": "int8"}, 0.05),
        ({"weight_dtype": "float8"}, 0.2),
        ({"cache_dtype": "int8"}, 0.05),
        ({"cache_dtype": "float8"}, 0.2),
    ],
    ids=str,
)
def test_eight_bits_cost_little_and_no_request_notices_the_others(
    changes: dict[str, Any], largest: float, engine: Engine
):
    """Mean difference of log-probabilities; float8 has 3 bits for a number's digits, int8 has 7."""
    asked = [dataclasses.replace(r, sampling=GREEDY, prompt_logprobs=True) for r in REQUESTS[2:8]]
    exact = run(engine, asked)
    with tiny.mesh():
        small = build(**changes)
        found = run(small, asked)
        assert run(small, asked[:1]) == {asked[0].id: found[asked[0].id]}
    off = [
        abs(one.logprob - other.logprob)
        for name, output in found.items()
        for one, other in zip(output.prompt_logprobs, exact[name].prompt_logprobs, strict=True)
    ]
    assert largest / 20 < np.mean(off) < largest


def test_eight_bits_on_a_mesh():
    """All that is split: weights over fsdp, context and tensor, pages over context, and the scales with them."""
    changes: dict[str, Any] = {"weight_dtype": "int8", "cache_dtype": "int8"}
    with tiny.mesh():
        expected = run(build(**changes), requests(GREEDY))
    with tiny.mesh(fsdp=2, context=2, tensor=2):
        assert run(build(**changes), requests(GREEDY)) == expected


def test_stop_tokens(greedy_tokens: dict[str, Output]):
    """A stop token ends a request, is not part of its tokens, and frees the slot at once. Slots are on two devices."""
    stops = {output.tokens[7] for output in greedy_tokens.values()} | {greedy_tokens["r0"].tokens[0]}
    assert len(stops) <= STOP_TOKENS
    with tiny.mesh(data=2):
        found = run(build(slots=3, stop_tokens=tuple(stops)), requests(GREEDY))
    for name, output in greedy_tokens.items():
        before = tuple(itertools.takewhile(lambda token: token not in stops, output.tokens))
        assert found[name].tokens == before
        assert found[name].finish_reason == "stop"
    assert found["r0"].tokens == (), "the first token already stops"


def test_stop_tokens_of_one_request(engine: Engine, greedy_tokens: dict[str, Output]):
    first = greedy_tokens["r1"].tokens
    stop = next(token for token in first[1:] if token != first[0])
    one, other = requests(GREEDY)[1], requests(GREEDY)[2]
    found = run(engine, [dataclasses.replace(one, stop_tokens=(stop,)), other])
    assert found["r1"].tokens == first[: first.index(stop)]
    assert found["r1"].finish_reason == "stop"
    assert found["r2"] == greedy_tokens["r2"]


def test_output_ends_where_the_positions_end(engine: Engine):
    long = Request("long", prompt(POSITIONS - 3), GREEDY)
    output = run(engine, [long, Request("last", prompt(POSITIONS - 1), GREEDY)])
    assert len(output["long"].tokens) == 3
    assert len(output["last"].tokens) == 1
    assert output["long"].finish_reason == "length"


def test_engine_is_used_again_after_a_generator_was_dropped(engine: Engine, together: dict[str, Output]):
    next(iter(engine.generate(REQUESTS)))
    assert run(engine, REQUESTS[:2]) == {name: together[name] for name in ("r0", "r1")}


def test_no_requests(engine: Engine):
    assert run(engine, []) == {}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("r", prompt(POSITIONS)), "request r: the prompt has 96 tokens; expected 1 to 95"),
        (Request("r", ()), "request r: the prompt has 0 tokens"),
        (Request("r", (1, C.vocab)), "request r: token 96 .* vocabulary of 96"),
        (Request("r", (1,), seed=2**31), "request r: seed 2147483648"),
        (Request("r", (1,), stop_tokens=tuple(range(17))), "request r: 17 stop tokens; expected at most 16"),
        (REQUESTS[0], "request r0 is there already"),
    ],
)
def test_requests_that_are_refused(engine: Engine, request_: Request, message: str):
    with pytest.raises(UserError, match=message):
        list(engine.generate([REQUESTS[0], request_]))


def test_engines_that_cannot_be():
    with tiny.mesh(context=2), pytest.raises(UserError, match=r"mesh.context 2 does not split pages of 33 positions"):
        build(page_tokens=33)
    with tiny.mesh(), pytest.raises(UserError, match=r"2 pages of 32 positions on each device; expected at least 3"):
        build(cache_tokens=2 * PAGE)
    with tiny.mesh(), pytest.raises(UserError, match=r"300 positions .* made for 256"):
        Engine(tiny.put(VALUES, C), C, (), positions=300)
    with pytest.raises(UserError, match="prefill_calls is 0; expected 1 or more"):
        EngineConfig(prefill_calls=0)
