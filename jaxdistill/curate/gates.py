"""The gates of refining: what a rewrite or a translation must keep; each returns why it fails, or None."""

import re
from collections import Counter

from jaxdistill import thinking
from jaxdistill.collect.calls import Reason
from jaxdistill.curate.choices import answer_letter, chosen_option, find_choices, open_question
from jaxdistill.curate.text import CODE, DRAWING, language, math_spans, named_numbers, numbers, prose
from jaxdistill.records import Problem
from jaxdistill.verify import Verifier, boxed_answers, extract_answer

_TAGS = (thinking.OPEN, thinking.CLOSE)


def reformat_gate(problem: Problem, question: str, solution: str, verifier: Verifier) -> tuple[Reason, str] | None:
    """Why a rewritten solution (and question) is not kept, as reason and detail; None if it is.

    The boxed answer equals the original's (an option letter stands for its option), the question says the same numbers,
    and the solution is longer in characters than the original.
    """
    if not (problem.answer or "").strip():
        return "unverifiable", "the original has no answer"
    letter = answer_letter(problem.answer or "")
    if not letter or answer_letter(extract_answer(solution) or "") != letter:  # else both name the same option
        gold = chosen_option(problem) or problem.answer or ""
        verdict = verifier.verify(solution, gold)
        if verdict.label != "correct":
            reason = "unverifiable" if verdict.label == "unverifiable" else "wrong"
            return reason, f"rule {verdict.rule}: found {verdict.extracted!r}, the original has {gold!r}"
    if lost := sorted(_boxed_numbers(problem.solution or "") - _boxed_numbers(solution)):
        return "answer_changed", f"no box has {', '.join(lost[:5])}"
    if detail := changed_numbers(problem, question):
        return "numbers_changed", detail
    if len(solution) <= len(problem.solution or ""):
        return "not_longer", f"{len(solution)} characters, the original has {len(problem.solution or '')}"
    return None


def _boxed_numbers(text: str) -> set[str]:
    """The numbers in all boxes: a question of several parts has several."""
    return {number for box in boxed_answers(text) for number in numbers(box)}


def changed_numbers(problem: Problem, question: str) -> str | None:
    """Which numbers a rewritten question lacks or adds; those of the options may go or stay."""
    opened, choice = open_question(problem), find_choices(problem.problem)
    statement = opened.problem if opened else choice.stem if choice else problem.problem
    statement = re.sub(r"^\s*\d+\s*[.)、]\s", "", statement)  # its number in the source
    lost = sorted(set(numbers(statement)) - _values(question))
    added = sorted(set(numbers(question)) - _values(problem.problem))
    if not lost and not added:
        return None
    return "; ".join(f"{what} {', '.join(found[:5])}" for what, found in (("lost", lost), ("added", added)) if found)


def _values(text: str) -> set[str]:
    """The values a text names, in digits or words."""
    return set(numbers(text)) | set(named_numbers(text))


def translation_gate(source: str, translation: str, target: str) -> tuple[Reason, str] | None:
    """Why a translation is not kept, as reason and detail; None if it is.

    It is in the target language; code, drawings and boxed answers are those of the source; formulas too, up to words
    inside them and up to `$M$, $N$` for `$M, N$`; so are the numbers, though a word may stand for digits.
    """
    if (found := language(translation)) != target:
        return "wrong_language", f"the translation is {found}, expected {target}"
    if target == "zh" and (left := _ENGLISH.findall(prose(translation))):
        return "wrong_language", f"English is left in it: {', '.join(sorted(set(left))[:5])}"
    for name, pattern in (("code", CODE), ("a drawing", DRAWING)):
        if [m[0] for m in pattern.finditer(source)] != [m[0] for m in pattern.finditer(translation)]:
            return "code_changed", f"{name} differs"
    if [source.count(tag) for tag in _TAGS] != [translation.count(tag) for tag in _TAGS]:
        return "code_changed", "the think tags differ"
    boxes, others = _boxes(source), _boxes(translation)
    if boxes != others:
        return "box_changed", f"boxes {dict(boxes - others)} became {dict(others - boxes)}"
    formulas, others = _formulas(source), _formulas(translation)
    if formulas != others:
        return "latex_changed", f"formulas {dict(formulas - others)} became {dict(others - formulas)}"
    before, after = numbers(source), numbers(translation)
    if (before - after) - named_numbers(translation) or (after - before) - named_numbers(source):
        return "numbers_changed", f"numbers {dict(before - after)} became {dict(after - before)}"
    return None


_ENGLISH = re.compile(
    r"\b(?:the|and|is|are|of|let|for|if|given|such|that|with|be|in|on|to|find|from|we|each|when|determine|consider|then|so)\b",
    re.IGNORECASE,
)
_WORDS = re.compile(r"\\(?:text|mbox|textrm|mathrm)\s*\{[^{}]*\}|[\u3400-\u9fff，。、；：]+|[{}\s]|\\[,;:! ]")


def _boxes(text: str) -> Counter[str]:
    return Counter(_WORDS.sub("", box) for box in boxed_answers(text))


def _formulas(text: str) -> Counter[str]:
    """The formulas without words and braces, lists taken apart; a formula that is only a number counts as a number."""
    pieces = (piece for span in math_spans(text) for piece in re.split(r"[,，](?![^(\[{]*[)\]}])", span))
    bare = (_WORDS.sub("", piece).rstrip(".;:。；") for piece in pieces)
    return Counter(piece for piece in bare if piece and not re.fullmatch(r"[\d.]+", piece))
