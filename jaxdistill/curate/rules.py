"""The curation rules: each returns why it drops a problem, or None. English and Chinese.

A rule sees the problem after its options, if it had any and could do without, were taken away.
"""

import re
from collections.abc import Callable

from jaxdistill.curate.choices import find_choices
from jaxdistill.curate.numerical import is_number
from jaxdistill.curate.text import DRAWING, math_spans, numbers, without_drawings
from jaxdistill.records import Problem

Rule = Callable[[Problem], str | None]


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


RULES: dict[str, Rule] = {}  # by the reason of its receipts, in the order they are tried


def rule(function: Rule) -> Rule:
    """Registers a rule under its name."""
    RULES[function.__name__] = function
    return function


def first_reason(problem: Problem, names: tuple[str, ...]) -> tuple[str, str] | None:
    """The first of the rules that drops the problem, and what it says."""
    for name in names:
        if detail := RULES[name](problem):
            return name, detail
    return None


_NOTHING = frozenset(("none", "n/a", "null", "-", "?", "proof", "qed", "无", "略", "证明略", "见解析"))


@rule
def no_answer(problem: Problem) -> str | None:
    """No labelled answer: nothing could be verified."""
    answer = (problem.answer or "").strip().strip("$").strip()
    if not answer or answer.lower() in _NOTHING:
        return f"the answer is {problem.answer!r}"
    return None


_IMAGE = re.compile(
    r"!\[[^\]]*\]\([^)]*\)|\\includegraphics|<img\b|\b\S+\.(?:png|jpe?g|gif|svg)\b|\[图\]|<image>", re.IGNORECASE
)
_PICTURE = "(?:figure|diagram|picture(?! frame)|sketch(?! the)|illustration|image(?! of)|pie chart|bar graph|histogram)"
_FIGURE = _any(
    r"\b(?:in|from|by|see|consider|using|of) (?:the|this) (?:\w+ )?(?:figure|diagram)s?\b",
    rf"\b{_PICTURE}s? (?:is |are )?(?:shown|given|pictured|drawn|above|below|here|shows?|represents?)\b",
    r"\b(?:shown|pictured|depicted|illustrated|graphed|displayed) (?:below|above|here|at (?:the )?(?:left|right))",
    rf"\b(?:shown|pictured|depicted|illustrated|displayed) in the {_PICTURE}",
    r"\b(?:as|is) (?:shown|pictured|depicted|illustrated)\b(?! that| to)",
    r"\bshaded (?:\w+ )?(?:region|area|part|portion|square|triangle|circle)",
    r"\b(?:this|the) (?:pie chart|histogram|bar graph)\b",
)
_BESIDE_A_DRAWING = _any(
    rf"\b(?:below|above|shown|pictured|displayed|shaded|drawn segments|graphed|graph shows|{_PICTURE})\b"
)
_FIGURE_ZH = re.compile("如[下右左上]?图|[下右左上]图|图中|图示|见图|图\\s*\\d|由图|阴影")
_CREDIT = re.compile(
    r"^[_*]*Diagrams?\b(?: by .*)?[_*:]*\s*$", re.MULTILINE
)  # the heading of a drawing, not the statement's
_ASIDE = re.compile(r",? as (?:shown|pictured|drawn|depicted|illustrated)(?: (?:below|above|here))?(?=[.,;])")
_QUOTED = re.compile(r"\"([^\"]*)\"")  # what an Asymptote drawing writes beside its lines


@rule
def image(problem: Problem) -> str | None:
    """Depends on an image: a picture, words that point at one, or a drawing with facts that the words leave out."""
    if match := _IMAGE.search(problem.problem):
        return f"holds an image: {match[0][:60]!r}"
    words = without_drawings(problem.problem)
    drawn = len(words) < len(problem.problem)
    facts = [fact for label in _drawn_labels(problem.problem) for fact in numbers(label)]
    if missing := sorted(set(facts) - set(numbers(words))):
        return f"only the drawing says {', '.join(missing[:5])}"
    words = _CREDIT.sub("", words)
    if drawn and numbers(words):  # which say all that the drawing says in numbers: "as shown" only points at it
        words = _ASIDE.sub("", words)
    match = _FIGURE_ZH.search(words) or (_BESIDE_A_DRAWING if drawn else _FIGURE).search(words)
    if match and (drawn or not _TABLE.search(words)):
        return f"refers to a figure: {match[0]!r}"
    return None


_TABLE = re.compile(r"\\begin\{(?:tabular|array|aligned|align\*?|[pbv]?matrix)\}|\|\s*-{2,}")  # is itself what is shown


def _drawn_labels(statement: str) -> list[str]:
    return [label for drawing in DRAWING.finditer(statement) for label in _QUOTED.findall(drawing[0])]


