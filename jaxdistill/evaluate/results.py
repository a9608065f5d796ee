"""What came out of an evaluation: the rows, and the table for a person."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxdistill import records
from jaxdistill.evaluate.grade import Summary, Tokens
from jaxdistill.evaluate.plan import Plan
from jaxdistill.evaluate.statistics import Estimate
from jaxdistill.records import Completion, Score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one model said and what it is worth: one completion and one score a sample, in the order of the problems."""

    plan: Plan
    completions: Sequence[Completion]
    scores: Sequence[Score]
    summary: Summary

    @property
    def name(self) -> str:
        return self.plan.name


def read_completions(workdir: Path) -> list[tuple[Completion, Score]]:
    """Completions of a finished evaluation of one model, with their scores."""
    scores = {s.completion_id: s for s in records.read_jsonl(workdir / "scores.jsonl", Score)}
    return [(c, scores[c.id]) for c in records.read_jsonl(workdir / "completions.jsonl", Completion)]


def measures(summaries: Mapping[str, Summary]) -> dict[str, list[str]]:
    """The rows of the table: measure -> a value for each model."""
    one = next(iter(summaries.values()))
    n = one.accuracy.n_samples // one.accuracy.n_problems
    judged = any(s.agreement for s in summaries.values())
    shown: dict[str, Callable[[Summary], str]] = {f"avg@{n} [95% interval]": lambda s: str(s.accuracy)}
    if judged:
        shown["the judge's agreement with people"] = lambda s: s.agreement
    for group in one.groups:
        shown[f"avg@{n} of {group}"] = lambda s, group=group: _known(s.groups.get(group))
    for word in one.words:
        shown[f"judged {word}"] = lambda s, word=word: _known(s.words.get(word))
    for k in sorted(k for k in one.pass_at if k > 1):
        shown[f"pass@{k}"] = lambda s, k=k: str(s.pass_at[k])
    for k in sorted(k for k in one.maj_at if k > 1):
        shown[f"maj@{k}"] = lambda s, k=k: str(s.maj_at[k])
    for k in sorted(k for k in one.best_of if k > 1):
        shown[f"best of {k}"] = lambda s, k=k: str(s.best_of[k])
    shown |= {
        "tokens, mean / median": lambda s: _tokens(s.tokens),
        "thinking tokens, mean / median": lambda s: _tokens(s.thinking_tokens),
        "answer tokens, mean / median": lambda s: _tokens(s.answer_tokens),
        "truncated": lambda s: f"{s.truncation_rate:.1%}",
        "ends in a loop": lambda s: f"{s.repetition_rate:.1%}",
        "empty": lambda s: f"{s.empty_rate:.1%}",
    }
    if not judged:
        shown["no answer"] = lambda s: f"{s.no_answer_rate:.1%}"
        shown["not comparable"] = lambda s: f"{s.unverifiable_rate:.1%}"
    if any(s.coverage < 1 for s in summaries.values()):
        shown["coverage (incomplete)"] = lambda s: f"{s.coverage:.1%}"
    return {name: [value(s) for s in summaries.values()] for name, value in shown.items()}


def _known(estimate: Estimate | None) -> str:
    return "–" if estimate is None else str(estimate)


def _tokens(tokens: Tokens) -> str:
    return f"{tokens.average:,.0f} / {tokens.median:,.0f}"
