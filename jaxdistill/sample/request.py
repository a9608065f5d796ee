"""What is asked of the sampler, and what comes back."""

import dataclasses
import hashlib
from typing import Literal

from jaxdistill.errors import UserError

STOP_TOKENS = 16  # most stop tokens of one request, those of the model included
TOP_LOGPROBS = 20  # most likely tokens that are reported beside each token

_LEAST_TEMPERATURE = 1e-6  # below it, logits over temperature would soon leave float32
_LARGEST_PENALTY = 1e6

FinishReason = Literal["stop", "length"]


def derived_seed(*parts: int | str) -> int:
    """A seed of 31 bits that is a function of these parts: of another seed, and of what it is drawn for."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn. Penalties change the logits first, then the filters apply in the order of the fields."""

    temperature: float = 0.0  # 0 takes the most likely token
    top_k: int = 0  # keep this many tokens; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this likely relative to the most likely one
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or output, multiplies negative ones
    presence_penalty: float = 0.0  # taken off the logits of tokens in the output
    frequency_penalty: float = 0.0  # the same, for each time they are there
    max_new_tokens: int = 2048  # output tokens of a request

    def __post_init__(self):
        if self.temperature != 0 and not _LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise UserError(
                f"temperature is {self.temperature}; expected 0 (greedy), or {_LEAST_TEMPERATURE:g} and more"
            )
        if not 0 <= self.top_k < 2**31 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UserError(
                f"top_k {self.top_k}, top_p {self.top_p}, min_p {self.min_p}; expected top_k >= 0 (0: off), "
                "0 < top_p <= 1 (1: off), 0 <= min_p <= 1 (0: off)"
            )
        if not 1 / _LARGEST_PENALTY <= self.repetition_penalty <= _LARGEST_PENALTY:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; "
                f"expected {1 / _LARGEST_PENALTY:g} to {_LARGEST_PENALTY:g} (1: off)"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= _LARGEST_PENALTY:
                raise UserError(
                    f"{name} is {getattr(self, name)}; expected {-_LARGEST_PENALTY:g} to {_LARGEST_PENALTY:g} (0: off)"
                )
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0  # 0 to 2**31 - 1
    stop_tokens: tuple[int, ...] = ()  # beside those of the model
    logprobs: bool = False  # report log-probabilities of the output, before penalties and temperature
    prompt_logprobs: bool = False  # and of the prompt

    def check(self, positions: int, vocab: int, model_stops: int) -> None:
        """Refuses what an engine with this many positions cannot sample.

        Raises:
          UserError: the prompt leaves no room for output, a token is not in the vocabulary, a seed is out of range, or
            there are too many stop tokens.
        """
        if not 0 < len(self.prompt) < positions:
            raise UserError(
                f"request {self.id}: the prompt has {len(self.prompt)} tokens; "
                f"expected 1 to {positions - 1} ({positions} positions for prompt and output)"
            )
        unknown = [token for token in self.prompt if not 0 <= token < vocab]
        if unknown:
            raise UserError(
                f"request {self.id}: token {unknown[0]} is outside the model's vocabulary of "
                f"{vocab}; the tokenizer and the model do not belong together"
            )
        if not 0 <= self.seed < 2**31:
            raise UserError(f"request {self.id}: seed {self.seed}; expected 0 to {2**31 - 1}")
        if model_stops + len(self.stop_tokens) > STOP_TOKENS:
            raise UserError(
                f"request {self.id}: {len(self.stop_tokens)} stop tokens; "
                f"expected at most {STOP_TOKENS - model_stops} beside the model's own {model_stops}"
            )


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Natural log-probabilities of one token and of the most likely ones in its place, most likely first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # TOP_LOGPROBS of them, or the whole vocabulary


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of a request. The stop token is not among them, and has no log-probability."""

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()  # one a token, where asked for
    prompt_logprobs: tuple[Logprob, ...] = ()  # of all prompt tokens but the first, once, with the first tokens
    finish_reason: FinishReason | None = None  # set in the last event


@dataclasses.dataclass(frozen=True)
class Output:
    """What a request became; the stop token is not part of the tokens."""

    id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
