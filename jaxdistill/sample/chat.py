"""`jaxdistill chat`: talk to a model in a terminal; its reasoning is folded into one line."""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

from jaxdistill import thinking
from jaxdistill.checkpoint import base_of
from jaxdistill.data import chat
from jaxdistill.errors import UserError
from jaxdistill.records import Message
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.sample.run import load_engine
from jaxdistill.sample.text import TextStream
from jaxdistill.sharding import MeshConfig

_HELP = "/thoughts shows the last reasoning, /new starts again, /quit ends (Ctrl-D too); Ctrl-C stops an answer"
_CONTROL = {code: None for code in range(32) if chr(code) not in "\n\t"}  # a model's words must not steer the terminal
_STEPS = 4  # tokens between two looks at what was said


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Whom to talk to."""

    model: Path  # Hugging Face folder, or a phase folder of a training run
    system: str = ""  # the system message
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95, max_new_tokens=16_384)
    seed: int = 0  # of the first answer; each further one has the next
    positions: int | None = None  # longest conversation, tokens; by default all the model was made for
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.positions is not None and self.positions < 2:
            raise UserError(f"positions is {self.positions}; expected 2 or more")


def main(config: ChatConfig) -> None:
    """Reads questions from standard input until it ends."""
    tokenizer = chat.load_tokenizer(base_of(config.model))
    with jax.set_mesh(config.mesh.build()):
        how = EngineConfig(slots=1, steps_per_call=_STEPS, compute_dtype=config.compute_dtype)
        talk = _Talk(config, tokenizer, load_engine(config.model, tokenizer, config.positions, how))
        if sys.stdin.isatty():
            import readline  # noqa: F401  (gives input() a history and keys to edit with)

            print(_HELP)
        while True:
            try:
                words = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if words == "/quit":
                return
            talk.take(words)


class _Talk:
    """A conversation, and how it is shown."""

    def __init__(self, config: ChatConfig, tokenizer: Any, engine: Engine):
        self._config, self._tokenizer, self._engine = config, tokenizer, engine
        self._console = Console(highlight=False, markup=False)
        self._answers = 0
        self._reasoning = ""
        self._begin()

    def _begin(self) -> None:
        system = self._config.system
        self._turns: list[Message] = [{"role": "system", "content": system}] if system else []

    def take(self, words: str) -> None:
        """Answers, or does what a word with a slash asks for."""
        if words == "/new":
            self._begin()
        elif words == "/thoughts":
            print(self._reasoning)
        elif words.startswith("/"):
            print(_HELP)
        elif words:
            self._turns.append({"role": "user", "content": words})
            try:
                answer = self._say()
            except UserError as error:
                print(f"{error}; /new starts again")
                self._turns.pop()
            else:
                # Reasoning is left out of what comes before, as in training
                self._turns.append({"role": "assistant", "content": answer})

    def _say(self) -> str:
        """Shows an answer while it comes; without the reasoning, it is what is returned."""
        prompt = chat.prompt_tokens(self._tokenizer, self._turns)
        id_ = str(self._answers)
        request = Request(id_, tuple(prompt), self._config.sampling, self._config.seed + self._answers)
        self._engine.submit(request)
        self._answers += 1
        stream = TextStream(self._tokenizer)
        opened = self._tokenizer.decode(prompt).rstrip().endswith(thinking.OPEN)
        splitter, answer, self._reasoning, folded = thinking.Splitter(opened), "", "", False
        status = self._console.status("thinking")
        with _interrupts() as interrupted, contextlib.ExitStack() as shown:
            shown.callback(status.stop)
            while self._engine.busy and not interrupted.is_set():
                for event in self._engine.step():
                    ended = event.finish_reason is not None
                    reasoning, said = splitter.add(stream.add(event.tokens) + (stream.end() if ended else ""))
                    if ended:
                        reasoning, said = (a + b for a, b in zip((reasoning, said), splitter.end(), strict=True))
                    self._reasoning += reasoning.translate(_CONTROL)
                    answer += said.translate(_CONTROL)
                    if splitter.thinking:
                        status.update(f"thinking, {stream.tokens} tokens")
                        status.start()
                    elif self._reasoning.strip() and not folded:
                        status.stop()
                        folded = True
                        self._console.print(f"(thought for about {stream.tokens} tokens)", style="dim")
                    print(said.translate(_CONTROL), end="", flush=True)
                    if event.finish_reason == "length":
                        status.stop()
                        print(" (cut off: max_new_tokens or the model's positions are used up)", end="")
        self._engine.cancel(id_)
        print(" (stopped)" if interrupted.is_set() else "")
        return answer.strip()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Whether Ctrl-C was pressed; not as an exception, which could come in the middle of a step."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
