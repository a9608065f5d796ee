"""Conversations to tokens, through the tokenizer's own chat template, with loss on the assistant's words only."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
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
    """The text of a conversation. With `prompt`, it ends where the assistant is to speak.

    Raises:
      UserError: the chat template refuses the conversation.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except jinja2.TemplateError as error:
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise UserError(f"the chat template refuses a conversation of the roles {roles}: {error}") from None


def prompt_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokens to sample from: the conversation up to where the assistant speaks."""
    return tokenizer(render(tokenizer, messages, prompt=True), add_special_tokens=False)["input_ids"]


def end_tokens(tokenizer: Any, folder: Path | None = None) -> list[int]:
    """Tokens that end an answer: what the chat template ends a turn with, and the tokenizer's own end token.

    Args:
      folder: of the model; adds the ids that its generation_config.json and config.json name, as Llama 3 and Qwen do.
    """
    after = _after_answer(tokenizer, [{"role": "user", "content": "a"}])
    special = _special_ids(tokenizer)
    ends = [token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in special][:1]
    named = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        if folder is not None and (folder / name).is_file():
            ids = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            named += ids if isinstance(ids, list) else [ids]
    return list(dict.fromkeys(ends + [token for token in named if token is not None]))


_PROBE = "probe-answer"
_THINK_TAG = re.compile("</?think>")


def _after_answer(tokenizer: Any, before: Sequence[Message]) -> str:
    """What the template writes after the last word of an answer: its end-of-turn token, and perhaps a newline."""
    return render(tokenizer, [*before, {"role": "assistant", "content": _PROBE}], prompt=False).rpartition(_PROBE)[2]


def _special_ids(tokenizer: Any) -> set[int]:
    """Special tokens, also those that no name like eos_token points to (Llama 3's <|eot_id|>)."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def tokenize(tokenizer: Any, example: Example) -> Document:
    """Tokens of a conversation; the assistant's words and the token that ends its turn are trained.

    The spans are found by comparing what the template writes with and without each answer, so it needs no
    generation markers, and an end token is trained also where it has the id of padding: masks go by position.

    Raises:
      UserError: a message lacks its role or content; there is no question; the template rewrites earlier turns, so
        that an answer's span cannot be told; it drops words of an answer; or nothing is trained.
    """
    for turn, message in enumerate(example.messages):
        if not {"role", "content"} <= message.keys():
            raise UserError(f"example {example.id}: message {turn} has {sorted(message)}; expected role and content")
    if not example.messages or example.messages[0]["role"] == "assistant":
        raise UserError(f"example {example.id} starts without a question; expected a user or system message first")
    if not 0 <= example.weight < float("inf"):
        raise UserError(f"example {example.id} has weight {example.weight}; expected 0 or more")
    text = render(tokenizer, example.messages, prompt=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    stops = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1]
    # Tokenizers may leave leading spaces out of a token's span, so a token starts where the one before it stops
    starts = np.concatenate([[0], np.maximum.accumulate(stops)[:-1]])
    tokens = np.array(encoded["input_ids"], dtype=np.int32)
    special = np.isin(tokens, list(_special_ids(tokenizer)))
    trained = np.zeros(len(tokens), dtype=bool)
    for turn, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, example.messages[:turn], prompt=True)
        through = render(tokenizer, example.messages[: turn + 1], prompt=False)
        after = _after_answer(tokenizer, example.messages[:turn])
        if not (text.startswith(before) and text.startswith(through) and through.endswith(after)):
            raise UserError(
                f"example {example.id}: the chat template changes earlier text when turn {turn} is added; "
                "train on conversations with one answer, or use a template that only appends"
            )
        kept = text[len(before) : len(through)]
        # Templates may lay the space around think tags out anew (Qwen3), but every word must be there
        parts = [message.get("reasoning_content") or "", *_THINK_TAG.split(message["content"])]
        if lost := [part.strip() for part in parts if part.strip() not in kept]:
            raise UserError(
                f"example {example.id}: the chat template drops or rewrites {lost[0]!r:.60} of turn {turn}, so it "
                "would not be learnt; write the reasoning into content, or mend the template"
            )
        # A character of several tokens may end the prompt: its later tokens start where the answer does, and are empty
        inside = (starts >= len(before)) & (stops > len(before)) & (stops <= len(through))
        # The first special token after the answer ends the turn; what follows it (a newline, say) is the template's.
        # One inside the answer is only text.
        ends = np.flatnonzero(inside & special & (starts >= len(through) - len(after)))
        if ends.size:
            inside[ends[0] + 1 :] = False
        trained |= inside
    if not trained[1:].any():
        raise UserError(f"example {example.id} has no assistant words to train on; expected an assistant message")
    return Document(example.id, tokens, trained, example.weight)
