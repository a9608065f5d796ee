"""Budget forcing on the real engine, with a model that says one fixed text."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from jaxdistill.data import chat
from jaxdistill.errors import UserError
from jaxdistill.evaluate import scaling
from jaxdistill.evaluate.budget import Budget, generate, without_tag
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.evaluate.grade import Summary, Tokens
from jaxdistill.evaluate.plan import Plan, plans
from jaxdistill.evaluate.statistics import Estimate
from jaxdistill.evaluate.tasks import task
from jaxdistill.models import decoder
from jaxdistill.records import Problem
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig

SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 512, "num_hidden_layers": 1}
C = tiny.config("llama", **SIZES)
# What follows each token: the thought "abc", its end, the answer "E" and its end; after "Wait" it thinks again
FOLLOWS = {"\n": "a", "a": "b", "b": "c", "c": "</think>", "</think>": "E", "E": "<|im_end|>", "t": "a", ":": "7"}
FOLLOWS |= {"7": "<|im_end|>"}


def tokenizer(template: str = tiny.CHATML.replace("assistant\n'", "assistant\n<think>\n'")) -> Any:
    made = tiny.tokenizer(template)
    made.add_tokens(["</think>"])  # one token, as Qwen3 has it, and no special one
    return made


TOKENIZER = tokenizer()


def fixed(follows: dict[str, str]) -> decoder.Params:
    """Weights of a model whose next token depends on the last one alone: one-hot embeddings, blocks that add 0."""
    ids = {word: TOKENIZER(word, add_special_tokens=False)["input_ids"] for pair in follows.items() for word in pair}
    assert all(len(found) == 1 for found in ids.values())
    params = tiny.values(C)
    params = jax.tree.map(np.zeros_like, params)
    head = np.zeros_like(params.unembed)
    for word, then in follows.items():
        head[ids[then][0], ids[word][0]] = 1.0
    one_hot = np.eye(C.vocab, C.embed, dtype=np.float32)
    return dataclasses.replace(params, embed=one_hot, unembed=head, final_norm=np.ones_like(params.final_norm))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with tiny.mesh():
        config = EngineConfig(slots=2, page_tokens=32, prefill_tokens=32, steps_per_call=5, compute_dtype="float32")
        stops = chat.end_tokens(TOKENIZER)
        yield Engine(tiny.put(fixed(FOLLOWS), C), C, stops, positions=160, config=config)


def texts(engine: Engine, budget: Budget, limit: int = 80, count: int = 3) -> list[str]:
    prompt = tuple(chat.prompt_tokens(TOKENIZER, [{"role": "user", "content": "?"}]))
    requests = [Request(f"r{i}", prompt, SamplingConfig(max_new_tokens=limit), seed=i) for i in range(count)]
    outputs = {output.id: output for output in generate(engine, requests, budget, TOKENIZER)}
    assert outputs.keys() == {request.id for request in requests}
    assert not engine.busy
    assert all(len(output.tokens) <= limit for output in outputs.values())
    return [TOKENIZER.decode(output.tokens) for output in outputs.values()]


def test_without_a_budget_the_model_thinks_as_it_likes(engine: Engine):
    assert texts(engine, Budget()) == ["abc</think>E"] * 3
    assert texts(engine, Budget(thinking_tokens=50)) == ["abc</think>E"] * 3  # it never comes so far


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_thinking_is_cut_at_the_token_and_the_answer_asked_for(engine: Engine, limit: int):
    assert texts(engine, Budget(thinking_tokens=limit)) == ["abc"[:limit] + "\n</think>\nFinal Answer:7"] * 3


@pytest.mark.parametrize("waits", [1, 2, 3])
def test_thinking_is_sent_on_where_it_would_end(engine: Engine, waits: int):
    assert texts(engine, Budget(waits=waits)) == ["abc" + "\nWaitabc" * waits + "</think>E"] * 3


def test_no_room_to_go_on_leaves_the_answer_alone(engine: Engine):
    assert texts(engine, Budget(waits=5), limit=13) == ["abc\nWaitabc</think>E"] * 3
    with pytest.raises(UserError, match="the answer needs some; raise max_new_tokens"):
        texts(engine, Budget(thinking_tokens=60), limit=70)


def test_a_model_that_ends_within_its_thought_is_sent_on():
    with tiny.mesh():
        config = EngineConfig(slots=2, page_tokens=32, prefill_tokens=32, compute_dtype="float32")
        params = tiny.put(fixed(FOLLOWS | {"c": "<|im_end|>"}), C)
        silent = Engine(params, C, chat.end_tokens(TOKENIZER), positions=160, config=config)
        assert texts(silent, Budget(waits=1)) == ["abc\nWaitabc"] * 3


def test_a_tag_of_several_tokens_is_taken_off_whole():
    plain = tiny.tokenizer()
    tokens = plain("so x</think>", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 8
    assert plain.decode(without_tag(tokens, plain)) == "so x"
    assert without_tag(tokens[-1:], plain) == []


def test_several_budgets_are_runs_of_their_own(tmp_path: Path):
    hf = tiny.hf_config("llama", **SIZES)
    for name in ("one", "two"):
        tiny.write_folder(tmp_path / name, hf, fixed(FOLLOWS), C, with_tokenizer=False)
    config = EvaluateConfig(
        workdir=tmp_path / "run",
        model=(tmp_path / "one", tmp_path / "two"),
        task="problems",
        path=tmp_path / "problems.jsonl",
        thinking_limits=(64, 128),
        waits=(1,),
    )
    made: list[Plan] = plans(config, task("problems"), [Problem(id="1", problem="?", answer="7")])
    kinds = ("", "-think64", "-think128", "-wait1")
    assert [plan.name for plan in made] == [name + kind for name in ("one", "two") for kind in kinds]
    assert [plan.budget for plan in made[:4]] == [
        Budget(), Budget(thinking_tokens=64), Budget(thinking_tokens=128), Budget(waits=1),
    ]  # fmt: skip
    settings = [str(plan.settings(plan.problems[0])) for plan in made]
    assert len(set(settings)) == len(settings)  # no resumed run takes one for another
    with pytest.raises(UserError, match="each once"):
        dataclasses.replace(config, waits=(1, 1))
    with pytest.raises(UserError, match="expected numbers of 1 or more"):
        dataclasses.replace(config, thinking_limits=(0,))


def summary(accuracy: float, tokens: float) -> Summary:
    def of(value: float) -> Estimate:
        return Estimate(value=value, low=value - 0.1, high=value + 0.1, n_problems=30, n_samples=120)

    counted = Tokens(average=tokens, median=tokens)
    return Summary(
        accuracy=of(accuracy),
        pass_at={1: of(accuracy)},
        maj_at={1: of(accuracy), 2: of(accuracy), 4: of(accuracy + 0.1)},
        tokens=counted,
        thinking_tokens=counted,
        answer_tokens=counted,
        truncation_rate=0.0,
        empty_rate=0.0,
        no_answer_rate=0.0,
        unverifiable_rate=0.0,
        repetition_rate=0.0,
    )


def test_the_curve_holds_samples_votes_budgets_and_references_on_one_axis():
    shown = [*scaling.points("m", summary(0.5, 1000.0)), *scaling.points("m", summary(0.3, 400.0), "think256")]
    assert [(p.how, p.tokens, p.accuracy.value) for p in shown] == [
        ("one sample", 1000, 0.5), ("maj@2", 2000, 0.5), ("maj@4", 4000, 0.6), ("think256", 400, 0.3),
    ]  # fmt: skip
    beside = scaling.references("aime2024")
    assert [(p.model, p.tokens) for p in beside][:2] == [("o1-preview", 9083), ("o1-mini", 9903)]
    ours = beside[2].accuracy  # 13/30, whose interval the paper's reader should know
    assert (round(ours.value, 3), round(ours.low, 3), round(ours.high, 3)) == (0.433, 0.274, 0.608)
    assert scaling.references("gsm8k") == []
    drawn = scaling.plot(shown, beside)
    for name in ("o1-preview", "o1-mini", "O1 Journey Part 2, 72B", "think256", "maj@4"):
        assert f">{name}<" in drawn
    assert drawn == scaling.plot(shown, beside)
