"""What the demo and its sweeps work on: problems, a teacher's verified chains, and a student that knows nothing yet."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from jaxdistill import manifest, records
from jaxdistill.collect import run as collect
from jaxdistill.collect.teacher import TeacherConfig
from jaxdistill.curate import examples, reformat
from jaxdistill.data import chat
from jaxdistill.demo import ablations, student
from jaxdistill.errors import UserError
from jaxdistill.local_teacher import problems
from jaxdistill.local_teacher.answers import Faults
from jaxdistill.local_teacher.server import TeacherOptions, running_teacher
from jaxdistill.records import Chain, Example, Problem

REFORMATTED, DISTILLED, ANSWERS = "reformatted", "distilled", "answers_only"  # folders of examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaterialConfig:
    """Where it is written, and how much of it there is. A finished part is not made again."""

    workdir: Path
    teacher: str | None = None  # model at a real API; None starts the local teacher
    base_url: str = "https://api.openai.com/v1"  # of the real API
    seed: int = 0  # of problems and weights
    train_problems: int = 2600  # asked of the teacher, over all families; each one a paid call at a real API
    reformat_problems: int = 800  # of those, the ones whose solution is reformatted too: another call each
    heldout_problems: int = 150
    max_tokens: int = 4096  # output limit of one call, in tokens
    wrong: float = 0.05  # share of the local teacher's answers that are wrong
    ablations: bool = False  # also the chains of held-out problems, and the sets that ablations train on

    def __post_init__(self):
        for name in ("train_problems", "reformat_problems", "heldout_problems"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.ablations and self.teacher is not None:
            raise UserError(f"teacher is {self.teacher}, but the ablations are made of the local teacher's texts")
        if not 0 <= self.wrong <= 0.9:
            raise UserError(f"wrong is {self.wrong}; expected a share from 0 to 0.9")


class Material:
    """The files of one folder."""

    def __init__(self, config: MaterialConfig, console: Console | None = None):
        self.config, self.workdir = config, config.workdir
        self.console = console or Console(stderr=True)
        self.train_file, self.heldout_file = (self.workdir / "problems" / f"{n}.jsonl" for n in ("train", "heldout"))

    def all(self) -> None:
        """Everything, once: what is there is left as it is.

        Raises:
          UserError: what is there was made with other settings.
        """
        told = self.workdir / "material.json"
        now = json.loads(json.dumps(dataclasses.asdict(self.config) | {"workdir": None}, default=str))
        if told.is_file() and (earlier := json.loads(told.read_text(encoding="utf-8"))) != now:
            changed = [name for name in now if now[name] != earlier.get(name)]
            raise UserError(f"{self.workdir} was made with other {', '.join(changed)}; give another material.workdir")
        manifest.write_json(told, now)
        self.problems()
        self.collect()
        if self.config.ablations:
            ablations.write(self.workdir)
        self.student()

    def problems(self) -> tuple[Path, Path]:
        """The training problems, and held-out ones that share no operands with them."""
        counts = {self.train_file: self.config.train_problems, self.heldout_file: self.config.heldout_problems}
        for path, count in counts.items():
            if not path.exists():
                records.write_jsonl(path, problems.generate("all", count, self.config.seed, path.stem))  # type: ignore[arg-type]
        first = self.workdir / "problems" / "reformat.jsonl"
        if not first.exists():
            rows = list(records.read_jsonl(self.train_file, Problem))
            records.write_jsonl(first, rows[: self.config.reformat_problems])
        return self.train_file, self.heldout_file

    @contextlib.contextmanager
    def _teacher(self) -> Iterator[TeacherConfig]:
        """The API to ask: a local server that misbehaves at known rates, or a real one."""
        config = self.config
        if config.teacher is not None:
            calls = config.train_problems + config.reformat_problems
            self.console.print(
                f"asking {config.teacher} at {config.base_url}: {calls} calls of at most "
                f"{config.max_tokens} output tokens each, at the provider's price and under its terms"
            )
            yield TeacherConfig(base_url=config.base_url, model=config.teacher, max_tokens=config.max_tokens)
            return
        faults = Faults(rate_limited=0.01, server_error=0.01, truncated=0.03, wrong=config.wrong)
        options = TeacherOptions(seed=config.seed, faults=faults, log=self.workdir / "teacher_log.jsonl")
        with running_teacher(options) as base_url:
            yield TeacherConfig(base_url=base_url, model="local-teacher", max_tokens=config.max_tokens)

    def collect(self) -> dict[str, dict[str, int]]:
        """Asks the teacher for both kinds of text and writes the sets of examples; returns what became of the calls."""
        done = self.workdir / "collected.json"
        if done.is_file():
            return json.loads(done.read_text())
        with self._teacher() as teacher:
            reformatted = reformat.main(
                reformat.ReformatConfig(
                    problems=self.workdir / "problems" / "reformat.jsonl",
                    workdir=self.workdir / REFORMATTED,
                    teacher=teacher,
                    unknown_price=True,  # what is asked for is bounded and was printed
                )
            )
            chains = self._chains(self.train_file, DISTILLED, teacher)
            if self.config.ablations:
                self._chains(self.heldout_file, ablations.HELDOUT, teacher)
        answers = examples.answers_only(records.read_jsonl(self.train_file, Problem))
        records.write_jsonl(self.workdir / ANSWERS / "examples.jsonl", answers)
        counts = {REFORMATTED: dict(reformatted), DISTILLED: dict(chains)}
        manifest.write_json(done, counts)
        return counts

    def _chains(self, problems_file: Path, name: str, teacher: TeacherConfig) -> dict[str, int]:
        """Verified chains to problems, and examples of them beside."""
        folder = self.workdir / name
        config = collect.CollectConfig(problems=problems_file, workdir=folder, teacher=teacher, unknown_price=True)
        counts = collect.main(config)
        rows = records.read_jsonl(folder / "chains.jsonl", Chain)
        records.write_jsonl(folder / "examples.jsonl", examples.chains_to_examples(rows))
        return dict(counts)

    def student(self) -> Path:
        """The model to start from: a tokenizer trained on the examples, and random weights."""
        folder = self.workdir / "student"
        if (folder / "config.json").is_file():
            return folder
        sets = [self.workdir / name / "examples.jsonl" for name in (REFORMATTED, DISTILLED)]
        texts = (m["content"] for path in sets for row in records.read_jsonl(path, Example) for m in row.messages)
        partial = folder.with_name("student.partial")
        student.write(partial, texts, self.config.seed)
        manifest.write_json(partial / "longest.json", self._longest(partial, sets))
        partial.rename(folder)
        return folder

    def _longest(self, folder: Path, sets: list[Path]) -> int:
        """Tokens of the longest example that the student has positions for; longer ones are dropped with a receipt."""
        tokenizer, limit = chat.load_tokenizer(folder), student.POSITIONS
        rows = (row for path in sets for row in records.read_jsonl(path, Example))
        return max((n for row in rows if (n := len(chat.tokenize(tokenizer, row).tokens)) <= limit), default=limit)

    def longest(self) -> int:
        """Tokens of the longest example; for a student that is there."""
        return json.loads((self.workdir / "student" / "longest.json").read_text())