_PROVE = _any(
    r"\b(?:prove|disprove|show) (?:that|the|if|by|there|for|it)\b",
    r"(?:^|[.,;:)\]$]\s*|\band )\s*(?:prove|show that)\b",
    r"\bprove\b\s*[:,]?",
    r"\bshow\b[^.?!]{0,80}\b(?:that|is|are|has)\b",
    "证明|求证",
)
_WITH_PROOF = _any(r"\bwith proof\b|\band prove (?:it|your|that)\b|\bprove your\b|\bshow (?:that )?your\b", "并证明")
_ASKS = _any(
    r"\b(?:find|determine|compute|calculate|evaluate|what (?:is|are|was)|how many|how much|provide)\b(?! when| where)",
    "求(?!证)|多少|计算",
)


@rule
def proof(problem: Problem) -> str | None:
    """Asks for a proof and for no value."""
    match = _PROVE.search(problem.problem)
    if match is None or _WITH_PROOF.search(problem.problem):
        return None
    return None if _ASKS.search(problem.problem) else f"asks for a proof: {match[0].strip()!r}"


@rule
def multiple_choice(problem: Problem) -> str | None:
    """Options that the question cannot do without; the others were taken away before."""
    choice = find_choices(problem.problem)
    return f"options {', '.join(choice.options)}" if choice else None


@rule
def not_numerical(problem: Problem) -> str | None:
    """The answer is not one number."""
    answer = problem.answer or ""
    return None if is_number(answer) else f"the answer is {answer[:80]!r}"


_REQUEST = _any(
    "[?？]",
    r"\b(?:find|what|determine|compute|evaluate|calculate|how (?:many|much|far|long|old)|simplify|solve|expand)\b",
    r"\b(?:factor|express|prove|show|which|write|rewrite|convert|rationalize|round|estimate|enter|count|give|subtract)\b",
    r"\b(?:divide|multiply|sum|completes|can be (?:written|expressed)|where|if|provide|cut)\b",
    "[求问]|多少|几|计算|化简|解[方不]|证明|写出|判断|则|等于",
)
# A sentence ends with a mark; formulas, brackets and notes may end one too, a word of prose or a comma may not.
_BROKEN_END = re.compile(r"(?:(?<![\\{_^])\b[a-zA-Z]{2,}|[,;、，；(\[{\\=+/<]|[和与的是若设])\s*$")
_NOTE = re.compile(r"(?:\n\s*(?:~.*|Diagrams?:?|Note:.*|Credit.*|by .*))+\s*$|\s+[~-]\s?\w+\s*$")  # of who typed it in
_ELSEWHERE = _any(
    r"\b(?:previous|preceding|last) (?:problem|question|exercise|part)\b|\bas in (?:problem|exercise|part)\b",
    r"\b(?:problem|exercise|question) \d+(?:\.\d+)* (?:above|of the)",
    "上一?题|前一题",
)


_SEGMENT = re.compile(r"(?<![A-Za-z\\])[A-Z]{2}(?![A-Za-z0-9])")
_POINT = re.compile(r"(?<![A-Za-z\\])(?:[A-Z](?![A-Za-z])|[A-Z]{3,}(?![a-z]))")
_INTRODUCES = _any(  # in a sentence with such a word, or with a length, a two-letter name may stand for the first time
    r"\b(?:segment|line|ray|arc|chord|diameter|radi(?:us|i)|side|base|leg|edge|hypotenuse|diagonal|altitude|median)s?\b"
    r"|\b(?:bisector|tangent|secant|distance|height|length|wall|road|path|point|midpoint|angle|let|axis|axes)(?:s|es)?\b|[=∥]"
)


def _unintroduced(words: str) -> list[str]:
    """Points that are named only as ends of segments, in sentences that do not introduce these: told of elsewhere."""
    formulas = " ".join(math_spans(words))
    ends = {letter for name in _SEGMENT.findall(formulas) for letter in name}
    told = {letter for name in _POINT.findall(words) for letter in name}
    for sentence in re.split(r"(?<=[.?!])\s", words):
        if _INTRODUCES.search(sentence):
            told |= {letter for name in _SEGMENT.findall(sentence) for letter in name}
    return sorted(ends - told)


@rule
def incomplete(problem: Problem) -> str | None:
    """Cut off, asks for nothing, or asks about another problem or about points that it does not introduce."""
    words = _NOTE.sub("", without_drawings(problem.problem).strip()).strip()
    if len(words) < 8:
        return f"{len(words)} characters"
    if match := _ELSEWHERE.search(words):
        return f"refers to another problem: {match[0]!r}"
    if re.sub(r"\\\\|\\\$", "", words).count("$") % 2:
        return "a formula never ends (an odd number of dollars)"
    if words.count("\\begin{") != words.count("\\end{") or words.count("\\[") > words.count("\\]"):
        return "a formula never ends"
    if len(points := _unintroduced(words)) > 1 and words == problem.problem.strip():  # no drawing that has them
        return f"nothing introduces the points {', '.join(points)}"
    match = _BROKEN_END.search(words)
    if match and find_choices(words) is None:  # an option may end with any word
        return f"ends with {match[0].strip()!r}"
    if not _REQUEST.search(words):
        return "asks for nothing"
    return None
