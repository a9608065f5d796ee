"""Journeys and debates: what is asked next, how the chain tells it, and both against the real teacher process."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import rows

from jaxdistill.collect.calls import Call, Receipt
from jaxdistill.collect.dialogues import Dialogues, Method
from jaxdistill.collect.request import Request, Response
from jaxdistill.collect.run import CollectConfig, main
from jaxdistill.collect.teacher import Teacher, TeacherConfig
from jaxdistill.errors import UserError
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.problems import generate
from jaxdistill.local_teacher.server import TeacherOptions, running_teacher
from jaxdistill.records import Chain, Message, Problem, Usage, read_jsonl, write_jsonl
from jaxdistill.verify import Verifier

PROBLEM = Problem(id="p", problem="What is 3 * 4 + 1?", answer="13")


def dialogues(method: Method, attempts: int = 3) -> Dialogues:
    teacher = Teacher(TeacherConfig(base_url="http://127.0.0.1:9/v1"))
    return Dialogues([PROBLEM], method, attempts, ({"role": "system", "content": "Think."},), teacher.request)


def answer(plan: Dialogues, call: Call, verifier: Verifier, content: str, reasoning: str | None = None) -> list[Call]:
    """What the dialogue asks after this answer, which used 10 and 5 tokens."""
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    raw = json.dumps({"model": "m", "choices": [choice], "usage": usage}).encode()
    outcome = Response(raw=raw, request_id="r", sent=0.0, received=1.0, nano=7)
    judged = dataclasses.replace(plan.judge(call, outcome, verifier), nano=7)
    return plan.judged(call, judged)[1]


def last_message(request: Request) -> str:
    return request.messages[-1]["content"]


def told(plan: Dialogues, content: str) -> Chain:
    ((call, judged),) = plan.in_order()
    message: Message = {"role": "assistant", "content": content}
    messages = (*call.request.messages, message)
    return plan.told(
        call, judged, rows.chain(id=call.id, problem_id=call.problem.id, messages=messages, reasoning_kind="full")
    )


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as one:
        yield one


def test_a_journey_goes_back_to_the_last_right_step(verifier: Verifier):
    plan = dialogues("journey")
    (first,) = plan.start()
    assert first.request.messages == (
        {"role": "system", "content": "Think."},
        {"role": "user", "content": PROBLEM.problem},
    )
    (review,) = answer(plan, first, verifier, "\\boxed{15}", "First 3 * 4.\n3 * 4 = 14.\n\n14 + 1 = 15.")
    assert "1. First 3 * 4.\n2. 3 * 4 = 14.\n3. 14 + 1 = 15." in last_message(review.request)
    (second,) = answer(plan, review, verifier, "Wait, 3 * 4 is 12.\n**Step: 2**")
    assert "far:\n1. First 3 * 4.\n\nNote:\nWait, 3 * 4 is 12." in last_message(second.request)
    assert answer(plan, second, verifier, "\\boxed{13}", "3 * 4 = 12.\n12 + 1 = 13.") == []
    ((call, judged),) = plan.in_order()
    assert (call, judged.reason, judged.usage, judged.nano) == (
        second,
        None,
        Usage(prompt_tokens=30, output_tokens=15),
        21,
    )
    chain = told(plan, "\\boxed{13}")
    assert chain.messages == (
        *first.request.messages,
        {
            "role": "assistant",
            "content": "\\boxed{13}",
            "reasoning_content": "First 3 * 4.\n3 * 4 = 14.\n\nWait, 3 * 4 is 12.\n\n3 * 4 = 12.\n12 + 1 = 13.",
        },
    )
    assert (chain.reasoning_kind, chain.usage.output_tokens, chain.cost_usd) == ("synthesized", 15, 21e-9)


def test_a_journey_that_is_right_at_once_is_a_plain_chain(verifier: Verifier):
    plan = dialogues("journey")
    (first,) = plan.start()
    assert answer(plan, first, verifier, "\\boxed{13}", "3 * 4 = 12.\n\n12 + 1 = 13.") == []
    assert told(plan, "\\boxed{13}").reasoning_kind == "full"


def test_a_review_that_names_no_step_ends_a_journey(verifier: Verifier):
    for words in ("It is all wrong.", "I see no mistake.\nStep: none"):
        plan = dialogues("journey")
        (first,) = plan.start()
        (review,) = answer(plan, first, verifier, "\\boxed{15}", "3 * 4 = 14.")
        assert answer(plan, review, verifier, words) == []
        ((call, judged),) = plan.in_order()
        assert (call, judged.reason, judged.detail) == (review, "failed", "the review names no wrong step")


def test_a_journey_ends_with_its_attempts(verifier: Verifier):
    plan = dialogues("journey", attempts=2)
    (call,) = plan.start()
    for content in ("3 * 4 = 14.\n\\boxed{15}", "Wait.\nStep: 1", "3 * 4 = 15.\n\\boxed{16}"):
        calls = answer(plan, call, verifier, content)
        if calls:
            (call,) = calls
    assert calls == []
    assert [(one.request.sample_index, judged.reason) for one, judged in plan.in_order()] == [(2, "wrong")]
    assert len(list(plan.at_worst(call))) == 3


def test_a_critic_does_not_know_the_answer_and_ends_a_debate(verifier: Verifier):
    plan = dialogues("debate")
    (first,) = plan.start()
    (review,) = answer(plan, first, verifier, "\\boxed{13}", "3 * 4 = 12.\n12 + 1 = 13.")
    assert "answer: 13" not in last_message(review.request)
    (second,) = answer(plan, review, verifier, "Is 3 * 4 not 14?\nStep: 1")
    assert "Objection:\nIs 3 * 4 not 14?" in last_message(second.request)
    (again,) = answer(plan, second, verifier, "\\boxed{13}", "No, 3 * 4 = 12.\n12 + 1 = 13.")
    assert answer(plan, again, verifier, "Right, 4 + 4 + 4 = 12.\nStep: none") == []
    ((call, judged),) = plan.in_order()
    assert (call, judged.reason, judged.usage.output_tokens) == (second, None, 20)
    thought = told(plan, "\\boxed{13}").messages[-1]["reasoning_content"]
    first_words = "3 * 4 = 12.\n12 + 1 = 13.\n\nIs 3 * 4 not 14?\n\nNo, 3 * 4 = 12.\n12 + 1 = 13.\n\n"
    assert thought == first_words + "Right, 4 + 4 + 4 = 12."


@pytest.mark.parametrize("method", ["journey", "debate"])
def test_dialogues_with_the_real_teacher(method: Method, tmp_path: Path):
    problems = generate("all", 60, seed=0, split="train")
    write_jsonl(tmp_path / "problems.jsonl", problems)
    log = tmp_path / "log.jsonl"
    faults = Faults(server_error=0.05, truncated=0.03, wrong=0.4)
    with running_teacher(TeacherOptions(faults=faults, seed=5, log=log)) as base_url:
        teacher = TeacherConfig(base_url=base_url, max_tokens=2000, backoff_s=0.05)
        config = CollectConfig(
            problems=tmp_path / "problems.jsonl", workdir=tmp_path / "run", teacher=teacher, method=method
        )
        counts = main(config)
        asked = len(log.read_text().splitlines())
        assert main(config) == counts
        assert len(log.read_text().splitlines()) == asked
    assert sum(counts.values()) == 60
    assert counts["verified"] > 45  # one attempt in five has the wrong answer or none
    chains = list(read_jsonl(config.workdir / "chains.jsonl", Chain))
    texts: dict[str, list[str]] = collections.defaultdict(list)
    for chain in chains:
        texts[chain.reasoning_kind].append(chain.messages[-1]["reasoning_content"])
        assert [message["role"] for message in chain.messages] == ["system", "user", "assistant"]
    turned = [text for text in texts["synthesized"] if "should be" in text]
    assert len(turned) > 10
    if method == "journey":
        assert len(texts["full"]) > 15  # right at once
        for text in turned:  # each wrong step is followed by what was noticed, then by the right one
            before, _, after = text.partition("\n\nWait, ")
            label = after.partition(":")[0]
            wrong, right = before.splitlines()[-1], after.partition("\n\n")[2].splitlines()[0]
            assert wrong.startswith(f"{label}: ")
            assert right.startswith(f"{label}: ")
            assert wrong[-2] != right.removesuffix(".")[-1] or text.count("Wait, ") > 1
    else:
        ended = ("came to the same values" in text or text.count("should be") == 2 for text in texts["synthesized"])
        assert all(ended)  # by the critic, or with the third attempt
        assert not texts["full"]
    receipts = list(read_jsonl(config.workdir / "dropped.jsonl", Receipt))
    assert len(receipts) + len(chains) == 60


def test_settings_of_single_calls_are_refused(tmp_path: Path):
    values: dict[str, Any] = {"problems": tmp_path, "workdir": tmp_path, "method": "journey"}
    with pytest.raises(UserError, match="samples_per_problem of method journey cannot be set"):
        CollectConfig(**values, samples_per_problem=2)
    with pytest.raises(UserError, match=r"teacher\.larger_max_tokens of method journey"):
        CollectConfig(**values, teacher=TeacherConfig(larger_max_tokens=100_000))
    with pytest.raises(UserError, match="attempts is 0"):
        CollectConfig(**values, attempts=0)
