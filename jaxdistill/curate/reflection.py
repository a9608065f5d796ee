"""Scores how much a chain reflects: markers per 1,000 tokens, and backtracking that changed a result."""

import dataclasses
import re
from collections.abc import Iterable

from jaxdistill.curate.text import tokens

# Each alternative starts with a letter, after a word boundary where it has one: `_any` looks at these first.
# The reference implementation looks for these; the Chinese ones are their translations.
MARKERS = {
    "wait": (r"\bwait\b", "等等", "等一下", "且慢"),
    "verify": (r"\bverif(?:y|ies|ied|ying|ication)\b", "验证"),
    "check": (
        *(rf"\b{word}(?:s|ed|ing)?\b" for word in ("check", "recheck", "double[- ]check")),
        *("检查", "检验", "核对"),
    ),
    "identify": (r"\bidentif(?:y|ies|ied|ying)\b", "识别", "找出"),
    "summarize": (r"\bsummari[sz](?:e|es|ed|ing)\b", "总结", "综上"),
    "note that": (r"\bnote that\b", "注意"),
    "notice that": (r"\bnotice that\b", "注意到", "发现"),
    "recall that": (r"\brecall that\b", "回忆", "回想", "记得"),
}
_CORRECTIONS = (
    *(
        rf"\b{words}\b"
        for words in (
            *("wait", "actually", "hold on", "hmm", "oops", "mistake", "wrong", "incorrect", "not (?:right|correct)"),
            *("should be", "instead", r"let me (?:re\w+|check again|try again)"),
            *(r"re-?(?:check|examin|calculat|consider|comput)\w*", r"double[- ]check\w*", "on second thought"),
        )
    ),
    *("等等", "等一下", "不对", "错了", "有误", "重新", "其实", "实际上", "应该是", "更正"),
)


def _any(alternatives: Iterable[str]) -> re.Pattern[str]:
    """Finds what any of the alternatives finds, and sooner: most characters start none of them."""
    alternatives = tuple(alternatives)
    letters = sorted({alternative.removeprefix(r"\b")[0] for alternative in alternatives})
    assert all(map(str.isalpha, letters)), letters
    return re.compile(f"(?=[{''.join(letters)}])(?:{'|'.join(alternatives)})", re.IGNORECASE)


_MARKER = _any(alternative for alternatives in MARKERS.values() for alternative in alternatives)
_CORRECTION = _any(_CORRECTIONS)
_VALUE = re.compile(
    r"\s*(?:=|\bis\b|等于|[为是])\s*\$?\\?\(?\s*(?:\\boxed\{)?(?P<value>-?\d+(?:\.\d+)?(?:/\d+)?)"
    r"(?!\.?\d)(?!\s*(?:[-+*/^×·]|\\cdot|\\times))(?![a-zA-Z(])"
)
_NAME = re.compile(  # what stands before: x, a_{1}, f(2), m + n, 3 * 4
    r"(?:\d+(?:\.\d+)?(?:\s*(?:[-+*/×·]|\\cdot|\\times)\s*\d+(?:\.\d+)?)+|(?:[a-zA-Z]+\s*[+*-]\s*)+[a-zA-Z]+|"
    r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\([^()=]{1,12}\))?)$"
)
_NAME_CHARACTERS = 40
_FILLERS = frozenset(
    ("it", "that", "this", "answer", "which", "there", "he", "she", "what", "so", "value", "result", "one", "and")
)


@dataclasses.dataclass(frozen=True)
class Reflection:
    """How much a text reflects."""

    tokens: int
    markers: int
    backtracks: int  # results that were stated again with another value, after words of correction

    def score(self, backtrack_weight: float) -> float:
        """Markers and weighted backtracks per 1,000 tokens."""
        return 1000 * (self.markers + backtrack_weight * self.backtracks) / max(1, self.tokens)


def count_markers(text: str) -> int:
    """How often the text says one of the markers."""
    return len(_MARKER.findall(text))


def reflect(text: str) -> Reflection:
    """Counts markers and backtracking in a chain."""
    return Reflection(len(tokens(text)), count_markers(text), len(backtracks(text)))


def backtracks(text: str) -> list[tuple[str, str, str]]:
    """(name, earlier value, later value) of each result that changes after words of correction.

    A name that takes several values without such words is a variable of cases ("if x = 2 ... if x = 3"), no correction.
    A sign of backtracking, not proof of it: cases tried within 400 characters after such words count too.
    """
    corrections = [match.start() for match in _CORRECTION.finditer(text)]
    values: dict[str, tuple[str, int]] = {}
    found, next_correction = [], 0
    last_correction = -1
    for match in _VALUE.finditer(text):
        before = _NAME.search(text[max(0, match.start() - _NAME_CHARACTERS) : match.start()])
        if before is None:
            continue
        while next_correction < len(corrections) and corrections[next_correction] < match.start():
            last_correction = corrections[next_correction]
            next_correction += 1
        name, value = re.sub(r"[\s\\]+", "", before[0]), match["value"]
        if name.lower() in _FILLERS:
            continue
        earlier = values.get(name)
        if earlier and earlier[0] != value and earlier[1] < last_correction and match.start() - last_correction < 400:
            found.append((name, earlier[0], value))
        values[name] = (value, match.start())
    return found
