r"""Whether an answer is one number: what the paper keeps, since such answers can be compared."""

import re

_UNIT = re.compile(
    r"(?<!^)(?:\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}|\\?%|\^\s*\{?\s*\\circ\s*\}?|°|\\degree|\\(?:,|;|!|:| )"
    r"|(?<=\d)\s*(?:square |cubic )?(?:degrees?|dollars?|cents?|feet|foot|inch(?:es)?|units?|cm|mm|km|m|kg|g|miles?"
    r"|hours?|minutes?|seconds?|days?|years?|ways?|sq\.?\s*\w+)(?:\^\{?\d\}?)?"
    r"|元|米|厘米|千米|度|人|个|种|天|小时|分钟|平方米|立方米|千克|克|岁|名)\s*\.?\s*"
    r"(?:\^\s*\{?\d\}?)?"
)
_WHOLE_TEXT = re.compile(r"^\s*\\(?:text|mbox|mathrm|textbf|textrm)\s*\{([^{}]*)\}$")
_NOUN = re.compile(r"^(\s*[-\d.]+)\s+(?!.*\b(?:or|and|to|than|if|when|no|not)\b)[a-z][a-z -]{2,40}$")  # 12 parts
_ASSIGNMENT = re.compile(r"^\s*(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\([^()]*\))?)\s*=\s*")
_COMMANDS = re.compile(
    "[dtc]?frac|sqrt|pi|cdot|times|div|pm|left|right|cos|sin|tan|cot|sec|csc|arc(?:cos|sin|tan)|log|ln|exp|[dt]?binom|overline"
    "|dots|displaystyle|circ|quad"
)
_LETTERS = frozenset(("e", "i", "pi", "sin", "cos", "tan", "cot", "log", "ln", "sqrt", "choose"))
_NOT_ONE = re.compile(
    r"\\(?:pm|infty)(?![a-zA-Z])|[=<>\[\]&;]|\\(?:le|ge|ne|in|cup|begin|to)|(?<!\d),|,(?!\d{3}(?!\d))"
)


def is_number(answer: str) -> bool:
    r"""Whether the answer is one number, exact or decimal, with or without a unit.

    `\frac{2}{3}`, `12\sqrt{35}`, `3^{2007}`, `2\cos 15^\circ`, `40\text{ feet}`, `1112_3`, `84\%`, `x = 1` are;
    pairs, lists, intervals, vectors, expressions with a variable and words are not.
    """
    text = answer.strip().strip("$").strip().removesuffix(".")
    text = re.sub(r"\\(?:\(|\)|\[|\]|!|,|;|:|quad)|\$|\{,\}", lambda m: "," if m[0] == "{,}" else "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = _WHOLE_TEXT.sub(r"\1", text)
    text = _NOUN.sub(r"\1", _UNIT.sub("", text)).replace(r"\$", "")
    text = _ASSIGNMENT.sub("", text)
    text = re.sub(r"(?<=\w)_\{?\w+\}?\s*$", "", text)  # the base of a numeral
    if _NOT_ONE.search(text) or not re.search(r"\d|\\pi|(?<![a-z])[ei](?![a-z])", text):
        return False
    commands = re.findall(r"\\([a-zA-Z]+)", text)
    letters = re.findall(r"[a-zA-Z]+", re.sub(r"\\[a-zA-Z]+", " ", text))
    plain = not re.search(r"[^\x00-\x7fπ√−]", text)
    return plain and all(map(_COMMANDS.fullmatch, commands)) and _LETTERS.issuperset(letters)
