"""Multiple choice: finds the options of a statement, and makes an open question of it where it can do without them."""

import dataclasses
import re

from jaxdistill.curate.text import language
from jaxdistill.records import Problem

_WRAPPER = r"(?:\$?[ \t]*\\?(?:text(?:bf|rm|it)?|extbf|mathrm|mathbf|rm|bf|mbox)\s*\{?\s*)"
# A letter in brackets or before a mark, in dollars and fonts or bare: (A), A), A., $\textbf{(A)}\ $.
_LABEL = re.compile(
    r"(?:(?<=\s)|(?<=^)|(?<=[$.?:)）。？：}\]~])|(?<=quad))\$?[ \t]*"
    + _WRAPPER
    + r"?(?:\((?P<round>[A-H])(?:\)|\s*\\?\s*\\?\s*\))|（(?P<wide>[A-H])）|(?P<plain>[A-H])\s*[.):．、：](?![A-Za-z]))"
    r"(?:\s*\\?\s*\})?(?:\s*\\?\s*\))?",
    re.MULTILINE,
)
_ANSWER_LABEL = re.compile(
    rf"^(?:the correct answer is|the answer is|answer:?|option|答案[是为：:]?|选)?\s*\**\s*{_WRAPPER}?\**"
    r"\(?\s*(?P<letter>[A-H])\s*(?:[.):]\**\s*\}?|\)?\s*\}\s*\)?|(?=\s*\.?\s*$))",
    re.IGNORECASE,
)
_NEEDS_OPTIONS = re.compile(
    r"\b(?:which|what) (?:one |two |ones )?of (?:the |these )|of the following|letter of the correct|closest to"
    r"|the following (?:statements|options|choices|is|are|could|must|can)|(?:must|may) be\s*\("
    r"|which (?:statement|option|choice|answer|graph|figure|pair|equation|expression)\b"
    "|下列|以下|哪[个一]|正确的[是有]|错误的是|不正确",
    re.IGNORECASE,
)
_UNFINISHED = re.compile(r"(?:\b(?:is|are|equals?|be|to|by|of)|[是为])\s*[:：]?$|[:：]$", re.IGNORECASE)
_NO_ANSWER = re.compile(r"none of|all of|both|neither|cannot be|not enough|以上", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The parts of a multiple-choice question."""

    stem: str  # the statement without its options
    options: dict[str, str]  # text by letter


def find_choices(statement: str) -> Choice | None:
    """The options of a statement: three or more labels, A, B, C and so on in order; None where it has none."""
    marks = list(_LABEL.finditer(statement))
    for start in range(len(marks) - 1, -1, -1):  # the last run that starts at A: statements may be labelled too
        if _letter(marks[start]) != "A":
            continue
        run = marks[start : start + 1]
        for mark in marks[start + 1 :]:
            if _letter(mark) == chr(ord(_letter(run[-1])) + 1):
                run.append(mark)
        if len(run) < 3:
            continue
        ends = [mark.start() for mark in run[1:]] + [_end(statement, run[-1].end())]
        options = {_letter(mark): _clean(statement[mark.end() : end]) for mark, end in zip(run, ends, strict=True)}
        if not all(options.values()):
            continue
        stem = statement[: run[0].start()].strip().removesuffix("-").rstrip()  # the options may be a list
        return Choice(stem.removesuffix("$").rstrip() if stem.count("$") % 2 else stem, options)
    return None


def answer_letter(answer: str) -> str | None:
    r"""The option letter that an answer names: `B`, `(C)`, `\textbf{(D)}\ 4`, `The correct answer is B) 1.`"""
    match = _ANSWER_LABEL.match(answer.strip().strip("$").strip())
    return match["letter"].upper() if match else None


def chosen_option(problem: Problem) -> str | None:
    """Text of the option that the answer names, or that it is; None where the problem has no options or it is none."""
    choice = find_choices(problem.problem)
    if choice is None or not problem.answer:
        return None
    letter = answer_letter(problem.answer)
    return choice.options.get(letter) if letter else problem.answer


def open_question(problem: Problem) -> Problem | None:
    """The problem without its options and with the chosen option's text as answer.

    None where the question means nothing without its options, or the answer names none of them.
    """
    choice = find_choices(problem.problem)
    if choice is None or problem.answer is None or _NEEDS_OPTIONS.search(problem.problem):
        return None
    chosen = chosen_option(problem)
    if not chosen or not choice.stem or _NO_ANSWER.search(chosen):
        return None
    stem = re.sub(r"[(（]\s*[)）]\s*[.。]?\s*$", "", choice.stem).strip()
    if _UNFINISHED.search(stem):
        stem += "\n" + ("求空缺的值。" if language(stem) == "zh" else "Find what completes the sentence.")
    return dataclasses.replace(problem, problem=stem, answer=chosen)


def _letter(mark: re.Match[str]) -> str:
    return mark["round"] or mark["wide"] or mark["plain"]


def _end(statement: str, start: int) -> int:
    """Where the last option ends: at a blank line, or where the text ends."""
    blank = re.search(r"\n\s*\n|\nEnter ", statement[start:])
    return start + blank.start() if blank else len(statement)


def _clean(option: str) -> str:
    option = re.sub(r"\\(?:qquad|quad|hspace\{[^}]*\})(?![a-zA-Z])|\\\\\s*$|\n\s*-\s*$", " ", option).strip()
    option = re.sub(r"^(?:\\\s+|\\ |[~}\s])+|(?:\\\s*|~|\s)+$", "", option).strip()
    if option.count("$") % 2:
        option = option.strip("$")
    if option.startswith("$") and option.endswith("$") and option.count("$") == 2:
        option = option[1:-1]
    if option.startswith("\\(") and option.endswith("\\)"):
        option = option[2:-2]
    return option.strip().rstrip(".;,。；").strip()
