"""`jaxdistill doctor --teacher MODEL`: one cheap call to an API, and what of it works."""

import asyncio
import dataclasses
import datetime
import time

from jaxdistill.collect import profiles, transports
from jaxdistill.collect.api import Again, Api, Outcome, Stop, connected
from jaxdistill.collect.prices import NANO
from jaxdistill.collect.reply import UnreadableReply, read_reply
from jaxdistill.collect.request import Failure, Response
from jaxdistill.collect.teacher import Teacher, TeacherConfig, read_key
from jaxdistill.errors import RunError, UserError

_QUESTION = "What is 2 + 2? Answer with \\boxed{} and nothing else."
_MAX_TOKENS = 1024  # enough for a reasoning model to think a little and answer


def config_of(model: str, base_url: str | None, api_key_env: str | None) -> TeacherConfig:
    """The teacher that a model's name means, by the shipped profile that knows it unless an address is given.

    Raises:
      UserError: no profile knows the model.
    """
    known = next((p for p in profiles.shipped() if p.base_urls and p.knows(model)), None)
    if base_url is None and known is None:
        raise UserError(f"no shipped profile knows a model {model!r}; say where it is with --base-url")
    url = base_url or (known.base_urls[0] if known else "")
    profile = None if base_url else known
    key = api_key_env or (profile or profiles.find(None, url)).api_key_env
    return TeacherConfig(base_url=url, model=model, api_key_env=key, max_tokens=_MAX_TOKENS, timeout_s=120.0)


def check(config: TeacherConfig) -> None:
    """Prints what the profile says and what one call brings.

    Raises:
      UserError: no key.
      RunError: the call brings no answer.
    """
    teacher = Teacher(config)
    read_key(config)
    model = teacher.model
    rows = [
        ("profile", teacher.profile.name),
        ("endpoint", f"{config.base_url}, {' or '.join(model.transports)}"),
        ("price", teacher.prices.describe()),
        ("retires", f"{model.retires}" if model.retires else "no date announced"),
        ("not accepted", ", ".join(model.refuses) or "nothing is known to be refused"),
        ("terms", teacher.profile.terms or "not known here; read them before training on outputs"),
    ]
    for name, value in rows:
        print(f"{name:14} {value}")
    for warning in teacher.warnings(datetime.date.today()):
        print(f"{'warning':14} {warning}")
    asyncio.run(_call(teacher))


async def _call(teacher: Teacher) -> None:
    config = teacher.config
    at_once = "responses" if teacher.through_responses else "chat"
    if teacher.transport != at_once and at_once in teacher.model.transports:
        teacher = Teacher(dataclasses.replace(config, transport=at_once))
    request = teacher.request(({"role": "user", "content": _QUESTION},))
    limits: dict[str, str] = {}
    async with connected(config) as api:
        started = time.monotonic()
        send = transports.responses if teacher.through_responses else transports.chat
        outcome = await send(api, request.body, lambda h: limits.update({k.lower(): v for k, v in h.items()}))
        seconds = time.monotonic() - started
        _print_answer(teacher, outcome, seconds)
        told = {k: v for k, v in limits.items() if k.startswith("x-ratelimit-limit-")}
        print(f"{'rate limits':14} {', '.join(f'{v} {k[18:]}' for k, v in told.items()) or 'not told'}")
        print(f"{'models':14} {await _listed(api, config.model)}")


def _print_answer(teacher: Teacher, outcome: Outcome, seconds: float) -> None:
    if isinstance(outcome, Stop):
        raise RunError(f"no answer: {outcome.reason}")
    if isinstance(outcome, Failure | Again):
        raise RunError(f"no answer: {outcome.detail}")
    assert isinstance(outcome, Response)
    try:
        reply = read_reply(outcome.raw)
    except UnreadableReply as error:
        raise RunError(f"an answer that cannot be read: {error}") from None
    usage = reply.usage
    cost = f"${teacher.prices.nano(usage) / NANO:.6f}" if teacher.prices.known else "unknown cost"
    print(f"{'answer':14} {reply.content!r:.80} from {reply.model} in {seconds:.1f} s, {reply.finish_reason}")
    print(f"{'reasoning':14} {reply.reasoning_kind} ({usage.reasoning_tokens} tokens reported)")
    print(f"{'usage':14} {usage.prompt_tokens} prompt and {usage.output_tokens} output tokens, {cost}")
    print(f"{'request id':14} {outcome.request_id or 'none'}")


async def _listed(api: Api, model: str) -> str:
    reply = await api.call("GET", "/models")
    if isinstance(reply, Again) or reply.status != 200:
        return "the list of models is not to be had"
    return "listed" if model.encode() in reply.body else f"{model} is not in the list of models"
