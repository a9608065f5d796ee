"""What the local teacher answers to one request body: the checks of the body, the drawn fault, the text, the usage."""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Mapping
from typing import Any, Literal

from jaxdistill.local_teacher.problems import parse
from jaxdistill.local_teacher.thoughts import (
    UNKNOWN,
    Thought,
    after_numbered,
    count_tokens,
    first_tokens,
    long_thought,
    reformatted,
    review,
)

MODEL = "local-teacher"
REFORMAT_WORDS = "rewrite the solution"  # what the prompts of curate/prompts/reformat.* say
VERDICT = re.compile(r"^Verdict: <(.+)>$", re.MULTILINE)  # how the prompts of judges end
REVIEW_WORDS, GO_ON_WORDS = "first wrong step", "right steps so far"  # of collect/prompts/*_review.*, journey_revise.*
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
PRICES_USD = (1.0, 4.0)  # per million prompt and output tokens; play money, as in collect/profiles/local.toml
Outcome = Literal["right", "wrong", "truncated", "unknown", "rate_limited", "server_error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """How often the teacher misbehaves; rates are shares of all requests and exclude each other."""

    rate_limited: float = 0.0  # share answered 429 with Retry-After
    server_error: float = 0.0  # share answered 500
    truncated: float = 0.0  # share cut off with finish_reason "length"
    wrong: float = 0.0  # share with a wrong boxed answer
    wrong_turn: float = 0.15  # share of right thoughts with a slip that is noticed and repaired

    def __post_init__(self) -> None:
        for name, rate in dataclasses.asdict(self).items():
            if not 0 <= rate <= 1:
                raise ValueError(f"fault rate {name} is {rate}, expected a share between 0 and 1")
        if (total := self.rate_limited + self.server_error + self.truncated + self.wrong) > 1:
            raise ValueError(f"the fault rates add up to {total}, expected at most 1")

    def draw(self, rng: random.Random) -> Outcome:
        """The fate of one request; `right` where nothing goes wrong."""
        point = rng.random()
        rates: dict[Outcome, float] = {
            "rate_limited": self.rate_limited,
            "server_error": self.server_error,
            "truncated": self.truncated,
            "wrong": self.wrong,
        }
        for outcome, rate in rates.items():
            if point < rate:
                return outcome
            point -= rate
        return "right"


class BadRequest(ValueError):  # noqa: N818  (named after the HTTP status)
    """The request body is not one this API takes; `param` names the culprit as OpenAI does."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def check(raw: bytes, through_responses: bool = False) -> dict[str, Any]:
    """Parses and checks a chat-completions body, or one of the Responses API, whose `input` may be a text.

    Raises:
      BadRequest: it is not JSON, or a field this server reads has a wrong type or value.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadRequest("We could not parse the JSON body of your request; expected a JSON object.") from None
    if not isinstance(body, dict):
        raise BadRequest(f"The body is a JSON {type(body).__name__}; expected an object.")
    if not isinstance(body.get("model"), str):
        raise BadRequest("You must provide a model parameter, a string.", "model")
    if body["model"] != MODEL:
        message = f"The model {body['model']!r} does not exist; this server has {MODEL!r}."
        raise BadRequest(message, "model", status=404, code="model_not_found")
    asked = "input" if through_responses else "messages"
    if isinstance(body.get("input"), str):
        body["input"] = [{"role": "user", "content": body["input"]}]
    _check_messages(body.get(asked), asked)
    for name in LIMITS:
        value = body.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise BadRequest(f"{name} is {value!r:.80}; expected an integer of at least 1.", name)
    for name, largest in (("temperature", 2), ("top_p", 1)):
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BadRequest(f"{name} is {value!r:.80}; expected a number.", name)
        if value is not None and not 0 <= value <= largest:
            raise BadRequest(f"{name} is {value}; expected a number from 0 to {largest}.", name)
    if body.get("stream") or body.get("n") not in (None, 1):
        raise BadRequest(
            "This server does not stream and answers once a request.", "stream" if "stream" in body else "n"
        )
    return body


def _check_messages(messages: Any, name: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadRequest(f"{name} is missing or empty; expected a non-empty list of {{role, content}}.", name)
    for index, message in enumerate(messages):
        where = f"{name}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRequest(f"{where} is not an object with a content of type string.", where)
        if message.get("role") not in ("system", "developer", "user", "assistant"):
            raise BadRequest(f"{where}.role is {message.get('role')!r:.80}; expected system, user or assistant.", where)


def messages_of(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation in a body of either API."""
    return body["messages"] if "messages" in body else body["input"]


def body_hash(body: Mapping[str, Any]) -> str:
    """SHA-256 of a body, whatever the order of its keys and whether it is worked on in the background."""
    asked = {name: value for name, value in body.items() if name not in ("background", "store")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Answer:
    """The fate of a request and, unless it is an error, the text sent."""

    outcome: Outcome
    thought: Thought = Thought("", "")
    finish_reason: Literal["stop", "length"] = "stop"


def answer(body: Mapping[str, Any], attempt: int, seed: int, faults: Faults) -> Answer:
    """Answers from the text of the last user message; the same arguments give the same answer."""
    rng = random.Random(f"{seed}/{body_hash(body)}/{attempt}")
    outcome = faults.draw(rng)
    if outcome in ("rate_limited", "server_error"):
        return Answer(outcome)
    text = next((m["content"] for m in reversed(messages_of(body)) if m["role"] == "user"), "")
    task = parse(text)
    if asked := VERDICT.findall(text):
        thought = Thought("", _verdict(asked[-1], rng, readable=outcome != "wrong"))
    elif task is None:
        outcome, thought = "unknown", Thought("", UNKNOWN)
    elif REFORMAT_WORDS in text.lower():
        thought = Thought("", reformatted(task, rng if outcome == "wrong" else None))
    elif REVIEW_WORDS in text.lower():
        outcome, thought = "right" if outcome == "wrong" else outcome, Thought("", review(task, text))
    else:
        thought = long_thought(task, rng, wrong_turn_rate=faults.wrong_turn, wrong=outcome == "wrong")
        if GO_ON_WORDS in text.lower():
            thought = after_numbered(text, thought)
    limits = [body[name] for name in LIMITS if body.get(name) is not None]
    length = count_tokens(thought.reasoning) + count_tokens(thought.content)
    if outcome == "truncated":
        limits.append(max(1, int(length * rng.uniform(0.2, 0.8))))
    limit = min(limits, default=length)
    if limit < length:
        return Answer("truncated", _cut(thought, limit), "length")
    return Answer(outcome, thought)


def _verdict(words: str, rng: random.Random, *, readable: bool) -> str:
    """A judgement drawn by chance, which says nothing about the text judged."""
    if not readable:
        return "It depends."
    word = str(rng.randint(0, 100)) if words == "0-100" else rng.choice(words.split("|"))
    return f"This server draws its verdicts by chance.\nVerdict: {word}"


def _cut(thought: Thought, limit: int) -> Thought:
    reasoning = first_tokens(thought.reasoning, limit)
    return Thought(reasoning, first_tokens(thought.content, limit - count_tokens(reasoning)))


def completion(body: Mapping[str, Any], reply: Answer, request_id: str, created: int) -> dict[str, Any]:
    """The response body, in OpenAI's shape, with the reasoning where DeepSeek and vLLM put it."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.thought.content, "refusal": None}
    if reply.thought.reasoning:
        message["reasoning_content"] = reply.thought.reasoning
    prompt_tokens, output_tokens, reasoning_tokens = _usage(body, reply)
    return {
        "id": f"chatcmpl-{request_id.removeprefix('req_')}",
        "object": "chat.completion",
        "created": created,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
        },
    }


def _usage(body: Mapping[str, Any], reply: Answer) -> tuple[int, int, int]:
    """Prompt, output and reasoning tokens."""
    reasoning_tokens = count_tokens(reply.thought.reasoning)
    output_tokens = reasoning_tokens + count_tokens(reply.thought.content)
    return sum(count_tokens(m["content"]) for m in messages_of(body)), output_tokens, reasoning_tokens


def response_object(body: Mapping[str, Any], reply: Answer, request_id: str, created: int) -> dict[str, Any]:
    """The answer in the shape of the Responses API, which returns a summary of the reasoning where one is asked for."""
    prompt_tokens, output_tokens, reasoning_tokens = _usage(body, reply)
    name = request_id.removeprefix("req_")
    output: list[dict[str, Any]] = []
    if reply.thought.reasoning:
        lines = reply.thought.reasoning.splitlines()
        wanted = isinstance(body.get("reasoning"), dict) and body["reasoning"].get("summary")
        summary = [{"type": "summary_text", "text": f"{lines[0]} {lines[-1]}"}] if wanted else []
        output.append({"id": f"rs_{name}", "type": "reasoning", "summary": summary})
    text = {"type": "output_text", "text": reply.thought.content, "annotations": []}
    if reply.thought.content:
        message = {"id": f"msg_{name}", "type": "message", "role": "assistant", "content": [text]}
        output.append({**message, "status": "completed"})
    cut = reply.finish_reason == "length"
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": created,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "model": MODEL,
        "output": output,
        "usage": {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
            "total_tokens": prompt_tokens + output_tokens,
        },
    }
