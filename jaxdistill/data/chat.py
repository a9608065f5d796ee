"""Conversations to tokens, through the tokenizer's own chat template, with loss on the assistant's words only."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxdistill.errors import UserError
from jaxdistill.records import Example, Message


@dataclasses.dataclass(frozen=True)
class Document:
    """One tokenized conversation."""

    id: str
    tokens: Int[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]  # whether a token carries loss when it is the target
    weight: float = 1.0


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder.

    Raises:
      UserError: the folder has no tokenizer, or the tokenizer has no chat template.
    """
    import transformers  # seconds to import, and commands that need no tokenizer should not pay for it

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no usable tokenizer ({error}); expected tokenizer.json and its config") from None
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: the tokenizer has no chat template; add chat_template.jinja to the folder")
    return tokenizer


def render(tokenizer: Any, messages: Sequence[Message], prompt: bool) -> str:
    """The text of a conversation. With `prompt`, it ends where the assistant is to speak."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)


def prompt_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokens to sample from: the conversation up to where the assistant speaks."""
    return tokenizer(render(tokenizer, messages, prompt=True), add_special_tokens=False)["input_ids"]


def end_tokens(tokenizer: Any) -> list[int]:
    """Tokens that end an assistant's turn, as the chat template writes it, and the tokenizer's own end token."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tail = render(tokenizer, probe, prompt=False)[len(render(tokenizer, probe[:1], prompt=True)) :]
    after = tokenizer(tail.removeprefix("b"), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    ends = [token for token in after if token in special][:1]
    return list(dict.fromkeys(ends + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])))


def tokenize(tokenizer: Any, example: Example) -> Document:
    """Tokens of a conversation; the assistant's words and the token that ends its turn are trained.

    The spans are found by comparing what the template writes with and without each answer, so it needs no
    generation markers, and an end token is trained also where it has the id of padding: masks go by position.

    Raises:
      UserError: the template rewrites earlier turns, so that an answer's span cannot be told; or nothing is trained.
    """
    text = render(tokenizer, example.messages, prompt=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, stops = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    tokens = np.array(encoded["input_ids"], dtype=np.int32)
    special = np.isin(tokens, tokenizer.all_special_ids)
    trained = np.zeros(len(tokens), dtype=bool)
    for turn, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, example.messages[:turn], prompt=True)
        through = render(tokenizer, example.messages[: turn + 1], prompt=False)
        if not (text.startswith(before) and text.startswith(through)):
            raise UserError(
                f"example {example.id}: the chat template changes earlier text when turn {turn} is added; "
                "train on conversations with one answer, or use a template that only appends"
            )
        inside = (starts >= len(before)) & (stops <= len(through)) & (stops > starts)
        # What follows the end of the turn (a newline, say) is the template's, not the assistant's
        said = np.flatnonzero(inside & special & (starts >= len(before) + _said_chars(through, before, message)))
        if said.size:
            inside[said[0] + 1 :] = False
        trained |= inside
    if not trained[1:].any():
        raise UserError(f"example {example.id} has no assistant words to train on; expected an assistant message")
    return Document(example.id, tokens, trained, example.weight)


def _said_chars(through: str, before: str, message: Message) -> int:
    """How many characters after `before` the message's content reaches: an end token inside it is only text."""
    at = through.find(message["content"].strip(), len(before))
    return max(at, len(before)) - len(before) + len(message["content"].strip()) if at >= 0 else 0
