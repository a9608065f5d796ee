"""Grades completions against gold answers, and sums the grades up into the numbers that are reported."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from jaxdistill.errors import UserError
from jaxdistill.evaluate.judges import JUDGES, Judge
from jaxdistill.evaluate.statistics import Estimate, best_of_k, estimate, maj_at_k, pass_at_k
from jaxdistill.records import Completion, Problem, Score, Verdict
from jaxdistill.verify import Verifier, normalize

_LONGEST_LOOP, _LEAST_TURNS, _LEAST_LOOPED = 1000, 4, 100  # characters, times, characters: see `repeats`

RIGHT = "right"  # answer class of every correct sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Output tokens of a completion, over all completions."""

    average: float
    median: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What one evaluation says; the rates are shares of completions and, but for the last, do not overlap."""

    accuracy: Estimate  # avg@n; of ratings their mean, as a share of 100
    pass_at: Mapping[int, Estimate]  # by k
    maj_at: Mapping[int, Estimate]  # by k; a tie of t answers counts 1/t
    tokens: Tokens  # thinking and answer together
    thinking_tokens: Tokens
    answer_tokens: Tokens
    truncation_rate: float  # stopped by the token limit
    empty_rate: float  # stopped by itself without a word
    no_answer_rate: float  # text without a boxed answer after the thinking part
    unverifiable_rate: float  # an answer that could not be compared
    repetition_rate: float  # ends in a loop; may be any of the above too
    best_of: Mapping[int, Estimate] = dataclasses.field(default_factory=dict)  # by k; by the scores of another judge
    coverage: float = 1.0  # share of the completions asked for that are here; below 1 the numbers are not final
    groups: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)  # avg@n of each group of problems
    words: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)  # share of each of a judge's words
    agreement: str = ""  # of the judge with people's labels; empty where none judged


def unanswered(completion: Completion, answer: str) -> Verdict | None:
    """The verdict on an output that was cut off or holds no answer; None of any other."""
    if completion.finish_reason == "length":
        return Verdict(label="wrong", rule="truncated")
    return None if answer.strip() else Verdict(label="wrong", rule="empty")


def _boxed_math(completion: Completion, gold: str, verifier: Verifier) -> Verdict:
    return unanswered(completion, completion.text) or verifier.verify(completion.text, gold)


Grader = Callable[[Completion, str, Verifier], Verdict]  # judges a completion by the gold answer
GRADERS: Mapping[str, Grader] = {"boxed_math": _boxed_math}  # by the name that a task gives


def grader_named(name: str) -> Grader | Judge:
    """The grader or judge of that name.

    Raises:
      UserError: there is no such grader; names those there are.
    """
    known = {**GRADERS, **JUDGES}
    if name not in known:
        raise UserError(f"no grader is named {name!r}; expected one of {sorted(known)} (evaluate/grade.py, judges)")
    return known[name]


def points(score: Score) -> float:
    """What a score is worth, from 0 to 1."""
    return float(score.verdict.label == "correct") if score.points is None else score.points


def golds(problems: Iterable[Problem]) -> dict[str, str]:
    """Gold answers by problem, as `grade` takes them."""
    return {problem.id: problem.answer or "" for problem in problems}


def grade(
    completions: Sequence[Completion], golds: Mapping[str, str], verifier: Verifier, grader: str = "boxed_math"
) -> list[Score]:
    """One score a completion, in order; `golds` maps item ids to gold answers. Truncated and empty outputs are wrong.

    Raises:
      UserError: there is no such grader, or an item has no gold answer; names all of them.
    """
    judge = grader_named(grader)
    if isinstance(judge, Judge):
        raise UserError(f"{grader} asks a model; it is not among the graders that need none")
    missing = sorted({completion.item_id for completion in completions} - golds.keys())
    if missing:
        raise UserError(f"no gold answer for items {missing[:20]} ({len(missing)} in all); was the task file changed?")
    return [Score(completion_id=c.id, verdict=judge(c, golds[c.item_id], verifier), grader=grader) for c in completions]


def summarize(
    completions: Sequence[Completion],
    scores: Sequence[Score],
    verifier: Verifier | None = None,
    ks: Sequence[int] | None = None,
    seed: int = 0,
    rankings: Mapping[str, float] | None = None,
    coverage: float = 1.0,
    groups: Mapping[str, str] | None = None,
    agreement: str = "",
) -> Summary:
    """The numbers of one task, one model and one setting.

    Args:
      verifier: decides which wrong answers equal one another for maj@k; without it only equal spellings do.
      ks: the k of pass@k and maj@k; powers of two up to the n samples a problem, and n, unless given.
      seed: of the bootstrap.
      rankings: the score that another judge gave, by completion id, for best of k.
      coverage: share of the completions asked for that these are.
      groups: the group of an item, by its id.
      agreement: of the judge whose scores these are with people's labels, in words.

    Raises:
      ValueError: scores and completions do not match, or problems have different numbers of samples.
    """
    items = by_item(completions, scores)
    n = len(next(iter(items.values())))
    ks = sorted({2**i for i in range(n.bit_length())} | {n}) if ks is None else ks
    correct = [[score.verdict.label == "correct" for _, score in pairs] for pairs in items.values()]
    classes = [answer_classes([score.verdict for _, score in pairs], verifier) for pairs in items.values()]
    worth = {item: statistics.fmean(points(score) for _, score in pairs) for item, pairs in items.items()}
    judge, names = JUDGES.get(scores[0].grader), groups or {}
    rated = judge is not None and not judge.words
    ranks = [[rankings[c.id] for c, _ in pairs] for pairs in items.values()] if rankings else None
    thinking, answer = [c.thinking_tokens for c in completions], [c.answer_tokens for c in completions]

    def rate(*rules: str) -> float:
        return sum(score.verdict.rule in rules for score in scores) / len(scores)

    def average(group: str | None = None) -> Estimate:
        own = [value for item, value in worth.items() if group is None or names.get(item) == group]
        return estimate(own, n * len(own), seed)

    return Summary(
        accuracy=average(),
        pass_at={k: pass_at_k(correct, k, seed) for k in ks} if not rated else {},
        maj_at={k: maj_at_k(classes, [RIGHT] * len(classes), k, seed=seed) for k in ks} if not rated else {},
        tokens=_tokens([t + a for t, a in zip(thinking, answer, strict=True)]),
        thinking_tokens=_tokens(thinking),
        answer_tokens=_tokens(answer),
        truncation_rate=rate("truncated"),
        empty_rate=rate("empty"),
        no_answer_rate=rate("no_answer"),
        unverifiable_rate=sum(score.verdict.label == "unverifiable" for score in scores) / len(scores),
        repetition_rate=sum(repeats(c.text) for c in completions) / len(completions),
        best_of={k: best_of_k(correct, ranks, k, seed) for k in ks} if ranks else {},
        coverage=coverage,
        groups={group: average(group) for group in sorted({names[item] for item in items if item in names})},
        words=_words(judge, [[s.verdict.extracted for _, s in pairs] for pairs in items.values()], seed),
        agreement=agreement,
    )


def _words(judge: Judge | None, said: Sequence[Sequence[str | None]], seed: int) -> dict[str, Estimate]:
    """How often a judge said each of its words, and how often the right one where an answer was attempted."""
    if judge is None or not judge.words:
        return {}
    n = len(said[0])
    shares = {word: estimate([own.count(word) / n for own in said], n * len(said), seed) for word in judge.words}
    tried = [[word for word in own if word in judge.attempts] for own in said]
    if attempted := [own for own in tried if own]:
        values = [own.count(judge.attempts[0]) / len(own) for own in attempted]
        shares[f"{judge.attempts[0]}, of attempted"] = estimate(values, sum(map(len, attempted)), seed)
    return shares


def repeats(text: str) -> bool:
    """Whether a text ends in a loop: up to 1,000 characters, four times or more, and for 100 characters or more."""
    for length in range(1, min(_LONGEST_LOOP, len(text) // _LEAST_TURNS) + 1):
        turns = max(_LEAST_TURNS, -(-_LEAST_LOOPED // length))
        if text.endswith(text[-length:] * turns):
            return True
    return False


def answer_classes(verdicts: Sequence[Verdict], verifier: Verifier | None = None) -> list[str | None]:
    """The answer class of each sample of one problem: RIGHT, a spelling for a wrong class, None without an answer."""
    spellings: list[str] = []
    known: dict[str, str] = {}

    def class_of(verdict: Verdict) -> str | None:
        if verdict.label == "correct":
            return RIGHT
        if verdict.extracted is None:
            return None
        key = "wrong: " + normalize(verdict.extracted)
        if key not in known:
            # What could not be compared with the gold answer is not compared again: each try may cost the time limit.
            others = spellings if verifier and verdict.label == "wrong" else []
            same = (s for s in others if verifier and verifier.equivalent(verdict.extracted, s).label == "correct")
            first = next(same, None)
            known[key] = key if first is None else "wrong: " + normalize(first)
            if first is None and verdict.label == "wrong":
                spellings.append(verdict.extracted)
        return known[key]

    return [class_of(verdict) for verdict in verdicts]


def by_item(completions: Sequence[Completion], scores: Sequence[Score]) -> dict[str, list[tuple[Completion, Score]]]:
    """The samples of each problem, with their scores, in order.

    Raises:
      ValueError: scores and completions do not match, or problems have different numbers of samples.
    """
    by_id = {score.completion_id: score for score in scores}
    ids = {completion.id for completion in completions}
    if not completions or by_id.keys() != ids or not len(scores) == len(completions) == len(ids):
        raise ValueError(
            f"{len(completions)} completions with {len(ids)} ids and {len(scores)} scores with {len(by_id)} ids; "
            f"expected one score for each of one or more completions; without a partner: "
            f"{sorted(by_id.keys() ^ ids)[:10]}"
        )
    items: dict[str, list[tuple[Completion, Score]]] = {}
    for completion in sorted(completions, key=lambda c: c.sample_index):
        items.setdefault(completion.item_id, []).append((completion, by_id[completion.id]))
    counts = {len(samples) for samples in items.values()}
    if len(counts) > 1:
        most = max(counts)
        short = [item for item, samples in items.items() if len(samples) < most]
        raise ValueError(f"{len(short)} items have fewer than {most} samples: {short[:10]}; finish sampling first")
    return items


def _tokens(counts: Sequence[int]) -> Tokens:
    return Tokens(average=statistics.fmean(counts), median=float(statistics.median(counts)))
